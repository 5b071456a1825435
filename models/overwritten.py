"""Activations that work in place in a model that reads what they wrote: a learned one writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from polytrope.models.modes import wrapped_forward


def refuse_overwritten(
    model: nn.Module, names: Sequence[str], wanted: Tensor, output: Callable[[], Tensor], moved: float
) -> None:
    """Compare the model's output with that where each of its activations works on a copy.

    Args:
        names: of the activations; functions that the model calls are modules by now, and not in place.
        wanted: the output of the model as it was given.
        output: computes it.
        moved: relative difference that is rounding.

    Raises:
        ValueError: another output; names the activations that wrote to what they were given.
    """
    writing: dict[str, bool] = {}

    def wrap(name: str, module: nn.Module) -> Callable[..., Any]:
        function = module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            given = (arguments, keywords)
            copies = tree_map_only(Tensor, torch.clone, given)
            result = function(*copies[0], **copies[1])
            pairs = zip(_tensors(given), _tensors(copies), strict=True)
            writing[name] = writing.get(name, False) or not all(_equal(one, other) for one, other in pairs)
            return result

        return forward

    with wrapped_forward([(name, model.get_submodule(name)) for name in names], wrap):
        found = output()
    difference = float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))
    if not difference > moved:
        return
    shown = ", ".join(f"`{name}`" for name in ([name for name, wrote in writing.items() if wrote] or names)[:5])
    raise ValueError(
        f"{shown}: works in place, and the model reads what it wrote: without that its output moves by "
        f"{difference:.2g} relative to itself, and what is learned writes nothing; let the model use the result alone "
        f"(`x = activation(x)`, `inplace=False`), or leave it out"
    )


def _tensors(given: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    return [value for value in (*given[0], *given[1].values()) if isinstance(value, Tensor)]


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
