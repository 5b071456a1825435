"""A learned activation as ordinary tensor operations (add, multiply, clamp, max, cos), and as a table.

For exporters and other runtimes, which know nothing of this package's operators. Polynomials are written in powers of
(x - middle) / half of their interval, where float32 loses nothing.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.ops import is_learnable_activation


class PlainActivation(nn.Module):
    """The same function as a learnable activation, without learnable parameters, in float32.

    Args:
        module: an activation of this package with one set of coefficients.

    Raises:
        ValueError: a gated activation, one with groups of channels, or one that is not elementwise.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        config: dict[str, Any] = module.config()  # type: ignore[operator]
        self.name = config["name"]
        if config.get("glu") or config.get("num_parameters", 1) != 1 or self.name == "polynorm":
            raise ValueError(f"activation {self.name}: only elementwise activations with one set of coefficients")
        if config.get("learnable_recurrence") or config.get("harmonic"):
            raise ValueError(f"activation {self.name}: learnable_recurrence and harmonic have no plain form yet")
        self.interval: list[float] | None = config.get("interval")
        values = {name: p.detach().double().cpu().numpy() for name, p in module.named_parameters()}
        self.middle, self.radius = 0.0, 1.0
        self.tails = [0.0, 0.0]
        if self.name == "piecewise_linear":
            self._keep(_broken_line(self.interval, values["values"]))
            self.interval = None
            return
        if self.interval is not None:
            low, high = self.interval
            self.middle, self.radius = (low + high) / 2, (high - low) / 2
            self.tails = _end_slopes(module, low, high)
        self._keep(_numbers(self.name, values, self.middle, self.radius))

    def _keep(self, numbers: dict[str, np.ndarray]) -> None:
        for name, value in numbers.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value)).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        inside = x if self.interval is None else x.clamp(self.interval[0], self.interval[1])
        value = self._inside(inside)
        if self.interval is None:
            return value
        below, above = torch.relu(self.interval[0] - x), torch.relu(x - self.interval[1])
        return value - self.tails[0] * below + self.tails[1] * above

    def _inside(self, x: Tensor) -> Tensor:
        numbers: dict[str, Tensor] = dict(self.named_buffers())
        if self.name in ("hermite", "chebyshev", "legendre"):
            return _horner((x - self.middle) / self.radius, numbers["powers"])
        if self.name == "polyrelu":
            return _horner(torch.relu(x), numbers["powers"])
        if self.name == "rational":
            return _horner(x, numbers["numerator"]) / (1.0 + (x * _horner(x, numbers["denominator"])).abs())
        if self.name == "fourier":
            waves = numbers["amplitudes"] * torch.cos(x.unsqueeze(-1) * numbers["frequencies"] - numbers["phases"])
            return numbers["bias"] + waves.sum(-1)
        if self.name == "piecewise_linear":
            bent = torch.relu(x.unsqueeze(-1) - numbers["breaks"]) * numbers["changes"]
            return numbers["offset"] + numbers["slope"] * x + bent.sum(-1)
        value = (x.unsqueeze(-1) * numbers["slopes"] + numbers["intercepts"]).max(dim=-1).values
        if self.name == "tropical_rational":
            value = value - (x.unsqueeze(-1) * numbers["lower_slopes"] + numbers["lower_intercepts"]).max(dim=-1).values
        return value


def _numbers(name: str, values: dict[str, np.ndarray], middle: float, half: float) -> dict[str, np.ndarray]:
    if name in ("hermite", "chebyshev", "legendre"):
        from polytrope.ops.reference import BASES

        count = len(values["coefficients"])
        powers = values["coefficients"] @ BASES[name](count - 1).numpy()
        shifted = np.zeros(count)
        for power in powers[::-1]:  # Horner's rule with the polynomial x = middle + half · t
            shifted = middle * shifted + half * np.concatenate([[0.0], shifted[:-1]])
            shifted[0] += power
        return {"powers": shifted}
    if name == "polyrelu":
        return {"powers": values["coefficients"]}
    if name == "fourier":
        factorials = np.array([math.factorial(k) for k in range(1, len(values["amplitudes"]) + 1)], dtype=np.float64)
        return values | {"amplitudes": values["amplitudes"] / factorials}
    if name == "tropical":
        degree = len(values["coefficients"]) - 1
        scale = math.sqrt(2.0) / degree
        return {"slopes": scale * np.arange(degree + 1), "intercepts": scale * values["coefficients"]}
    if name == "tropical_rational":
        return {
            "slopes": values["numerator_slopes"],
            "intercepts": values["numerator_intercepts"],
            "lower_slopes": values["denominator_slopes"],
            "lower_intercepts": values["denominator_intercepts"],
        }
    return values


def _broken_line(interval: Any, heights: np.ndarray) -> dict[str, np.ndarray]:
    knots = np.linspace(interval[0], interval[1], len(heights))
    slopes = np.diff(heights) / np.diff(knots)
    return {
        "offset": np.array(heights[0] - slopes[0] * knots[0]),
        "slope": np.array(slopes[0]),
        "breaks": knots[1:-1],
        "changes": np.diff(slopes),
    }


def _end_slopes(module: nn.Module, low: float, high: float) -> list[float]:
    """F' outside the interval, on both sides."""
    double = copy.deepcopy(module).double().cpu()
    length = high - low
    with torch.no_grad():
        left = double(torch.tensor([low - length, low - 2 * length], dtype=torch.float64))
        right = double(torch.tensor([high + 2 * length, high + length], dtype=torch.float64))
    return [float((left[0] - left[1]) / length), float((right[0] - right[1]) / length)]


def _horner(x: Tensor, powers: Tensor) -> Tensor:
    value = torch.zeros_like(x) + powers[-1]
    for index in range(len(powers) - 2, -1, -1):
        value = value * x + powers[index]
    return value


def with_plain_activations(model: nn.Module) -> nn.Module:
    """A copy of the model on the CPU whose learnable activations are ordinary operations."""
    copied = copy.deepcopy(model).cpu().eval()
    if is_learnable_activation(copied):
        return PlainActivation(copied)
    for owner in list(copied.modules()):
        for name, child in list(owner._modules.items()):
            if child is not None and is_learnable_activation(child):
                setattr(owner, name, PlainActivation(child))
    return copied


def tabulate(module: nn.Module, interval: tuple[float, float], points: int = 1025) -> dict[str, Any]:
    """A learned activation as a table for serving: equidistant x with values, and the slopes that continue it outside.

    `maximum_error` is what linear interpolation in the table loses inside, at ten times as many points.

    Raises:
        ValueError: fewer than two points, or an interval that is none.
    """
    low, high = float(interval[0]), float(interval[1])
    if points < 2 or not low < high:
        raise ValueError(f"table: expected lo < hi and at least 2 points, got ({low}, {high}) and {points}")
    double = copy.deepcopy(module).double().cpu()
    x = np.linspace(low, high, points)
    dense = np.linspace(low, high, 10 * points)
    with torch.no_grad():
        values, exact = (double(torch.from_numpy(part)).numpy() for part in (x, dense))
    return {
        "format": 1,
        "low": low,
        "high": high,
        "values": values.tolist(),
        "slopes_outside": _end_slopes(module, low, high),
        "maximum_error": float(np.abs(np.interp(dense, x, values) - exact).max()),
        "activation": module.config() if is_learnable_activation(module) else None,  # type: ignore[operator]
    }


def save_table(path: Path, module: nn.Module, interval: tuple[float, float], points: int = 1025) -> dict[str, Any]:
    """Write `tabulate` as JSON; see there."""
    table = tabulate(module, interval, points)
    path.write_text(json.dumps(table) + "\n")
    return table
