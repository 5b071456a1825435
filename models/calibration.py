"""What the activations of a model receive: streaming histograms, which can be added up over batches and machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.inputs import counted, masks
from polytrope.models.modes import measuring
from polytrope.models.surgery import Activation

# Every power of two from 2^-34 to 2^30 is cut into 128 bins, on both sides of zero: 0.8 % wide or less whatever the
# scale of the data. They never depend on the data, so that histograms of any batches can be added, in any order, to
# the same integers. A bin is the sign, the exponent and the first bits of the mantissa of a float32.
_MANTISSA_BITS = 7
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -34, 30
_HALF = (_LARGEST_EXPONENT - _SMALLEST_EXPONENT) << _MANTISSA_BITS
BINS = 2 * _HALF
_CHUNK = 1 << 22
_RESOLUTION = 2048  # bins over the range of all but one in 1,000 inputs; finer ones are joined for a fit
_DRAWN = 4096  # raw inputs per call of an activation that may be kept
_KEPT = 2048  # raw inputs that are kept in the end


def _edges() -> np.ndarray:
    powers = 2.0 ** np.arange(_SMALLEST_EXPONENT, _LARGEST_EXPONENT)
    within = 1.0 + np.arange(1 << _MANTISSA_BITS) / (1 << _MANTISSA_BITS)
    positive = np.append(np.multiply.outer(powers, within).ravel(), 2.0**_LARGEST_EXPONENT)
    positive[0] = 0.0
    return np.concatenate([-positive[:0:-1], positive])


def _bins(x: Tensor) -> Tensor:
    """The bin of every number of a float32 tensor, int64."""
    bits = x.view(torch.int32)
    offset = (_SMALLEST_EXPONENT + 127) << _MANTISSA_BITS
    magnitude = (((bits & 0x7FFFFFFF) >> (23 - _MANTISSA_BITS)) - offset).clamp(0, _HALF - 1)
    return torch.where(bits < 0, _HALF - 1 - magnitude, _HALF + magnitude).long()


def _histogram(x: Tensor) -> np.ndarray:
    counts = np.zeros(BINS, dtype=np.int64)
    for part in x.detach().flatten().split(_CHUNK):  # type: ignore[no-untyped-call]
        counts += torch.bincount(_bins(part.float()), minlength=BINS).cpu().numpy()
    return counts


@dataclass(frozen=True)
class Sample:
    """Raw inputs, drawn by a hash of value and place: of any parts, in any order, the same are kept.

    Args:
        priorities: `[n]` uint64, ascending; the smallest are kept.
        values: `[n]` float64.
    """

    priorities: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, x: Tensor) -> Sample:
        flat = x.detach().flatten()
        count = min(len(flat), _DRAWN)
        # A prime step visits every place once, and does not follow the rows of x.
        places = torch.arange(count) if count == len(flat) else (torch.arange(count) * 2_654_435_761) % len(flat)
        values = flat[places.to(flat.device)].double().cpu().numpy()
        mixed = values.view(np.uint64) ^ (places.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return cls._smallest(mixed ^ (mixed >> np.uint64(31)), values)

    @classmethod
    def _smallest(cls, priorities: np.ndarray, values: np.ndarray) -> Sample:
        order = np.lexsort((values, priorities))[:_KEPT]
        return cls(priorities[order], values[order])

    def __add__(self, other: Sample) -> Sample:
        priorities = np.concatenate([self.priorities, other.priorities])
        return self._smallest(priorities, np.concatenate([self.values, other.values]))


@dataclass(frozen=True)
class Calibration:
    """The inputs of one activation.

    Args:
        counts: `[BINS]` int64.
        minimum, maximum: exact extremes; inf and -inf if there were no inputs.
        sample: some of the inputs as they came.
        dtypes: the floating-point formats they came in.
    """

    counts: np.ndarray
    minimum: float
    maximum: float
    sample: Sample
    dtypes: frozenset[torch.dtype]

    @classmethod
    def of(cls, x: Tensor) -> Calibration:
        """The histogram of one tensor of any shape, also an empty one.

        Raises:
            ValueError: NaN or infinity in it.
        """
        x = x.detach()
        low, high = (float(end) for end in torch.aminmax(x)) if x.numel() else (np.inf, -np.inf)
        if x.numel() and not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("NaN or infinity")
        return cls(_histogram(x), low, high, Sample.of(x), frozenset({x.dtype}))

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(
            self.counts + other.counts,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.sample + other.sample,
            self.dtypes | other.dtypes,
        )

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def held_out(self) -> np.ndarray:
        """Raw inputs that `measure` leaves out, to check a fit on; at most an eighth of all."""
        return self.sample.values[: self.total // 8]

    def measure(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (centres of the bins that are not empty, ascending) and how often each was seen, but for `held_out`.

        Bins that are narrow for the scale of the data are joined.
        """
        counts = self.counts - _histogram(torch.from_numpy(self.held_out))
        filled = np.flatnonzero(counts)
        edges = _edges()
        centres = np.clip((edges[filled] + edges[filled + 1]) / 2, self.minimum, self.maximum)
        centres[[0, -1]] = self.minimum, self.maximum
        weights = counts[filled].astype(np.float64)
        width = (self.quantile(0.9995) - self.quantile(0.0005)) / _RESOLUTION
        if width <= 0.0:
            return centres, weights
        groups = np.unique(np.floor(centres / width), return_inverse=True)[1]
        total = np.bincount(groups, weights)
        return np.bincount(groups, weights * centres) / total, total

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of the formats the inputs came in."""
        return max(self.dtypes, key=lambda dtype: (torch.finfo(dtype).eps, str(dtype)))

    def quantile(self, fraction: float) -> float:
        """The input below which `fraction` of all lie, interpolated within its bin."""
        cumulative = np.concatenate([[0.0], np.cumsum(self.counts)]) / self.counts.sum()
        return float(np.clip(np.interp(fraction, cumulative, _edges()), self.minimum, self.maximum))

    def density(self, x: np.ndarray) -> np.ndarray:
        """Probability density at `x`, averaged over 1 % of the range of all but one in 1,000 inputs."""
        spread = self.quantile(0.9995) - self.quantile(0.0005)
        width = max(spread / 100, 1e-6 * max(abs(self.minimum), abs(self.maximum)), 2.0**_SMALLEST_EXPONENT)
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


def calibrate(
    model: nn.Module,
    activations: Sequence[Activation],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
) -> dict[str, Calibration]:
    """Run `forward(model, batch)` over all batches, in evaluation mode, and collect each activation's inputs, but for
    those at padding.

    Raises:
        ValueError: data of the wrong shape or range; an activation that receives NaN or infinity, or nothing at all.
    """
    found: dict[str, Calibration] = {}
    current: Any = None  # batch
    failures: list[Exception] = []  # of what is done here; they never pass through the model, which might catch them

    def consume(name: str, module: nn.Module, arguments: Sequence[Any]) -> None:
        try:
            x = input_of(arguments)
            measured = Calibration.of(counted(x, mask_at(current, module, x)))
            found[name] = found[name] + measured if name in found else measured
        except ValueError as error:
            failures.append(ValueError(f"activation `{name}` receives {error} from the calibration data"))
        except Exception as error:
            failures.append(error)

    handles = [
        activation.module.register_forward_pre_hook(
            lambda module, inputs, keywords, name=activation.name: consume(name, module, (*inputs, *keywords.values())),
            with_kwargs=True,
        )
        for activation in activations
    ]
    try:
        with measuring(model), masks(model) as mask_at:
            for batch in batches:
                current = batch
                try:
                    forward(model, batch)
                except (RuntimeError, IndexError, TypeError, ValueError) as error:
                    if not failures:
                        reason = str(error) or type(error).__name__
                        raise ValueError(f"the model cannot run on the calibration data: {reason}") from error
                if failures:
                    raise failures[0]
    finally:
        for handle in handles:
            handle.remove()
    silent = [
        activation.name for activation in activations if not (activation.name in found and found[activation.name].total)
    ]
    if silent:
        raise ValueError(f"the calibration data never reaches: {', '.join(silent)}; leave it out by name, or add data")
    return {activation.name: found[activation.name] for activation in activations}


def input_of(arguments: Sequence[Any]) -> Tensor:
    """What an activation is applied to, given by position or by keyword."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            return argument
    raise ValueError(f"no tensor of floating-point numbers (but {', '.join(type(a).__name__ for a in arguments)})")


def add(parts: Iterable[Mapping[str, Calibration]]) -> dict[str, Calibration]:
    """The calibration over all the data, from calibrations over parts of it."""
    total: dict[str, Calibration] = {}
    for part in parts:
        for name, measured in part.items():
            total[name] = total[name] + measured if name in total else measured
    return total
