"""The activations in `conversion.json`, and what a report shows of it: none is made anew for a change of a model.

What the mathematics measures has the same name here, with the fields that are written of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from polytrope.pipeline.data.records import OpenRecord, Record, read_record

CONVERSION_FILE = "conversion.json"
HINT = "name a `convert` stage"


class Curves(Record):
    """An activation and its replacement at the points `x`, and the density of the inputs there."""

    x: list[float]
    target: list[float]
    fit: list[float]
    density: list[float]


class Cost(Record):
    """What one evaluation of a polynomial costs: `products` of two variable factors, `depth` of these alone, `levels`
    with products by constants too (of `polytrope.ops.circuit.Cost`)."""

    depth: int
    levels: int
    products: int
    constant_products: int
    additions: int


class DomainInputs(Record):
    """Inputs of a polynomial on data that its domain was not made of, and how many lay outside
    (of `polytrope.models.domains.DomainInputs`)."""

    inputs: int
    below: int
    above: int
    probability: float
    minimum: float | None
    maximum: float | None


class PolynomialModel(Record):
    """All polynomials of a model together: the sums of `polytrope.models.polynomials.Polynomials`.

    Args:
        depth, levels: of the activations one after the other, each as often as a forward pass calls it; what the layers
            between them cost is not in it.
        products, constant_products: per sample.
        samples: held-out ones, which these and the inputs outside are of.
        inputs, outside: of all activations on them.
    """

    depth: int
    levels: int
    products: float
    constant_products: float
    samples: int
    inputs: int
    outside: int


class ConvertedLayer(OpenRecord):
    """One activation.

    Args:
        name: of the module; target: its class before.
        family, degree, config, coefficients: of what replaces it.
        interval: where the fit holds.
        relative_error: root mean square over the inputs, relative to that of the target.
        inputs: extremes and quantiles of what it receives.
        certificate: bounds of the errors by name.
        circuit, outside: of a polynomial without tangents.
    """

    name: str
    target: str
    family: str
    degree: int | list[int]
    interval: tuple[float, float]
    config: dict[str, Any]
    coefficients: list[Any]
    relative_error: float | None
    inputs: dict[str, Any]
    certificate: dict[str, Any]
    curve: Curves
    circuit: Cost | None = None
    outside: DomainInputs | None = None


class _Dropped(Record):
    blocks: list[str]
    total: int


class _Factored(Record):
    layers: list[dict[str, Any]]


class _Rounded(Record):
    bits: int
    bytes_after: int


class ShownConversion(Record):
    """As much of a conversion (`conversion_file.ConversionRecord`) as a report shows."""

    format: Literal[1] = 1
    layers: list[ConvertedLayer]
    quadratic: list[str] | None = None
    dropped: _Dropped | None = None
    factorization: _Factored | None = None
    quantization: _Rounded | None = None

    def structure(self) -> list[str]:
        """What was done to blocks, linear layers and weights, for people; empty where nothing was."""
        said = []
        if self.dropped is not None:
            said.append(f"{len(self.dropped.blocks)} of {self.dropped.total} blocks dropped")
        if self.factorization is not None:
            said.append(f"{len(self.factorization.layers)} layers in two factors")
        if self.quadratic is not None:
            said.append(f"{len(self.quadratic)} quadratic layers")
        if self.quantization is not None:
            megabytes = self.quantization.bytes_after / 1e6
            said.append(f"{self.quantization.bits}-bit weights, {megabytes:.3g} MB packed")
        return said


def read_shown_conversion(directory: Path) -> ShownConversion:
    """Read so much of `conversion.json`.

    Raises:
        UserError: not there, damaged, or of another version.
    """
    return read_record(directory / CONVERSION_FILE, ShownConversion, HINT)
