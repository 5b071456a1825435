"""Inputs that leave the domains of a model's polynomials: counted while it runs, since nothing holds outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.models.inputs import counted as without_padding
from polytrope.ops import Composition


@dataclass
class DomainInputs:
    """The inputs of one activation.

    Args:
        domain: (lo, hi) of the activation.
        inputs: all; below, above: those outside; NaN counts as above.
        minimum, maximum: extremes of those that are numbers.
        calls: of the module.
    """

    domain: tuple[float, float]
    inputs: int = 0
    below: int = 0
    above: int = 0
    minimum: float = float("inf")
    maximum: float = float("-inf")
    calls: int = 0

    @property
    def outside(self) -> int:
        return self.below + self.above

    @property
    def probability(self) -> float:
        """The share of the inputs that lay outside."""
        return self.outside / self.inputs if self.inputs else 0.0

    def add(self, x: Tensor) -> None:
        """Count a tensor of inputs."""
        low, high = self.domain
        below = int((x < low).sum())
        self.inputs += x.numel()
        self.below += below
        self.above += x.numel() - below - int(((x >= low) & (x <= high)).sum())
        self.calls += 1
        numbers = x.detach()[~x.isnan()]
        if numbers.numel():
            least, most = (float(end) for end in torch.aminmax(numbers))
            self.minimum, self.maximum = min(self.minimum, least), max(self.maximum, most)


@contextmanager
def watching(
    model: nn.Module, mask: Callable[[nn.Module, Tensor], Tensor | None] = lambda _module, _x: None
) -> Iterator[dict[str, DomainInputs]]:
    """Inside, what the compositions of the model receive is counted, by their names; empty if it has none.

    Args:
        mask: of the batch that runs, at a module and its input, as `inputs.masks` has it.
    """
    found: dict[str, DomainInputs] = {}
    handles = []

    def count(seen: DomainInputs, module: Composition, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = next(iter((*arguments, *keywords.values())))
        x = without_padding(x, mask(module, x))
        seen.add(x.chunk(2, -1)[0] if module.glu else x)

    for name, module in model.named_modules():
        if isinstance(module, Composition):
            seen = found[name] = DomainInputs(module.domain)
            handles.append(
                module.register_forward_pre_hook(
                    lambda owner, inputs, keywords, seen=seen: count(seen, owner, inputs, keywords), with_kwargs=True
                )
            )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def describe_outside(found: dict[str, DomainInputs]) -> str | None:
    """One sentence that says which activations received inputs outside of their domains; None: none did."""
    left = {name: seen for name, seen in found.items() if seen.outside}
    if not left:
        return None
    worst = sorted(left, key=lambda name: -left[name].probability)
    shown = ", ".join(f"`{name}` {_described(left[name])}" for name in worst[:3])
    more = f", and {len(worst) - 3} more" if len(worst) > 3 else ""
    return f"INPUTS OUTSIDE OF THE CERTIFIED RANGE, where nothing holds: {shown}{more}"


def _described(seen: DomainInputs) -> str:
    low, high = seen.domain
    share = f"{seen.outside} of {seen.inputs} (probability {seen.probability:.2g})"
    extremes = f"{seen.minimum:.4g} … {seen.maximum:.4g}" if seen.minimum <= seen.maximum else "none of them a number"
    return f"{share}, {extremes} for {low:.4g} … {high:.4g}"
