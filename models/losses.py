"""What a model is trained to make small, by name. Validation and evaluation measure cross entropy, whatever it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[..., Tensor]


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    """-Σ_c q_c log p_c with p = softmax(logits), in nats.

    Args:
        logits: `[samples, classes]`.
        targets: `[samples]` int64 classes (-100: does not count), or q itself `[samples, classes]`.
        reduction: `mean` over those that count, `sum`, or `none` (`[samples]`).
        label_smoothing: how much of q is moved to the uniform distribution.
    """
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction=reduction, label_smoothing=label_smoothing)


def mse(outputs: Tensor, targets: Tensor, *, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    """Mean over the components of (output - target)²; of what is predicted, not of classes: nothing to smooth.

    Args:
        outputs, targets: `[samples, components]`.
        reduction: `mean` over the samples, `sum`, or `none` (`[samples]`).
    """
    assert label_smoothing == 0.0
    losses = F.mse_loss(outputs, targets, reduction="none").mean(dim=-1)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


def poly(
    logits: Tensor, targets: Tensor, *, epsilon: float = 1.0, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """Poly-1: cross entropy + ε (1 - p_t), p_t = Σ_c q_c p_c; the other arguments are those of `cross_entropy`.

    Cross entropy of a class is Σ_{j≥1} (1 - p_t)^j / j; Poly-1 changes the first coefficient of this series to 1 + ε.
    The gradient by the logits is (p - q)(1 + ε p_t) for a class. (Leng et al., PolyLoss: A Polynomial Expansion
    Perspective of Classification Loss Functions, 2022)
    """
    if epsilon == 0.0:
        return cross_entropy(logits, targets, reduction=reduction, label_smoothing=label_smoothing)
    losses = cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if targets.is_floating_point():
        counted = torch.ones_like(losses)
        matched = (logits.softmax(dim=-1) * targets).sum(dim=-1)
    else:
        counted = (targets != -100).to(losses.dtype)
        matched = (-(cross_entropy(logits, targets, reduction="none") if label_smoothing else losses)).exp()
    target_probability = (1.0 - label_smoothing) * matched + label_smoothing / logits.size(-1)
    losses = losses + epsilon * (1.0 - target_probability) * counted
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "poly": poly}


def make_loss(name: str, **options: Any) -> Loss:
    """One of `LOSSES` with its options (`epsilon`)."""
    return functools.partial(LOSSES[name], **options)
