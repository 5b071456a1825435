"""The complete state of a training on disk: saved by all ranks, committed once, restored exactly, at any world size."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import random
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import StageContext
from polytrope.pipeline.stages.train import checkpoint_catalogue as catalogue
from polytrope.pipeline.stages.train.best_weights import prune_best
from polytrope.pipeline.stages.train.weight_average import WeightAverage

_STATISTICS = "statistics.pt"  # of rank 0, if the model has any


@dataclass
class Progress:
    """What a restart must know beside weights and optimizer; every rank has its own.

    Args:
        step: completed optimizer steps; also the position in the data.
        sums: of the training `loss` and its terms since the last logged metrics, over `summed_steps`.
        history: logged metrics so far.
        recent_norms: gradient norms of the last steps, to tell a spike.
        best_step, best_loss: of the lowest validation loss so far; 0: none yet.
    """

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    summed_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf


@dataclass(frozen=True)
class ChosenCheckpoint:
    """The checkpoint all ranks restore. `universal`: converted, because another number of workers wrote it."""

    directory: Path
    step: int
    workers: int
    universal: bool


class CheckpointWriter:
    """Writes the checkpoints of one rank; see `catalogue` for when one exists.

    Args:
        context: of the stage; checkpoints lie in its scratch directory.
        rank, workers: this rank, and how many there are.
        keep: newest checkpoints to keep.
        asynchronous: training waits only for a copy in memory; a thread writes, hashes and commits it.
        timeout: seconds that rank 0's thread waits for the files of the others.
    """

    def __init__(
        self, context: StageContext, rank: int, workers: int, keep: int, asynchronous: bool, timeout: float
    ) -> None:
        self.root = context.scratch / "checkpoints"
        self.rank, self.workers, self.keep = rank, workers, keep
        self.asynchronous, self.timeout = asynchronous, timeout
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, engine: Any, progress: Progress, average: WeightAverage | None) -> None:
        """All ranks write and hash, then rank 0 commits.

        Raises:
            OSError, RuntimeError: this checkpoint, or the one before if it was written meanwhile, cannot be written.
        """
        self.finish()
        directory = catalogue.checkpoint_directory(self.root, progress.step)
        if self.rank == 0 and directory.exists():  # left unfinished by an earlier attempt
            shutil.rmtree(directory)
        dist.barrier()
        directory.mkdir(parents=True, exist_ok=True)
        details = {"workers": self.workers, "best_step": progress.best_step}
        own: dict[str, Any] = {f"rank-{self.rank}.pt": _rank_state(progress)}
        if average is not None and self.rank == 0:  # it is the same on all ranks
            own["average.pt"] = average.state()
        if self.rank == 0 and (statistics := running_statistics(engine.module)):
            own[_STATISTICS] = statistics
        if self.asynchronous:
            copies = {directory / name: _serialise(state) for name, state in own.items()}
            with _capturing(engine, copies):
                engine.save_checkpoint(str(directory), tag="state", save_latest=False)
            self._writing = self._thread.submit(self._write, directory, progress.step, copies, details)
            return
        engine.save_checkpoint(str(directory), tag="state", save_latest=False)
        for name, state in own.items():
            torch.save(state, directory / name)
        dist.barrier()
        names = catalogue.files_below(directory)
        hashes = {name: catalogue.hash_on_disk(directory / name) for name in names[self.rank :: self.workers]}
        gathered: list[Any] = [None] * self.workers
        dist.all_gather_object(gathered, hashes)
        if self.rank == 0:
            self._commit(directory, progress.step, gathered, details)
        dist.barrier()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is there.

        Raises:
            OSError, RuntimeError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, directory: Path, step: int, copies: dict[Path, bytes], details: dict[str, Any]) -> None:
        """In the thread: no collectives here, they belong to the training. The ranks meet in the directory instead."""
        for path, content in copies.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        names = [str(path.relative_to(directory)) for path in copies]
        if self.rank == 0:  # what DeepSpeed wrote at once: a script
            names = sorted({*names, *(name for name in catalogue.files_below(directory) if name.endswith(".py"))})
        catalogue.write_hashes(directory, self.rank, {name: catalogue.hash_on_disk(directory / name) for name in names})
        if self.rank == 0:
            gathered = catalogue.gather_hashes(directory, self.workers, self.timeout)
            self._commit(directory, step, gathered, details)

    def _commit(self, directory: Path, step: int, hashes: list[dict[str, Any]], details: dict[str, Any]) -> None:
        files = {name: entry for part in hashes for name, entry in part.items()}
        catalogue.commit(directory, step, files, details)
        kept = catalogue.prune(self.root, self.keep)
        prune_best(self.root / "best", {int(checkpoint.details["best_step"]) for checkpoint in kept}, until=step)


def _serialise(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def _capturing(engine: Any, into: dict[Path, bytes]) -> Iterator[None]:
    """What DeepSpeed would write goes into memory instead, as the bytes of its files."""

    def capture(state_dict: Any, path: str) -> None:
        into[Path(path)] = _serialise(state_dict)

    writer = engine.checkpoint_engine
    writer.save = capture
    try:
        yield
    finally:
        del writer.save


def choose_checkpoint(context: StageContext, rank: int, workers: int, zero_stage: int) -> ChosenCheckpoint | None:
    """The newest valid checkpoint, the same on every rank; converted first if another number of workers wrote it.

    A ZeRO checkpoint loads only at the number of workers that wrote it; DeepSpeed's universal format loads at any.
    Without sharding (stage 0) every rank holds everything, and nothing needs converting.
    """
    message: list[Any] = [None]
    if rank == 0:
        found = catalogue.newest_valid(context.scratch / "checkpoints", context.message)
        if found is not None:
            writers = int(found.details["workers"])
            universal = writers != workers and zero_stage > 0
            if universal:
                context.message(f"converting the checkpoint of step {found.step} from {writers} to {workers} workers")
                _convert_to_universal(found.path / "state", context.scratch / "universal")
            message = [(str(found.path), found.step, writers, universal)]
    dist.broadcast_object_list(message, src=0)
    if message[0] is None:
        return None
    path, step, writers, universal = message[0]
    return ChosenCheckpoint(Path(path), step, writers, universal)


def restore(
    engine: Any,
    average: WeightAverage | None,
    chosen: ChosenCheckpoint | None,
    context: StageContext,
    rank: int,
    workers: int,
) -> Progress:
    """Load weights, optimizer, averaged weights, random state and progress.

    With another number of workers, the ranks beyond the old ones take rank 0's progress and keep the random state they
    were seeded with; the data order does not depend on the number of workers.
    """
    if chosen is None:
        return Progress()
    with safe_loading():
        if chosen.universal:
            _load_universal(engine, context.scratch)
        else:
            engine.load_checkpoint(str(chosen.directory), tag="state")
    if statistics := running_statistics(engine.module):  # DeepSpeed's universal format has none
        saved = torch.load(chosen.directory / _STATISTICS, map_location="cpu", weights_only=True)
        for name, buffer in statistics.items():
            buffer.copy_(saved[name])
    if average is not None:
        average.load(torch.load(chosen.directory / "average.pt", map_location="cpu", weights_only=True))
    source = rank if rank < chosen.workers else 0
    state = torch.load(chosen.directory / f"rank-{source}.pt", weights_only=True)
    if source == rank:
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    if rank == 0:
        context.message(f"continuing from the checkpoint of step {chosen.step}")
    progress = Progress(**state["progress"])
    if workers != chosen.workers:  # each old rank summed the losses of its own samples
        files = [chosen.directory / f"rank-{number}.pt" for number in range(chosen.workers)]
        sums = [torch.load(file, weights_only=True)["progress"]["sums"] for file in files]
        progress.sums = {name: sum(own[name] for own in sums) / len(sums) for name in sums[0]}
    return progress


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """The numbers of a model that are no parameters, by name; the same on every rank."""
    return {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def _rank_state(progress: Progress) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {  # tensors and plain values only: it is read back with `weights_only`
        "progress": vars(progress),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _load_universal(engine: Any, directory: Path) -> None:
    """Load `directory/universal`, and mend what DeepSpeed 0.19.8 leaves wrong under ZeRO-3.

    It gives every parameter group the settings of the first (weight decay on norms), and one shared `step` tensor to
    all of them, which AdamW then counts up once per group.
    """
    optimizer = engine.optimizer.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    engine.load_checkpoint(str(directory), tag="universal")
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _convert_to_universal(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with (
        safe_loading(),
        open(os.devnull, "w", encoding="utf-8") as silence,
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
    ):
        ds_to_universal.main(arguments)


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """Within, `torch.load` makes tensors, plain values and DeepSpeed's few records of them, and runs no foreign code.

    DeepSpeed 0.19.8 loads the files of a checkpoint with `weights_only=False`: whoever may write into a shared store
    could have any code run by the training that goes on from there.

    Raises:
        UserError: a file names anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    original = torch.load

    def load(file: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return original(file, *arguments, **{**options, "weights_only": True})
        except UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"names `{named[1]}`" if named else f"cannot be read: {str(error).splitlines()[0]}"
            raise UserError(
                f"the checkpoint {file} {what}, which no checkpoint of a training does; nothing of it was run",
                "find out who wrote it; without its directory the training goes on from an older one, or starts again",
            ) from None

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        torch.load = load  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.load = original
