"""The conversion of a model, for the stage and the command alike: read, calibrate, fit, rate, replace, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polytrope.models import ARCHITECTURES, conversion, find_architecture
from polytrope.models.calibration import Calibration, calibrate
from polytrope.models.calls import Call
from polytrope.models.conversion import FitOptions, PolynomialOnly
from polytrope.models.formats import read_model
from polytrope.models.selection import select_activations
from polytrope.models.surgery import Activation, describe_activations
from polytrope.pipeline.data.conversion_file import ConversionRecord, write_conversion
from polytrope.pipeline.stages.convert.calibration_data import Batch, forward
from polytrope.pipeline.stages.convert.conversion_record import record
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.stages.convert.polynomials import hold_out, with_polynomials

_RATED_SAMPLES = 8


@dataclass(frozen=True)
class Source:
    """A model to convert, and what to calibrate it on.

    Args:
        path: a directory or file that `read_model` reads.
        batches: reads the calibration data for the model.
        title: of the page.
        config: fields of the model's configuration that its file does not tell.
        ray_address: of the cluster for `ray_tasks`; None: the one at hand, or this machine.
    """

    path: Path
    batches: Callable[[nn.Module], list[Batch]]
    title: str
    config: Mapping[str, Any] = field(default_factory=dict)
    ray_address: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a model.

    Args:
        record: of the conversion; None where nothing was converted.
        samples: of the calibration.
        deviation: of onnxruntime's outputs from the model's, where `model.onnx` was written.
        onnx_failure: why it was not; everything else is there.
        rest_of_graph: operators in `model.onnx` that are no sums and products, none of them of a polynomial; None where
            the model has no polynomials without tangents.
    """

    record: ConversionRecord | None
    samples: int
    deviation: float | None = None
    onnx_failure: str | None = None
    rest_of_graph: dict[str, int] | None = None


def convert_model(
    source: Source, parameters: ConvertParameters, output: Path | None, tell: Callable[[int, str], None]
) -> Outcome:
    """Replace the activations of a model, and write it to the empty directory `output`.

    Args:
        output: gets the model, `conversion.json`, and what else the parameters ask for; None: nothing is replaced
            or written.
        tell: is told what begins, by the number of the step, of 3.

    Raises:
        ValueError: a model or data that cannot be read, nothing to convert, a layer that cannot be fitted or whose
            conversion has no effect, a format the model cannot have.
    """
    torch.set_num_threads(parameters.threads)
    model = read_model(source.path, source.config or None)
    batches = source.batches(model)
    held_out: list[Batch] = []
    if parameters.polynomial_only:
        batches, held_out = hold_out(batches)
    samples = sum(map(_size, batches))
    tell(0, f"looking for activations on {samples} samples")
    selection = select_activations(
        model,
        batches,
        forward,
        types=parameters.types,
        include=parameters.include,
        exclude=parameters.exclude,
        layers=parameters.layer_range(),
    )
    found = selection.activations
    tell(1, f"calibrating {len(found)} activations on {samples} samples")
    calibrations = _calibrate(source, parameters, model, found, batches, selection.calls)
    options = FitOptions(
        parameters.replacement(),
        parameters.highest_degree(),
        parameters.target_error,
        parameters.coverage,
        parameters.derivative_weight,
        tuple(parameters.constraints),
        PolynomialOnly(parameters.largest_depth(), parameters.domain, parameters.domain_margin)
        if parameters.polynomial_only
        else None,
    )
    tell(2, f"fitting {options.title()}")
    fits = conversion.fit_layers(found, calibrations, options)
    rated = _rated(batches)
    made = record(fits, options, conversion.layer_costs(model, fits, rated, forward), selection.left)
    if output is None and not held_out:
        return Outcome(made, samples)
    conversion.apply(model, fits)
    conversion.prove(model, [entry.name for entry in fits], rated, forward)
    if held_out:
        made = with_polynomials(made, model, held_out, forward)
    if output is None:
        return Outcome(made, samples)
    _write_model(model, source.path, parameters, output)
    write_conversion(output, made)
    if parameters.page:
        from polytrope.pipeline.stages.convert.conversion_page import write_page

        write_page(output, made, source.title)
    return _write_extras(model, parameters, output, Outcome(made, samples), calibrations, rated)


def export_model(source: Source, parameters: ConvertParameters, output: Path) -> Outcome:
    """Write a model whose activations are learned already to the empty directory `output`; nothing is replaced.

    Raises:
        ValueError: as of `convert_model`.
    """
    torch.set_num_threads(parameters.threads)
    model = read_model(source.path, source.config or None)
    _write_model(model, source.path, parameters, output)
    if not (parameters.onnx or parameters.tables):
        return Outcome(None, 0)
    batches = source.batches(model)
    learned = [Activation(name, model.get_submodule(name)) for name in describe_activations(model)]
    calibrations = _calibrate(source, parameters, model, learned, batches)
    outcome = Outcome(None, sum(map(_size, batches)))
    return _write_extras(model, parameters, output, outcome, calibrations, _rated(batches))


def _calibrate(
    source: Source,
    parameters: ConvertParameters,
    model: nn.Module,
    activations: Sequence[Activation],
    batches: Sequence[Batch],
    calls: Sequence[Call] = (),
) -> dict[str, Calibration]:
    """The inputs of the activations; `calls`: those that were made modules, which Ray tasks do again."""
    if not parameters.ray_tasks:
        return calibrate(model, activations, batches, forward)
    from polytrope.pipeline.stages.convert.parallel_calibration import calibrate_on_ray

    names = [activation.name for activation in activations]
    tasks, address = parameters.ray_tasks, source.ray_address
    return calibrate_on_ray(source.path, source.config, names, batches, tasks, address, calls)


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _rated(batches: Sequence[Batch]) -> Batch:
    """What layers are rated and graphs are traced on: the start of the batch with the most numbers in it."""
    largest = max(batches, key=lambda batch: next(iter(batch.values())).numel())
    return {name: tensor[:_RATED_SAMPLES] for name, tensor in largest.items()}


def _is_ours(model: nn.Module) -> bool:
    return hasattr(model, "architecture")


def _write_model(model: nn.Module, source: Path, parameters: ConvertParameters, output: Path) -> None:
    """The model with what lies beside it in the directory `source`."""
    if parameters.format == "own" and not _is_ours(model):
        titles = " and ".join(find_architecture(name).title for name in ARCHITECTURES)
        raise ValueError(f"format: own is for {titles}; this architecture is written as huggingface")
    beside = source if source.is_dir() else None
    if _is_ours(model) and parameters.format != "huggingface":
        from polytrope.models.checkpoint import save_model

        save_model(output, model, tokenizer=beside)
        return
    from polytrope.models.formats.huggingface import save_huggingface

    save_huggingface(output, model, describe_activations(model), beside)


def _write_extras(
    model: nn.Module,
    parameters: ConvertParameters,
    output: Path,
    outcome: Outcome,
    calibrations: Mapping[str, Calibration],
    traced: Batch,
) -> Outcome:
    """Tables and ONNX. No failure of ONNX takes away what is there already: the outcome says it."""
    if parameters.tables:
        _write_tables(output, model, calibrations)
    if not parameters.onnx:
        return outcome
    from polytrope.models.formats.onnx import save_onnx
    from polytrope.models.formats.onnx_operators import check_polynomial

    path = output / "model.onnx"
    try:
        deviation = save_onnx(path, model, list(traced.values()), None if _is_ours(model) else list(traced))
        rest = check_polynomial(path, model)
    except Exception as error:  # the exporter runs the model's own code, which raises anything
        path.unlink(missing_ok=True)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        failure = kind + str(error).removeprefix(f"{path}: ")
        return Outcome(outcome.record, outcome.samples, onnx_failure=failure)
    return Outcome(outcome.record, outcome.samples, deviation, rest_of_graph=rest)


def _write_tables(output: Path, model: nn.Module, calibrations: Mapping[str, Calibration]) -> None:
    """`tables/NAME.json` for every activation, over the range of the inputs it was seen to receive."""
    from polytrope.models.formats.plain import save_table

    (output / "tables").mkdir()
    for name, seen in calibrations.items():
        reach = (seen.minimum, seen.maximum) if seen.minimum < seen.maximum else (seen.minimum - 1, seen.maximum + 1)
        save_table(output / "tables" / f"{name}.json", model.get_submodule(name), reach)
