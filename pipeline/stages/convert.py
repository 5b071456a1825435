"""The `convert` stage: replace a model's classical activations by learnable ones, fitted on the inputs they really see.

Parameters and flow; the mathematics is in `polytrope.ops.interpolate`, the work in `polytrope.pipeline.conversion`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage

_RATED_SAMPLES = 8


class ConvertParameters(BaseModel):
    """What replaces the activations, and how it is fitted."""

    model_config = ConfigDict(extra="forbid")

    family: Literal[
        "hermite", "chebyshev", "legendre", "fourier", "tropical", "tropical_rational", "rational", "polyrelu"
    ] = Field("hermite", description="family of the new activations")
    degree: int = Field(8, ge=1, le=16, description="degree; with target_error the highest one tried")
    target_error: float | None = Field(
        None,
        gt=0,
        description="smallest degree per layer with at most this rms error, relative to the activation's rms",
    )
    coverage: float | None = Field(
        None,
        gt=0.5,
        le=1,
        description="share of a layer's inputs inside the fitted interval, tangent lines outside; "
        "null: the interval of the smallest error over all inputs",
    )
    derivative_weight: float = Field(0.01, ge=0, description="weight of the slope's error against the value's")
    constraints: list[Literal["ends", "end_values", "origin"]] = Field(
        default_factory=list, description="what holds exactly: value and slope at the ends, values there, F(0) = f(0)"
    )
    include: list[str] = Field(default_factory=list, description="patterns of module names to convert; default: all")
    exclude: list[str] = Field(default_factory=list, description="patterns of module names to leave as they are")
    types: list[str] = Field(default_factory=list, description="class names to convert; default: all known activations")
    layers: tuple[int, int] | None = Field(
        None, description="first and last layer to convert, from 0: the first number in the module's name"
    )
    calibration_samples: int = Field(256, ge=1, description="training samples that measure the layers' inputs")
    batch_size: int = Field(32, ge=1, description="samples per forward pass of the calibration")
    threads: int = Field(1, ge=1, description="CPU threads; part of the result's identity")
    ray_tasks: int = Field(
        0,
        ge=0,
        description="calibrate in that many Ray tasks, on the workflow's cluster; the same counts for any number",
    )
    format: Literal["own", "huggingface"] | None = Field(
        None,
        description="of the output; default: own for GPT-2 and ConvNeXt, which other stages read, else huggingface",
    )
    onnx: bool = Field(False, description="write model.onnx as well, checked with onnxruntime")
    tables: bool = Field(False, description="write every new activation as a table, tables/NAME.json")
    page: bool = Field(False, description="write conversion.html and plots/ as well")
    register_as: str | None = Field(None, description="name in MLflow's model registry")
    register_alias: str = Field("converted", description="alias of the registered version")


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
    code=(
        "polytrope.models",
        "polytrope.ops",
        "polytrope.pipeline.conversion",
        "polytrope.pipeline.reader",
        "polytrope.pipeline.order",
    ),
)
def convert(
    context: StageContext, model: Artifact, dataset: Artifact, parameters: ConvertParameters
) -> dict[str, float]:
    """Calibrate on training samples, fit every layer, write the converted model and `conversion.json`.

    `model`: of a train stage, or a Hugging Face directory. `dataset`: of a shard stage, or a directory with
    `calibration.txt` (one text per line) or `calibration.npy` (images or token ids).
    """
    import torch

    from polytrope.models.calibration import calibrate
    from polytrope.models.conversion import FitOptions
    from polytrope.models.formats import read_model
    from polytrope.models.surgery import find_activations
    from polytrope.pipeline.conversion.data import forward
    from polytrope.pipeline.conversion.work import fit_model, save, write_tables

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
            from polytrope.pipeline.conversion.parallel import calibrate_on_ray

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
    context.log_artifact("conversion.json")
    if parameters.page:
        from polytrope.pipeline.conversion.page import write_page

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

    from polytrope.pipeline.conversion import data
    from polytrope.pipeline.order import sample_indices
    from polytrope.pipeline.reader import open_split

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
    return [
        {"input_ids": torch.from_numpy(reader.samples(part)[:, :-1].astype(np.int64))}
        for part in np.array_split(indices, -(-len(indices) // parameters.batch_size))
    ]
