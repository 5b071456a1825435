"""Products of linear layers in the place of a linear layer and its activation: a network of these is multilinear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polytrope.models.parts.norm import NormSizes, build_norm
from polytrope.models.parts.settings import MuSettings, read_part


class MuLayer(nn.Module):
    """a + α · a ⊙ b with a = U₁ x and b = U₃ U₂ x, `[…, inputs]` to `[…, outputs]`; α starts as 1, biases too.

    With norms these are of a and of b. With `shift`, x is `[…, height, width, inputs]`, and U₁ x and U₂ x are shifted
    (`shift_pixels`). (The Mu-layer of Cheng et al., Multilinear Operator Networks, 2024, whose last layer stands behind
    this one.)

    Args:
        inputs: channels; the settings say how many come out.
        bias: the layers and norms have one.
        epsilon: added to the variances of norms.
    """

    def __init__(self, inputs: int, settings: MuSettings, *, bias: bool, epsilon: float) -> None:
        super().__init__()
        self.shift = settings.shift
        outputs, rank = settings.hidden(inputs), settings.rank(inputs)
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.reduce = nn.Linear(inputs, rank, bias=bias)
        self.expand = nn.Linear(rank, outputs, bias=bias)
        self.alpha = nn.Parameter(torch.ones(1))
        norms = 0 if settings.norm == "none" else 2
        self.norms = nn.ModuleList(
            build_norm(read_part("norm", settings.norm), NormSizes(outputs, epsilon, bias=bias)) for _ in range(norms)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published start of the linear layers: weights of variance 2 / inputs, biases of 1."""
        for layer in (self.linear, self.reduce, self.expand):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.ones_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear(x), self.reduce(x)
        if self.shift:
            first, second = shift_pixels(first), shift_pixels(second)
        second = self.expand(second)
        if self.norms:
            first, second = self.norms[0](first), self.norms[1](second)
        return first + self.alpha * (first * second)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"shift={self.shift}"


def shift_pixels(x: Tensor) -> Tensor:
    """`[…, height, width, channels]` whose quarters of channels are those of the pixel above, below, left and right.

    Where there is no such pixel it stays. (Yu et al., S²-MLP, 2021)
    """
    quarter = x.size(-1) // 4
    above, below, left, right = x.split([quarter, quarter, quarter, x.size(-1) - 3 * quarter], dim=-1)
    return torch.cat(
        (
            torch.cat((above[..., :1, :, :], above[..., :-1, :, :]), dim=-3),
            torch.cat((below[..., 1:, :, :], below[..., -1:, :, :]), dim=-3),
            torch.cat((left[..., :1, :], left[..., :-1, :]), dim=-2),
            torch.cat((right[..., 1:, :], right[..., -1:, :]), dim=-2),
        ),
        dim=-1,
    )
