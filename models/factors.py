"""Linear layers in two factors, and how a model that has some is built again from their ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polytrope.models.surgery import replace_module


class FactoredLinear(nn.Module):
    """B (A x) + b: a linear layer `[…, inputs]` to `[…, outputs]` whose weight B A has at most the rank of A.

    Args:
        inputs, outputs: numbers of channels.
        rank: rows of A and columns of B.
        bias: b is there.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.inner = nn.Linear(inputs, rank, bias=False)
        self.outer = nn.Linear(rank, outputs, bias=bias)

    def forward(self, input: Tensor) -> Tensor:  # as nn.Linear calls it
        projected: Tensor = self.outer(self.inner(input))
        return projected

    def product(self) -> Tensor:
        """B A `[outputs, inputs]`, in float32 at least."""
        inner, outer = self.inner.weight, self.outer.weight
        wide = torch.promote_types(outer.dtype, torch.float32)
        return outer.to(wide) @ inner.to(wide)

    def merged(self) -> nn.Linear:
        """The same layer with one matrix B A, multiplied in float64 and rounded to the dtype of the factors."""
        inner, outer = self.inner.weight, self.outer.weight
        whole = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.outer.bias is not None,
            device=outer.device,
            dtype=outer.dtype,
        )
        whole.weight.data = (outer.detach().double() @ inner.detach().double()).to(outer.dtype)
        if self.outer.bias is not None:
            whole.bias.data = self.outer.bias.detach().clone()
        return whole


def describe_factors(model: nn.Module) -> dict[str, int]:
    """The rank of every factored layer, by its name: what `restore_factors` needs."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def restore_factors(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put factors of these ranks, freshly initialised, in the places of linear layers; their weights come with the
    model's.

    Raises:
        ValueError: a name the model does not have, a layer that is not linear, a rank that it cannot have.
    """
    for name, rank in ranks.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"factors: {type(model).__name__} has no module `{name}`") from None
        if type(layer) is not nn.Linear:
            raise ValueError(f"factors: `{name}` is a {type(layer).__name__}, not an nn.Linear")
        if not 1 <= rank <= min(layer.in_features, layer.out_features):
            raise ValueError(
                f"factors: `{name}` of {layer.in_features} → {layer.out_features} cannot have rank {rank}; expected 1 "
                f"to {min(layer.in_features, layer.out_features)}"
            )
        factored = FactoredLinear(layer.in_features, layer.out_features, rank, bias=layer.bias is not None)
        replace_module(model, name, factored.to(layer.weight.dtype))


def whole_weight(layer: nn.Module) -> Tensor:
    """The matrix `[outputs, inputs]` of a linear layer, in factors or not.

    Raises:
        ValueError: it is no linear layer.
    """
    if isinstance(layer, FactoredLinear):
        return layer.product()
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"a {type(layer).__name__} is no linear layer")
    return layer.weight


def largest_change(layer: nn.Module, whole: Tensor) -> Tensor:
    """max |W - V| over the numbers of the layer's matrix W and another one, V: a scalar, in float32 at least.

    No output of the layer is then further than this times Σ |x| from that with V, for inputs x.

    Args:
        whole: V `[outputs, inputs]`.
    """
    weight = whole_weight(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) - whole.to(wide)).abs().max()


def change_beyond(layers: Sequence[nn.Module], wholes: Sequence[Tensor], bound: float) -> Tensor:
    """Mean over the layers of max(0, `largest_change` - bound)²: nothing where all are within the bound.

    (Guo et al., PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, 2023, whose code holds the
    change at the bound from both sides; that less is free is ours.)

    Args:
        wholes: the matrices that the layers are to stay close to, `[outputs, inputs]` each.
    """
    changes = [largest_change(layer, whole) for layer, whole in zip(layers, wholes, strict=True)]
    return (torch.stack(changes) - bound).clamp(min=0.0).square().mean()


def merge_factors(model: nn.Module) -> None:
    """Put one matrix in the place of every two factors: the same function but for rounding."""
    for name in describe_factors(model):
        factored = model.get_submodule(name)
        assert isinstance(factored, FactoredLinear)
        replace_module(model, name, factored.merged())


def saved_products(module: nn.Module) -> int:
    """Multiply-adds per vector that the factors in `module` need less than whole matrices would."""
    return sum(
        part.in_features * part.out_features - part.rank * (part.in_features + part.out_features)
        for part in module.modules()
        if isinstance(part, FactoredLinear)
    )
