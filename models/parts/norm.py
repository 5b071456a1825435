"""Norms of vectors of channels: by vector, or by channel over the batch, which becomes an affine map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from polytrope.models.parts.evonorm import EvoNorm
from polytrope.models.parts.ranges import RangePenalty
from polytrope.models.parts.settings import (
    BatchNormSettings,
    EvoNormSettings,
    LayerNormSettings,
    NoNormSettings,
    Norm,
    RMSNormSettings,
)
from polytrope.models.per_layer import Entry

MOMENTUM = 0.1  # share of a batch in the running statistics
LIMIT = 4.0  # a variance that is more times the running one, or less than one by this, counts as this many


@dataclass(frozen=True)
class NormSizes:
    """What the model says of a norm.

    Args:
        width: channels.
        epsilon: added to the variance.
        bias: whether something is added to each channel.
        channels_first: of `[batch, channels, height, width]`, not `[…, channels]`.
        activated: of `evonorm`: an activation comes with it, and it has none of its own.
        number: of the norm among those of its model, in the order of computation.
    """

    width: int
    epsilon: float
    bias: bool = True
    channels_first: bool = False
    activated: bool = False
    number: int = 0


class ChannelsFirstLayerNorm(nn.Module):
    """Layer norm over the channels of `[batch, channels, height, width]`."""

    def __init__(self, channels: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.epsilon)
        return normalised.permute(0, 3, 1, 2)


class BatchNorm(nn.Module):
    """(x - mean) / √(variance + ε) · weight + bias, mean and variance of each channel over all vectors of a batch.

    In training these are those of the whole batch, of all workers, summed in float64 so that their number does not
    matter; where the weight is frozen, and in evaluation mode, running averages. They begin with the first batch, are
    not those of torch's batch norms, see `_take_in`, and stay float32 whatever the model is cast to.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, settings: BatchNormSettings, sizes: NormSizes) -> None:
        super().__init__()
        self.settings = settings
        self.epsilon = sizes.epsilon
        self.channels_first = sizes.channels_first
        self.weight = nn.Parameter(torch.ones(sizes.width))
        self.bias = nn.Parameter(torch.zeros(sizes.width)) if sizes.bias else None
        self.register_buffer("running_mean", torch.zeros(sizes.width))
        self.register_buffer("running_variance", torch.ones(sizes.width))

    def config(self) -> Entry:
        """What builds it again."""
        return self.settings.config()

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_first:
            return self._normalised(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._normalised(x)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) in float64, `[width]` each: x · scale + shift is what it computes in evaluation mode."""
        scale = self.weight.double() * (self.running_variance.double() + self.epsilon).rsqrt()
        shift = -self.running_mean.double() * scale
        return scale, shift if self.bias is None else shift + self.bias.double()

    def _normalised(self, x: Tensor) -> Tensor:
        """Of `[…, width]`."""
        dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        if self.training and self.weight.requires_grad:
            mean, variance = self._measured(x)
        else:
            mean, variance = self.running_mean.to(dtype), self.running_variance.to(dtype)
        scale = (variance + self.epsilon).rsqrt().to(dtype) * self.weight.to(dtype)
        result = (x.to(dtype) - mean.to(dtype)) * scale
        return (result if self.bias is None else result + self.bias.to(dtype)).to(x.dtype)

    def _measured(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of this batch in float64; the running ones take them in."""
        vectors = x.flatten(0, -2).double()
        sums, count = torch.stack((vectors.sum(0), vectors.square().sum(0))), vectors.size(0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            sums, count = all_reduce(sums), count * dist.get_world_size()  # type: ignore[no-untyped-call]
        if count < 2:
            raise ValueError("norm: batch needs at least two vectors in a batch to have a variance")
        mean = sums[0] / count
        variance = (sums[1] / count - mean.square()).clamp(min=0.0)
        self._take_in(mean.detach(), variance.detach() * (count / (count - 1)))
        return mean, variance

    @torch.no_grad()
    def _take_in(self, mean: Tensor, variance: Tensor) -> None:
        """Geometric running averages of variances, of which one batch moves none by more than `LIMIT` ** `MOMENTUM`.

        Through polynomials a single odd sample has hundreds of times the usual variance, and an arithmetic average
        would be such samples' alone for dozens of batches. A batch whose variance is limited moves the mean by as many
        of its standard deviations as it would have, of limited ones.
        """
        begins = (self.running_mean == 0.0) & (self.running_variance == 1.0)  # as they were made
        running, measured = self.running_variance.double() + self.epsilon, variance + self.epsilon
        limited = torch.minimum(torch.maximum(measured, running / LIMIT), running * LIMIT)
        share = MOMENTUM * (limited / measured).sqrt().clamp(max=1.0)
        averaged = running * (limited / running).pow(MOMENTUM) - self.epsilon
        self.running_mean.copy_(torch.where(begins, mean, torch.lerp(self.running_mean.double(), mean, share)))
        self.running_variance.copy_(torch.where(begins, variance, averaged.clamp(min=0.0)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        """What torch casts and moves modules by: the statistics move, and keep their dtype."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class InverseRoot(nn.Module):
    """1/√m, as a module: whoever wants a polynomial in its place exchanges it."""

    def forward(self, m: Tensor) -> Tensor:
        return m.rsqrt()


class RMSNorm(nn.Module):
    """x / √m · weight, m the mean of x² + ε, of `[…, width]`; half precision is left for float32.

    (Zhang, Sennrich, Root Mean Square Layer Normalization, 2019)
    """

    def __init__(self, settings: RMSNormSettings, sizes: NormSizes) -> None:
        super().__init__()
        self.settings = settings
        self.epsilon = sizes.epsilon
        self.weight = nn.Parameter(torch.ones(sizes.width))
        self.inverse_root: nn.Module = InverseRoot()
        if settings.root is not None:
            from polytrope.models.parts.reciprocal import INVERSE_ROOT, NewtonPolynomial

            self.inverse_root = NewtonPolynomial(settings.root.of(sizes.number), INVERSE_ROOT)
        self.ranges: RangePenalty | None = None

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        wide = x.to(dtype)
        m = wide.square().mean(-1, keepdim=True) + self.epsilon
        if self.ranges is not None and self.training:
            self.ranges.mean_squares(m)
        result: Tensor = wide * self.inverse_root(m) * self.weight.to(dtype)
        return result.to(x.dtype)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(scale, shift) in float64, `[width]` each: what it makes of x / √m."""
        scale = self.weight.double()
        return scale, torch.zeros_like(scale)


def fold_into_linear(norm: BatchNorm | RMSNorm, linear: nn.Linear) -> nn.Linear:
    """One linear layer, with a bias, for `linear(norm(x))` with the norm as it is in evaluation mode; it takes x, or in
    the place of an `RMSNorm` x / √m."""
    scale, shift = norm.affine()
    folded = nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype)
    with torch.no_grad():
        weight = linear.weight.double()
        bias = weight @ shift
        folded.weight.copy_(weight * scale)
        folded.bias.copy_(bias if linear.bias is None else bias + linear.bias.double())
    return folded


def _layer_norm(_settings: LayerNormSettings, sizes: NormSizes) -> nn.Module:
    if sizes.channels_first:
        return ChannelsFirstLayerNorm(sizes.width, sizes.epsilon)
    return nn.LayerNorm(sizes.width, sizes.epsilon, bias=sizes.bias)


def _evonorm(settings: EvoNormSettings, sizes: NormSizes) -> nn.Module:
    return EvoNorm(settings, sizes.width, activated=sizes.activated)


def _none(_settings: NoNormSettings, _sizes: NormSizes) -> nn.Module:
    return nn.Identity()


NORMS: dict[str, Callable[[Any, NormSizes], nn.Module]] = {
    "layer_norm": _layer_norm,
    "batch": BatchNorm,
    "rms": RMSNorm,
    "evonorm": _evonorm,
    "none": _none,
}


def build_norm(settings: Norm, sizes: NormSizes) -> nn.Module:
    """A norm, freshly initialised.

    Args:
        settings: as `parts.settings.read_part("norm", …)` gives them.
    """
    return NORMS[settings.name](settings, sizes)
