"""The `convert` stage: replace a model's classical activations by learnable ones, fitted on the inputs they really see.

Parameters and flow; the mathematics is in `polytrope.ops.interpolate`, the work in `polytrope.pipeline.stages.convert`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS, activation_configs
from polytrope.pipeline.data.lineage import read_lineage, write_lineage
from polytrope.pipeline.data.promised import PromisedModel, expect, expect_data, refuse_misfit
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, stage
from polytrope.pipeline.stages.convert.parameters import ConvertParameters


def promise(parameters: ConvertParameters, upstream: Mapping[str, Any], _resources: Resources) -> PromisedModel | None:
    """The converted model; refuses data or layers that the model cannot have, and activations that are so already."""
    model = expect("inputs.model", upstream["model"], PromisedModel)
    data = expect_data("inputs.dataset", upstream["dataset"])
    refuse_misfit("inputs.dataset", model, data)
    if model is None:
        return None
    config = make_config(MODEL_KINDS[model.architecture].config, model.settings)
    layers, numbers = parameters.layer_range(), config.layer_numbers()
    if layers is not None and (layers[0] >= numbers or sys.maxsize > layers[1] >= numbers):
        raise UserError(
            f"layers: {parameters.layers} goes beyond the last layer: the model has {numbers}, counted from 0",
            f"expected numbers from 0 to {numbers - 1}",
        )
    blocks = len(config.activation_widths())
    if {_name(entry) for entry in activation_configs(config.activation, blocks)} == {parameters.family}:
        raise UserError(
            f"family: the model was trained with `{parameters.family}` activations already",
            "convert a model with a classical activation (gelu, gelu_tanh, relu, silu, tanh)",
        )
    # which activations it has then depends on what is found in it
    return replace(model, settings={name: value for name, value in model.settings.items() if name != "activation"})


def _name(activation: Any) -> str:
    name = str(activation.get("name") if isinstance(activation, dict) else activation)
    return name.rstrip("0123456789")


@stage(
    promise=promise,
)
def convert(
    context: StageContext, model: Artifact, dataset: Artifact, parameters: ConvertParameters
) -> dict[str, float]:
    """Calibrate on training samples, fit every layer, write the converted model and `conversion.json`.

    `model`: of a train stage, or a Hugging Face directory. `dataset`: of a shard or shard_images stage, or a
    directory with `calibration.txt` (one text per line) or `calibration.npy` (images or token ids).
    """
    from polytrope.pipeline.stages.convert.calibration_data import dataset_batches
    from polytrope.pipeline.stages.convert.work import Source, convert_model

    source = Source(
        model.path,
        lambda network: dataset_batches(network, model.path, dataset.path, parameters),
        title=f"Conversion to {parameters.family}",
    )
    try:
        outcome = convert_model(source, parameters, context.output, lambda step, text: context.progress(step, 3, text))
    except ValueError as error:
        raise UserError(f"convert: {error}") from error
    if outcome.onnx_failure is not None:
        raise UserError(f"convert: model.onnx cannot be written: {outcome.onnx_failure}", "leave out `onnx`")
    assert outcome.record is not None  # there is an output
    write_lineage(context.output, read_lineage(model.path).then(model.stage, model.digest))
    context.log_artifact("conversion.json")
    if parameters.page:
        context.log_artifact("conversion.html")
    context.log_dataset("calibration", dataset.digest, str(dataset.path), {"samples": outcome.samples})
    if parameters.register_as:
        context.log_model(".", name=parameters.register_as, alias=parameters.register_alias)
    return outcome.record.metrics()
