"""Rational-quadratic splines: rising, with a continuous slope, given by values and slopes at knots, and invertible.

(Durkan, Bekasov, Murray, Papamakarios, Neural Spline Flows, 2019; Gregory and Delbourgo, Piecewise Rational Quadratic
Interpolation to Monotonic Data, 1982.) Their numbers and their inverse; values: `functional.rational_spline`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

FLOOR = 1e-3  # of the width of a piece relative to the interval, and of slopes


def invert(y: Tensor, knots: Tensor, heights: Tensor, slopes: Tensor) -> Tensor:
    """The x with S(x) = y, in closed form: t is a root of a quadratic equation.

    Args:
        y: any shape.
        knots, heights, slopes: `[pieces + 1]`, as of `functional.rational_spline`.
    """
    low, high = heights.detach()[[0, -1]].tolist()
    inside = y.clamp(low, high)
    piece = torch.searchsorted(heights[1:-1].contiguous(), inside.detach())
    width, rise = knots.diff()[piece], heights.diff()[piece]
    mean, rate, next_rate = rise / width, slopes[:-1][piece], slopes[1:][piece]
    above = inside - heights[:-1][piece]
    bend = above * (next_rate + rate - 2 * mean)
    square, linear, constant = bend + rise * (mean - rate), rise * rate - bend, -mean * above
    root = 2 * constant / (-linear - (linear * linear - 4 * square * constant).sqrt())
    beyond = y - inside
    return knots[:-1][piece] + root * width + beyond / torch.where(beyond < 0, slopes[0], slopes[-1])


def free(knots: Tensor, slopes: Tensor, secants: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers from which `tied` makes these widths, slopes and rises.

    Args:
        knots: `[pieces + 1]`; pieces of at least `FLOOR` of the whole.
        slopes: `[pieces + 1]`, above `FLOOR`.
        secants: mean slopes of the pieces, `[pieces]`, above `FLOOR`.
    """
    widths = knots.diff() / (knots[-1] - knots[0])
    shares = (widths - FLOOR) / (1 - FLOOR * len(widths))
    return shares.log(), _free_slope(slopes), _free_slope(secants)


def tied(
    widths: Tensor, slopes: Tensor, rises: Tensor, start: Tensor, interval: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Knots, heights and slopes `[(groups,) pieces + 1]` that rise for any numbers; all 0 are x itself, exactly.

    Args:
        widths: `[(groups,) pieces]`, their softmax are the shares of the interval.
        slopes, rises: `[(groups,) pieces + 1]` and `[(groups,) pieces]`, of the knots and in the mean of each piece.
        start: `[(groups,) 1]`, the first height less the first knot.
        interval: the first and the last knot.
    """
    low, high = interval
    pieces = widths.shape[-1]
    shares = FLOOR + (1 - FLOOR * pieces) * torch.softmax(widths, dim=-1)
    inner = low + (high - low) * shares[..., :-1].cumsum(-1)
    ends = [torch.full_like(start, end) for end in interval]
    knots = torch.cat([ends[0], inner, ends[1]], dim=-1)
    above = ((_slope(rises) - 1.0) * knots.diff()).cumsum(-1)
    return knots, knots + start + F.pad(above, (1, 0)), _slope(slopes)


def plain_numbers(knots: Tensor, heights: Tensor, slopes: Tensor, line: Tensor) -> dict[str, Tensor]:
    """What `plain_spline` takes, exact to a few units of float32 in float32, however far from 0 the knots lie.

    Args:
        knots, heights, slopes, line: `[pieces + 1]` and `[1]`, float64.
    """
    places = knots.float().double()
    return {
        "places": places,
        "rests": knots - places,
        "widths": knots.diff(),
        "rises": heights.diff(),
        "slopes": slopes,
        "start": heights[:1] - line * knots[:1],
        "line": line,
    }


def plain_spline(x: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """The same sum without a search: each piece adds its rise up to x; for files that know only ordinary operations."""
    slopes, widths, rises = (numbers[name] for name in ("slopes", "widths", "rises"))
    beyond = (x.unsqueeze(-1) - numbers["places"]) - numbers["rests"]  # each knot
    t = (beyond[..., :-1] / widths).clamp(0.0, 1.0)
    inside = _rise(t, rises, rises / widths, slopes[:-1], slopes[1:]).sum(-1)
    below, above = torch.clamp(beyond[..., 0], max=0.0), torch.clamp(beyond[..., -1], min=0.0)
    rest = inside + slopes[0] * below + slopes[-1] * above - numbers["line"] * beyond[..., 0]
    return numbers["start"] + rest


def _rise(t: Tensor, rise: Tensor, mean: Tensor, rate: Tensor, next_rate: Tensor) -> Tensor:
    u = t * (1 - t)
    return rise * (mean * t * t + rate * u) / (mean + (next_rate + rate - 2 * mean) * u)


def _slope(free: Tensor) -> Tensor:
    """Above `FLOOR`; 0 stands for 1."""
    return FLOOR + (1 - FLOOR) * (F.softplus(free) / math.log(2.0))


def _free_slope(slope: Tensor) -> Tensor:
    value = (slope - FLOOR) / (1 - FLOOR) * math.log(2.0)
    return value + (-torch.expm1(-value)).log()
