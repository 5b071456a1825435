"""What a conversion did to blocks, linear layers and weights, and what it left: records without torch.

The mathematics makes them, and `conversion.json` and `certificates.json` are written from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Left:
    """An activation that was seen and is not converted.

    Args:
        name: of its module, or of its owner and the function.
        kind: its class or function.
        place: class, method and line of a call; the class of a module.
        count: how often it was called on the data; None for a module.
        reason: why it stays.
    """

    name: str
    kind: str
    place: str
    count: int | None
    reason: str


@dataclass(frozen=True)
class DroppedBlocks:
    """What was dropped, and what stands for it.

    Args:
        blocks: names of the blocks that are gone, as they were before.
        into: the linear layer that took in the map.
        total: blocks of the model before.
        distances: mean cosine distance of the states before and after so many blocks, by the name of the block before
            them: of every cut that was possible.
        relative_error: how far the state behind the cut is from the one that the blocks gave, on the calibration data,
            relative to that: root mean squares.
        relative_error_without: the same if nothing stood for them.
    """

    blocks: tuple[str, ...]
    into: str
    total: int
    distances: dict[str, float]
    relative_error: float
    relative_error_without: float

    def describe(self) -> str:
        """For people."""
        return (
            f"{len(self.blocks)} of {self.total} blocks dropped: {', '.join(self.blocks)}; a map in {self.into} stands "
            f"for them\nthe state behind them is off by {self.relative_error:.3g} of its size "
            f"({self.relative_error_without:.3g} without the map)"
        )


@dataclass(frozen=True)
class FactoredLayer:
    """One layer that is in two factors.

    Args:
        name, inputs, outputs, input_rank, output_rank: as of `MeasuredLayer`.
        rank: of its factors.
        relative_error: of its outputs without bias on the calibration data: root mean square, relative to theirs.
        largest_change: of a number of its matrix: no output moves by more than this times the sum of the sizes of the
            inputs, whatever they are. None: a record from before it was measured.
    """

    name: str
    inputs: int
    outputs: int
    input_rank: int
    output_rank: int
    rank: int
    relative_error: float
    largest_change: float | None = None

    @property
    def utilised_rank(self) -> int:
        """As many directions as the data make use of."""
        return min(self.input_rank, self.output_rank)


@dataclass(frozen=True)
class UnchangedLayer:
    """A layer or an activation that stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Factorization:
    """What became of all linear layers.

    Args:
        energy: share of the squares that the ranks of inputs and outputs are of.
        layers: in two factors now.
        left: as they were.
    """

    energy: float
    layers: tuple[FactoredLayer, ...]
    left: tuple[UnchangedLayer, ...]

    def utilisation(self) -> float:
        """Mean over the factored layers of the utilised rank relative to the largest that there could be."""
        shares = [layer.utilised_rank / min(layer.inputs, layer.outputs) for layer in self.layers]
        return sum(shares) / len(shares)

    def rows(self) -> list[list[str]]:
        """A table for people of what is in two factors, its head first."""
        table = [["linear layer", "size", "utilised rank", "rank", "outputs off by"]]
        table += [
            [
                layer.name,
                f"{layer.inputs} → {layer.outputs}",
                str(layer.utilised_rank),
                str(layer.rank),
                f"{layer.relative_error:.2e}",
            ]
            for layer in self.layers
        ]
        return table


@dataclass(frozen=True)
class EqualizedLayer:
    """An activation that took up scales.

    Args:
        name: of its module.
        rows: the linear layer before it, whose rows are scaled.
        columns: the linear layer behind it, whose columns are scaled; None where the activation takes up all.
        smallest, largest: scale.
        rows_before, rows_after, columns_before, columns_after: the largest size of a weight of either layer, before any
            scale and after all of them. None: of no layer, or a record from before they were measured.
    """

    name: str
    rows: str
    columns: str | None
    smallest: float
    largest: float
    rows_before: float | None = None
    rows_after: float | None = None
    columns_before: float | None = None
    columns_after: float | None = None

    def describe(self) -> str:
        """For people."""
        said = f"{self.name} took up scales of {self.rows} from {self.smallest:.3g} to {self.largest:.3g}"
        ranges = (
            (self.rows, self.rows_before, self.rows_after),
            (self.columns, self.columns_before, self.columns_after),
        )
        for layer, before, after in ranges:
            if before is not None:
                said += f"; the largest weight of {layer} was {before:.3g} and is {after:.3g}"
        return said


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer.

    Args:
        name: of its module.
        inputs, outputs: numbers of channels.
        exponent: of the power; 1 is the uniform grid.
        relative_error: of its outputs without bias on the calibration data: root mean square, relative to theirs.
        uniform_error: the same, had the grid been uniform.
    """

    name: str
    inputs: int
    outputs: int
    exponent: float
    relative_error: float
    uniform_error: float


@dataclass(frozen=True)
class Quantization:
    """What became of all layers with a matrix of weights.

    Args:
        bits: of a weight.
        per: what has a scale of its own: a row of the matrix, or the whole matrix (`tensor`).
        layers: rounded.
        left: as they were.
        equalized: activations that took up the scales of the rows before them.
        unequalized: activations that did not, where that was asked for.
        bytes_before, bytes_after: of all parameters of the model, as they were before anything was done to it, and
            now with the rounded weights packed and their scales in 4 bytes each. The model itself is written with
            ordinary numbers.
    """

    bits: int
    per: Literal["row", "tensor"]
    layers: tuple[QuantizedLayer, ...]
    left: tuple[UnchangedLayer, ...]
    equalized: tuple[EqualizedLayer, ...]
    unequalized: tuple[UnchangedLayer, ...]
    bytes_before: int
    bytes_after: int

    def rows(self) -> list[list[str]]:
        """A table for people of what is rounded, its head first."""
        table = [[f"linear layer, {self.bits} bits", "size", "exponent", "outputs off by", "on a uniform grid"]]
        table += [
            [
                layer.name,
                f"{layer.inputs} → {layer.outputs}",
                f"{layer.exponent:.4g}",
                f"{layer.relative_error:.2e}",
                f"{layer.uniform_error:.2e}",
            ]
            for layer in self.layers
        ]
        return table
