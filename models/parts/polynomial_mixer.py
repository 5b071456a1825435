"""Mixing of positions by products of linear mixtures: a polynomial of fixed degree in place of attention's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.parts.settings import PADReSettings, PolynomialMixerSettings
from polytrope.models.per_layer import Entry

SIZE = 7  # pixels that a filter of images sees in each direction, as in ConvNeXt's depthwise convolution


class PolynomialMixer(nn.Module):
    """Y_i = mix_i(X B_i), Z_1 = Y_1, Z_{i+1} = mix'_i(Z_i D_i) ⊙ Y_{i+1}, and the sum of Z_i C_i, i ≤ degree.

    Each mix is a convolution of every channel by itself. Filters start at their own position, B and D with variance
    1/width, C_1 as the model's other linear layers, and the other C at 0: it starts linear. Cost grows with the number
    of positions, not its square. (Letourneau et al., PADRe: A Unifying Polynomial Attention Drop-in Replacement for
    Efficient Vision Transformer, 2024, has the products; the filters, the recursion and the start are ours.)

    Args:
        degree: of the result in X, 2 or more.
        width: channels.
        filter_shape: of each filter: `(positions,)` of texts, `(rows, columns)` of images.
        own: which entry of a filter stands for the position itself, in reading order.
        bias: something is added to each channel of the result.
    """

    multiplicative: ClassVar[tuple[str, ...]] = ("products",)

    def __init__(self, degree: int, width: int, filter_shape: tuple[int, ...], own: int, *, bias: bool) -> None:
        super().__init__()
        self.inputs = nn.Parameter(torch.randn(degree, width, width) * width**-0.5)
        self.states = nn.Parameter(torch.randn(degree - 1, width, width) * width**-0.5)
        self.input_filters = nn.Parameter(0.02 * torch.randn(degree, width, 1, *filter_shape))
        self.state_filters = nn.Parameter(0.02 * torch.randn(degree - 1, width, 1, *filter_shape))
        with torch.no_grad():
            for filters in (self.input_filters, self.state_filters):
                filters.flatten(3)[..., own] += 1.0
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.products = nn.Parameter(torch.zeros(degree - 1, width, width))

    def forward(self, x: Tensor, mix: Callable[[Tensor, Tensor], Tensor], extend: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum, `[…, width]`.

        Args:
            x: `[…, width]`.
            mix: (`[…, width]`, filters `[width, 1, *filter_shape]`) to the mixture.
            extend: adds the earlier positions to X, and then to each Z but the last, in this order.
        """
        extended = extend(x)
        mixtures = [
            mix(extended @ matrix, filters) for matrix, filters in zip(self.inputs, self.input_filters, strict=True)
        ]
        power = mixtures[0]
        result: Tensor = self.c_proj(power)
        steps = zip(self.states, self.state_filters, mixtures[1:], self.products, strict=True)
        for matrix, filters, mixture, outer in steps:
            power = mix(extend(power) @ matrix, filters) * mixture
            result = result + power @ outer
        return result


class CausalPolynomialMixer(nn.Module):
    """Of texts, `[batch, positions, width]`: a filter sees a position and those before it, `reach` in all."""

    def __init__(self, settings: PolynomialMixerSettings, width: int, *, bias: bool) -> None:
        super().__init__()
        self.settings = settings
        self.mixer = PolynomialMixer(settings.degree, width, (settings.reach,), settings.reach - 1, bias=bias)

    def config(self) -> Entry:
        """What builds it again."""
        return self.settings.config()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_cache(x, None)[0]

    def forward_with_cache(self, x: Tensor, past: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """For positions that follow those of `past`; the second result is what the next ones need: the last
        `reach` - 1 vectors of X and of each Z but the last, `[batch, reach - 1, width]`."""
        earlier = iter(past) if past is not None else None
        kept = self.settings.reach - 1
        present: list[Tensor] = []

        def extend(z: Tensor) -> Tensor:
            before = z.new_zeros(z.size(0), kept, z.size(2)) if earlier is None else next(earlier)
            extended = torch.cat((before, z), dim=1)
            present.append(extended[:, extended.size(1) - kept :])
            return extended

        def mix(z: Tensor, filters: Tensor) -> Tensor:
            return F.conv1d(z.transpose(1, 2), filters, groups=filters.size(0)).transpose(1, 2)

        return self.mixer(x, mix, extend), present


class PolynomialImageMixer(nn.Module):
    """Of images, `[batch, channels, height, width]`: filters of 7 × 7 pixels around each."""

    def __init__(self, settings: PADReSettings, channels: int) -> None:
        super().__init__()
        self.settings = settings
        self.mixer = PolynomialMixer(settings.degree, channels, (SIZE, SIZE), SIZE * SIZE // 2, bias=True)

    def config(self) -> Entry:
        """What builds it again."""
        return self.settings.config()

    def forward(self, x: Tensor) -> Tensor:
        def mix(z: Tensor, filters: Tensor) -> Tensor:
            mixed = F.conv2d(z.permute(0, 3, 1, 2), filters, padding=SIZE // 2, groups=filters.size(0))
            return mixed.permute(0, 2, 3, 1)

        mixed: Any = self.mixer(x.permute(0, 2, 3, 1), mix, lambda z: z)
        return mixed.permute(0, 3, 1, 2)  # type: ignore[no-any-return]
