"""A layer of an `mlp` that multiplies linear layers: a polynomial of its inputs of exactly one degree."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.parts.settings import PiSettings

SLOPE = 0.2  # of leaky rectifiers below 0
LARGEST = 256.0  # where rectified products are cut off
_GAIN = math.sqrt(2.0 / (1.0 + SLOPE**2))  # keeps the mean square of a normal number that is rectified
_RECTIFIED_MEAN = (1.0 - SLOPE) * _GAIN / math.sqrt(2.0 * math.pi)  # of such a number


class PiLinear(nn.Module):
    """h_1 = U_1 x, h_n = (U_n x) ⊙ h_{n-1}, y = h_N + b; `[…, inputs]` to `[…, outputs]`, a polynomial of degree N.

    With `skip` h_n = ((U_n x) ⊙ h_{n-1} + h_{n-1}) / √2, which has all degrees from 1 to N. A linear layer behind makes
    it the CCP model. (Chrysos et al., Deep Polynomial Neural Networks, 2020)

    With `activation: leaky_relu` h_n = σ(W_n (h_{n-1} ⊙ σ(U_n x + a_n))), where h_0 = 1 and σ is the leaky rectifier of
    slope 0.2, cut off at ±256 outside. (Singh et al., Polynomial Implicit Neural Representations For Large Diverse
    Datasets, 2023) With `skip` as well, the product is (h ⊙ σ(…) + h) / c, which keeps its mean square.

    U and W start such that inputs of mean square 1 give outputs of mean square 1; a = b = 0.

    Args:
        inputs, outputs: numbers of channels.
        settings: degree N, `skip` and `activation`.
    """

    def __init__(self, inputs: int, outputs: int, settings: PiSettings) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.settings = settings
        rectified = settings.activation == "leaky_relu"
        gain = _GAIN if rectified else 1.0
        self.factors = nn.Parameter(torch.empty(settings.degree * outputs, inputs))
        nn.init.normal_(self.factors, std=gain * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.shifts = nn.Parameter(torch.zeros(settings.degree * outputs)) if rectified else None
        self.mixing = nn.Parameter(torch.empty(settings.degree, outputs, outputs)) if rectified else None
        if self.mixing is not None:
            nn.init.normal_(self.mixing, std=gain * outputs**-0.5)
        # of 1 + a factor, whose mean square is 1
        self.skipped = math.sqrt(2.0 + 2.0 * (_RECTIFIED_MEAN if rectified else 0.0))

    def forward(self, x: Tensor) -> Tensor:
        factors = F.linear(x, self.factors, self.shifts)
        if self.mixing is not None:
            factors = F.leaky_relu(factors, SLOPE)
        first, *others = factors.chunk(self.settings.degree, dim=-1)
        product = self._mixed(first, 0)
        for number, factor in enumerate(others, start=1):
            multiplied = factor * product
            if self.settings.skip:
                multiplied = (multiplied + product) / self.skipped
            product = self._mixed(multiplied, number)
        return product + self.bias

    def _mixed(self, product: Tensor, number: int) -> Tensor:
        if self.mixing is None:
            return product
        return F.leaky_relu(F.linear(product, self.mixing[number]), SLOPE).clamp(-LARGEST, LARGEST)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, degree={self.settings.degree}, "
            f"skip={self.settings.skip}, activation={self.settings.activation}"
        )


def pi_layer(settings: PiSettings, inputs: int, outputs: int) -> nn.Module:
    """A fresh one, from torch's global random state."""
    return PiLinear(inputs, outputs, settings)
