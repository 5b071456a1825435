"""How far a model is from the one it was made from, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def block_cosines(
    model: nn.Module, reference: nn.Module, forward: Callable[[nn.Module], Any], features: int
) -> list[float]:
    """Cosine between the outputs of each block of the two models on the same inputs, averaged over positions.

    Args:
        forward: runs one of them once.
        features: the dimension of a block's output that holds the features: -1 for text, 1 for images.

    Returns:
        One per block, first block first; empty if the models have different numbers of blocks.
    """
    outputs = _block_outputs(model, forward)
    others = _block_outputs(reference, forward)
    if [output.shape for output in outputs] != [other.shape for other in others]:
        return []
    return [
        float(F.cosine_similarity(output.double(), other.double(), dim=features).mean())
        for output, other in zip(outputs, others, strict=True)
    ]


@torch.no_grad()
def _block_outputs(model: nn.Module, forward: Callable[[nn.Module], Any]) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in model.blocks]  # type: ignore[union-attr]
    try:
        forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return found
