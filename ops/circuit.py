"""Sums of Chebyshev polynomials as circuits of additions and multiplications, as homomorphic evaluation runs them.

The scheme is Paterson and Stockmeyer's in Chebyshev form (baby steps, giant steps; Han and Ki, "Better bootstrapping
for approximate homomorphic encryption", 2020): a sum of degree n is split as q · T_m + r with m a power of two until
the parts are shorter than a baby step; these are linear combinations of T_1 … T_b, and T_{a+b} = 2 T_a T_b - T_{a-b}.
Everything is written for any numbers with + and ·: tensors (exporters see Add and Mul alone), `fractions.Fraction`
(exact values), and `Counted`, which counts.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Split(NamedTuple):
    """high · T_at + low."""

    at: int
    high: Series
    low: Series


Series = Split | tuple[Any, ...]  # a tuple: coefficients of T_0, T_1, …


class Circuit(NamedTuple):
    """x → P_m(… P_1(u)) with u = scale · x + offset, times x where it is gated.

    Args:
        scale, offset: numbers.
        steps: P_1 … P_m.
        gated: whether the result is multiplied by x.
    """

    scale: Any
    offset: Any
    steps: tuple[Series, ...]
    gated: bool

    def run(self, x: Any) -> Any:
        """F(x) by additions and multiplications of x and numbers."""
        value = x * self.scale
        if self.offset != 0:
            value = value + self.offset
        for step in self.steps:
            value = value * 0 + step[0] if _is_constant(step) else _Powers(value).sum(step)
        return value * x if self.gated else value

    def converted(self, number: Callable[[float], Any]) -> Circuit:
        """With other numbers: `fractions.Fraction` for exact values."""
        steps = tuple(_converted(step, number) for step in self.steps)
        return Circuit(number(self.scale), number(self.offset), steps, self.gated)


def _converted(series: Series, number: Callable[[float], Any]) -> Series:
    if isinstance(series, Split):
        return Split(series.at, _converted(series.high, number), _converted(series.low, number))
    return tuple(number(coefficient) for coefficient in series)


def _is_constant(series: Series) -> bool:
    return not isinstance(series, Split) and not any(series[1:])


class _Powers:
    """T_1(u), T_2(u), … as they are asked for."""

    def __init__(self, u: Any) -> None:
        self.known = {1: u}

    def chebyshev(self, k: int) -> Any:
        if k not in self.known:
            apart = 2 if k % 4 == 2 and k > 2 else k % 2  # T_6 from T_4 and T_2: even sums need no odd ones
            product = self.chebyshev((k + apart) // 2) * self.chebyshev((k - apart) // 2)
            self.known[k] = (product + product) + (self.known[apart] * -1 if apart else -1)
        return self.known[k]

    def sum(self, series: Series) -> Any:
        """The value of a series that is not constant."""
        if isinstance(series, Split):
            high, low = series.high, series.low
            value = self.chebyshev(series.at) * (high[0] if _is_constant(high) else self.sum(high))
            return self._plus(value, low[0]) if _is_constant(low) else value + self.sum(low)
        terms = [self.chebyshev(k) * number for k, number in enumerate(series) if k > 0 and number != 0]
        return self._plus(functools.reduce(operator.add, terms), series[0])

    @staticmethod
    def _plus(value: Any, number: Any) -> Any:
        return value if number == 0 else value + number


def split(coefficients: Sequence[Any], baby: int) -> Series:
    """The sum of coefficients[k] T_k, split until no part is of a degree of `baby` or more.

    T_{m+j} = 2 T_m T_j - T_{m-j} for j ≤ m, so that the coefficients of both parts are sums of the given ones.
    """
    numbers = list(coefficients)
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    if len(numbers) <= baby:
        return tuple(numbers)
    at = 1 << (len(numbers) - 1).bit_length() - 1
    high = [numbers[at], *(2 * number for number in numbers[at + 1 :])]
    low = numbers[:at]
    for j, number in enumerate(numbers[at + 1 :], start=1):
        low[at - j] = low[at - j] - number
    return Split(at, split(high, baby), split(low, baby))


def best_split(coefficients: Sequence[Any]) -> Series:
    """The split of the smallest depth, and among those of the fewest products of two variable factors."""
    degree = len(coefficients) - 1
    candidates = [split(coefficients, 1 << power) for power in range(1, max(1, degree.bit_length()) + 1)]
    return min(candidates, key=lambda series: _order(_shape(series)))


def _shape(series: Series) -> Series:
    """The same with 1 for each coefficient that is not 0: circuits of one shape cost the same."""
    if isinstance(series, Split):
        return Split(series.at, _shape(series.high), _shape(series.low))
    return tuple(int(number != 0) for number in series)


@functools.lru_cache(maxsize=4096)
def _order(shape: Series) -> tuple[int, int, int]:
    cost = count(Circuit(1, 0, (shape,), False))
    return cost.depth, cost.products, cost.levels


@dataclass(frozen=True)
class Cost:
    """What one evaluation costs.

    Args:
        depth: the most products of two variable (encrypted) factors that follow one another.
        levels: the same with products by constants other than ±1 counted too: rescaling takes a level for each.
        products: of two variable factors.
        constant_products: of a variable factor and a constant.
        additions: of anything.
    """

    depth: int
    levels: int
    products: int
    constant_products: int
    additions: int


class Counted:
    """A number that counts what is done to it; all that follow from one share `totals`."""

    def __init__(self, totals: dict[str, int], depth: int = 0, levels: int = 0) -> None:
        self.totals = totals
        self.depth = depth
        self.levels = levels

    def __mul__(self, other: Any) -> Counted:
        if isinstance(other, Counted):
            self.totals["products"] += 1
            return Counted(self.totals, max(self.depth, other.depth) + 1, max(self.levels, other.levels) + 1)
        if other in (1, -1):
            return self
        self.totals["constant_products"] += 1
        return Counted(self.totals, self.depth, self.levels + 1)

    def __add__(self, other: Any) -> Counted:
        self.totals["additions"] += 1
        if isinstance(other, Counted):
            return Counted(self.totals, max(self.depth, other.depth), max(self.levels, other.levels))
        return self


def count(circuit: Circuit) -> Cost:
    """What the circuit costs, by running it on a number that counts."""
    totals = {"products": 0, "constant_products": 0, "additions": 0}
    result = circuit.run(Counted(totals))
    return Cost(depth=result.depth, levels=result.levels, **totals)


def make_circuit(polynomials: Sequence[Sequence[float]], center: float, half: float, gated: bool) -> Circuit:
    """P_m(… P_1((x - center) / half)), times x where gated, of Chebyshev coefficients P_1 … P_m.

    The change of variable costs a product by a constant, which a linear layer before x can take in.
    """
    steps = tuple(best_split([float(number) for number in numbers]) for numbers in polynomials)
    return Circuit(1.0 / half, -center / half, steps, gated)


def depth_of(degree: int) -> int:
    """Of a polynomial of this degree: ⌈log2 degree⌉."""
    return max(0, math.ceil(math.log2(degree)))
