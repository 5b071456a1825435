"""`conversion.json`: what the `convert` stage put in the place of every activation, and of linear layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from polytrope.models.changes import DroppedBlocks, Factorization, Left, Quantization
from polytrope.pipeline.data.records import OpenRecord, Record, read_record, write_record

CONVERSION_FILE = "conversion.json"


class Curves(Record):
    """An activation and its replacement at the points `x`, and the density of the inputs there."""

    x: list[float]
    target: list[float]
    fit: list[float]
    density: list[float]


class CircuitCost(Record):
    """What one evaluation of a polynomial costs: `products` of two variable factors, `depth` of these alone, `levels`
    with products by constants too (`polytrope.ops.circuit.Cost`)."""

    depth: int
    levels: int
    products: int
    constant_products: int
    additions: int


class OutsideDomain(Record):
    """Inputs of a polynomial on data that its domain was not made of, and how many lay outside."""

    inputs: int
    below: int
    above: int
    probability: float
    minimum: float | None
    maximum: float | None


class PolynomialModel(Record):
    """All polynomials of a model together.

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
    circuit: CircuitCost | None = None
    outside: OutsideDomain | None = None


class Advice(Record):
    """What the conversion of one layer costs; the dearest have `advice`. A figure that is not finite is None."""

    rank: int
    name: str
    cost: float | None
    share: float | None
    relative_error: float | None
    degree: int | list[int]
    advice: str | None = None


class Size(Record):
    """Numbers in the model before and after, and how far its output moved: |difference| / |output|."""

    before: int
    after: int
    difference: float


class ConversionRecord(Record):
    """All layers, the advice where their costs were measured, and the activations that were not converted.

    `onnx_failure`: why `model.onnx`, which was asked for, is not there.
    `polynomial`: of a conversion to polynomials only.
    `quadratic`: names of linear layers that became quadratic ones, with the same function.
    `dropped`, `factorization`, `quantization`: blocks that are gone, linear layers in two factors, rounded weights;
    `size`: what all of it made of the model.
    """

    format: Literal[1] = 1
    layers: list[ConvertedLayer]
    advice: list[Advice] | None = None
    left: list[Left] | None = None
    onnx_failure: str | None = None
    polynomial: PolynomialModel | None = None
    quadratic: list[str] | None = None
    dropped: DroppedBlocks | None = None
    factorization: Factorization | None = None
    quantization: Quantization | None = None
    size: Size | None = None

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

    def metrics(self) -> dict[str, float]:
        """The worst layer's figures; of polynomials those of the model."""
        made = {} if self.quadratic is None else {"quadratic_layers": float(len(self.quadratic))}
        if self.dropped is not None:
            made["dropped_blocks"] = float(len(self.dropped.blocks))
        if self.factorization is not None:
            made["factored_layers"] = float(len(self.factorization.layers))
            made["utilisation"] = self.factorization.utilisation()
        if self.quantization is not None:
            made["bits"] = float(self.quantization.bits)
            made["quantized_layers"] = float(len(self.quantization.layers))
            made["bytes"] = float(self.quantization.bytes_after)
            made["bytes_before"] = float(self.quantization.bytes_before)
        if self.size is not None:
            made["parameters"] = float(self.size.after)
            made["parameters_before"] = float(self.size.before)
            made["output_difference"] = self.size.difference
        if not self.layers:
            return made
        figures = made | {
            "layers": float(len(self.layers)),
            "maximum_error": max(float(layer.certificate["maximum"]) for layer in self.layers),
            "rms_error": max(float(layer.certificate["rms"]) for layer in self.layers),
        }
        if self.polynomial is None:
            return figures
        whole = self.polynomial
        outside = max(layer.outside.probability for layer in self.layers if layer.outside is not None)
        return figures | {
            "multiplicative_depth": float(whole.depth),
            "products_per_sample": whole.products,
            "outside_probability": outside,
        }


def write_conversion(directory: Path, conversion: ConversionRecord) -> None:
    """Write `conversion.json`."""
    write_record(directory / CONVERSION_FILE, conversion)


def read_conversion(directory: Path) -> ConversionRecord:
    """Read `conversion.json`.

    Raises:
        UserError: not there, damaged, or of another version.
    """
    return read_record(directory / CONVERSION_FILE, ConversionRecord, "name a `convert` stage")
