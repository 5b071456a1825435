"""What a conversion to polynomials only says beside the fits: costs, and inputs outside of the certified ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import nn

from polytrope.models.domains import DomainInputs, describe_outside, watching
from polytrope.models.inputs import masks, part, size_of
from polytrope.models.modes import measuring
from polytrope.ops import Composition
from polytrope.ops.circuit import Cost, count

_HELD_OUT = 4  # one in so many samples
_EXTREMES = ("minimum", "maximum")  # fields of `DomainInputs`


@dataclass(frozen=True)
class Polynomials:
    """All polynomials of a model, on data that their domains were not made of.

    Args:
        costs: of one evaluation, by the activation's name.
        seen: what each one received, with the inputs outside of its domain.
        samples, batches: held-out ones, which went through the model.
    """

    costs: dict[str, Cost]
    seen: dict[str, DomainInputs]
    samples: int
    batches: int

    def _calls(self, name: str) -> int:
        """In a forward pass."""
        return self.seen[name].calls // self.batches

    @property
    def depth(self) -> int:
        """Of the activations one after the other; what the layers between them cost is not in it."""
        return sum(cost.depth * self._calls(name) for name, cost in self.costs.items())

    @property
    def levels(self) -> int:
        """The same with products by constants."""
        return sum(cost.levels * self._calls(name) for name, cost in self.costs.items())

    @property
    def products(self) -> float:
        """Of two variable factors, per sample."""
        return sum(cost.products * self.seen[name].inputs for name, cost in self.costs.items()) / self.samples

    @property
    def constant_products(self) -> float:
        """By constants, per sample."""
        return sum(cost.constant_products * self.seen[name].inputs for name, cost in self.costs.items()) / self.samples

    def describe(self) -> str:
        """Costs in one sentence; a second one where inputs lay outside."""
        text = describe_costs(self)
        warning = describe_outside(self.seen)
        return text if warning is None else f"{text}\n{warning}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready numbers; an activation that received nothing has no extremes: None."""
        content = asdict(self)
        for entry in content["seen"].values():
            for name in _EXTREMES:
                entry[name] = entry[name] if math.isfinite(entry[name]) else None
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Polynomials:
        """What `to_dict` gave."""
        seen = {}
        for name, entry in content["seen"].items():
            known = {key: value for key, value in entry.items() if key not in _EXTREMES or value is not None}
            seen[name] = DomainInputs(**{**known, "domain": tuple(entry["domain"])})
        costs = {name: Cost(**entry) for name, entry in content["costs"].items()}
        return cls(costs, seen, int(content["samples"]), int(content["batches"]))


class Costs(Protocol):
    """What the polynomials of a model cost together, measured or recorded; fields as of `Polynomials`."""

    @property
    def depth(self) -> int: ...
    @property
    def levels(self) -> int: ...
    @property
    def products(self) -> float: ...
    @property
    def constant_products(self) -> float: ...
    @property
    def samples(self) -> int: ...


def describe_costs(costs: Costs) -> str:
    """In one sentence."""
    return (
        f"all, one after the other: depth {costs.depth}, {costs.levels} levels; {costs.products:.4g} products "
        f"and {costs.constant_products:.4g} by constants per sample ({costs.samples} held-out samples)"
    )


def hold_out(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to calibrate on, and what is kept aside: the last quarter of each batch, or one in four small batches.

    Raises:
        ValueError: fewer than four samples, or a function that runs the model.
    """
    kept, aside = [], []
    for batch in batches:
        size = size_of(batch)
        if not size:
            raise ValueError(
                "polynomial_only: certified ranges are checked on samples that are kept aside, and a function that "
                "runs the model has none; give batches"
            )
        cut = size - size // _HELD_OUT
        last = part(batch, cut, size) if cut < size else None
        if last is None:
            kept.append(batch)
        else:
            kept.append(part(batch, 0, cut))
            aside.append(last)
    if not aside:
        aside = kept[_HELD_OUT - 1 :: _HELD_OUT]
        kept = [batch for number, batch in enumerate(kept) if number % _HELD_OUT != _HELD_OUT - 1]
    if not aside:
        raise ValueError(
            f"polynomial_only: certified ranges need at least {_HELD_OUT} calibration samples, as some are kept aside "
            f"to check them; got {sum(map(size_of, kept))}"
        )
    return kept, aside


def measure_polynomials(
    model: nn.Module, names: Sequence[str], held_out: Sequence[Any], forward: Callable[[nn.Module, Any], Any]
) -> Polynomials:
    """Costs of every polynomial, and its inputs on data that its domain was not made of.

    Args:
        model: the converted one.
        names: of the activations that were converted, all of them compositions.
    """
    current: Any = None  # batch
    with (
        measuring(model),
        masks(model) as mask_at,
        watching(model, lambda module, x: mask_at(current, module, x)) as found,
    ):
        for batch in held_out:
            current = batch
            forward(model, batch)
    costs = {}
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, Composition)
        costs[name] = count(module.circuit())
    seen = {name: found[name] for name in names}
    return Polynomials(costs, seen, sum(map(size_of, held_out)), len(held_out))
