"""Analyse all models of the stage, one after the other, and draw what was found."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError

from polytrope.models.checkpoint import load_model, read_description
from polytrope.pipeline.data.analysis_file import (
    ANALYSIS_FILE,
    AnalysedData,
    AnalysedModel,
    Analysis,
    write_analysis,
)
from polytrope.pipeline.data.description import read_dataset
from polytrope.pipeline.data.model_inputs import refuse_other_data
from polytrope.pipeline.data.records import Record, finite
from polytrope.pipeline.data.training_file import recorded_failure
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext
from polytrope.pipeline.stages.analyze.analyses import ANALYSES
from polytrope.pipeline.stages.analyze.parameters import AnalyzeParameters
from polytrope.pipeline.stages.analyze.subject import Subject, read_activations
from polytrope.pipeline.support import figures


def analyze_models(
    context: StageContext, dataset: Artifact, models: dict[str, Artifact], parameters: AnalyzeParameters
) -> dict[str, float]:
    """Write `analysis.json` and, of what is drawn, `plots/*.png`; returns `LABEL/signal/…` and the like of all models.

    A model that cannot be analysed (it diverged, or does not fit the dataset) is a row with its `failure`; an analysis
    that says nothing of a model takes no other one's figures.

    Raises:
        UserError: no model is left.
    """
    if not models:
        raise UserError("the stages of all `models` were skipped", f"give `{context.stage}` the same `when:`")
    torch.set_num_threads(parameters.threads)
    description = read_dataset(dataset.path)
    samples = min(parameters.samples, description.splits["validation"].samples)
    if samples < 1:
        raise UserError(f"the dataset of `{dataset.stage}` has no validation samples", "use a larger corpus")
    found: dict[str, AnalysedModel] = {}
    for index, (label, model) in enumerate(models.items()):
        context.progress(index, len(models), label)
        try:
            found[label] = _analyse(context, label, model, dataset, samples, parameters)
        except UserError as error:
            found[label] = AnalysedModel(stage=model.stage, digest=model.digest, failure=error.message)
        if (failure := found[label].failure) is not None:
            context.message(f"{label}: {failure}")
        for missing in _missing(found[label]):
            context.message(f"{label}: {missing}")
    context.progress(len(models), len(models), "")
    if all(entry.failure is not None for entry in found.values()):
        label, entry = next(iter(found.items()))
        raise UserError(
            f"no model is left to analyse; `{label}`: {entry.failure}", f"look at the training of `{entry.stage}`"
        )
    data = AnalysedData(name=description.name, digest=dataset.digest, samples=samples)
    analysis = Analysis(format=1, dataset=data, models=found)
    write_analysis(context.output, analysis)
    context.log_artifact(ANALYSIS_FILE)
    if _draw(context.output / "plots", analysis):
        context.log_artifact("plots")
    summary = {f"{label}/{name}": value for label, entry in found.items() for name, value in entry.metrics().items()}
    context.log_metrics(summary)
    return summary


def _analyse(
    context: StageContext,
    label: str,
    model: Artifact,
    dataset: Artifact,
    samples: int,
    parameters: AnalyzeParameters,
) -> AnalysedModel:
    """Every analysis of one model.

    Raises:
        UserError: it cannot be analysed, or no analysis says anything of it.
    """
    if (failure := recorded_failure(model.path)) is not None:
        raise UserError(failure)
    about = read_description(model.path)
    unsure = refuse_other_data(label, model.path, about, read_dataset(dataset.path), dataset)
    if unsure is not None:
        context.message(unsure)
    try:
        network = load_model(model.path)
        activations = read_activations(network, dataset.path, samples, parameters.batch_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    subject = Subject(model.path, network, dataset.path, activations, samples, parameters.batch_size)
    figures_: dict[str, Record] = {}
    failures: dict[str, str] = {}
    for options in parameters.analyses:
        try:
            figures_[options.name] = _readable(options.name, ANALYSES[options.name](subject, options))
        except UserError as error:
            failures[options.name] = error.message
    if not figures_:
        raise UserError("; ".join(failures.values()))
    found = {"stage": model.stage, "digest": model.digest, **figures_}
    return AnalysedModel.model_validate({**found, "failures": failures} if failures else found)


def _readable(name: str, found: Record) -> Record:
    """The figures, if the file can hold them.

    Raises:
        UserError: one that there has to be is NaN or infinite.
    """
    try:
        type(found).model_validate(finite(found.model_dump()))
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UserError(f"{name}: {place} is not a finite number") from error
    return found


def _missing(model: AnalysedModel) -> list[str]:
    """What could not be had of which layers, each reason once."""
    layers = [*(model.signal.layers if model.signal else ()), *(model.kernel.layers if model.kernel else ())]
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if layer.missing is not None:
            reasons.setdefault(f"{layer.activation}: {layer.missing}", []).append(layer.name)
    said = [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    said += model.failures.values()
    for figures_ in (model.modular, model.features, model.merging, model.arithmetic, model.bilinear, model.rank):
        said += figures_.missing if figures_ is not None else []
    return said


def _draw(directory: Path, analysis: Analysis) -> bool:
    """Whether there was anything to draw: few analyses have pictures."""
    drawings = figures.analysis_drawings(analysis.spectra(), analysis.variance_maps(), analysis.accuracies())
    for name, draw in drawings.items():
        directory.mkdir(exist_ok=True)
        (directory / f"{name}.png").write_bytes(figures.render(draw, "light"))
    return bool(drawings)
