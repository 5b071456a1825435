"""The `convert` stage: replace a model's classical activations by learnable ones, fitted on the inputs they really see.

Parameters and flow; the mathematics is in `polytrope.ops.interpolate`, the work in `polytrope.pipeline.stages.convert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.lineage import read_lineage, write_lineage
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage
from polytrope.pipeline.stages.convert.parameters import ConvertParameters

_RATED_SAMPLES = 8


def check(parameters: ConvertParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse to convert a model whose activations are learnable already."""
    model = getattr(upstream.get("model"), "model", None)
    activation = getattr(model, "activation", None)
    if isinstance(activation, dict) and activation.get("name") == parameters.family:
        raise UserError(
            f"convert: the model was trained with `{parameters.family}` activations already",
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
    import torch

    from polytrope.models.calibration import calibrate
    from polytrope.models.conversion import FitOptions
    from polytrope.models.formats import read_model
    from polytrope.models.surgery import find_activations
    from polytrope.pipeline.stages.convert.calibration_data import forward
    from polytrope.pipeline.stages.convert.work import fit_model, save, write_tables

    torch.set_num_threads(parameters.threads)
    options = FitOptions(
        parameters.family,
        parameters.degree,
        parameters.target_error,
        parameters.coverage,
        parameters.derivative_weight,
        tuple(parameters.constraints),
    )
    try:
        network = read_model(model.path)
        batches = calibration_batches(network, model.path, dataset.path, parameters)
        samples = sum(len(next(iter(batch.values()))) for batch in batches)
        found = find_activations(
            network,
            types=parameters.types,
            include=parameters.include,
            exclude=parameters.exclude,
            layers=parameters.layers,
        )
        context.progress(1, 3, f"calibrating {len(found)} activations on {samples} samples")
        if parameters.ray_tasks:
            from polytrope.pipeline.stages.convert.parallel_calibration import calibrate_on_ray

            names = [activation.name for activation in found]
            calibrations = calibrate_on_ray(model.path, {}, names, batches, parameters.ray_tasks, None)
        else:
            calibrations = calibrate(network, found, batches, forward)
        context.progress(2, 3, f"fitting degree {parameters.degree}")
        rated = {name: tensor[:_RATED_SAMPLES] for name, tensor in batches[0].items()}
        result = fit_model(network, found, calibrations, options, rated)
        traced = rated if parameters.onnx else None
        save(network, result, context.output, model.path, parameters.format or "as_read", traced)
        if parameters.tables:
            chosen = {entry.name: network.get_submodule(entry.name) for entry in result.conversions}
            write_tables(context.output, chosen, calibrations)
    except ValueError as error:
        raise UserError(f"convert: {error}") from error
    write_lineage(context.output, read_lineage(model.path).then(model.stage, model.digest))
    context.log_artifact("conversion.json")
    if parameters.page:
        from polytrope.pipeline.stages.convert.conversion_page import write_page

        write_page(context.output, result.content, f"Conversion to {parameters.family}")
        context.log_artifact("conversion.html")
    context.log_dataset("calibration", dataset.digest, str(dataset.path), {"samples": samples})
    if parameters.register_as:
        context.log_model(".", name=parameters.register_as, alias=parameters.register_alias)
    return result.metrics()


def calibration_batches(network: Any, model: Path, dataset: Path, parameters: ConvertParameters) -> list[Any]:
    """Batches of the data set, of whatever kind it is."""
    import numpy as np
    import torch

    from polytrope.models.convnext import normalise_images
    from polytrope.pipeline.data.description import read_dataset
    from polytrope.pipeline.data.order import sample_indices
    from polytrope.pipeline.data.reader import open_split
    from polytrope.pipeline.data.tokenization import same_tokenizer
    from polytrope.pipeline.stages.convert import calibration_data as data

    if (dataset / "calibration.npy").exists():
        return data.array_batches(dataset / "calibration.npy", parameters.batch_size, parameters.calibration_samples)
    if (dataset / "calibration.txt").exists():
        texts = data.read_texts([dataset / "calibration.txt"])[: parameters.calibration_samples]
        tokenizer = data.tokenizer_of(model)
        if tokenizer is None:
            raise UserError("convert: the model has no tokenizer.json for the calibration texts")
        longest = data.longest_input(network, model)
        keywords = not hasattr(network, "architecture")
        return data.text_batches(tokenizer, texts, parameters.batch_size, longest, keywords)
    reader = open_split(dataset, "train")
    indices = sample_indices(0, 0, min(parameters.calibration_samples, len(reader)), len(reader))
    parts = np.array_split(indices, -(-len(indices) // parameters.batch_size))
    if read_dataset(dataset).kind == "images":
        pixels = (torch.from_numpy(reader.images(part)[0]).float() / 255.0 for part in parts)
        return [{"pixel_values": normalise_images(images)} for images in pixels]
    own, other = model / "tokenizer.json", dataset / "tokenizer.json"
    if own.exists() and other.exists() and not same_tokenizer(own, other):
        raise UserError(
            "convert: the model's tokenizer is not the one of the dataset, so its tokens would be other words to it",
            "calibrate on a dataset that was sharded with the model's tokenizer",
        )
    return [{"input_ids": torch.from_numpy(reader.samples(part)[:, :-1].astype(np.int64))} for part in parts]
