"""How far the states behind a network's blocks are from those of another network, on the same inputs.

(Guo et al., PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, 2023, match features by their mean
squared error; that it is relative to the variance of each, so that all blocks count alike, is ours.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.models import is_own
from polytrope.models.configurations import residual_blocks
from polytrope.models.formats import of_transformers
from polytrope.models.inputs import tensors_of


class NoVariance(ValueError):
    """Numbers that are all the same, so that no error can be relative to their variance."""


def find_blocks(model: nn.Module) -> list[str]:
    """The names of the blocks that each add to what they are given, in the order of the forward pass.

    Raises:
        ValueError: it has none, or nothing says which modules they are.
    """
    if is_own(model):
        return list(residual_blocks(model.config))
    kind = type(model).__name__
    if not of_transformers(model):
        raise ValueError(
            f"a {kind} is neither of this package nor of transformers, and nothing says what its blocks are"
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} has an encoder and a decoder, whose states are not at the same positions")
    number = getattr(config, "num_hidden_layers", None)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number and number
    ]
    if len(lists) != 1:
        raise ValueError(
            f"{kind} has {len(lists)} lists of as many blocks as it is said to have (num_hidden_layers = {number}); "
            "one is needed"
        )
    return [f"{lists[0]}.{name}" for name, _ in model.get_submodule(lists[0]).named_children()]


@contextmanager
def states_behind(model: nn.Module, blocks: Sequence[str]) -> Iterator[list[Tensor]]:
    """The first tensor that each block returns, in their order, of one forward pass inside; with its gradients."""
    states: list[Tensor] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(next(tensors_of(output)))

    handles = [model.get_submodule(name).register_forward_hook(note) for name in blocks]
    try:
        yield states
    finally:  # before backward, which may compute blocks again
        for handle in handles:
            handle.remove()


def feature_error(
    states: Sequence[Tensor],
    wanted: Sequence[Tensor],
    mask: Tensor | None = None,
    names: Sequence[str] = (),
) -> Tensor:
    """Mean over the blocks of mean (h - t)² / var t, in float32 at least; the variance is that of all numbers in t.

    Whether there are differences among the numbers in t is read on the host, once for all blocks.

    Args:
        states: h of each block, any shape.
        wanted: t of each block, in the same shapes.
        mask: `[batch, positions]`, 0 where a position does not count; None: all count.
        names: of the blocks, for the error; default: their numbers.

    Raises:
        ValueError: other numbers of blocks, other shapes, no position that counts.
        NoVariance: wanted numbers that are all the same, as a single one is.
    """
    if [state.shape for state in states] != [target.shape for target in wanted]:
        shapes = (f"{[tuple(state.shape) for state in part]}" for part in (states, wanted))
        raise ValueError(f"features: states of {' and '.join(shapes)} cannot be compared")
    errors, constant, counts = [], [], []
    for state, target in zip(states, wanted, strict=True):
        wide = torch.promote_types(state.dtype, torch.float32)
        h, t = state.to(wide), target.to(wide)
        if mask is not None:
            h, t = h[mask != 0], t[mask != 0]
        if not t.numel():
            raise ValueError("features: no position counts, so that nothing is compared")
        counts.append(t.numel())
        least, most = t.aminmax()
        variance = t.var(correction=0)
        constant.append((least == most) | (variance == 0))  # the variance of one number many times is rounding, not 0
        errors.append((h - t).square().mean() / variance)
    if (found := torch.stack(constant)).any():
        number = int(found.nonzero()[0])
        raise NoVariance(
            f"`{names[number] if names else number}`: the {counts[number]} numbers that are wanted at once are all "
            "the same, and have no variance that errors could be relative to"
        )
    return torch.stack(errors).mean()
