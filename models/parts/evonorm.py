"""EvoNorm-S0: one layer in the place of a norm and of the activation behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polytrope.models.parts.settings import EvoNormSettings

EPSILON = 1e-5  # added to the variance of a group


class EvoNorm(nn.Module):
    """γ F(x) / √(variance + ε) + β, F(x) = x σ(v x), of `[batch, height, width, channels]` to the same shape.

    The variance is that of a group of channels, over the pixels of one sample; nothing is subtracted. γ and v begin at
    1, β at 0, one each per channel. (Liu, Brock, Simonyan, Le, Evolving Normalization-Activation Layers, 2020; another
    F is ours.)

    Args:
        settings: the number of groups, which divides the channels.
        channels: how many.
        activated: F is somebody else's: it is given with x, and there is no v.
    """

    def __init__(self, settings: EvoNormSettings, channels: int, *, activated: bool) -> None:
        super().__init__()
        self.groups = settings.groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.slope = None if activated else nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, values: Tensor | None = None) -> Tensor:
        """Half precision is left for float32.

        Args:
            x: what F is of.
            values: F(x), where F is somebody else's.
        """
        dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        wide = x.to(dtype)
        if self.slope is not None:
            values = wide * torch.sigmoid(self.slope.to(dtype) * wide)
        assert values is not None  # what there is no v for comes with x
        groups = wide.unflatten(-1, (self.groups, -1))
        variance = (groups - groups.mean((1, 2, 4), keepdim=True)).square().mean((1, 2, 4), keepdim=True)
        scaled = values.to(dtype).unflatten(-1, (self.groups, -1)) * (variance + EPSILON).rsqrt()
        result: Tensor = scaled.flatten(-2) * self.weight.to(dtype) + self.bias.to(dtype)
        return result.to(x.dtype)

    def extra_repr(self) -> str:
        return f"channels={self.weight.numel()}, groups={self.groups}, activated={self.slope is None}"
