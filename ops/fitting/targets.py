"""The functions that are fitted: by name, callable or module; their values, slopes and kinks in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Target = Callable[[Tensor], Tensor]
Array = np.ndarray

NAMED: dict[str, Target] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": functional.mish,
    "elu": functional.elu,
    "softplus": functional.softplus,
    "hardswish": functional.hardswish,
    "leaky_relu": functional.leaky_relu,
}
_KINK_GRID = 2049
_KINK_CANDIDATES = 24
_BISECTIONS = 44


def resolve_target(target: str | Target | nn.Module) -> Target:
    """The function to fit, ready for float64.

    Args:
        target: a name of `NAMED`, a function of a tensor, or an activation module (a float64 copy is made of it).

    Raises:
        ValueError: unknown name, or a function that is not elementwise (a softmax, a norm, one slope per channel).
    """
    if isinstance(target, str):
        if target not in NAMED:
            raise ValueError(f"target: expected one of {', '.join(NAMED)}, a function or a module, got {target!r}")
        return NAMED[target]
    function: Target = copy.deepcopy(target).double().eval() if isinstance(target, nn.Module) else target
    probe = torch.linspace(-2.0, 3.0, 7, dtype=torch.float64)
    try:
        with torch.no_grad():
            forwards, parts = function(probe.clone()), [function(part.clone()) for part in (probe[:3], probe[3:])]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"target: cannot be called on a float64 tensor of shape [7]: {error}") from error
    if not isinstance(forwards, Tensor) or forwards.shape != probe.shape:
        raise ValueError("target: expected a function from a tensor to a tensor of the same shape")
    if not torch.allclose(forwards, torch.cat(parts), rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ValueError("target: the function is not elementwise, so no activation can stand for it")
    return function


def sample(target: Target, x: Array, derivative: Target | None = None) -> tuple[Array, Array]:
    """f(x) and f'(x) in float64 at the points `x` of any shape; the derivative by autograd unless it is given.

    Raises:
        ValueError: no derivative, or a value that is not finite.
    """
    inputs = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)).requires_grad_(derivative is None)
    with torch.enable_grad():
        outputs = target(inputs * 1.0)  # not a leaf: an activation that works in place may do so
        if derivative is not None:
            slopes = derivative(inputs.detach())
        elif outputs.requires_grad:
            (slopes,) = torch.autograd.grad(outputs.sum(), inputs)
        else:
            raise ValueError("target: autograd cannot differentiate the function; give `derivative`")
    value, slope = outputs.detach().double().numpy(), slopes.detach().double().numpy()
    if not (np.isfinite(value).all() and np.isfinite(slope).all()):
        bad = x[~(np.isfinite(value) & np.isfinite(slope))]
        raise ValueError(f"target: not finite at x = {bad.flat[0]:.6g}; choose an interval where it is")
    return value, slope


def find_kinks(target: Target, low: float, high: float, derivative: Target | None = None) -> list[float]:
    """Where the slope jumps inside (low, high): quadrature panels end there, so that their rules stay accurate.

    The largest jumps between grid points are followed by bisection; a jump that stays while the cell shrinks is a kink.
    """
    grid = np.linspace(low, high, _KINK_GRID)
    slopes = sample(target, grid, derivative)[1]
    jumps = np.abs(np.diff(slopes))
    peaks = np.flatnonzero((jumps >= np.roll(jumps, 1)) & (jumps >= np.roll(jumps, -1)))
    candidates = peaks[np.argsort(-jumps[peaks], kind="stable")][:_KINK_CANDIDATES]
    left, right = grid[candidates], grid[candidates + 1]
    initial = jumps[candidates]
    for _ in range(_BISECTIONS):
        middle = (left + right) / 2
        at = sample(target, np.stack([left, middle, right]), derivative)[1]
        first = np.abs(at[1] - at[0]) >= np.abs(at[2] - at[1])
        left, right = np.where(first, left, middle), np.where(first, middle, right)
        jump = np.where(first, np.abs(at[1] - at[0]), np.abs(at[2] - at[1]))
        stays = jump > np.maximum(0.4 * initial, 1e-6)
        left, right, initial = left[stays], right[stays], initial[stays]
        if not len(left):
            return []
    return sorted({float(point) for point in (left + right) / 2})
