"""The functions that are fitted: by name, callable or module; their values, slopes and kinks in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from polytrope.ops.fitting.curves import Array, Curve

Target = Callable[[Tensor], Tensor]

NAMED: dict[str, Target] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu6": functional.relu6,
    "relu_squared": lambda x: functional.relu(x) ** 2,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": functional.mish,
    "elu": functional.elu,
    "softplus": functional.softplus,
    "hardswish": functional.hardswish,
    "leaky_relu": functional.leaky_relu,
}
_TRAINING_PROBE = 1 << 14  # points: a dropout of one in a thousand drops some of them
_KINK_GRID = 2049
_KINK_CANDIDATES = 24
_BISECTIONS = 44
_STRAIGHT = 33  # points of a piece of a function that may be made of straight lines


def resolve_target(target: str | Target | nn.Module) -> Target:
    """The function to fit, ready for float64; it never writes to its argument, whatever the target does to its own.

    Args:
        target: a name of `NAMED`, a function of a tensor, or an activation module (a float64 copy without its hooks is
            made of it).

    Raises:
        ValueError: unknown name, a function that is not elementwise (a softmax, a norm, one slope per channel), or one
            that is not the same in training (a dropout of its own, `RReLU`): its fit would lose that.
    """
    if isinstance(target, str):
        if target not in NAMED:
            raise ValueError(f"target: expected one of {', '.join(NAMED)}, a function or a module, got {target!r}")
        return _guarded(NAMED[target])
    module = _private_copy(target) if isinstance(target, nn.Module) else None
    function = _guarded(target if module is None else module)
    probe = torch.linspace(-2.0, 3.0, 7, dtype=torch.float64)
    try:
        with torch.no_grad():
            forwards, parts = function(probe), [function(part) for part in (probe[:3], probe[3:])]
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"target: cannot be called on a float64 tensor of shape [7]: {error}") from error
    if not isinstance(forwards, Tensor) or forwards.shape != probe.shape:
        raise ValueError("target: expected a function from a tensor to a tensor of the same shape")
    if not torch.allclose(forwards, torch.cat(parts), rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ValueError("target: the function is not elementwise, so no activation can stand for it")
    if module is not None and not _same_in_training(module):
        raise ValueError(
            f"target: {type(target).__name__} does something else in training than in evaluation (a dropout of its "
            "own?), which a fitted function would lose; make that a module of its own, or leave this activation out"
        )
    return function


def _guarded(function: Target) -> Target:
    # A product: not the caller's memory, and not a leaf, so that an activation that works in place may do so.
    return lambda x: function(x * 1.0)


def _private_copy(module: nn.Module) -> nn.Module:
    """On the CPU, in float64 and evaluation mode, without hooks: those of the user are for the model's own calls."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                memo[id(value)] = type(value)()
    return copy.deepcopy(module, memo).cpu().double().eval()


def _same_in_training(module: nn.Module) -> bool:
    trained = copy.deepcopy(module).train()
    probe = torch.linspace(-3.0, 3.0, _TRAINING_PROBE, dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return torch.equal(_guarded(trained)(probe), _guarded(module)(probe))


def sample(target: Target, x: Array, derivative: Target | None = None) -> tuple[Array, Array]:
    """f(x) and f'(x) in float64 at the points `x` of any shape; the derivative by autograd unless it is given.

    Raises:
        ValueError: no derivative, or a value that is not finite.
    """
    inputs = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)).requires_grad_(derivative is None)
    with torch.enable_grad():
        outputs = target(inputs * 1.0)
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


def broken_line(target: Target, low: float, high: float) -> list[float] | None:
    """By how much the slope changes at each kink, where the function is made of straight lines; None: it is not."""
    if not low < high:
        return None
    edges = np.array([low, *find_kinks(target, low, high), high])
    slopes = straight_slopes(lambda x: sample(target, x), edges)
    return None if slopes is None else [float(bend) for bend in np.diff(slopes)]


def straight_slopes(exact: Curve, edges: Array) -> Array | None:
    """The slope of each piece of a function between edges, where all are straight; None: one is not."""
    inside = edges[:-1, None] + np.diff(edges)[:, None] * np.linspace(0.001, 0.999, _STRAIGHT)
    _, slopes = exact(inside)
    if (np.ptp(slopes, axis=1) > 1e-9 * max(float(np.abs(slopes).max()), 1e-300)).any():
        return None
    return slopes[:, 0]
