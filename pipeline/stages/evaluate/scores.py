"""Sums over predictions: loss, accuracy, calibration, divergence from a reference; the same for tokens and classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Scores:
    """Adds up over batches, in float64.

    Args:
        bins: confidence bins of the calibration error (Guo et al., 2017: equal width).
        classes: also keep a confusion matrix of this size; 0 for none.
    """

    bins: int
    classes: int = 0
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
    confusion: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.confidence, self.correct, self.filled = (np.zeros(self.bins) for _ in range(3))
        self.confusion = np.zeros((self.classes, self.classes), dtype=np.int64)

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
            np.add.at(self.confusion, (targets.cpu().numpy(), top.indices[:, 0].cpu().numpy()), 1)
        if reference is not None:
            other = F.log_softmax(reference.float(), dim=-1)
            self.divergence += float((other.exp() * (other - log_probabilities)).double().sum())
            self.agreements += int((other.argmax(dim=-1) == top.indices[:, 0]).sum())
            self.compared += targets.numel()

    def _calibrate(self, confidence: np.ndarray, correct: np.ndarray) -> None:
        index = np.minimum((confidence * self.bins).astype(np.int64), self.bins - 1)
        self.confidence += np.bincount(index, weights=confidence, minlength=self.bins)
        self.correct += np.bincount(index, weights=correct.astype(np.float64), minlength=self.bins)
        self.filled += np.bincount(index, minlength=self.bins)

    def figures(self) -> dict[str, Any]:
        """Means: loss in nats, top-1 and top-5 accuracy, expected calibration error, and what was compared."""
        mean = self.loss / self.count
        result: dict[str, Any] = {
            "loss": mean,
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "top1": self.first / self.count,
            "top5": self.fifth / self.count,
            "calibration_error": float(np.abs(self.correct - self.confidence).sum() / self.count),
        }
        if self.compared:
            result["drift"] = {
                "kl_divergence": self.divergence / self.compared,
                "agreement": self.agreements / self.compared,
            }
        if self.classes:
            result["confusion"] = self.confusion.tolist()
        return result


def seeded_generator(seed: int) -> torch.Generator:
    """A generator of its own on the CPU: sampling does not depend on what ran before."""
    return torch.Generator().manual_seed(seed)
