"""Adapters: a few numbers beside frozen linear layers that learn for them, and are merged into the weights at the end.

Each starts as nothing: the model's function is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.surgery import replace_module

SHORTEST = 1e-30  # squared length that a householder vector is divided by at least


@dataclass(frozen=True)
class AdapterSettings:
    """Which adapters, and where.

    Args:
        name: of `ADAPTERS`.
        rank: how many vectors, singular triples or columns each has.
        relaxed: of householder: I - uuᵀ + vvᵀ for each pair of unit vectors, which need not keep lengths.
        layers: patterns of names of linear layers (`*` stands for anything); None: all of the blocks.
    """

    name: str
    rank: int
    relaxed: bool = False
    layers: Sequence[str] | None = None


class Householder(nn.Module):
    """x → x H, H = Π_i (I - 2 v_i v_iᵀ / ‖v_i‖²): W H keeps the rows' products W Wᵀ.

    Vectors start as equal pairs, so that H is the identity, to rounding, with gradients that are not 0. (Yuan, Liu, Xu,
    Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, 2024, starts
    elsewhere; `relaxed`: Bini et al., ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections,
    2024)

    Args:
        weight: `[outputs, inputs]` of the layer.
        settings: `rank` is even.

    Raises:
        ValueError: it is not.
    """

    beside: ClassVar[bool] = False

    def __init__(self, weight: Tensor, settings: AdapterSettings) -> None:
        super().__init__()
        if settings.rank % 2:
            raise ValueError(f"rank: householder vectors come in pairs, got {settings.rank}")
        self.relaxed = settings.relaxed
        pairs = torch.randn(settings.rank // 2, weight.size(1))
        self.vectors = nn.Parameter(pairs.repeat_interleave(2, dim=0).to(weight.device))

    def forward(self, x: Tensor) -> Tensor:
        vectors = self.vectors.to(x.dtype)
        lengths = vectors.square().sum(1).clamp(min=SHORTEST)
        if self.relaxed:
            for first, second in zip(range(0, len(vectors), 2), range(1, len(vectors), 2), strict=True):
                u, v = vectors[first], vectors[second]
                x = x - (x @ u / lengths[first])[..., None] * u + (x @ v / lengths[second])[..., None] * v
            return x
        for vector, length in zip(vectors, lengths, strict=True):
            x = x - (x @ vector * (2.0 / length))[..., None] * vector
        return x


class LoRA(nn.Module):
    """x → x Aᵀ Bᵀ, added to the layer's output; B starts at 0, A with variance 1 / inputs.

    (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, without its constant factor)

    Args:
        weight: `[outputs, inputs]` of the layer.
        settings: `rank` is at most the smaller of the two.

    Raises:
        ValueError: it is larger.
    """

    beside: ClassVar[bool] = True

    def __init__(self, weight: Tensor, settings: AdapterSettings) -> None:
        super().__init__()
        _check_rank(weight, settings.rank)
        inputs = weight.size(1)
        self.down = nn.Parameter(torch.randn(settings.rank, inputs).to(weight.device) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(weight.size(0), settings.rank, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class Spectral(nn.Module):
    """(U + A) Σ (V + B)ᵀ - U Σ Vᵀ of the largest singular triples, added to the layer; A and B start at 0.

    (Zhang, Pilanci, Spectral Adapter: Fine-Tuning in Spectral Space, 2024, the additive form)

    Args:
        weight: `[outputs, inputs]` of the layer.
        settings: `rank` is at most the smaller of the two.

    Raises:
        ValueError: it is larger.
    """

    beside: ClassVar[bool] = True
    left: Tensor
    right: Tensor
    sizes: Tensor

    def __init__(self, weight: Tensor, settings: AdapterSettings) -> None:
        super().__init__()
        rank = settings.rank
        _check_rank(weight, rank)
        left, sizes, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        for name, value in (("left", left[:, :rank]), ("right", right[:rank].T), ("sizes", sizes[:rank])):
            self.register_buffer(name, value.to(weight.dtype).contiguous(), persistent=False)
        self.left_change = nn.Parameter(torch.zeros_like(self.left))
        self.right_change = nn.Parameter(torch.zeros_like(self.right))

    def forward(self, x: Tensor) -> Tensor:
        left, right, sizes, left_change, right_change = (
            tensor.to(x.dtype) for tensor in (self.left, self.right, self.sizes, self.left_change, self.right_change)
        )
        changed = F.linear((x @ (right + right_change)) * sizes, left_change)
        return changed + F.linear((x @ right_change) * sizes, left)


ADAPTERS: dict[str, Callable[[Tensor, AdapterSettings], nn.Module]] = {
    "householder": Householder,
    "spectral": Spectral,
    "lora": LoRA,
}


def _check_rank(weight: Tensor, rank: int) -> None:
    if rank > min(weight.shape):
        raise ValueError(f"rank: expected at most {min(weight.shape)}, the smaller side of the layer, got {rank}")


class AdaptedLinear(nn.Linear):
    """A linear layer whose weight and bias keep their names, with its `adapter`."""

    def __init__(self, linear: nn.Linear, adapter: nn.Module) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter.beside:
            return super().forward(x) + self.adapter(x)  # type: ignore[no-any-return]
        return super().forward(self.adapter(x))


@dataclass(frozen=True)
class Adapted:
    """Which layers of a model have adapters; of none in the default.

    Args:
        layers: their names, sorted.
        settings: of the adapters.
    """

    layers: tuple[str, ...] = ()
    settings: AdapterSettings | None = None

    def merged(self, weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Weights of the model without adapters that computes the same; in float64, then in the dtype of each weight.

        Args:
            weights: of the model with adapters, whole, by name.
            model: it, whose buffers are those that the adapters learned with: singular vectors computed again, on
                another machine, may be others.
        """
        own = tuple(f"{layer}.adapter." for layer in self.layers)
        result = {name: tensor for name, tensor in weights.items() if not name.startswith(own)}
        for layer, prefix in zip(self.layers, own, strict=True):
            assert self.settings is not None
            weight = weights[f"{layer}.weight"]
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                adapter: Any = ADAPTERS[self.settings.name](weight.double(), self.settings).double()
                for name, parameter in adapter.named_parameters():
                    parameter.copy_(weights[prefix + name])
                for name, buffer in adapter.named_buffers():
                    buffer.copy_(model.get_buffer(prefix + name))
                changed = adapter(torch.eye(weight.size(1), dtype=torch.float64, device=weight.device))
                whole = weight.double() + changed.T if adapter.beside else (changed @ weight.double().T).T
            result[f"{layer}.weight"] = whole.to(weight.dtype)
        return result


def add_adapters(model: nn.Module, settings: AdapterSettings) -> Adapted:
    """Give linear layers of the blocks their adapters, in place.

    Args:
        model: of this package.

    Raises:
        ValueError: a pattern that names no linear layer of the blocks, or none is there, or a rank that cannot be; the
            model is then as it was.
    """
    within = {id(module) for block in model.blocks for module in block.modules()}  # type: ignore[union-attr]
    layers = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and id(module) in within
    }
    if not layers:
        raise ValueError("adapters: the blocks have no linear layers")
    chosen = sorted(layers) if settings.layers is None else _named(layers, settings.layers)
    made = {}
    for name in chosen:
        try:
            made[name] = AdaptedLinear(layers[name], ADAPTERS[settings.name](layers[name].weight, settings))
        except ValueError as error:
            raise ValueError(f"adapters.{error} (`{name}`)") from error
    for name, module in made.items():
        replace_module(model, name, module)
    return Adapted(tuple(chosen), settings)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of all adapters."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, AdaptedLinear)
        for parameter in module.adapter.parameters()
    ]


def _named(layers: Mapping[str, Any], patterns: Sequence[str]) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        own = {name for name in layers if fnmatchcase(name, pattern)}
        if not own:
            raise ValueError(
                f"adapters.layers: `{pattern}` names no linear layer of the blocks, such as `{min(layers)}`"
            )
        found |= own
    return sorted(found)
