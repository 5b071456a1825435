"""A model's tangent: linear in what learns, so that the loss is convex in it, and averages of models are exact."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from polytrope.models.gpt2 import Cache, sample_sequence
from polytrope.models.parts.reciprocal import certified_modules

_INITIAL = "initial."  # before the names of the frozen model


class LinearizedModel(nn.Module):
    """f(x; w₀) + J(x; w₀)·v, with J the derivative of a model's output by its parameters at w₀; v starts at 0.

    v alone learns. w₀ is a frozen copy that always computes as in evaluation: no dropout, and batch norm with its
    running statistics. w₀ + v are not the weights of this function: the model itself cannot compute it. (Liu, Golatkar,
    Soatto, Tangent Transformers for Composition, Privacy and Removal, 2023)

    Args:
        model: of this package; what it computes is one tensor. Parameters that do not require gradients, and those of
            certified reciprocals, have no tangent.

    Raises:
        ValueError: no parameter is left to learn, or the model's loss has penalties of ranges: they are no function of
            its output.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if getattr(model, "ranges", None) is not None:
            raise ValueError("model: its penalty of ranges is of its own activations, of which a tangent has none")
        fixed = {id(parameter) for module in certified_modules(model) for parameter in module.parameters()}
        self.names = tuple(
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in fixed
        )
        if not self.names:
            raise ValueError("model: no parameter requires gradients, so that its tangent has nothing to learn")
        self.initial = copy.deepcopy(model).requires_grad_(False)
        self.tangents = nn.ParameterList(torch.zeros_like(self.initial.get_parameter(name)) for name in self.names)
        self.train(model.training)

    @property
    def architecture(self) -> str:
        """Of the frozen model."""
        return str(self.initial.architecture)

    @property
    def config(self) -> Any:
        """Of the frozen model."""
        return self.initial.config

    @property
    def tied_weights(self) -> dict[str, str]:
        """Names in `state_dict` of the frozen model's tied weights, and of those that they share."""
        tied: Mapping[str, str] = getattr(self.initial, "tied_weights", {})
        return {_INITIAL + name: _INITIAL + source for name, source in tied.items()}

    def pairs(self) -> Iterator[tuple[str, Tensor, nn.Parameter]]:
        """Name and value of each weight that has a tangent, and the tangent, in the order of `names`."""
        for name, tangent in zip(self.names, self.tangents, strict=True):
            yield name, self.initial.get_parameter(name), tangent

    def separated(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors by their names in `state_dict`, as those of the frozen model and the tangents, by its own names."""
        frozen = {name.removeprefix(_INITIAL): value for name, value in state.items() if name.startswith(_INITIAL)}
        return frozen, {name: state[f"tangents.{number}"] for number, name in enumerate(self.names)}

    def frozen_state(self) -> dict[str, Tensor]:
        """Weights and running statistics of the frozen model by their names in `state_dict`; not its counters."""
        state = self.initial.state_dict()
        return {_INITIAL + name: value for name, value in state.items() if value.is_floating_point()}

    def train(self, mode: bool = True) -> Self:
        """As of any module, but for the frozen model, which stays in evaluation."""
        super().train(mode)
        self.initial.eval()
        return self

    def forward(self, inputs: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """The model's output, of the same shape and dtype, or with `targets` the model's loss of that output.

        It is not the tangent of the loss, which no minimum bounds. Costs about two of the model's forward passes.

        Args:
            inputs, targets, reduction: what the model takes; in training mode the loss is that of training.
        """
        weights = {name: self.initial.get_parameter(name) for name in self.names}

        def compute(weights: dict[str, Tensor]) -> Any:
            return functional_call(self.initial, weights, (inputs,))

        # Fused attention has no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            output, change = jvp(compute, (weights,), (dict(zip(self.names, self.tangents, strict=True)),))[:2]
        outputs: Tensor = output + change
        if targets is None:
            return outputs
        model: Any = self.initial
        loss: Tensor = model.loss(outputs, targets, reduction=reduction, training=self.training)
        return loss

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Of a text model: what `GPT2.generate` does. Every token takes a forward pass of the whole window."""
        return sample_sequence(self, tokens, max_new_tokens, **options)

    def forward_with_cache(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits of the last position `[batch, vocab_size]`; what is kept for the next ones are the tokens alone."""
        seen = tokens if cache is None else torch.cat((*cache.layers, tokens), dim=1)
        return self(seen)[:, -1], Cache(seen.size(1), [seen])


def refuse_tangent(model: nn.Module, why: str) -> None:
    """Raise ValueError where `model` is a tangent model; `why`: what it cannot be."""
    if isinstance(model, LinearizedModel):
        raise ValueError(f"model: a tangent model, which no weights alone compute: {why}")


def average_linearized(models: Sequence[LinearizedModel]) -> LinearizedModel:
    """The tangent model whose output is the mean of theirs, to rounding: its v is the mean of theirs.

    Args:
        models: one or more tangents of the same model.

    Raises:
        ValueError: none is given, or what they are tangents of differs.
    """
    if not models:
        raise ValueError("models: expected one or more, got none")
    first = models[0]
    for number, model in enumerate(models[1:], start=1):
        difference = _difference(first, model)
        if difference is not None:
            raise ValueError(f"models[{number}]: not a tangent of the same model as models[0]: {difference} differs")
    result = copy.deepcopy(first)
    with torch.no_grad():
        for mean, *tangents in zip(result.tangents, *(model.tangents for model in models), strict=True):
            mean.copy_(torch.stack([tangent.double() for tangent in tangents]).mean(dim=0))
    return result


def _difference(first: LinearizedModel, second: LinearizedModel) -> str | None:
    """What tells the models apart that they are tangents of; None: nothing."""
    if repr(first.initial) != repr(second.initial):
        return "the architecture"
    if first.names != second.names:
        return "which parameters have tangents"
    own, other = (
        {**dict(model.initial.named_parameters()), **dict(model.initial.named_buffers())} for model in (first, second)
    )
    if own.keys() != other.keys():
        return f"`{min(own.keys() ^ other.keys())}`"
    return next((f"`{name}`" for name, tensor in own.items() if not torch.equal(tensor, other[name])), None)
