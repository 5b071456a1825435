"""Calibration on a Ray cluster: every task reads the model, runs its part of the batches, and returns histograms.

The histograms are integers over fixed bins, so the sum is the same for any number of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polytrope.models.calibration import Calibration, add, calibrate
from polytrope.models.calls import Call, lift
from polytrope.models.formats import read_model
from polytrope.models.inputs import Batch, forward
from polytrope.models.surgery import Activation


def calibrate_part(
    path: str,
    config: Mapping[str, Any],
    names: Sequence[str],
    batches: Sequence[Batch],
    threads: int,
    calls: Sequence[Call],
) -> dict[str, Calibration]:
    """The calibration of the named activations of the model at `path` on some of the batches."""
    import torch

    torch.set_num_threads(threads)
    model = read_model(Path(path), config or None)
    lift(model, calls)
    activations = [Activation(name, model.get_submodule(name)) for name in names]
    return calibrate(model, activations, batches, forward)


def calibrate_on_ray(
    path: Path,
    config: Mapping[str, Any],
    names: Sequence[str],
    batches: Sequence[Batch],
    tasks: int,
    address: str | None,
    calls: Sequence[Call] = (),
) -> dict[str, Calibration]:
    """As `calibrate`, spread over `tasks` Ray tasks.

    Args:
        address: of a cluster whose machines see `path`; None: a Ray of this machine, ended afterwards.
        calls: functions that the model calls, to be made modules first.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            include_dashboard=False,
            num_cpus=None if address else tasks,
        )
    try:
        remote = ray.remote(num_cpus=1, max_retries=2)(calibrate_part)
        tasks = min(tasks, len(batches))
        parts = [list(batches[number::tasks]) for number in range(tasks)]
        return add(
            ray.get([remote.remote(str(path), dict(config), list(names), part, 1, list(calls)) for part in parts])
        )
    finally:
        if started:
            ray.shutdown()
