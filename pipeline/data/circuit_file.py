"""`circuit.json`: what the circuit that the `export_circuit` stage wrote costs, and where it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from polytrope.pipeline.data.converted_layers import Cost
from polytrope.pipeline.data.records import Record, read_record, write_record

CIRCUIT_FILE = "circuit.json"
CIRCUIT_ONNX = "circuit.onnx"


class GraphCost(Cost):
    """The same with the degree of the result as a polynomial of the input, by the product rule: an upper bound."""

    degree: int


class Division(Record):
    """A division of attention, or by the root of a norm's mean square, and the polynomial in its place.

    Args:
        name: of the module.
        measured: smallest and largest denominator, or mean square, of the calibration.
        domain: the range of the polynomial.
        relative_error: the largest |1 - d r(d)| there, of a root |1 - √d r(d)|, in exact arithmetic.
        inputs, outside: rows of the held-out samples, and those outside of the domain.
        minimum, maximum: of them.
    """

    name: str
    measured: tuple[float, float]
    domain: tuple[float, float]
    relative_error: float
    inputs: int
    outside: int
    minimum: float | None
    maximum: float | None


class ActivationRange(Record):
    """What an activation received in the calibration; a polynomial is the same on every range."""

    name: str
    minimum: float
    maximum: float


class CircuitRecord(Record):
    """The circuit: `[1, positions, width]` embedded tokens → `[1, positions, vocabulary]` logits.

    Args:
        cost: of one evaluation; depth and levels one after the other.
        layers: of each layer, with the depth, levels and degree that are reached there.
        largest_constant: in absolute value.
        deviation: the largest one of the file's logits, in float64, from the model's with divisions, relative to the
            largest logit, on calibration data.
        calibration_samples, held_out_samples: how many there were.
        loss, loss_with_divisions: nats per token of the held-out samples, with the polynomials and before; None: no
            finite number.
    """

    format: Literal[1] = 1
    positions: int
    width: int
    vocabulary: int
    cost: GraphCost
    layers: dict[str, GraphCost]
    largest_constant: float
    deviation: float
    divisions: list[Division]
    activations: list[ActivationRange]
    calibration_samples: int
    held_out_samples: int
    loss: float | None
    loss_with_divisions: float | None

    def metrics(self) -> dict[str, float]:
        """Depth, products per token, and what lies outside of the ranges."""
        losses = {"val_loss": self.loss, "val_loss_with_divisions": self.loss_with_divisions}
        return {
            "multiplicative_depth": float(self.cost.depth),
            "levels": float(self.cost.levels),
            "products_per_token": self.cost.products / self.positions,
            "constant_products_per_token": self.cost.constant_products / self.positions,
            "reciprocal_error": max(division.relative_error for division in self.divisions),
            "rows_outside": float(sum(division.outside for division in self.divisions)),
            "deviation": self.deviation,
            **{name: loss for name, loss in losses.items() if loss is not None},
        }


def write_circuit(directory: Path, circuit: CircuitRecord) -> None:
    """Write `circuit.json`."""
    write_record(directory / CIRCUIT_FILE, circuit)


def read_circuit(directory: Path) -> CircuitRecord:
    """Read `circuit.json`.

    Raises:
        UserError: not there, damaged, or of another version.
    """
    return read_record(directory / CIRCUIT_FILE, CircuitRecord, "name an `export_circuit` stage")
