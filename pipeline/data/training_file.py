"""`training.json` and `history.json`: what a training came to, and what was logged on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polytrope.pipeline.data.records import OpenRecord, read_record, write_json, write_record
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import suggest

TRAINING_FILE = "training.json"
HISTORY_FILE = "history.json"
INITIAL = "initial"  # the directory of the model before the first step, where `keep_initial` was asked for
# What the loss after a teacher is the weighted sum of, without the weights; `targets` is the loss of the data.
DISTILLATION_TERMS = tuple(f"distillation/{name}" for name in ("targets", "outputs", "features", "perturbation"))
_HINT = "name a `train` stage"
_MEASURED = {"text": ("loss",), "images": ("loss", "accuracy"), "numbers": ("loss", "accuracy")}  # in validation


class Training(OpenRecord):
    """The end of a training; its metrics stand beside these fields by their names (`val/loss`).

    Args:
        trainable_parameters: how many of the `parameters` learned, where not all did.
        failure: how it diverged, under `on_divergence: record`.
        samples, tokens: that it has seen.
        result_step: the step whose weights are the model, where that is not the last one.
        skipped_batches, rollbacks: how many batches were left out, and why.
    """

    format: Literal[1] = 1
    architecture: str
    parameters: int
    trainable_parameters: int | None = None
    steps: int
    samples: int | None = None
    tokens: int | None = None
    failure: str | None = None
    result_step: int | None = None
    skipped_batches: int | None = None
    rollbacks: list[str] | None = None

    def metrics(self) -> dict[str, float]:
        """What was measured: `val/loss`."""
        return {name: value for name, value in (self.model_extra or {}).items() if isinstance(value, int | float)}

    def counts(self) -> dict[str, int]:
        """How large it was: `parameters`, `steps`, `tokens`; facts, not measurements."""
        content = self.model_dump(include=set(type(self).model_fields) - {"format"}, exclude_none=True)
        return {name: value for name, value in content.items() if isinstance(value, int)}

    def figures(self) -> dict[str, int | float]:
        """Everything in it that is a number."""
        return {**self.counts(), **self.metrics()}


def figure_names(
    kind: Literal["text", "images", "numbers"],
    *,
    predicts_numbers: bool = False,
    fit: bool = False,
    terms: Iterable[str] = (),
) -> tuple[str, ...]:
    """Names of the figures that a training on such data may have: its counts and its metrics.

    Args:
        predicts_numbers: the model has no classes to be right about.
        fit: training samples are measured too (`fit_samples`).
        terms: of the loss, that `train/loss` is the weighted sum of: `distillation/outputs`.
    """
    measured = ("loss",) if predicts_numbers else _MEASURED[kind]
    counts = [name for name, field in Training.model_fields.items() if field.annotation in (int, int | None)]
    of_training = [f"train/{name}" for name in ("loss", *terms)]
    of_training += [f"fit/{name}" for name in measured] if fit else []
    return (*counts, *of_training, *(f"val/{name}" for name in measured), "val/best_loss")


def write_training(directory: Path, training: Training, history: Sequence[Mapping[str, Any]]) -> None:
    """Write both files; `history` as of `read_history`."""
    write_record(directory / TRAINING_FILE, training)
    write_json(directory / HISTORY_FILE, history)


def read_training(directory: Path) -> Training | None:
    """Of the model in a directory; None where it was not trained here.

    Raises:
        UserError: damaged, or of another version.
    """
    path = directory / TRAINING_FILE
    return read_record(path, Training, _HINT) if path.exists() else None


def recorded_failure(directory: Path) -> str | None:
    """What `train` says of a training that diverged under `on_divergence: record`; None: it did not."""
    training = read_training(directory)
    return None if training is None else training.failure


def figure_of_training(directory: Path, name: str) -> tuple[float | None, str | None]:
    """A figure of the model's training by its name, or why there is none: it diverged, or was not finite.

    Raises:
        UserError: the model was not trained here, or its training has no such figure.
    """
    training = read_training(directory)
    if training is None:
        raise UserError(f"{directory} was not trained here, so it has no figures of its own", _HINT)
    if training.failure is not None:
        return None, training.failure
    figures = training.figures()
    unset = {key for key, value in training if value is None and key in training.model_fields_set}
    if name not in figures and name not in unset:
        raise UserError(f"{directory / TRAINING_FILE} has no figure `{name}`", suggest(name, figures))
    value = figures.get(name)
    if value is None or not math.isfinite(value):
        return None, f"{name} is not finite"
    return float(value), None


def read_history(directory: Path) -> list[dict[str, Any]]:
    """What was logged, as {step, name: value, …} in the order of the steps; empty for a model not trained here.

    Raises:
        UserError: damaged.
    """
    path = directory / HISTORY_FILE
    if not path.exists():
        return []
    try:
        history: list[dict[str, Any]] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", _HINT) from error
    return history
