"""`conversion.json`: what the `convert` stage put in the place of every activation, and of linear layers.

Apart from `converted_layers`, which reports read, because its records are those of the models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from polytrope.models.changes import DroppedBlocks, Factorization, Left, Quantization
from polytrope.pipeline.data.converted_layers import CONVERSION_FILE, HINT, ConvertedLayer, PolynomialModel
from polytrope.pipeline.data.records import Record, read_record, write_record


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
    return read_record(directory / CONVERSION_FILE, ConversionRecord, HINT)
