"""The `convert` stage: replace a model's classical activations by learnable ones, fitted on the inputs they really see.

Parameters and flow; the mathematics is in `polytrope.ops.interpolate`, the work in `polytrope.pipeline.stages.convert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polytrope.pipeline.data.lineage import read_lineage, write_lineage
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage
from polytrope.pipeline.stages.convert.parameters import ConvertParameters


def check(parameters: ConvertParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse to convert a model whose activations are learnable already."""
    model = getattr(upstream.get("model"), "model", None)
    activation = getattr(model, "activation", None)
    if isinstance(activation, dict) and activation.get("name") == parameters.replacement():
        raise UserError(
            f"convert: the model was trained with `{parameters.replacement()}` activations already",
            "convert a model with a classical activation (gelu, gelu_tanh, relu, silu, tanh)",
        )


@stage(
    check=check,
)
def convert(
    context: StageContext, model: Artifact, dataset: Artifact, parameters: ConvertParameters
) -> dict[str, float]:
    """Calibrate on training samples, fit every layer, write the converted model and `conversion.json`.

    `model`: of a train stage, or a Hugging Face directory. `dataset`: of a shard or shard_images stage, or a
    directory with `calibration.txt` (one text per line) or `calibration.npy` (images or token ids).
    """
    from polytrope.models.domains import describe_outside
    from polytrope.pipeline.stages.convert.calibration_data import dataset_batches
    from polytrope.pipeline.stages.convert.polynomials import outside_of_record
    from polytrope.pipeline.stages.convert.work import Source, convert_model

    source = Source(
        model.path,
        lambda network: dataset_batches(network, model.path, dataset.path, parameters),
        title=f"Conversion to {parameters.replacement()}",
    )
    try:
        outcome = convert_model(source, parameters, context.output, lambda step, text: context.progress(step, 3, text))
    except ValueError as error:
        raise UserError(f"convert: {error}") from error
    if outcome.onnx_failure is not None:
        raise UserError(f"convert: model.onnx cannot be written: {outcome.onnx_failure}", "leave out `onnx`")
    assert outcome.record is not None  # there is an output
    outside = None if outcome.record.polynomial is None else describe_outside(outside_of_record(outcome.record))
    if outside is not None:
        context.message(outside)
    write_lineage(context.output, read_lineage(model.path).then(model.stage, model.digest))
    context.log_artifact("conversion.json")
    if parameters.page:
        context.log_artifact("conversion.html")
    context.log_dataset("calibration", dataset.digest, str(dataset.path), {"samples": outcome.samples})
    if parameters.register_as:
        context.log_model(".", name=parameters.register_as, alias=parameters.register_alias)
    return outcome.record.metrics()
