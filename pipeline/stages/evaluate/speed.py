"""Time of a training step, throughput and latency of the forward pass, and memory, for several models in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models import find_architecture
from polytrope.models.checkpoint import load_model
from polytrope.pipeline.data.description import UNITS, read_dataset
from polytrope.pipeline.data.model_inputs import read_tensors
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.speed_file import SPEED_FILE, Speed, SpeedProtocol, write_speed
from polytrope.pipeline.data.training_file import recorded_failure
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext
from polytrope.pipeline.stages.evaluate.evaluation import granted_device
from polytrope.pipeline.stages.evaluate.parameters import MeasureSpeedParameters

Batch = tuple[Tensor, Tensor]


def measure_models(
    context: StageContext, dataset: Artifact, models: dict[str, Artifact], parameters: MeasureSpeedParameters
) -> dict[str, float]:
    """Write `speed.json`; returns `LABEL/step_milliseconds`, … of all models.

    The rounds go over all models in turn, so that whatever else the machine does meets all of them; the figures are
    medians over the rounds. Failed trainings have no figures but a reason, in `failures`.

    Raises:
        UserError: no model is left, or one does not fit the dataset.
    """
    torch.set_num_threads(parameters.threads)
    device = granted_device(context)
    batch = read_batch(dataset, parameters.batch_size, device)
    failures = {
        label: failure for label, model in models.items() if (failure := recorded_failure(model.path)) is not None
    }
    for label, failure in failures.items():
        context.note(f"{label} is not measured: {failure}")
    timers = {
        label: Timer(load_model(model.path, device), batch, parameters.steps)
        for label, model in models.items()
        if label not in failures
    }
    if not timers:
        raise UserError("no model is left to measure", "look at the trainings: all of them failed")
    for number in range(-1, parameters.rounds):  # round -1 warms up
        for index, (label, timer) in enumerate(timers.items()):
            context.progress((number + 1) * len(timers) + index, (parameters.rounds + 1) * len(timers), label)
            timer.measure(keep=number >= 0)
    results = {label: timer.figures() for label, timer in timers.items()}
    unit = UNITS[read_dataset(dataset.path).kind]
    protocol = {**parameters.model_dump(), "device": device.type, "unit": unit, "units": units_of(batch)}
    left_out = {"failures": failures} if failures else {}
    speed = Speed(format=1, protocol=SpeedProtocol.model_validate(protocol), models=results, **left_out)
    write_speed(context.output, speed)
    context.log_artifact(SPEED_FILE)
    summary = {f"{label}/{name}": value for label, figures in results.items() for name, value in figures.items()}
    context.log_metrics(summary)
    return summary


def read_batch(dataset: Artifact, size: int, device: torch.device) -> Batch:
    """Inputs and targets of the first samples: tokens `[size, length]`, or pixels `[size, channels, height, width]`, or
    rows `[size, inputs]`."""
    reader = open_split(dataset.path, "validation")
    size = min(size, len(reader))
    if size < 1:
        raise UserError(f"the dataset of `{dataset.stage}` has no validation samples", "use a larger corpus")
    inputs, targets = read_tensors(reader, np.arange(size))
    return inputs.to(device), targets.to(device)


def units_of(batch: Batch) -> int:
    """Tokens, images or rows in a batch."""
    inputs = batch[0]
    return inputs.numel() if inputs.dtype == torch.int64 else inputs.size(0)


class Timer:
    """One model's measurements. A training step is forward, backward and AdamW at a learning rate of 0."""

    def __init__(self, model: nn.Module, batch: Batch, steps: int) -> None:
        inputs, targets = batch
        self.model, self.steps = model, steps
        self.batch = find_architecture(str(model.architecture)).prepare(inputs), targets
        # At a learning rate of 0 the step costs the same and leaves the weights as they are.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        self.seconds: dict[str, list[float]] = {"step": [], "forward": [], "single": []}
        self.kept_for_backward = 0
        self.peak = 0

    def measure(self, keep: bool) -> None:
        """One round; `keep`: count it."""
        cuda = self.batch[0].is_cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        rounds = {"step": self._timed(self._step)}
        if cuda:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        if not self.kept_for_backward:
            self.kept_for_backward = bytes_kept_for_backward(lambda: self.model(*self.batch))
        self.model.eval()
        with torch.no_grad():
            rounds["forward"] = self._timed(lambda: self.model(self.batch[0]))
            rounds["single"] = self._timed(lambda: self.model(self.batch[0][:1]))
        self.model.train()
        for name, seconds in rounds.items():
            if keep:
                self.seconds[name].append(seconds)

    def _step(self) -> None:
        self.model(*self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _timed(self, work: Callable[[], Any]) -> float:
        """Seconds of one call, over `steps` calls."""
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(self.steps):
            work()
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / self.steps

    def figures(self) -> dict[str, float]:
        """Medians over the rounds."""
        median = {name: statistics.median(values) for name, values in self.seconds.items()}
        units = units_of(self.batch)
        figures = {
            "step_milliseconds": 1000 * median["step"],
            "training_throughput": units / median["step"],
            "forward_throughput": units / median["forward"],
            "latency_milliseconds": 1000 * median["single"],
            "bytes_kept_for_backward": float(self.kept_for_backward),
        }
        return figures | ({"peak_memory": float(self.peak)} if self.peak else {})


def bytes_kept_for_backward(forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd keeps between `forward` and its backward pass, each once, with parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(storages.values())
