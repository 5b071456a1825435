"""Weights out of a DeepSpeed ZeRO checkpoint, stages 1 to 3, without DeepSpeed and without unpickling its classes.

Stages 1 and 2 keep, on every rank, one slice of the flattened float32 weights of each parameter group. Stage 3 keeps a
slice of every single parameter, padded to a multiple of the number of ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytrope.models.formats.states import State, load_tensors


class _Inert:
    """Stands in for a class of DeepSpeed: takes any state and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def checkpoint_directory(path: Path) -> Path | None:
    """Where the files of the newest checkpoint below `path` are, None if it holds none."""
    candidates = [path]
    if (path / "latest").exists():
        candidates.insert(0, path / (path / "latest").read_text().strip())
    candidates += sorted(part for part in path.iterdir() if part.is_dir())
    return next((folder for folder in candidates if any(folder.glob("*_model_states.pt"))), None)


def read_state(path: Path) -> State:
    """The whole float32 weights by name.

    Raises:
        ValueError: no checkpoint there, a missing rank, a truncated file, sizes that do not add up.
    """
    folder = checkpoint_directory(path)
    if folder is None:
        raise ValueError(f"{path}: no DeepSpeed checkpoint: there is no *_model_states.pt")
    models = _ranked(folder.glob("*_model_states.pt"))
    model = _load(models[0])
    shards = _ranked(folder.glob("*_optim_states.pt"))
    if not shards:  # stage 0: the weights are whole
        return _tensors(model.get("module"), models[0])
    loaded = [_load(file)["optimizer_state_dict"] for file in shards]
    workers = loaded[0].get("partition_count", len(shards))
    workers = max(workers) if isinstance(workers, list) else int(workers)
    if workers != len(shards):
        raise ValueError(f"{folder}: {len(shards)} of {workers} ranks' *_optim_states.pt are there")
    shapes: list[dict[str, Any]] = model["param_shapes"]
    if "fp32_flat_groups" in loaded[0]:
        flat = [torch.cat([part.flatten() for part in rank["fp32_flat_groups"]]) for rank in loaded]
        state = _join_parameters(flat, shapes, folder)
    else:
        groups = [rank["single_partition_of_fp32_groups"] for rank in loaded]
        state = _split_groups(groups, shapes, folder)
    whole = _tensors(model.get("module"), models[0]) if model.get("module") else {}
    buffers = set(model.get("buffer_names") or [])
    state |= {name: tensor.float() for name, tensor in whole.items() if name in buffers}
    state |= dict(model.get("frozen_param_fragments") or {}) if len(shards) == 1 or whole else {}
    for name, source in _pairs(model.get("shared_params")):
        if source in state:
            state[name] = state[source]
    return state


def _split_groups(groups: list[list[Tensor]], shapes: list[dict[str, Any]], folder: Path) -> State:
    state: State = {}
    for index, group in enumerate(shapes):
        flat = torch.cat([rank[index].flatten() for rank in groups])
        needed = sum(math.prod(shape) for shape in group.values())
        if len(flat) < needed:
            raise ValueError(f"{folder}: group {index} has {len(flat)} numbers for {needed} parameters")
        offset = 0
        for name, shape in group.items():
            size = math.prod(shape)
            state[name] = flat[offset : offset + size].reshape(tuple(shape)).clone()
            offset += size
    return state


def _join_parameters(flat: list[Tensor], shapes: list[dict[str, Any]], folder: Path) -> State:
    state: State = {}
    offset = 0
    for group in shapes:
        for name, shape in group.items():
            size = math.prod(shape)
            part = -(-size // len(flat))
            if offset + part > len(flat[0]):
                raise ValueError(f"{folder}: the shards end before parameter {name}")
            joined = torch.cat([rank[offset : offset + part] for rank in flat])
            state[name] = joined[:size].reshape(tuple(shape)).clone()
            offset += part
    return state


def _load(path: Path) -> dict[str, Any]:
    content = load_tensors(path, _STAND_INS)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not written by DeepSpeed")
    return content


def _tensors(content: Any, path: Path) -> State:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no weights")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _pairs(shared: Any) -> list[tuple[str, str]]:
    return [(str(a), str(b)) for a, b in (shared.items() if isinstance(shared, dict) else shared or [])]


def _ranked(files: Iterable[Path]) -> list[Path]:
    def rank(file: Path) -> int:
        match = re.search(r"zero_pp_rank_(\d+)", file.name)
        return int(match.group(1)) if match else 0

    return sorted(files, key=rank)
