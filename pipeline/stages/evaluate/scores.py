"""Sums over predictions: loss, accuracy, calibration, divergence from a reference; the same for tokens and classes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_LARGEST_LOSS = 709.0  # beyond it, exp overflows float64: there is no perplexity to give
_MATRIX_CLASSES = 100  # with more, a matrix of all pairs is neither read nor drawn by anybody
_MOST_CONFUSED = 100


@dataclass
class Scores:
    """Adds up over batches, in float64.

    Args:
        bins: confidence bins of the calibration error (Guo et al., 2017: equal width).
        classes: also count which class was taken for which, of so many; 0: not. A model may have further outputs,
            which are never right.
        compared_outputs: over how many of the first outputs the divergence from a reference is taken; both models are
            normalised over them, so that embeddings that were padded differently can be compared.
    """

    bins: int
    classes: int = 0
    compared_outputs: int | None = None
    count: int = 0
    loss: float = 0.0
    first: int = 0
    fifth: int = 0
    divergence: float = 0.0
    agreements: int = 0
    compared: int = 0
    confidence: np.ndarray = field(init=False)
    correct: np.ndarray = field(init=False)
    filled: np.ndarray = field(init=False)
    confusions: Counter[tuple[int, int]] = field(default_factory=Counter)  # (class, prediction) → how often

    def __post_init__(self) -> None:
        self.confidence, self.correct, self.filled = (np.zeros(self.bins) for _ in range(3))

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            logits: `[predictions, classes]`, any float type.
            targets: `[predictions]` int64.
            reference: logits of the reference model for the same predictions.
        """
        log_probabilities = F.log_softmax(logits.float(), dim=-1)
        chosen = log_probabilities.gather(1, targets[:, None])[:, 0]
        self.count += targets.numel()
        self.loss -= float(chosen.double().sum())
        if not math.isfinite(self.loss):  # nothing else about these predictions means anything
            return
        top = log_probabilities.topk(min(5, logits.size(1)), dim=-1)
        hits = top.indices == targets[:, None]
        self.first += int(hits[:, 0].sum())
        self.fifth += int(hits.any(dim=1).sum())
        self._calibrate(top.values[:, 0].exp().double().cpu().numpy(), hits[:, 0].cpu().numpy())
        if self.classes:
            pairs = np.stack((targets.cpu().numpy(), top.indices[:, 0].cpu().numpy()), axis=1)
            for (true, predicted), number in zip(*np.unique(pairs, axis=0, return_counts=True), strict=True):
                self.confusions[int(true), int(predicted)] += int(number)
        if reference is not None:
            ours = F.log_softmax(logits[:, : self.compared_outputs].float(), dim=-1)
            other = F.log_softmax(reference[:, : self.compared_outputs].float(), dim=-1)
            self.divergence += float((other.exp() * (other - ours)).double().sum())
            self.agreements += int((other.argmax(dim=-1) == ours.argmax(dim=-1)).sum())
            self.compared += targets.numel()

    def _calibrate(self, confidence: np.ndarray, correct: np.ndarray) -> None:
        index = np.minimum((confidence * self.bins).astype(np.int64), self.bins - 1)
        self.confidence += np.bincount(index, weights=confidence, minlength=self.bins)
        self.correct += np.bincount(index, weights=correct.astype(np.float64), minlength=self.bins)
        self.filled += np.bincount(index, minlength=self.bins)

    def perplexity(self) -> float | None:
        """Exponential of the mean loss, of a text; None where that overflows."""
        mean = self.loss / self.count
        return math.exp(mean) if mean < _LARGEST_LOSS else None

    def figures(self) -> dict[str, Any]:
        """Means: loss in nats, top-1 and top-5 accuracy, expected calibration error, and what was compared.

        Of up to 100 classes `confusion`, a matrix (class, prediction) of counts; of more, `most_confused`: the most
        frequent (class, prediction, count).
        """
        mean = self.loss / self.count
        result: dict[str, Any] = {
            "loss": mean,
            "top1": self.first / self.count,
            "top5": self.fifth / self.count,
            "calibration_error": float(np.abs(self.correct - self.confidence).sum() / self.count),
        }
        if self.compared:
            result["drift"] = {
                "kl_divergence": self.divergence / self.compared,
                "agreement": self.agreements / self.compared,
            }
        if 0 < self.classes <= _MATRIX_CLASSES:
            matrix = np.zeros((self.classes, self.classes), dtype=np.int64)
            for (true, predicted), number in self.confusions.items():
                if predicted < self.classes:
                    matrix[true, predicted] = number
            result["confusion"] = matrix.tolist()
        elif self.classes:
            wrong = Counter({pair: number for pair, number in self.confusions.items() if pair[0] != pair[1]})
            result["most_confused"] = [[*pair, number] for pair, number in wrong.most_common(_MOST_CONFUSED)]
        return result


@dataclass
class Errors:
    """Adds up squared errors of predicted numbers over batches, in float64."""

    count: int = 0
    squares: float = 0.0
    targets: list[np.ndarray] = field(default_factory=list)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count one batch, both `[rows, components]`."""
        self.count += len(targets)
        self.squares += float((outputs.double() - targets.double()).square().mean(dim=-1).sum())
        self.targets.append(targets.double().cpu().numpy())

    @property
    def loss(self) -> float:
        """Sum over the rows of the mean over the components of the squared error."""
        return self.squares

    def figures(self) -> dict[str, Any]:
        """The mean squared error, and R² = 1 - squared errors / squared distances of the targets from their mean (by
        component); None where all targets are equal."""
        targets = np.concatenate(self.targets)
        spread = float(np.square(targets - targets.mean(axis=0)).mean(axis=-1).sum())
        return {"loss": self.squares / self.count, "r2": 1.0 - self.squares / spread if spread > 0.0 else None}


def seeded_generator(seed: int) -> torch.Generator:
    """A generator of its own on the CPU: sampling does not depend on what ran before."""
    return torch.Generator().manual_seed(seed)
