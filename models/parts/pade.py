"""A linear layer made rational: quotients of polynomials whose denominator is a sum of squares."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.parts.settings import PadeSettings


class PadeLinear(nn.Module):
    """(Q_L P_K + Q_{L-1} P_{K-1}) / (Q_L² + Q_{L-1}²), with P_k = W x + b + A₂ x² + … + A_k x^k and
    Q_l = 1 + B₁ x + … + B_l x^l, Q₀ = 1; powers of x and the quotient by component.

    It starts with all A and B zero as the linear layer W x + b, exactly. With L = 1 the denominator is at least 1.
    (the smoothed neuron of Tekalp and Keleş, Padé Neurons for Efficient Neural Models, 2026)

    Args:
        inputs, outputs: numbers of channels.
        bias: b is there.
        settings: K and L.
    """

    multiplicative: ClassVar[tuple[str, ...]] = ("numerator", "denominator")

    def __init__(self, inputs: int, outputs: int, *, bias: bool, settings: PadeSettings) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        linear = nn.Linear(inputs, outputs, bias=bias)  # draws the random numbers of a linear layer
        self.weight, self.bias = linear.weight, linear.bias
        self.numerator = nn.Parameter(torch.zeros(settings.numerator_degree - 1, outputs, inputs))  # A₂ … A_K
        self.denominator = nn.Parameter(torch.zeros(settings.denominator_degree, outputs, inputs))  # B₁ … B_L

    def forward(self, x: Tensor) -> Tensor:
        """`[…, inputs]` to `[…, outputs]`."""
        powers = [x]
        for _ in range(1, max(self.numerator.size(0) + 1, self.denominator.size(0))):
            powers.append(powers[-1] * x)
        numerators = _sums(F.linear(x, self.weight, self.bias), self.numerator, powers[1:])
        denominators = _sums(torch.ones_like(numerators[0]), self.denominator, powers)
        upper, lower = denominators[-1], denominators[-2]
        return (upper * numerators[-1] + lower * numerators[-2]) / (upper.square() + lower.square())

    def extra_repr(self) -> str:
        degrees = f"numerator_degree={self.numerator.size(0) + 1}, denominator_degree={self.denominator.size(0)}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {degrees}"


def _sums(first: Tensor, weights: Tensor, powers: list[Tensor]) -> list[Tensor]:
    """`first`, and what it is after each further term."""
    sums = [first]
    for weight, power in zip(weights, powers, strict=False):
        sums.append(sums[-1] + F.linear(power, weight))
    return sums
