"""What a training says while it runs: throughput, metrics that are sent once, statistics of activations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polytrope.models.checkpoint import activation_modules
from polytrope.pipeline.stage import StageContext


class Meter:
    """Throughput since it was last read, without the time of validations and checkpoints."""

    def __init__(self) -> None:
        self.units, self.seconds, self._since = 0, 0.0, time.perf_counter()

    def add(self, units: int) -> None:
        now = time.perf_counter()
        self.units += units
        self.seconds += now - self._since
        self._since = now

    def restart(self) -> None:
        """Do not count the time since the last `add`."""
        self._since = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Units per second, and seconds, since the last call."""
        seconds = max(self.seconds, 1e-9)
        rate = self.units / seconds
        self.units, self.seconds = 0, 0.0
        return rate, seconds


class Stopwatch:
    """Sums the time spent inside `with`: of the device if it is a GPU (by events, without waiting for it)."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self._on_gpu = 0.0, device.type == "cuda"
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._on_gpu:
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()  # type: ignore[no-untyped-call]
            self._pairs.append((started, ended))
        else:
            self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._pairs[-1][1].record()  # type: ignore[no-untyped-call]
        else:
            self.seconds += time.perf_counter() - self._started

    def read(self) -> float:
        """Seconds since the last call."""
        for started, ended in self._pairs:
            ended.synchronize()  # type: ignore[no-untyped-call]
            self.seconds += started.elapsed_time(ended) / 1000
        seconds, self.seconds, self._pairs = self.seconds, 0.0, []
        return seconds


def gather(own: list[float], workers: int, device: torch.device) -> list[list[float]]:
    """The values of all ranks, in their order; a collective."""
    mine = torch.tensor(own, dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(workers)]
    dist.all_gather(rows, mine)
    return [row.tolist() for row in rows]


def rank_metrics(forward: list[float], wait: list[float]) -> dict[str, float]:
    """Who holds the others up. Whole steps take all ranks equally long; what a rank does without the others does not.

    Args:
        forward, wait: seconds per step of each rank in forward passes, and waiting for data.

    Returns:
        Both by rank, for up to 16; `straggler_ratio`: the slowest rank's sum over the median one's; `slowest_rank`.
    """
    if len(forward) == 1:
        return {"worker_0/forward_seconds": forward[0], "worker_0/data_wait_seconds": wait[0]}
    sums = [a + b for a, b in zip(forward, wait, strict=True)]
    slowest = max(range(len(sums)), key=lambda rank: sums[rank])
    middle = statistics.median_low(sums)
    values = {"straggler_ratio": sums[slowest] / max(middle, 1e-9), "slowest_rank": float(slowest)}
    for rank in range(min(16, len(sums))):
        values[f"worker_{rank}/forward_seconds"], values[f"worker_{rank}/data_wait_seconds"] = forward[rank], wait[rank]
    return values


class MetricsLog:
    """Sends metrics from rank 0, and those of a step only once even if a restart trains it again."""

    def __init__(self, context: StageContext, rank: int) -> None:
        self.context, self.rank = context, rank
        self._path = context.scratch / "logged-step"
        try:
            self._logged = int(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._logged = -1

    def log(self, values: dict[str, float], step: int) -> None:
        if self.rank == 0 and step > self._logged:
            self.context.log_metrics(values, step=step)

    def finished(self, step: int) -> None:
        """All metrics of `step` were sent: a later attempt will not send them again."""
        if self.rank == 0 and step > self._logged:
            self._path.write_text(str(step), encoding="utf-8")


def peak_memory(device: torch.device) -> float:
    """Largest memory of this process (CPU: resident set) or device so far, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


@contextmanager
def watch_activations(model: nn.Module, into: dict[str, float]) -> Iterator[None]:
    """Collect mean and deviation of each block's activation's input, mean square of its output, its coefficients' norm.

    Costs three reductions per layer, in the steps where it is on; the values are of this rank's last micro-batch.
    """
    modules = {str(block): module for block, module in activation_modules(model).items()}
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().float()
            seen[name] = (x.mean(), x.std(), output.detach().float().square().mean())

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, (mean, deviation, mean_square) in seen.items():
        into[f"preactivation_mean/{name}"], into[f"preactivation_std/{name}"] = float(mean), float(deviation)
        into[f"activation_mean_square/{name}"] = float(mean_square)
    for name, module in modules.items():
        tensors = [parameter.detach().float().flatten() for parameter in module.parameters() if parameter.numel()]
        if tensors:
            into[f"coefficient_norm/{name}"] = float(torch.cat(tensors).norm())


def human(number: float) -> str:
    """18234 → 18.2k."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"
