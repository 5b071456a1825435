"""Penalties on values that leave the range where a polynomial in place of a function or a division will be good."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class RangePenalty:
    """What a training adds to its loss, summed over the layers; nothing is added in evaluation mode.

    One object for a model and its modules: they add while the model's `forward` runs. What backward computes again
    comes after, and adds nothing.

    Args:
        activation: weight of mean relu(|x| - beyond)² of the inputs x of activations.
        beyond: where that begins.
        denominator: weight of mean (ln d)² of the denominators d of attention, and of the variance of ln m over a
            sample, of the mean squares m of `norm: rms`, whose size does not matter.
    """

    activation: float
    beyond: float
    denominator: float
    _terms: list[Tensor] | None = field(default=None, init=False, repr=False)

    def start(self) -> None:
        """Of a forward pass."""
        self._terms = []

    def inputs(self, x: Tensor) -> None:
        """Inputs of an activation, any shape."""
        self._add(self.activation * torch.relu(x.float().abs() - self.beyond).square().mean())

    def denominators(self, d: Tensor) -> None:
        """What is divided by, positive, any shape."""
        self._add(self.denominator * d.float().log().square().mean())

    def mean_squares(self, m: Tensor) -> None:
        """What a norm divides by the root of, positive, `[batch, …]`."""
        logarithms = m.float().log().flatten(1)
        self._add(self.denominator * (logarithms - logarithms.mean(1, keepdim=True)).square().mean())

    def added_to(self, loss: Tensor, reduction: str) -> Tensor:
        """The loss with all penalties of this forward pass.

        Raises:
            ValueError: a loss that is no mean: penalties are means.
        """
        if reduction != "mean":
            raise ValueError(f"reduction: expected mean with range penalties, got {reduction}")
        assert self._terms is not None  # `start` came before
        terms, self._terms = self._terms, None
        return loss + torch.stack(terms).sum() if terms else loss

    def _add(self, term: Tensor) -> None:
        if self._terms is not None:
            self._terms.append(term)


def penalise_ranges(model: nn.Module, penalty: RangePenalty) -> None:
    """Let the model, and each of its modules with a range, add their penalties.

    Raises:
        ValueError: it has none.
    """
    owners = [module for module in model.modules() if hasattr(module, "ranges")]
    if not owners:
        raise ValueError(f"{type(model).__name__} has no ranges to penalise")
    for module in owners:
        module.ranges = penalty  # type: ignore[assignment]
