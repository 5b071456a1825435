"""`evaluation.json`: what the `evaluate` stage found out about its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from polytrope.pipeline.data.records import OpenRecord, Record, read_record, write_record

EVALUATION_FILE = "evaluation.json"


class EvaluatedData(Record):
    """The data set: a tokenizer and a length where it is text, names of classes where it is images."""

    name: str
    digest: str
    tokenizer: dict[str, Any] | None = None
    sequence_length: int | None = None
    class_names: list[str] | None = None
    splits: dict[str, dict[str, int | float]]


class Protocol(Record):
    """How it was measured: on how many samples, with which stride of the window, in which arithmetic."""

    samples: int
    stride: int | None
    precision: str


class Drift(Record):
    """How far the model's predictions are from its reference's; `cosine` of the outputs of each block."""

    kl_divergence: float
    agreement: float
    cosine: list[float] | None = None


class CertifiedDomain(Record):
    """The inputs of a polynomial without tangents on the validation data, and how many lay outside of its domain."""

    name: str
    domain: list[float]
    inputs: int
    outside: int
    probability: float
    minimum: float | None
    maximum: float | None


class AnswerFigures(Record):
    """Of so many held-out lines `question ; answer`, how many answers of the model are expressions (`valid`), right
    (`correct`), and written as in the line (`exact`); `too_long`: lines among them that the context does not hold."""

    task: Literal["derivative", "integral"]
    lines: int
    too_long: int
    valid: int
    correct: int
    exact: int


class EvaluatedModel(OpenRecord):
    """One model: its figures, or the `failure` that left none.

    Args:
        stage, digest: of the artifact.
        loss: nats per token, image or row with a class; of predicted numbers the mean squared error. perplexity, of
            text, is its exponential, None where that overflows.
        r2: of predicted numbers: 1 - squared errors / squared distances from the mean of the targets.
        drift_missing: why it has none although it was asked for.
        layers: of each activation, the curve and the distribution of its inputs.
        domains: of each polynomial without tangents, the inputs outside of its certified range.
        sample: a text that the model wrote.
        answers: what it answers to held-out questions.
        confusion: a matrix (class, prediction) of counts; of more than 100 classes `most_confused` has the most
            frequent [class, prediction, count].
    """

    stage: str
    digest: str
    failure: str | None = None
    activation: str | None = None
    parameters: int | None = None
    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    r2: float | None = None
    top1: float | None = None
    top5: float | None = None
    calibration_error: float | None = None
    tokens: int | None = None
    images: int | None = None
    rows: int | None = None
    bytes: int | None = None
    drift: Drift | None = None
    drift_missing: str | None = None
    layers: list[dict[str, Any]] | None = None
    domains: list[CertifiedDomain] | None = None
    sample: str | None = None
    answers: AnswerFigures | None = None
    confusion: list[list[int]] | None = None
    most_confused: list[list[int]] | None = None


class Evaluation(Record):
    """All models on one data set. `unigram_entropy`: nats per token, for text."""

    format: Literal[1] = 1
    kind: Literal["text", "images", "numbers"]
    dataset: EvaluatedData
    unigram_entropy: float | None
    protocol: Protocol
    models: dict[str, EvaluatedModel]


def write_evaluation(directory: Path, evaluation: Evaluation) -> None:
    """Write `evaluation.json`."""
    write_record(directory / EVALUATION_FILE, evaluation)


def read_evaluation(directory: Path) -> Evaluation:
    """Read `evaluation.json`.

    Raises:
        UserError: not there, damaged, or of another version.
    """
    return read_record(directory / EVALUATION_FILE, Evaluation, "name an `evaluate` stage")
