"""How the parameters of an activation stand side by side, for kernels and in the one tensor of the torch operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Parts `[count]` or `[groups, count]` <-> packed parameters `[groups, sum of counts]`.

    Args:
        columns: the first so many parts are `[]` or `[groups]` instead: one number per group.
        factors: of the packed parameters; empty: all 1.
    """

    columns: int = 0
    factors: tuple[float, ...] = ()

    def groups(self, shapes: Sequence[torch.Size]) -> int:
        """The number of groups of parts of these shapes.

        Raises:
            ValueError: a part of another shape, or not as many groups in each.
        """
        counts = []
        for index, shape in enumerate(shapes):
            if index >= self.columns and len(shape) not in (1, 2):
                raise ValueError(f"coefficients: expected [count] or [groups, count], got {list(shape)}")
            counts.append(shape.numel() if index < self.columns else 1 if len(shape) == 1 else shape[0])
        if any(count != counts[0] for count in counts) or counts[0] == 0:
            raise ValueError(f"coefficients: expected as many groups in each, at least one, got {counts}")
        return counts[0]

    def pack(self, parts: Sequence[Tensor], factors: Tensor | None) -> Tensor:
        """The packed parameters, float64; `factors`: what `constant` made of them."""
        packed = self.side_by_side(parts)
        return packed.double() if factors is None else packed * factors

    def side_by_side(self, parts: Sequence[Tensor]) -> Tensor:
        """The packed parameters without the factors, in the dtype of the parts."""
        rows = [
            part.reshape(-1, 1) if index < self.columns else part if part.dim() == 2 else part.unsqueeze(0)
            for index, part in enumerate(parts)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def unpack(self, gradient: Tensor, parts: Sequence[Tensor], factors: Tensor | None) -> list[Tensor]:
        """The gradient of the packed parameters -> those of the parts, in their shapes and dtypes."""
        scaled = gradient if factors is None else gradient * factors
        counts = [1 if index < self.columns else part.shape[-1] for index, part in enumerate(parts)]
        pieces = scaled.split(counts, dim=-1)
        return [piece.to(part.dtype).reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]

    def constant(self, device: torch.device) -> Tensor | None:
        """The factors as a new tensor; None where all are 1."""
        return torch.tensor(self.factors, dtype=torch.float64, device=device) if self.factors else None


PLAIN = Packing()
