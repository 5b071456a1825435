"""A learned activation as ordinary tensor operations (add, multiply, clamp, max, cos), and as a table.

For exporters and other runtimes, which know nothing of this package's operators. What the operations are is said by
each family (`LearnableActivation.plain`).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.ops import Composition, LearnableActivation

POLYNOMIAL_LABEL = "polynomial="


class PlainActivation(nn.Module):
    """The same function as a learnable activation, without learnable parameters, in float32.

    Args:
        module: an activation of this package with one set of coefficients.

    Raises:
        ValueError: a gated activation, one with groups of channels, or one that is not elementwise.
    """

    def __init__(self, module: LearnableActivation) -> None:
        super().__init__()
        numbers, self.formula, continues = module.plain()
        self.interval = module.interval if continues else None
        self.tails = _end_slopes(module, *self.interval) if self.interval is not None else [0.0, 0.0]
        for name, value in numbers.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value)).float(), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        numbers: dict[str, Tensor] = dict(self.named_buffers())
        if self.interval is None:
            return self.formula(input, numbers)
        value = self.formula(input.clamp(self.interval[0], self.interval[1]), numbers)
        below, above = torch.relu(self.interval[0] - input), torch.relu(input - self.interval[1])
        return value - self.tails[0] * below + self.tails[1] * above


def _end_slopes(module: nn.Module, low: float, high: float) -> list[float]:
    """F' on both sides, just outside: of the lines, where an interval ends here."""
    double = copy.deepcopy(module).double().cpu()
    step = 1e-9 * (high - low)
    with torch.enable_grad():
        ends = torch.tensor([low - step, high + step], dtype=torch.float64, requires_grad=True)
        (slopes,) = torch.autograd.grad(double(ends.clone()).sum(), ends)  # a copy: some work in place
    return [float(slope) for slope in slopes]


class Labelled(nn.Module):
    """An activation as the only child of a module, by a name that says whose it is: exporters name nodes after it."""

    def __init__(self, activation: nn.Module, name: str) -> None:
        super().__init__()
        self.label = POLYNOMIAL_LABEL + name.replace(".", ":")
        self.add_module(self.label, activation)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, self.label)(x)
        return result


def with_plain_activations(model: nn.Module) -> nn.Module:
    """A copy of the model on the CPU whose learnable activations are ordinary operations; compositions are labelled."""
    copied = copy.deepcopy(model).cpu().eval()
    if isinstance(copied, LearnableActivation):
        return _plain(copied, "")
    names = {id(module): name for name, module in copied.named_modules()}
    for owner in list(copied.modules()):
        for child_name, child in list(owner._modules.items()):
            if isinstance(child, LearnableActivation):
                setattr(owner, child_name, _plain(child, names[id(child)]))
    return copied


def _plain(module: LearnableActivation, name: str) -> nn.Module:
    plain = PlainActivation(module)
    return Labelled(plain, name) if isinstance(module, Composition) else plain


def tabulate(module: nn.Module, interval: tuple[float, float], points: int = 1025) -> dict[str, Any]:
    """A learned activation as a table for serving: equidistant x, values, and the slopes at its ends, to go on by.

    A composition, which nothing continues, has no such slopes. `maximum_error` is what linear interpolation in the
    table loses inside, at ten times as many points.

    Raises:
        ValueError: fewer than two points, an interval that is none or is infinite, or a module whose channels have
            functions of their own.
    """
    if getattr(module, "num_parameters", 1) > 1:
        raise ValueError(
            f"table: of one function, and this activation has {module.num_parameters}: one for each channel"
        )
    low, high = float(interval[0]), float(interval[1])
    if points < 2 or not -np.inf < low < high < np.inf:
        raise ValueError(f"table: expected finite lo < hi and at least 2 points, got ({low}, {high}) and {points}")
    double = copy.deepcopy(module).double().cpu()
    x = np.linspace(low, high, points)
    dense = np.linspace(low, high, 10 * points)
    with torch.no_grad():
        values, exact = (double(torch.tensor(part)).numpy() for part in (x, dense))  # copies: some work in place
    return {
        "format": 1,
        "low": low,
        "high": high,
        "values": values.tolist(),
        "slopes_outside": None if isinstance(module, Composition) else _end_slopes(module, low, high),
        "maximum_error": float(np.abs(np.interp(dense, x, values) - exact).max()),
        "activation": module.config() if isinstance(module, LearnableActivation) else None,
    }


def save_table(path: Path, module: nn.Module, interval: tuple[float, float], points: int = 1025) -> dict[str, Any]:
    """Write `tabulate` as JSON; see there."""
    table = tabulate(module, interval, points)
    path.write_text(json.dumps(table) + "\n", encoding="utf-8")
    return table
