"""What mixes the pixels of a ConvNeXt block, `[batch, channels, height, width]` to the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from polytrope.models.parts.max_plus import MaxPlusConvolution
from polytrope.models.parts.polynomial_mixer import PolynomialImageMixer
from polytrope.models.parts.settings import DepthwiseSettings, Mixer


def _depthwise(_settings: DepthwiseSettings, channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)


MIXERS: dict[str, Callable[[Any, int], nn.Module]] = {
    "depthwise": _depthwise,
    "max_plus": MaxPlusConvolution,
    "padre": PolynomialImageMixer,
}


def build_mixer(settings: Mixer, channels: int) -> nn.Module:
    """The mixer of one block, freshly initialised.

    Args:
        settings: as `parts.settings.read_part("mixer", …)` gives them.
    """
    return MIXERS[settings.name](settings, channels)
