"""Weights out of a DeepSpeed ZeRO checkpoint, stages 0 to 3, without DeepSpeed and without unpickling its classes.

Stages 1 and 2 keep, on every rank, one slice of the flattened float32 weights of each parameter group; what the
optimizer does not have (frozen parameters, buffers) lies whole in the model's file. Stage 3 keeps a slice of every
single parameter, frozen ones too, padded to a multiple of the number of ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
_MODEL_FILES = "*_model_states.pt"


def checkpoint_directory(path: Path) -> Path | None:
    """Where the files of the newest checkpoint below `path` are, None if it holds none.

    It is `path` itself, what its file `latest` names, or the folder with the highest number in its name.

    Raises:
        ValueError: a `latest` that names no checkpoint; without it, several folders of which none is the newest.
    """
    if any(path.glob(_MODEL_FILES)):
        return path
    tags = sorted(part.name for part in path.iterdir() if part.is_dir() and any(part.glob(_MODEL_FILES)))
    if (path / "latest").is_file():
        named = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if named not in tags:
            raise ValueError(
                f"{path / 'latest'} names {named!r}, but {path / named} has no {_MODEL_FILES}; there "
                f"{'are: ' + ', '.join(tags) if tags else 'is no other checkpoint either'}. Give the folder of the one "
                "you mean"
            )
        return path / named
    if len(tags) <= 1:
        return path / tags[0] if tags else None
    numbered = [re.fullmatch(r"(.*?)(\d+)", tag) for tag in tags]
    numbers = [int(match[2]) for match in numbered if match]
    alike = len({match[1] for match in numbered if match}) == 1 and len(numbers) == len(set(numbers)) == len(tags)
    if not alike:
        raise ValueError(
            f"{path} has several checkpoints and no file `latest`: {', '.join(tags)}. Give the folder of one"
        )
    return path / tags[numbers.index(max(numbers))]


def read_state(path: Path) -> State:
    """The whole weights by name, float32 where the optimizer has them.

    Raises:
        ValueError: no checkpoint there, a missing rank, a truncated file, sizes that do not add up, a model that is
            split over ranks in another way.
    """
    folder = checkpoint_directory(path)
    if folder is None:
        raise ValueError(f"{path}: no DeepSpeed checkpoint: there is no {_MODEL_FILES}")
    model_files = _ranked(folder, _MODEL_FILES)
    models = [_load(file) for file in model_files]
    shards = _ranked(folder, "*_optim_states.pt")
    model = models[0]
    split = model_files[0].name.startswith("zero_pp_rank_")  # of stage 3: its module holds placeholders
    whole = {} if split else _tensors(model.get("module"), model_files[0])
    if not shards:
        if split:
            raise ValueError(f"{folder}: the weights of stage 3 are in *_optim_states.pt, which are missing")
        return whole
    try:
        state = _trained(shards, models, split, folder)
        state |= _frozen(models, split, folder)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder}: not written by a DeepSpeed that is known: {error!r}") from error
    if split:
        buffers = model.get("buffer_names") or []
        state |= {name: model["module"][name] for name in buffers if name in model["module"]}
    for name, source in _pairs(model.get("shared_params")):
        if source in state:
            state[name] = state[source]
    return whole | state


def _trained(shards: Sequence[Path], models: Sequence[dict[str, Any]], split: bool, folder: Path) -> State:
    """What the optimizer has."""
    loaded = [_load(file)["optimizer_state_dict"] for file in shards]
    workers = loaded[0].get("partition_count", len(shards))
    workers = max(workers) if isinstance(workers, list) else int(workers)
    if workers != len(shards):
        raise ValueError(f"{folder}: {len(shards)} of {workers} ranks' *_optim_states.pt are there")
    if split and len(models) != workers:
        raise ValueError(f"{folder}: {len(models)} of {workers} ranks' {_MODEL_FILES} are there")
    shapes: list[dict[str, Any]] = models[0]["param_shapes"]
    if split:
        flat = [torch.cat([part.flatten() for part in rank["fp32_flat_groups"]]) for rank in loaded]
        return _join_parameters(flat, shapes, folder)
    groups = [rank["single_partition_of_fp32_groups"] for rank in loaded]
    return _split_groups(groups, shapes, loaded[0].get("param_alignment_paddings"), folder)


def _split_groups(
    groups: list[list[Tensor]], shapes: list[dict[str, Any]], paddings: list[list[int]] | None, folder: Path
) -> State:
    state: State = {}
    for index, group in enumerate(shapes):
        flat = torch.cat([rank[index].flatten() for rank in groups])
        behind = paddings[index] if paddings is not None else [0] * len(group)
        needed = sum(math.prod(shape) for shape in group.values()) + sum(behind)
        step = 2 * len(groups)  # DeepSpeed fills up to a multiple of it
        if len(flat) < needed or -(-len(flat) // step) != -(-needed // step):
            raise ValueError(f"{folder}: group {index} has {len(flat)} numbers for {needed} parameters")
        offset = 0
        for (name, shape), padding in zip(group.items(), behind, strict=True):
            size = math.prod(shape)
            state[name] = flat[offset : offset + size].reshape(tuple(shape)).clone()
            offset += size + padding
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


def _frozen(models: Sequence[dict[str, Any]], split: bool, folder: Path) -> State:
    """Parameters without gradient: slices of all ranks under stage 3, whole under stage 2, under stage 1 none."""
    fragments = [model.get("frozen_param_fragments") or {} for model in models]
    if not split:
        return dict(fragments[0])
    state: State = {}
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        size = math.prod(shape)
        joined = torch.cat([rank[name].flatten() for rank in fragments])
        if len(joined) < size:
            raise ValueError(
                f"{folder}: the shards of the frozen parameter {name} have {len(joined)} of {size} numbers"
            )
        state[name] = joined[:size].reshape(tuple(shape)).clone()
    return state


def _load(path: Path) -> dict[str, Any]:
    content = load_tensors(path, _STAND_INS)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not written by DeepSpeed")
    return content


def _tensors(content: Any, path: Path) -> State:
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds no weights")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _pairs(shared: Any) -> list[tuple[str, str]]:
    return [(str(a), str(b)) for a, b in (shared.items() if isinstance(shared, dict) else shared or [])]


def _ranked(folder: Path, pattern: str) -> list[Path]:
    """The files by the rank in their names.

    Raises:
        ValueError: the model is split by layers, experts or tensors, or a rank is missing in between.
    """
    ranks: dict[int, Path] = {}
    for file in folder.glob(pattern):
        match = re.fullmatch(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_00_(?:model|optim)_states\.pt", file.name)
        if match is None or int(match[1] or 0) in ranks:
            raise ValueError(f"{file}: a model split by tensors, layers or experts is not read; write it whole first")
        ranks[int(match[1] or 0)] = file
    if sorted(ranks) != list(range(len(ranks))):
        raise ValueError(
            f"{folder}: {len(ranks)} ranks' {pattern} are there, up to rank {max(ranks)}: some are missing"
        )
    return [ranks[rank] for rank in sorted(ranks)]
