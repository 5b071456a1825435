"""Evaluate all models of the stage, one after the other, on the same samples."""

from __future__ import annotations

import math
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models import find_architecture
from polytrope.models.activations import describe_activation
from polytrope.models.checkpoint import load_model, read_description
from polytrope.models.domains import describe_outside, watching
from polytrope.models.linearized import LinearizedModel
from polytrope.pipeline.data.description import UNITS, Dataset, read_dataset
from polytrope.pipeline.data.evaluation_file import (
    EVALUATION_FILE,
    CertifiedDomain,
    EvaluatedData,
    EvaluatedModel,
    Evaluation,
    Protocol,
    write_evaluation,
)
from polytrope.pipeline.data.expressions import Task
from polytrope.pipeline.data.model_inputs import read_tensors, refuse_other_data
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.tokenization import Tokenizer, read_tokenizer
from polytrope.pipeline.data.training_file import recorded_failure
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext
from polytrope.pipeline.stages.evaluate.answers import HeldOut, held_out_lines, measure_answers
from polytrope.pipeline.stages.evaluate.drift import block_cosines
from polytrope.pipeline.stages.evaluate.parameters import NO_QUESTIONS, NO_QUESTIONS_HINT, EvaluateParameters
from polytrope.pipeline.stages.evaluate.scores import Errors, Scores, seeded_generator
from polytrope.pipeline.stages.evaluate.shapes import measure_activations
from polytrope.pipeline.stages.evaluate.token_bytes import byte_lengths
from polytrope.pipeline.stages.evaluate.windows import WindowBatch, block_windows, sliding_windows


def evaluate_models(
    context: StageContext, dataset: Artifact, models: dict[str, Artifact], parameters: EvaluateParameters
) -> dict[str, float]:
    """Write `evaluation.json`; returns `LABEL/val_loss`, `LABEL/perplexity`, `LABEL/bits_per_byte`, … of all models.

    A model that cannot be evaluated (it diverged, or does not fit the dataset) is a row with its `failure`.

    Raises:
        UserError: no model is left.
    """
    if not models:
        raise UserError("the stages of all `models` were skipped", f"give `{context.stage}` the same `when:`")
    torch.set_num_threads(parameters.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    description = read_dataset(dataset.path)
    split = description.splits["validation"]
    context.log_dataset("validation", dataset.digest, str(dataset.path), dict(split))
    samples = min(parameters.samples or split.samples, split.samples)
    if samples < 1:
        raise UserError(f"the dataset of `{dataset.stage}` has no validation samples", "use a larger corpus")
    evaluator = Evaluator(context, dataset, description, parameters, samples)
    results: dict[str, EvaluatedModel] = {}
    summary: dict[str, float] = {}
    for index, (label, model) in enumerate(models.items()):
        context.progress(index, len(models), label)
        evaluator.place = (index, len(models))
        reference = models.get(parameters.drift.get(label, ""))
        if reference is not None and (why := recorded_failure(reference.path)):
            missing = f"no drift from `{parameters.drift[label]}`, whose training failed: {why}"
            reference = None
        elif label in parameters.drift and reference is None:
            missing = f"no drift from `{parameters.drift[label]}`, whose stage was skipped"
        else:
            missing = None
        failure = recorded_failure(model.path)
        results[label] = _failed(model, failure) if failure else evaluate_one(evaluator, label, model, reference)
        if results[label].failure is not None:
            context.message(f"{label}: {results[label].failure}")
            continue
        if missing is not None:
            context.note(f"{label}: {missing}")
            results[label] = results[label].model_copy(update={"drift_missing": missing})
        figures = metrics_of(label, results[label])
        context.log_metrics(figures)
        summary.update(figures)
    context.progress(len(models), len(models), "")
    if all(result.failure is not None for result in results.values()):
        label, result = next(iter(results.items()))
        raise UserError(
            f"no model is left to evaluate; `{label}`: {result.failure}",
            f"look at the training of `{result.stage}`",
        )
    evaluation = Evaluation(
        format=1,
        kind=description.kind,
        dataset=_evaluated_data(description, dataset.digest),
        unigram_entropy=description.unigram_entropy if description.kind == "text" else None,
        protocol=Protocol(samples=samples, stride=parameters.stride, precision=parameters.precision),
        models=results,
    )
    write_evaluation(context.output, evaluation)
    context.log_artifact(EVALUATION_FILE)
    return summary


def _evaluated_data(description: Dataset, digest: str) -> EvaluatedData:
    return EvaluatedData(
        name=description.name,
        digest=digest,
        tokenizer=dict(description.tokenizer) if description.kind == "text" else None,
        sequence_length=description.sequence_length if description.kind == "text" else None,
        class_names=description.class_names if description.kind == "images" else None,
        splits={
            name: {key: value for key, value in dict(part).items() if isinstance(value, int | float)}
            for name, part in description.splits.items()
        },
    )


def evaluate_one(evaluator: Evaluator, label: str, model: Artifact, reference: Artifact | None) -> EvaluatedModel:
    """All figures of one model; if it cannot be evaluated, the reason: the others do not depend on it."""
    try:
        return evaluator.evaluate(label, model, reference)
    except UserError as error:
        return _failed(model, error.message)
    except (RuntimeError, ValueError, ArithmeticError, LookupError, OSError) as error:  # a shape, a number, a file
        traceback.print_exc()
        return _failed(model, f"{type(error).__name__}: {error}")


def _failed(model: Artifact, reason: str) -> EvaluatedModel:
    return EvaluatedModel(stage=model.stage, digest=model.digest, failure=reason)


def metrics_of(label: str, model: EvaluatedModel) -> dict[str, float]:
    """The figures of one model under their metric names."""
    names = {
        "loss": "val_loss",
        "perplexity": "perplexity",
        "bits_per_byte": "bits_per_byte",
        "r2": "r2",
        "top1": "top1",
        "top5": "top5",
        "calibration_error": "calibration_error",
    }
    figures = {key: getattr(model, key) for key in names}
    metrics = {f"{label}/{name}": figures[key] for key, name in names.items() if figures[key] is not None}
    if model.answers is not None:
        for name in ("valid", "correct", "exact"):
            metrics[f"{label}/answers_{name}"] = getattr(model.answers, name) / model.answers.lines
    if model.domains:
        metrics[f"{label}/outside_probability"] = max(entry.probability for entry in model.domains)
    if model.drift is not None:
        metrics[f"{label}/kl_divergence"] = model.drift.kl_divergence
        if model.drift.cosine:
            metrics[f"{label}/lowest_block_cosine"] = min(model.drift.cosine)
    return metrics


def granted_device(context: StageContext) -> torch.device:
    """The GPU where the stage was given one, else the CPU.

    Raises:
        UserError: it was given one, and this torch sees none: figures of the CPU would pass for those of a GPU.
    """
    if context.resources.gpus <= 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"resources.gpus: `{context.stage}` was given {context.resources.gpus:g} GPUs, but torch "
            f"{torch.__version__} sees none on {socket.gethostname()}",
            "install a torch for CUDA there, or leave `gpus:` out to use the CPU",
        )
    return torch.device("cuda")


class Evaluator:
    """The validation data and the settings, shared by all models of the stage."""

    def __init__(
        self,
        context: StageContext,
        dataset: Artifact,
        description: Dataset,
        parameters: EvaluateParameters,
        samples: int,
    ) -> None:
        self.context, self.dataset, self.description = context, dataset, description
        self.parameters, self.samples = parameters, samples
        self.place = (0, 1)  # number of the model, and how many there are
        self.device = granted_device(context)
        self.reader = open_split(dataset.path, "validation")
        self.unit = UNITS[description.kind]
        self.tokenizer: Tokenizer | None = None
        self.byte_lengths: np.ndarray | None = None
        self.classes: int | None = None  # of samples, not of tokens
        if description.kind == "numbers" and description.targets is not None:
            self.outputs, self.of = description.targets, "numbers to predict"
        elif description.kind != "text":
            assert description.classes is not None
            self.classes = description.classes
            self.outputs, self.of = description.classes, "classes"
        else:
            self.tokenizer = read_tokenizer(dataset.path)
            self.byte_lengths = byte_lengths(self.tokenizer)
            if self.byte_lengths is None:
                context.message("no bits per byte: the tokens of this tokenizer do not stand for bytes")
            self.outputs, self.of = self.tokenizer.vocab_size, "tokens"
        self.held_out: HeldOut | None = None
        if parameters.answers is not None:
            if description.kind != "text" or description.task is None:
                raise UserError(NO_QUESTIONS, NO_QUESTIONS_HINT)
            assert self.tokenizer is not None
            self.task: Task = description.task
            self.held_out = held_out_lines(
                dataset.path, self.reader, self.tokenizer, description.sequence_length, parameters.answers.count
            )
            if (found := len(self.held_out.lines)) < parameters.answers.count:
                context.message(
                    f"answers: {found} questions instead of {parameters.answers.count}: the validation split has no "
                    f"more whole lines that differ ({self.held_out.too_long} others are too long for the context)"
                )

    def evaluate(self, label: str, artifact: Artifact, reference: Artifact | None) -> EvaluatedModel:
        """All figures of one model."""
        about = read_description(artifact.path, tangents=True)
        unsure = refuse_other_data(label, artifact.path, about, self.description, self.dataset)
        if unsure is not None:
            self.context.message(unsure)
        model = load_model(artifact.path, self.device)
        other = load_model(reference.path, self.device) if reference else None
        scores = self._scores()
        if reference is not None and isinstance(scores, Errors):
            raise UserError("drift is one of probabilities, and this dataset has numbers to predict")
        bytes_scored, started = 0, time.perf_counter()
        with watching(model) as domains:
            for inputs, targets, mask in self._batches():
                logits, flat = self._logits(model, inputs)[mask], targets[mask]
                if logits.size(1) < self.outputs or (isinstance(scores, Errors) and logits.size(1) != self.outputs):
                    raise UserError(f"it has {logits.size(1)} outputs, the dataset {self.outputs} {self.of}")
                if isinstance(scores, Errors):
                    scores.add(logits, flat)
                else:
                    scores.add(logits, flat, self._logits(other, inputs)[mask] if other is not None else None)
                if not math.isfinite(scores.loss):
                    break
                if self.byte_lengths is not None:
                    bytes_scored += int(self.byte_lengths[flat.cpu().numpy()].sum())
        seconds = time.perf_counter() - started
        outside = describe_outside(domains)
        if not math.isfinite(scores.loss):
            return _failed(artifact, f"its validation loss is {scores.loss}" + (f"; {outside}" if outside else ""))
        if outside is not None:
            self.context.message(f"{label}: {outside}")
        is_tangent = isinstance(model, LinearizedModel)
        if is_tangent and self.parameters.activation_samples:
            self.context.message(f"{label}: a tangent model, whose activations are those of the model it began as")
        self.context.log_metrics({f"{label}/{self.unit}_per_second": scores.count / seconds})
        figures = scores.figures()
        result: dict[str, Any] = {"stage": artifact.stage, "digest": artifact.digest, **figures}
        result[self.unit] = scores.count
        result["parameters"] = about["parameters"]
        result["activation"] = describe_activation(about["config"].get("activation"))
        if domains:
            result["domains"] = [
                CertifiedDomain(
                    name=name,
                    domain=list(seen.domain),
                    inputs=seen.inputs,
                    outside=seen.outside,
                    probability=seen.probability,
                    minimum=seen.minimum,
                    maximum=seen.maximum,
                )
                for name, seen in domains.items()
            ]
        if self.parameters.activation_samples and not is_tangent:
            inputs = next(iter(self._batches(min(self.samples, self.parameters.activation_samples))))[0]
            result["layers"] = measure_activations(model, lambda: self._logits(model, inputs))
            if other is not None and not isinstance(other, LinearizedModel):
                cosines = block_cosines(
                    model,
                    other,
                    lambda network: self._logits(network, inputs),
                    features=1 if self.unit == "images" else -1,
                )
                result["drift"]["cosine"] = cosines
        if self.tokenizer is not None and isinstance(scores, Scores):
            result["perplexity"] = scores.perplexity()
            if self.byte_lengths is not None:
                result["bytes"] = bytes_scored
                result["bits_per_byte"] = scores.loss / math.log(2) / bytes_scored if bytes_scored else None
            if self.held_out is not None:
                with self._arithmetic():
                    result["answers"] = measure_answers(
                        model,
                        self.held_out,
                        self.task,
                        self.tokenizer,
                        self.parameters.batch_size,
                        lambda done: self._answered(label, done),
                    )
            result["sample"] = self._sample(model, self.tokenizer)
        return EvaluatedModel.model_validate(result)

    def _answered(self, label: str, done: int) -> None:
        assert self.held_out is not None
        of = len(self.held_out.lines)
        index, total = self.place
        self.context.progress(index + done / of, total, f"{label}: {done} of {of} answers")

    def _scores(self) -> Scores | Errors:
        if self.description.kind == "numbers" and self.description.targets is not None:
            return Errors()
        return Scores(self.parameters.calibration_bins, self.classes or 0, self.outputs)

    def _batches(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs as the data set gives them, targets, and which targets count, on the device."""
        size, stride = self.parameters.batch_size, self.parameters.stride
        samples = self.samples if limit is None else limit
        if limit is not None:
            size = limit
        if self.description.kind != "text":
            for start in range(0, samples, size):
                indices = np.arange(start, min(samples, start + size))
                inputs, targets = read_tensors(self.reader, indices)
                yield self._move(inputs), self._move(targets), self._move(torch.ones(len(indices), dtype=torch.bool))
            return
        windows: Iterator[WindowBatch]
        if stride is None or limit is not None:
            windows = block_windows(self.reader.samples, samples, size)
        else:
            length = self.description.sequence_length
            windows = sliding_windows(self.reader.samples, samples, length, stride, size)
        for batch in windows:
            yield (
                self._move(torch.from_numpy(batch.inputs.copy())),
                self._move(torch.from_numpy(batch.targets.copy())),
                self._move(torch.from_numpy(batch.scored)),
            )

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    @torch.no_grad()
    def _logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        inputs = find_architecture(str(model.architecture)).prepare(inputs)
        with self._arithmetic():
            logits: Tensor = model(inputs)
        return logits

    def _arithmetic(self) -> AbstractContextManager[Any]:
        """`precision` of all figures; a sample is drawn in fp32."""
        narrow = self.parameters.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if narrow else nullcontext()

    def _sample(self, model: nn.Module, tokenizer: Tokenizer) -> str:
        """A seeded sample, up to the end of its document; on the CPU, so that every device draws the same."""
        if self.parameters.sample_tokens == 0:
            return ""
        start = tokenizer.encode(self.parameters.prompt) or [tokenizer.end_of_text]
        prompt = torch.tensor([start], dtype=torch.long)
        produced = (
            model.to("cpu")
            .generate(  # type: ignore[operator]
                prompt,
                self.parameters.sample_tokens,
                temperature=self.parameters.temperature,
                top_k=self.parameters.top_k,
                generator=seeded_generator(self.parameters.seed),
            )[0, prompt.size(1) :]
            .tolist()
        )
        return self.parameters.prompt + tokenizer.decode_produced(produced)
