"""The two layers around a block's activation, `[…, width]` to the same shape; or the one before it in an `mlp`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.parts.kan import kan_layer
from polytrope.models.parts.mu import MuLayer
from polytrope.models.parts.pade import PadeLinear
from polytrope.models.parts.pi import pi_layer
from polytrope.models.parts.settings import (
    DenseSettings,
    FeedForward,
    GatedSettings,
    MLPSettings,
    MuSettings,
    PadeSettings,
    QuadraticSettings,
)


@dataclass(frozen=True)
class FeedForwardSizes:
    """What the model says of it.

    Args:
        width: of the vectors that come and go.
        bias: whether the layers have one.
        epsilon: added to the variances of norms inside.
    """

    width: int
    bias: bool
    epsilon: float


class FeedForwardLayers(NamedTuple):
    """What a block puts around its activation F.

    Args:
        inner, outer: the layers before and after it, or one after the other where the settings have none.
        gated: what the inner layer gives are two halves a, b, and the outer one takes F(a) · b.
    """

    inner: nn.Module
    outer: nn.Module
    gated: bool


class QuadraticLinear(nn.Module):
    """(W x + b) ⊙ (G x + g) + S x² + c: starts with G = S = c = 0, g = 1 as the linear layer W x + b, exactly.

    (Fan et al., On Expressivity and Trainability of Quadratic Networks, 2021)

    Args:
        inputs, outputs: numbers of channels.
        bias: b and c are there; g always is.
        square: S is there.
    """

    multiplicative: ClassVar[tuple[str, ...]] = ("gate_weight", "gate_bias", "square_weight")

    def __init__(self, inputs: int, outputs: int, *, bias: bool, square: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        linear = nn.Linear(inputs, outputs, bias=bias)  # draws the random numbers of a linear layer
        self.weight, self.bias = linear.weight, linear.bias
        self.gate_weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.gate_bias = nn.Parameter(torch.ones(outputs))
        self.square_weight = nn.Parameter(torch.zeros(outputs, inputs)) if square else None
        self.constant = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x, self.weight, self.bias) * F.linear(x, self.gate_weight, self.gate_bias)
        if self.square_weight is not None:
            return product + F.linear(x.square(), self.square_weight, self.constant)
        return product if self.constant is None else product + self.constant

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, square={self.square_weight is not None}"
        )


LinearAtStart = nn.Linear | QuadraticLinear | PadeLinear  # their `weight` and `bias` are a linear layer's


def multiplicative_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that modules name in `multiplicative`: they multiply inputs by inputs."""
    return [
        parameter
        for module in model.modules()
        for name in getattr(module, "multiplicative", ())
        if (parameter := getattr(module, name)) is not None
    ]


def _mlp(settings: MLPSettings, sizes: FeedForwardSizes) -> FeedForwardLayers:
    hidden = settings.hidden(sizes.width)
    return FeedForwardLayers(
        nn.Linear(sizes.width, hidden, bias=sizes.bias), nn.Linear(hidden, sizes.width, bias=sizes.bias), gated=False
    )


def _gated(settings: GatedSettings, sizes: FeedForwardSizes) -> FeedForwardLayers:
    hidden = settings.hidden(sizes.width)
    return FeedForwardLayers(
        nn.Linear(sizes.width, 2 * hidden, bias=sizes.bias), nn.Linear(hidden, sizes.width, bias=sizes.bias), gated=True
    )


def _quadratic(settings: QuadraticSettings, sizes: FeedForwardSizes) -> FeedForwardLayers:
    hidden = settings.hidden(sizes.width)

    def layer(inputs: int, outputs: int) -> QuadraticLinear:
        return QuadraticLinear(inputs, outputs, bias=sizes.bias, square=settings.square)

    return FeedForwardLayers(layer(sizes.width, hidden), layer(hidden, sizes.width), gated=False)


def _pade(settings: PadeSettings, sizes: FeedForwardSizes) -> FeedForwardLayers:
    hidden = settings.hidden(sizes.width)

    def layer(inputs: int, outputs: int) -> PadeLinear:
        return PadeLinear(inputs, outputs, bias=sizes.bias, settings=settings)

    return FeedForwardLayers(layer(sizes.width, hidden), layer(hidden, sizes.width), gated=False)


def _mu(settings: MuSettings, sizes: FeedForwardSizes) -> FeedForwardLayers:
    inner = MuLayer(sizes.width, settings, bias=sizes.bias, epsilon=sizes.epsilon)
    outer = nn.Linear(settings.hidden(sizes.width), sizes.width, bias=sizes.bias)
    return FeedForwardLayers(inner, outer, gated=False)


FEEDFORWARDS: dict[str, Callable[[Any, FeedForwardSizes], FeedForwardLayers]] = {
    "mlp": _mlp,
    "gated": _gated,
    "quadratic": _quadratic,
    "pade": _pade,
    "mu": _mu,
}


def build_feedforward(settings: FeedForward, sizes: FeedForwardSizes) -> FeedForwardLayers:
    """The layers of one block, freshly initialised.

    Args:
        settings: as `parts.settings.read_part("feedforward", …)` gives them.
    """
    return FEEDFORWARDS[settings.name](settings, sizes)


def _dense_layer(_settings: DenseSettings, inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


def _quadratic_layer(settings: QuadraticSettings, inputs: int, outputs: int) -> nn.Module:
    return QuadraticLinear(inputs, outputs, bias=True, square=settings.square)


def _pade_layer(settings: PadeSettings, inputs: int, outputs: int) -> nn.Module:
    return PadeLinear(inputs, outputs, bias=True, settings=settings)


LAYERS: dict[str, Callable[[Any, int, int], nn.Module]] = {
    "dense": _dense_layer,
    "quadratic": _quadratic_layer,
    "pade": _pade_layer,
    "kan": kan_layer,
    "pi": pi_layer,
}


def build_layer(settings: FeedForward, inputs: int, outputs: int) -> nn.Module:
    """One layer of an `mlp`, `[…, inputs]` to `[…, outputs]`, freshly initialised.

    Args:
        settings: as `parts.settings.read_part("feedforward", …)` gives them.
    """
    return LAYERS[settings.name](settings, inputs, outputs)
