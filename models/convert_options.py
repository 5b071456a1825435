"""The options of a conversion for Python, the command and the stage, and which exclude each other; without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

# What `conversion.fit_options` takes.
FIT_OPTIONS = frozenset(
    {"family", "degree", "target_error", "coverage", "weight", "derivative_weight", "constraints", "basis"}
    | {"polynomial_only", "depth", "domain", "domain_margin"}
)
# What else is said of new activations alone, with what stands for "not given".
_OF_ACTIVATIONS: dict[str, Any] = {"types": [], "rated_samples": 8, "keep": None, "output_error": None}
_OF_CHOICES: dict[str, Any] = {"include": [], "exclude": [], "layers": None}
_WHY_NOT_POLYNOMIAL = {
    "fourier": "is made of cosines",
    "rational": "divides",
    "tropical": "compares",
    "tropical_rational": "compares",
    "polyrelu": "compares x with 0",
    "rational_spline": "divides",
}
_OF_POLYNOMIALS: dict[str, Any] = {"depth": None, "domain": None, "domain_margin": 0.25}
_OF_TAILS: dict[str, Any] = {"coverage": None, "derivative_weight": 0.01, "constraints": []}
_OF_OTHERS: dict[str, Any] = {"degree": None, "weight": "measured", "basis": "family"} | _OF_TAILS
POLYNOMIALS = ("hermite", "chebyshev", "legendre")
_LARGEST_DEGREE = 16  # these two of `polytrope.ops.families`, which a plan does not import
_MOST_PIECES = 64


@dataclass(frozen=True)
class DropBlocks:
    """Which blocks go; the block before them gets a least-squares map that stands for them.

    Args:
        count: so many in a row, where the states before and after them are the most alike.
        blocks: instead the numbers of the first and the last one, from 0.

    Raises:
        ValueError: none or both, or numbers that cannot be.
    """

    count: int | None = None
    blocks: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.blocks is None):
            raise ValueError("drop_blocks: give one of count (how many) and blocks ([first, last])")
        if self.count is not None and self.count < 1:
            raise ValueError(
                f"drop_blocks: count: expected at least 1, got {self.count}; without drop_blocks none goes"
            )
        if self.blocks is None:
            return
        first, last = self.blocks
        if first == 0:
            raise ValueError("drop_blocks: blocks: block 0 has none before it that could stand for it; begin with 1")
        if not 0 < first <= last:
            raise ValueError(f"drop_blocks: blocks: expected [first, last] with first ≤ last, got [{first}, {last}]")

    @property
    def number(self) -> int:
        """How many go."""
        if self.blocks is None:
            assert self.count is not None
            return self.count
        return self.blocks[1] - self.blocks[0] + 1


ENERGY = 0.999  # of which the utilised rank is told where nothing else is asked for


@dataclass(frozen=True)
class Factorize:
    """Which rank the two factors of a linear layer get; only layers that become smaller are factored.

    Args:
        energy: its utilised rank: as many directions as hold this share of the squares of its inputs, or of its outputs
            if those are fewer.
        ratio: the rank that leaves a layer 1 / ratio of its numbers.
        rank: this one in every layer.

    Raises:
        ValueError: not one of the three, or one that cannot be.
    """

    energy: float | None = None
    ratio: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.energy, self.ratio, self.rank)) != 1:
            raise ValueError(
                "factorize: give one of energy (a share, such as 0.999), ratio (how many times smaller) and rank"
            )
        if self.energy is not None and not 0 < self.energy < 1:
            raise ValueError(f"factorize: energy: expected a share above 0 and below 1, got {self.energy}")
        if self.ratio is not None and not 1 < self.ratio < math.inf:
            raise ValueError(f"factorize: ratio: expected a number above 1, got {self.ratio}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"factorize: rank: expected at least 1, got {self.rank}")


@dataclass(frozen=True)
class Quantize:
    """How the weights of linear layers are rounded.

    Args:
        bits: of a weight, its sign among them.
        exponent: of the power grid; `search`: for each layer the one from 0.2 to 1 with the least error of its outputs;
            1: uniform.
        per: what has a scale of its own: each `row` of a matrix, or the whole matrix (`tensor`).
        equalize: before that, rows are brought to one size where the activation behind them takes up the scales.

    Raises:
        ValueError: one that cannot be, or `equalize` beside scales per row, which it changes nothing for.
    """

    bits: int
    exponent: float | Literal["search"] = "search"
    per: Literal["row", "tensor"] = "row"
    equalize: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"quantize: bits: expected 2 to 16, got {self.bits}")
        if self.exponent != "search" and not 0.1 <= float(self.exponent) <= 1:
            raise ValueError(f"quantize: exponent: expected search, or a number from 0.1 to 1, got {self.exponent}")
        if self.per not in ("row", "tensor"):
            raise ValueError(f"quantize: per: expected row or tensor, got {self.per!r}")
        if self.equalize and self.per == "row":
            raise ValueError(
                "quantize: equalize: every row has a scale of its own, so that bringing rows to one size changes "
                "nothing; it is for per: tensor"
            )


def read_drop_blocks(given: Mapping[str, Any] | None) -> DropBlocks | None:
    """The options as they are written: `{count: 2}` or `{blocks: [3, 4]}`; None: not given.

    Raises:
        ValueError: an unknown one, or as of `DropBlocks`.
    """
    if given is None:
        return None
    values = _checked("drop_blocks", given, {"count": int, "blocks": list})
    blocks = values.get("blocks")
    if blocks is not None and (len(blocks) != 2 or not all(type(number) is int for number in blocks)):
        raise ValueError(f"drop_blocks: blocks: expected [first, last], got {list(blocks)}")
    return DropBlocks(values.get("count"), None if blocks is None else (blocks[0], blocks[1]))


def read_factorize(given: Mapping[str, Any] | None) -> Factorize | None:
    """The options as they are written: `{energy: 0.999}`, `{ratio: 3}` or `{rank: 16}`; None: not given.

    Raises:
        ValueError: an unknown one, or as of `Factorize`.
    """
    if given is None:
        return None
    return Factorize(**_checked("factorize", given, {"energy": float, "ratio": float, "rank": int}))


def read_quantize(given: Mapping[str, Any] | None) -> Quantize | None:
    """The options as they are written: `{bits: 4}`, with `exponent`, `per` and `equalize`; None: not given.

    Raises:
        ValueError: an unknown one, no bits, or as of `Quantize`.
    """
    if given is None:
        return None
    kinds: dict[str, type] = {"bits": int, "exponent": float, "per": str, "equalize": bool}
    exponent = given.get("exponent")
    rest = {name: value for name, value in given.items() if name != "exponent" or exponent != "search"}
    values = _checked("quantize", rest, kinds)
    if "bits" not in values:
        raise ValueError("quantize: bits: how many a weight has left is not given; expected 2 to 16")
    return Quantize(**values)


def possible_cuts(lengths: Sequence[int], options: DropBlocks) -> list[tuple[int, int]]:
    """Where blocks can go: (row, number in it of the block before them).

    Args:
        lengths: of the rows of blocks; only neighbours in one row can go together, and never its first.

    Raises:
        ValueError: nowhere.
    """
    number, total = options.number, sum(lengths)
    if options.blocks is None:
        cuts = [(row, after) for row, length in enumerate(lengths) for after in range(length - number)]
        if not cuts:
            rows = "in a row" if len(lengths) == 1 else "in one stage"
            raise ValueError(
                f"drop_blocks: count: {number} blocks cannot go: there are {max(lengths)} {rows}, and the one before "
                "them stays"
            )
        return cuts
    first, last = options.blocks
    if last >= total:
        raise ValueError(f"drop_blocks: blocks: [{first}, {last}] goes beyond the last block, {total - 1}")
    ends = list(accumulate(lengths))
    row = next(row for row, end in enumerate(ends) if first < end)
    start = ends[row] - lengths[row]
    if first == start:
        raise ValueError(f"drop_blocks: blocks: {first} is the first of a stage: none before it could stand for it")
    if last >= ends[row]:
        raise ValueError(
            f"drop_blocks: blocks: [{first}, {last}] goes beyond its stage, which ends with {ends[row] - 1}"
        )
    return [(row, first - start - 1)]


_WORDS = {int: "an integer", float: "a number", list: "a list", str: "a word", bool: "true or false"}


def _checked(place: str, given: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The options that are given, each of its kind."""
    values = {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"{place}: there is no {name}; there are {', '.join(kinds)}")
        allowed = {float: (int, float), list: (list, tuple)}.get(kinds[name], kinds[name])
        if not isinstance(value, allowed) or (isinstance(value, bool) and kinds[name] is not bool):
            raise ValueError(f"{place}: {name}: expected {_WORDS[kinds[name]]}, got {value!r}")
    return values


def fits_activations(family: str | None, polynomial_only: bool, structural: bool) -> bool:
    """Whether activations are replaced: always, but where only the structure changes and no family is given.

    Args:
        structural: blocks are dropped, or linear layers factored or rounded.
    """
    return not structural or family is not None or polynomial_only


def check_structural(given: Mapping[str, Any], *, factors: bool) -> None:
    """Refuse options of new activations where there are none.

    Args:
        given: all options by name; those that are absent or have their defaults were not given.
        factors: linear layers are factored or rounded, and chosen by some of these options.

    Raises:
        ValueError: the first of them.
    """
    absent = _OF_OTHERS | {"target_error": None} | _OF_POLYNOMIALS | _OF_ACTIVATIONS
    for name, default in (absent if factors else absent | _OF_CHOICES).items():
        value = given.get(name, default)
        if (list(value) if isinstance(value, tuple) and name != "domain" else value) != default:
            raise ValueError(
                f"{name} is for new activations, and without family they stay as they are; give family too"
            )


def check_equalize(quantize: Quantize | None) -> None:
    """Refuse equalisation beside new activations, which are told of as they were fitted.

    Raises:
        ValueError: says what to do instead.
    """
    if quantize is not None and quantize.equalize:
        raise ValueError(
            "quantize: equalize changes the coefficients of activations, and there are new ones; use two conversions, "
            "one after the other"
        )


def replacement(family: str | None, polynomial_only: bool) -> str:
    """The family of the new activations."""
    return "composition" if polynomial_only else family or "hermite"


def check_polynomial_only(polynomial_only: bool, given: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing beside `polynomial_only`, or without it.

    Args:
        given: the other options by name; those that are absent or have their defaults were not given.

    Raises:
        ValueError: the first of them, and what to use instead.
    """
    if not polynomial_only:
        for name, default in _OF_POLYNOMIALS.items():
            if given.get(name, default) != default:
                raise ValueError(f"{name} is for polynomial_only")
        return
    family = given.get("family")
    if family is not None:
        why = _WHY_NOT_POLYNOMIAL.get(family)
        reason = f"{why}, so it is no polynomial" if why else "is one basis of what is fitted anyway"
        raise ValueError(f"family {family} {reason}; leave family out")
    for name, default in _OF_OTHERS.items():
        if given.get(name, default) != default:
            instead = {"degree": "use depth", "coverage": "use domain"}.get(name, "leave it out")
            raise ValueError(f"{name} is for other conversions; {instead}")


def check_weight(weight: str, given: Mapping[str, Any]) -> None:
    """Refuse what means nothing beside `weight: normal`, which is a projection on polynomials of the whole line.

    Args:
        given: the other options by name; those that are absent or have their defaults were not given.

    Raises:
        ValueError: the first of them, and what to use instead.
    """
    if weight not in ("measured", "normal"):
        raise ValueError(f"weight: expected measured or normal, got {weight!r}")
    if weight == "measured":
        return
    family = given.get("family")
    if family is not None and family not in POLYNOMIALS:
        raise ValueError(f"weight normal projects on polynomials, not on family {family}; leave family out")
    for name, default in _OF_TAILS.items():
        if given.get(name, default) != default:
            raise ValueError(f"{name} is not for weight normal, which has no interval and no slopes; leave it out")


def check_basis(basis: str, family: str | None) -> None:
    """Refuse a basis of measured inputs for what is no polynomial.

    Args:
        family: None: not given.

    Raises:
        ValueError: the basis, and what to use instead.
    """
    if basis not in ("family", "measured"):
        raise ValueError(f"basis: expected family or measured, got {basis!r}")
    if basis == "measured" and family not in (None, *POLYNOMIALS):
        raise ValueError(
            f"basis measured is of polynomials, and family is {family}; expected {', '.join(POLYNOMIALS)}, or leave "
            "basis out"
        )


def check_family_degree(degree: int | None, family: str | None) -> None:
    """Refuse a degree that only a family of pieces has.

    Args:
        degree, family: None: not given.

    Raises:
        ValueError: the degree.
    """
    if degree is not None and degree > _LARGEST_DEGREE and family != "rational_spline":
        raise ValueError(f"expected at most {_LARGEST_DEGREE} (family rational_spline: {_MOST_PIECES} pieces)")


def check_keep(keep: int | None, output_error: float | None, rated_samples: int) -> None:
    """Refuse ways to keep activations that exclude each other, or that have no costs to go by.

    Raises:
        ValueError: says which.
    """
    if keep is None and output_error is None:
        return
    name = "keep" if output_error is None else "output_error"
    if keep is not None and output_error is not None:
        raise ValueError("keep and output_error: both say how many activations stay as they are; give one of them")
    if not rated_samples:
        raise ValueError(f"{name} goes by what every activation costs, and rated_samples is 0; give some")
