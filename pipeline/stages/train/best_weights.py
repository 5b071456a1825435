"""The weights of the lowest validation loss so far (`result: best`), kept beside the checkpoints.

One file per improvement, `best/step-00000100.pt` and its hash. A file goes when no kept checkpoint and not the training
itself calls it the best any more: after a restart or a rollback the best so far is always there.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from polytrope.pipeline.stages.train.checkpoint_catalogue import hash_on_disk
from polytrope.pipeline.support.files import replace_json


def save_best(directory: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Write the weights; they count once their hash is there."""
    directory.mkdir(parents=True, exist_ok=True)
    path = _file(directory, step)
    _hash_of(path).unlink(missing_ok=True)
    torch.save(weights, path)
    replace_json(_hash_of(path), hash_on_disk(path), durable=False)


def load_best(directory: Path, step: int) -> dict[str, Tensor]:
    """The weights of `step`.

    Raises:
        RuntimeError: they are not there, or were altered.
    """
    path = _file(directory, step)
    try:
        intact = hash_on_disk(path) == json.loads(_hash_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the best weights, of step {step}, cannot be read: {error}") from error
    if not intact:
        raise RuntimeError(f"the best weights, of step {step}, were altered: {path}")
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def prune_best(directory: Path, keep: Collection[int], until: int) -> None:
    """Delete the weights of all steps up to `until` that are not in `keep`."""
    wanted, last = {_file(directory, step).stem for step in keep}, _file(directory, until).stem
    for path in directory.glob("step-*"):
        if path.stem <= last and path.stem not in wanted:
            path.unlink()


def _file(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.pt"


def _hash_of(path: Path) -> Path:
    return path.with_suffix(".json")
