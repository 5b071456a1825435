"""What a conversion to polynomials only says beside the fits: costs, and inputs outside of the certified ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from polytrope.models.domains import Seen, watching
from polytrope.models.modes import measuring
from polytrope.ops import Composition
from polytrope.ops.circuit import count
from polytrope.pipeline.data.conversion_file import CircuitCost, ConversionRecord, OutsideDomain, PolynomialModel

Batch = dict[str, Tensor]
_HELD_OUT = 4  # one in so many samples


def hold_out(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to calibrate on, and what is kept aside: the last quarter of each batch, or one in four small batches.

    Raises:
        ValueError: fewer than four samples.
    """
    kept, aside = [], []
    for batch in batches:
        size = len(next(iter(batch.values())))
        cut = size - size // _HELD_OUT
        kept.append({name: tensor[:cut] for name, tensor in batch.items()})
        if cut < size:
            aside.append({name: tensor[cut:] for name, tensor in batch.items()})
    if not aside:
        aside = kept[_HELD_OUT - 1 :: _HELD_OUT]
        kept = [batch for number, batch in enumerate(kept) if number % _HELD_OUT != _HELD_OUT - 1]
    if not aside:
        raise ValueError(
            f"polynomial_only: certified ranges need at least {_HELD_OUT} calibration samples, as some are kept aside "
            f"to check them; got {sum(len(next(iter(batch.values()))) for batch in kept)}"
        )
    return kept, aside


def with_polynomials(
    made: ConversionRecord, model: nn.Module, held_out: Sequence[Batch], forward: Callable[[nn.Module, Batch], Any]
) -> ConversionRecord:
    """The record with costs of every polynomial and of all together, and the inputs outside of their domains.

    Args:
        model: the converted one, which runs on data that the domains were not made of.
    """
    with measuring(model), watching(model) as found:
        for batch in held_out:
            forward(model, batch)
    samples = sum(len(next(iter(batch.values()))) for batch in held_out)
    layers, costs = [], {}
    for layer in made.layers:
        module = model.get_submodule(layer.name)
        assert isinstance(module, Composition)
        costs[layer.name] = count(module.circuit())
        circuit = CircuitCost(**asdict(costs[layer.name]))
        layers.append(layer.model_copy(update={"circuit": circuit, "outside": _outside(found[layer.name])}))
    calls = {name: seen.calls // len(held_out) for name, seen in found.items()}
    whole = PolynomialModel(
        depth=sum(cost.depth * calls[name] for name, cost in costs.items()),
        levels=sum(cost.levels * calls[name] for name, cost in costs.items()),
        products=sum(cost.products * found[name].inputs for name, cost in costs.items()) / samples,
        constant_products=sum(cost.constant_products * found[name].inputs for name, cost in costs.items()) / samples,
        samples=samples,
        inputs=sum(found[name].inputs for name in costs),
        outside=sum(found[name].outside for name in costs),
    )
    return made.model_copy(update={"layers": layers, "polynomial": whole})


def _outside(seen: Seen) -> OutsideDomain:
    return OutsideDomain(
        inputs=seen.inputs,
        below=seen.below,
        above=seen.above,
        probability=seen.probability,
        minimum=seen.minimum,
        maximum=seen.maximum,
    )


def outside_of_record(made: ConversionRecord) -> dict[str, Seen]:
    """The counts of a record again, by name."""
    return {
        layer.name: Seen(
            layer.interval,
            layer.outside.inputs,
            layer.outside.below,
            layer.outside.above,
            layer.outside.minimum if layer.outside.minimum is not None else float("nan"),
            layer.outside.maximum if layer.outside.maximum is not None else float("nan"),
        )
        for layer in made.layers
        if layer.outside is not None
    }
