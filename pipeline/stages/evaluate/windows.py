"""Which tokens of a validation split are scored, and with how much text before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WindowBatch:
    """Inputs and targets `[windows, length]` int64; `scored` of the same shape marks the targets that count."""

    inputs: np.ndarray
    targets: np.ndarray
    scored: np.ndarray


ReadBlocks = Callable[[np.ndarray], np.ndarray]  # sample indices → blocks [samples, sequence_length + 1]


def block_windows(read: ReadBlocks, samples: int, batch_size: int) -> Iterator[WindowBatch]:
    """Each block on its own: its first token is given, all others are scored."""
    for start in range(0, samples, batch_size):
        blocks = read(np.arange(start, min(samples, start + batch_size))).astype(np.int64)
        yield WindowBatch(blocks[:, :-1], blocks[:, 1:], np.ones_like(blocks[:, 1:], dtype=bool))


def sliding_windows(read: ReadBlocks, samples: int, length: int, stride: int, batch_size: int) -> Iterator[WindowBatch]:
    """Windows of `length` tokens over the joined blocks, `stride` apart; a target counts in the first window it is in.

    All tokens but the very first are scored exactly once, each with at least `length - stride` tokens of context
    (except at the start). The last window is moved back so that all have the same length.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"stride must be between 1 and the sequence length ({length}), got {stride}")
    total = samples * (length + 1)
    last = total - 1 - length
    starts = [*range(0, last, stride), last] if last > 0 else [0]
    scored_until = 0  # targets are numbered by the position of the token they follow
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for start in starts:
        first_block, end = start // (length + 1), start + length + 1
        blocks = read(np.arange(first_block, -(-end // (length + 1)))).reshape(-1).astype(np.int64)
        tokens = blocks[start - first_block * (length + 1) :][: length + 1]
        rows.append((tokens, np.arange(start, start + length) >= scored_until))
        scored_until = start + length
        if len(rows) == batch_size or start == starts[-1]:
            stacked = np.stack([row for row, _ in rows])
            yield WindowBatch(stacked[:, :-1], stacked[:, 1:], np.stack([mask for _, mask in rows]))
            rows = []
