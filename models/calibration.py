"""What the activations of a model receive: streaming histograms, which can be added up over batches and machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.surgery import Activation

# Bins are equally wide in asinh(4 x): 0.0014 wide at 0, 0.11 at 20. They never depend on the data, so that histograms
# of any batches can be added, in any order, to the same integers.
BINS = 4096
_STRETCH = 4.0
_REACH = float(np.arcsinh(_STRETCH * 1e4))
_CHUNK = 1 << 22  # histc counts in float32: exact up to 2^24 per call


def _edges() -> np.ndarray:
    return np.asarray(np.sinh(np.linspace(-_REACH, _REACH, BINS + 1)) / _STRETCH)


@dataclass(frozen=True)
class Calibration:
    """The inputs of one activation.

    Args:
        counts: `[BINS]` int64.
        minimum, maximum: exact extremes.
    """

    counts: np.ndarray
    minimum: float
    maximum: float

    @classmethod
    def of(cls, x: Tensor) -> Calibration:
        """The histogram of one tensor of any shape.

        Raises:
            ValueError: NaN or infinity in it.
        """
        low, high = (float(end) for end in torch.aminmax(x))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("NaN or infinity")
        counts = np.zeros(BINS, dtype=np.int64)
        for part in x.detach().flatten().split(_CHUNK):  # type: ignore[no-untyped-call]
            stretched = torch.asinh(part.float() * _STRETCH).clamp(-_REACH, _REACH)
            counts += torch.histc(stretched, BINS, -_REACH, _REACH).cpu().numpy().astype(np.int64)
        return cls(counts, low, high)

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(
            self.counts + other.counts, min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        )

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def measure(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (centres of the bins that are not empty, ascending) and how often each was seen."""
        filled = np.flatnonzero(self.counts)
        centres = np.sinh(np.linspace(-_REACH, _REACH, 2 * BINS + 1)[1::2]) / _STRETCH
        return np.clip(centres[filled], self.minimum, self.maximum), self.counts[filled].astype(np.float64)

    def quantile(self, fraction: float) -> float:
        """The input below which `fraction` of all lie, interpolated within its bin."""
        cumulative = np.concatenate([[0.0], np.cumsum(self.counts)]) / self.counts.sum()
        return float(np.clip(np.interp(fraction, cumulative, _edges()), self.minimum, self.maximum))

    def density(self, x: np.ndarray) -> np.ndarray:
        """Probability density at `x`, averaged over 1 % of the range of all but one in 1,000 inputs."""
        width = max((self.quantile(0.9995) - self.quantile(0.0005)) / 100, 1e-6)
        cumulative = np.concatenate([[0.0], np.cumsum(self.counts)]) / self.counts.sum()
        edges = _edges()
        above = np.interp(np.asarray(x) + width / 2, edges, cumulative)
        return np.asarray((above - np.interp(np.asarray(x) - width / 2, edges, cumulative)) / width)

    def summary(self) -> dict[str, Any]:
        """Extremes and quantiles, for people."""
        fractions = (0.0001, 0.001, 0.01, 0.5, 0.99, 0.999, 0.9999)
        return {
            "inputs": self.total,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "quantiles": {str(fraction): self.quantile(fraction) for fraction in fractions},
        }


class NotFiniteError(ValueError):
    """An activation receives NaN or infinity."""


def calibrate(
    model: nn.Module,
    activations: Sequence[Activation],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
) -> dict[str, Calibration]:
    """Run `forward(model, batch)` over all batches, in evaluation mode, and collect each activation's inputs.

    Raises:
        ValueError: data of the wrong shape or range; an activation that receives NaN or infinity, or nothing at all.
    """
    found: dict[str, Calibration] = {}

    def consume(name: str, x: Tensor) -> None:
        try:
            measured = Calibration.of(x)
        except ValueError as error:
            raise NotFiniteError(f"activation `{name}` receives {error} from the calibration data") from None
        found[name] = found[name] + measured if name in found else measured

    handles = [
        activation.module.register_forward_pre_hook(
            lambda _module, inputs, name=activation.name: consume(name, inputs[0].detach())
        )
        for activation in activations
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                try:
                    forward(model, batch)
                except NotFiniteError:
                    raise
                except (RuntimeError, IndexError, TypeError, ValueError) as error:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    raise ValueError(f"the model cannot run on the calibration data: {reason}") from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    silent = [activation.name for activation in activations if activation.name not in found]
    if silent:
        raise ValueError(f"the calibration data never reaches: {', '.join(silent)}; leave it out by name, or add data")
    return found


def add(parts: Iterable[Mapping[str, Calibration]]) -> dict[str, Calibration]:
    """The calibration over all the data, from calibrations over parts of it."""
    total: dict[str, Calibration] = {}
    for part in parts:
        for name, measured in part.items():
            total[name] = total[name] + measured if name in total else measured
    return total
