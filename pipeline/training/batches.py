"""Batches of one rank: its slice of each global batch, read ahead by a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # inputs, targets


def rank_slice(indices: np.ndarray, rank: int, workers: int) -> np.ndarray:
    """The part of a global batch that `rank` processes: contiguous, so that the union over ranks is the batch."""
    share = len(indices) // workers
    return indices[rank * share : (rank + 1) * share]


def text_batch(blocks: np.ndarray) -> Batch:
    """Inputs and targets `[samples, sequence_length]` int64 from blocks `[samples, sequence_length + 1]`."""
    tokens = torch.from_numpy(blocks.astype(np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Prefetcher:
    """Runs `load(step)` for consecutive steps in a thread, `depth` steps ahead.

    An exception of `load` is raised by `next_step`. `wait_seconds` sums the time training waited for data.
    """

    def __init__(self, load: Callable[[int], list[Batch]], start: int, stop: int, depth: int = 2) -> None:
        self.wait_seconds = 0.0
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(load, start, stop), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, load: Callable[[int], list[Batch]], start: int, stop: int) -> None:
        for step in range(start, stop):
            try:
                item: list[Batch] | BaseException = load(step)
            except BaseException as error:  # handed to the training thread, which raises it
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.5)
                    break
                except queue.Full:
                    continue
            if self._stopped.is_set() or isinstance(item, BaseException):
                return

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step."""
        started = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - started
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=10)


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
