"""What an activation makes of the variance of its inputs, from layer to layer: q → E[F(√q z)²] with z ~ N(0, 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import nn

from polytrope.ops.fitting.curves import Array
from polytrope.ops.moments import REACH, check_everywhere, curve_of, gaussian_nodes

SMALLEST, LARGEST = 1e-2, 1e2  # variances that are looked at
POINTS = 60  # even, so that q = 1 is none of them: a fixed point there lies between two
_STEPS = 400  # of the map, after which a deviation has died out
_SAME = 1e-9  # relative


@dataclass(frozen=True)
class FixedPoint:
    """A variance that the map keeps.

    Args:
        variance: q with E[F(√q z)²] = q.
        slope: of the map there; between -1 and 1 a deviation dies out.
        basin: the variances, as far as they are looked at, from which the map comes here; None: it leads away.
    """

    variance: float
    slope: float
    basin: tuple[float, float] | None


@dataclass(frozen=True)
class VarianceMap:
    """The map at `POINTS` variances.

    Args:
        variances, images: `[POINTS]`.
        fixed_points: ascending.
        keeps_all: every variance is kept, so that none is isolated (ReLU, scaled).
    """

    variances: Array
    images: Array
    fixed_points: list[FixedPoint]
    keeps_all: bool


def variance_map(activation: nn.Module) -> VarianceMap:
    """The map of an activation with its present parameters.

    Raises:
        ValueError: an activation that is gated, has groups of channels or is not elementwise; one for its domain alone.
    """
    check_everywhere(activation)
    reach = REACH * math.sqrt(LARGEST)
    curve, kinks = curve_of(activation, -reach, reach)

    def image(variance: float) -> tuple[float, float]:
        """The map and its slope, which is E[(z² - 1) F²] / 2q."""
        root = math.sqrt(variance)
        z, density = gaussian_nodes([kink / root for kink in kinks])
        square = curve(root * z)[0] ** 2
        return float(density @ square), float(density @ ((z * z - 1.0) * square)) / (2.0 * variance)

    variances = np.geomspace(SMALLEST, LARGEST, POINTS)
    images = np.array([image(float(variance))[0] for variance in variances])
    rises = images / variances - 1.0
    if float(np.abs(rises).max()) < _SAME:
        return VarianceMap(variances, images, [], keeps_all=True)
    ends = _iterated(variances, images)
    found = []
    for index in np.flatnonzero(np.sign(rises[:-1]) != np.sign(rises[1:])):
        low, high = float(variances[index]), float(variances[index + 1])
        for _ in range(60):
            middle = math.sqrt(low * high)
            before = image(low)[0] < low
            low, high = (middle, high) if (image(middle)[0] < middle) == before else (low, middle)
        variance = math.sqrt(low * high)
        slope = image(variance)[1]
        found.append(FixedPoint(variance, slope, _basin(variances, ends, variance) if abs(slope) < 1.0 else None))
    return VarianceMap(variances, images, found, keeps_all=False)


def _iterated(variances: Array, images: Array) -> Array:
    """Where the map leads from each of the variances, between which it is taken to be a power."""
    logarithms = np.log(variances)
    values = np.log(np.maximum(images, 1e-300))
    now = logarithms
    for _ in range(_STEPS):
        inside = (now >= logarithms[0]) & (now <= logarithms[-1])
        now = np.where(inside, np.interp(now, logarithms, values), now)
    ends: Array = np.exp(now)
    return ends


def _basin(variances: Array, ends: Array, fixed: float) -> tuple[float, float]:
    """The variances around the fixed point that lead to it, the two beside it at least."""
    right = int(np.searchsorted(variances, fixed))
    left = right - 1
    comes = np.abs(ends / fixed - 1.0) < 0.05
    while left > 0 and comes[left - 1]:
        left -= 1
    while right < len(variances) - 1 and comes[right + 1]:
        right += 1
    return float(variances[left]), float(variances[right])
