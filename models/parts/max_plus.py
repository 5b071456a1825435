"""Convolution in the semiring of maximum and plus: dilation and erosion of images by learned shapes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.parts.settings import MaxPlusSettings
from polytrope.models.per_layer import Entry

SIZE = 7  # pixels in each direction, as in ConvNeXt's depthwise convolution


class MaxPlusConvolution(nn.Module):
    """max over (u, v) of w[c, u, v] + x[c, i + u, j + v], the minimum, or the difference of both.

    Starts as the paraboloid -(u² + v²)/2: what is near counts most, and no pixel gets smaller (`min`: larger). The two
    of a difference have filters of their own.
    (Dilation and erosion of Serra, Image Analysis and Mathematical Morphology, 1982, with learned shapes)

    Args:
        settings: which form.
        channels: C of `[batch, C, height, width]`.
    """

    added: ClassVar[tuple[str, ...]] = ("maximum", "minimum")  # to the inputs, as biases are: decay would flatten them

    def __init__(self, settings: MaxPlusSettings, channels: int) -> None:
        super().__init__()
        self.settings = settings
        offsets = torch.arange(SIZE, dtype=torch.float32) - SIZE // 2
        paraboloid = -0.5 * (offsets.square()[:, None] + offsets.square()).expand(channels, SIZE, SIZE)
        self.maximum = nn.Parameter(paraboloid.clone()) if settings.form != "min" else None
        self.minimum = nn.Parameter(-paraboloid.clone()) if settings.form != "max" else None

    def config(self) -> Entry:
        """What builds it again."""
        return self.settings.config()

    def forward(self, x: Tensor) -> Tensor:
        highest = max_plus(x, self.maximum) if self.maximum is not None else None
        lowest = -max_plus(-x, -self.minimum) if self.minimum is not None else None
        if highest is None or lowest is None:
            return highest if lowest is None else lowest  # type: ignore[return-value]
        return highest - lowest


def max_plus(x: Tensor, weight: Tensor) -> Tensor:
    """max over (u, v) of weight[c, u, v] + x[b, c, i + u - k // 2, j + v - k // 2]; outside the image x is -∞.

    The gradient goes to the winner, the first one in reading order where several are equal. Deterministic on every
    device. A NaN anywhere in the window gives NaN.

    Args:
        x: `[batch, channels, height, width]`, any floating dtype.
        weight: `[channels, k, k]`, k odd and at most 11; it is cast to the dtype of `x`.

    Returns:
        As `x`.
    """
    weight = weight.to(x.dtype)
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return _with_winners(x, weight)[0]  # plain arithmetic, which exports
    result: Tensor = _MaxPlus.apply(x, weight)[0]  # type: ignore[no-untyped-call]
    return result


def _with_winners(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the number of the shift that each entry is of (int8)."""
    size, (height, width) = weight.size(-1), x.shape[-2:]
    padded = F.pad(x, [size // 2] * 4, value=-torch.inf)
    best = torch.full_like(x, -torch.inf)
    winner = torch.zeros_like(x, dtype=torch.int8)
    for number, (row, column) in enumerate(_shifts(size)):
        candidate = padded[..., row : row + height, column : column + width] + weight[:, row, column, None, None]
        better = (candidate > best) | candidate.isnan()
        best = torch.where(better, candidate, best)
        winner = torch.where(better, number, winner)
    return best, winner


def _shifts(size: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(size) for column in range(size)]


class _MaxPlus(torch.autograd.Function):
    """Keeps one byte per pixel: the number of the winner."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _with_winners(x, weight)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        context.mark_non_differentiable(output[1])
        context.save_for_backward(output[1])
        context.save_for_forward(output[1])
        context.size = inputs[1].size(-1)

    @staticmethod
    def backward(context: Any, gradient: Tensor, _winners: Tensor) -> tuple[Tensor, Tensor]:
        (winner,) = context.saved_tensors
        size, (height, width) = context.size, gradient.shape[-2:]
        padded = F.pad(torch.zeros_like(gradient), [size // 2] * 4)
        sums = []
        for number, (row, column) in enumerate(_shifts(size)):
            own = torch.where(winner == number, gradient, 0.0)
            edges = (column, size - 1 - column, row, size - 1 - row)
            padded = padded + F.pad(own, edges)
            sums.append(own.sum((0, 2, 3), dtype=torch.float32 if own.dtype.itemsize < 4 else own.dtype))
        half = size // 2
        shape = (gradient.size(1), size, size)
        return padded[..., half : half + height, half : half + width], torch.stack(sums, -1).view(shape).to(
            gradient.dtype
        )

    @staticmethod
    def jvp(context: Any, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor, None]:
        (winner,) = context.saved_tensors
        size, (height, width) = context.size, winner.shape[-2:]
        padded = F.pad(x, [size // 2] * 4) if x is not None else None
        result: Any = 0.0
        for number, (row, column) in enumerate(_shifts(size)):
            own: Any = 0.0
            if padded is not None:
                own = own + padded[..., row : row + height, column : column + width]
            if weight is not None:
                own = own + weight[:, row, column, None, None]
            result = result + torch.where(winner == number, own, 0.0)
        return result, None
