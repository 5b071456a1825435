"""What a training says while it runs: throughput, metrics that are sent once, statistics of activations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


class MetricsLog:
    """Sends metrics from rank 0, and those of a step only once even if a restart trains it again."""

    def __init__(self, context: StageContext, rank: int) -> None:
        self.context, self.rank = context, rank
        self._path = context.scratch / "logged-step"
        try:
            self._logged = int(self._path.read_text())
        except (OSError, ValueError):
            self._logged = -1

    def log(self, values: dict[str, float], step: int) -> None:
        if self.rank == 0 and step > self._logged:
            self.context.log_metrics(values, step=step)

    def finished(self, step: int) -> None:
        """All metrics of `step` were sent: a later attempt will not send them again."""
        if self.rank == 0 and step > self._logged:
            self._path.write_text(str(step))


def peak_memory(device: torch.device) -> float:
    """Largest memory of this process (CPU: resident set) or device so far, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def activation_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The activation modules of the blocks, by block number."""
    blocks: Any = model.blocks
    return {
        str(index): block.mlp.activation if hasattr(block, "mlp") else block.act for index, block in enumerate(blocks)
    }


@contextmanager
def watch_preactivations(model: nn.Module, into: dict[str, float]) -> Iterator[None]:
    """Collect mean and deviation of what enters each block's activation, and the norm of its coefficients.

    Costs two reductions per layer, in the steps where it is on; the values are of this rank's last micro-batch.
    """
    modules = activation_modules(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            seen[name] = (x.mean(), x.std())

        return record

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, (mean, deviation) in seen.items():
        into[f"preactivation_mean/{name}"], into[f"preactivation_std/{name}"] = float(mean), float(deviation)
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
