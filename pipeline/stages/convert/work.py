"""The conversion of a model, for the stage and the command alike: read, calibrate, fit, rate, replace, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polytrope.models import ARCHITECTURES, is_own
from polytrope.models.calibration import Calibration, calibrate
from polytrope.models.conversion import fit_options
from polytrope.models.convert import RATED_SAMPLES, Conversion, convert_batches
from polytrope.models.convert_options import FIT_OPTIONS
from polytrope.models.formats import read_model, write_model
from polytrope.models.formats.module import MODULE_FILE, Factory
from polytrope.models.formats.onnx import Export
from polytrope.models.inputs import Batch, forward, head, size_of
from polytrope.models.quadratic import make_quadratic
from polytrope.models.selection import Selection
from polytrope.models.surgery import Activation, Choice, describe_activations
from polytrope.models.writing import compare_outputs
from polytrope.pipeline.data.conversion_file import ConversionRecord, write_conversion
from polytrope.pipeline.stages.convert.conversion_record import record
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.stages.convert.polynomials import with_polynomials
from polytrope.pipeline.stages.convert.structure import with_structure


@dataclass(frozen=True)
class Source:
    """A model to convert, and what to calibrate it on.

    Args:
        path: a directory or file that `read_model` reads.
        batches: reads the calibration data for the model.
        title: of the page.
        config: fields of the model's configuration that its file does not tell.
        ray_address: of the cluster for `ray_tasks`; None: the one at hand, or this machine.
        factory: what builds a module that is neither of this package nor of transformers; written beside its weights.
        build: calls it.
    """

    path: Path
    batches: Callable[[nn.Module], list[Batch]]
    title: str
    config: Mapping[str, Any] = field(default_factory=dict)
    ray_address: str | None = None
    factory: Factory | None = None
    build: Callable[[], nn.Module] | None = None

    def read(self) -> nn.Module:
        """The model, as it is at the start.

        Raises:
            ValueError: as of `read_model`.
        """
        return read_model(self.path, self.config or None, None if self.build is None else self.build())


@dataclass(frozen=True)
class Outcome:
    """What became of a model.

    Args:
        record: of the conversion; None where nothing was converted.
        samples: of the calibration.
        onnx: what `model.onnx` is, where it was written.
        onnx_failure: why it was not; everything else is there.
        rest_of_graph: operators in `model.onnx` that are no sums and products, none of them of a polynomial; None where
            the model has no polynomials without tangents.
    """

    record: ConversionRecord | None
    samples: int
    onnx: Export | None = None
    onnx_failure: str | None = None
    rest_of_graph: dict[str, int] | None = None


def convert_model(
    source: Source, parameters: ConvertParameters, output: Path | None, tell: Callable[[int, str], None]
) -> Outcome:
    """Replace activations, linear layers or blocks of a model, and write it to the empty directory `output`.

    Args:
        output: gets the model, `conversion.json`, and what else the parameters ask for; None: nothing is replaced
            or written.
        tell: is told what begins, by the number of the step, of 3.

    Raises:
        ValueError: a model or data that cannot be read, nothing to convert, a layer that cannot be fitted or whose
            conversion has no effect, a format the model cannot have.
    """
    torch.set_num_threads(parameters.threads)
    tell(0, f"reading {source.path}")
    model = source.read()
    batches = source.batches(model)
    quadratic = None
    if parameters.linear is not None:
        tell(1, "making linear layers quadratic")
        model, quadratic = _quadratic(model, head(batches, RATED_SAMPLES))
    drop, factor, rounding = parameters.drop_blocks, parameters.factorize, parameters.quantize
    options = None
    if parameters.replacement() is not None:
        options = fit_options(**parameters.model_dump(include=set(FIT_OPTIONS)))
    choice = Choice(parameters.types, parameters.include, parameters.exclude, parameters.layer_range())
    measure = partial(_on_ray, source, parameters.ray_tasks) if parameters.ray_tasks else None
    if quadratic is not None and options is None:
        made = Conversion(model, [], [], sum(map(size_of, batches)), 0.0, rated=head(batches, RATED_SAMPLES))
    else:
        made = convert_batches(
            model,
            batches,
            options,
            choice,
            measure=measure,
            tell=tell,
            rated_samples=parameters.rated_samples,
            keep=parameters.keep,
            output_error=parameters.output_error,
            drop=None if drop is None else drop.options(),
            factor=None if factor is None else factor.options(),
            rounding=None if rounding is None else rounding.options(),
        )
    costs = {entry.name: entry.cost for entry in made.activations if entry.cost is not None}
    written = record(made.layers, options, costs, made.left)
    if made.polynomials is not None:
        written = with_polynomials(written, made.polynomials)
    written = with_structure(written, made)
    if quadratic is not None:
        written = written.model_copy(update={"quadratic": quadratic})
    if output is None:
        return Outcome(written, made.samples)
    tell(2, "writing the model, and reading it back")
    _write_model(model, source, parameters, output, made.rated)
    write_conversion(output, written)
    if parameters.page:
        from polytrope.pipeline.stages.convert.conversion_page import write_page

        write_page(output, written, source.title)
    calibrations = {entry.name: entry.calibration for entry in made.layers}
    return _write_extras(model, parameters, output, Outcome(written, made.samples), calibrations, made.rated)


def _quadratic(model: nn.Module, inputs: Batch) -> tuple[nn.Module, list[str]]:
    """The model with quadratic layers, whose outputs are the same numbers, and the names of these layers.

    Raises:
        ValueError: a model of others, one that has no quadratic form, or outputs that are not the same.
    """
    if not is_own(model):
        raise ValueError(
            f"linear: quadratic layers are for {', '.join(ARCHITECTURES)}, and this is a {type(model).__name__}"
        )
    made, names = make_quadratic(model)
    with torch.no_grad():
        before, after = forward(model, inputs), forward(made, inputs)
    if not torch.equal(before, after):
        off = float((after - before).abs().max())
        raise ValueError(
            f"linear: the model with quadratic layers computes something else, off by {off:.3g}: the square of a "
            "number that a layer takes is not finite"
        )
    return made, names


def export_model(source: Source, parameters: ConvertParameters, output: Path) -> Outcome:
    """Write a model whose activations are learned already to the empty directory `output`; nothing is replaced.

    Raises:
        ValueError: as of `convert_model`.
    """
    torch.set_num_threads(parameters.threads)
    model = source.read()
    _write_model(model, source, parameters, output)
    if not (parameters.onnx or parameters.tables):
        return Outcome(None, 0)
    batches = source.batches(model)
    learned = [Activation(name, model.get_submodule(name)) for name in describe_activations(model)]
    if parameters.ray_tasks:
        calibrations = _on_ray(source, parameters.ray_tasks, model, Selection(learned, [], []), batches)
    else:
        calibrations = calibrate(model, learned, batches, forward)
    outcome = Outcome(None, sum(map(size_of, batches)))
    return _write_extras(model, parameters, output, outcome, calibrations, head(batches, RATED_SAMPLES))


def _on_ray(
    source: Source, tasks: int, _model: nn.Module, selection: Selection, batches: Sequence[Batch]
) -> dict[str, Calibration]:
    """The inputs of the chosen activations, measured by tasks that read the model and make the same calls modules."""
    from polytrope.pipeline.stages.convert.parallel_calibration import calibrate_on_ray

    names = [activation.name for activation in selection.activations]
    return calibrate_on_ray(source.path, source.config, names, batches, tasks, source.ray_address, selection.calls)


def _write_model(
    model: nn.Module, source: Source, parameters: ConvertParameters, output: Path, inputs: Batch | None = None
) -> None:
    """The model with what lies beside it in the directory it came from."""
    beside = source.path if source.path.is_dir() else None
    write_model(output, model, format=parameters.format, source=beside, inputs=inputs, factory=source.factory)
    if source.build is not None and (output / MODULE_FILE).exists() and inputs is not None:
        written = read_model(output, model=source.build())
        compare_outputs(written, model, inputs, f"{output} is not written")


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
        written = save_onnx(path, model, list(traced.values()), None if is_own(model) else list(traced))
        rest = check_polynomial(path, model)
    except Exception as error:  # the exporter runs the model's own code, which raises anything
        path.unlink(missing_ok=True)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        failure = kind + str(error).removeprefix(f"{path}: ")
        if outcome.record is not None:
            write_conversion(output, outcome.record.model_copy(update={"onnx_failure": failure}))
        return Outcome(outcome.record, outcome.samples, onnx_failure=failure)
    return Outcome(outcome.record, outcome.samples, written, rest_of_graph=rest)


def _write_tables(output: Path, model: nn.Module, calibrations: Mapping[str, Calibration]) -> None:
    """`tables/NAME.json` for every activation, over the range of the inputs it was seen to receive."""
    from polytrope.models.formats.plain import save_table

    (output / "tables").mkdir()
    for name, seen in calibrations.items():
        reach = (seen.minimum, seen.maximum) if seen.minimum < seen.maximum else (seen.minimum - 1, seen.maximum + 1)
        save_table(output / "tables" / f"{name}.json", model.get_submodule(name), reach)
