"""Polynomials only, in `conversion.json`: costs, and inputs outside of the certified ranges."""

from __future__ import annotations

from dataclasses import asdict

from polytrope.models.domains import DomainInputs
from polytrope.models.polynomials import Polynomials
from polytrope.pipeline.data import converted_layers
from polytrope.pipeline.data.conversion_file import ConversionRecord
from polytrope.pipeline.data.records import finite


def with_polynomials(made: ConversionRecord, polynomials: Polynomials) -> ConversionRecord:
    """The record with costs of every polynomial and of all together, and the inputs outside of their domains."""
    layers = []
    for layer in made.layers:
        circuit = converted_layers.Cost(**asdict(polynomials.costs[layer.name]))
        layers.append(layer.model_copy(update={"circuit": circuit, "outside": _outside(polynomials.seen[layer.name])}))
    whole = converted_layers.PolynomialModel(
        depth=polynomials.depth,
        levels=polynomials.levels,
        products=polynomials.products,
        constant_products=polynomials.constant_products,
        samples=polynomials.samples,
        inputs=sum(seen.inputs for seen in polynomials.seen.values()),
        outside=sum(seen.outside for seen in polynomials.seen.values()),
    )
    return made.model_copy(update={"layers": layers, "polynomial": whole})


def _outside(seen: DomainInputs) -> converted_layers.DomainInputs:
    return converted_layers.DomainInputs(
        inputs=seen.inputs,
        below=seen.below,
        above=seen.above,
        probability=seen.probability,
        minimum=finite(seen.minimum),
        maximum=finite(seen.maximum),
    )


def outside_of_record(made: ConversionRecord) -> dict[str, DomainInputs]:
    """The counts of a record again, by name."""
    return {
        layer.name: DomainInputs(
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
