"""Batches of one rank: its slice of each global batch, read ahead by threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # inputs, targets


def rank_slice(indices: np.ndarray, rank: int, workers: int) -> np.ndarray:
    """The part of a global batch that `rank` processes: contiguous, so that the union over ranks is the batch."""
    share = len(indices) // workers
    return indices[rank * share : (rank + 1) * share]


def text_batch(blocks: np.ndarray) -> Batch:
    """Inputs and targets `[samples, sequence_length]` int64 from blocks `[samples, sequence_length + 1]`."""
    tokens = torch.from_numpy(blocks.astype(np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def as_weights(inputs: Tensor, module: nn.Module) -> Tensor:
    """Images and rows in the type of a model's weights, token ids as they are."""
    return inputs.to(next(module.parameters()).dtype) if inputs.is_floating_point() else inputs


class Prefetcher:
    """Runs `load(step)` for consecutive steps in threads, ahead of the training; batches come in their order.

    An exception of `load` is raised by `next_step`. `wait_seconds` sums the time training waited for data.
    """

    def __init__(self, load: Callable[[int], list[Batch]], start: int, stop: int, threads: int = 1) -> None:
        self.wait_seconds = 0.0
        self._load, self._steps = load, iter(range(start, stop))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
        self._ahead: deque[Future[list[Batch]]] = deque()
        for _ in range(threads + 1):
            self._submit()

    def _submit(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._ahead.append(self._pool.submit(self._load, step))

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step."""
        started = time.perf_counter()
        batches = self._ahead.popleft().result()
        self.wait_seconds += time.perf_counter() - started
        self._submit()
        return batches

    def close(self) -> None:
        """End the threads; what is being read is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def validation_batches(
    load: Callable[[np.ndarray], Batch], samples: int, rank: int, workers: int, size: int
) -> Iterator[tuple[Batch, int]]:
    """Equally many batches on every rank (ZeRO-3 gathers weights collectively), with the number of samples that count.

    The first `samples` validation samples are dealt out; ranks that run out repeat sample 0 with weight zero.
    """
    per_rank = -(-samples // workers)
    first = rank * per_rank
    mine = np.arange(first, min(samples, first + per_rank))
    for start in range(0, per_rank, size):
        part = mine[start : start + size]
        width = min(size, per_rank - start)
        padded = np.concatenate([part, np.zeros(width - len(part), dtype=part.dtype)])
        yield load(padded), len(part)
