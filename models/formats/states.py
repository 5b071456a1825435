"""State dicts in files, and the model of this package that fits: sizes are read off the shapes, the rest is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from polytrope.models import make_config, published_architectures
from polytrope.models.architecture import PublishedArchitecture
from polytrope.models.weights import load_exactly, unwrap

State = dict[str, Tensor]
_DEEPEST = 5  # mappings within one another that are searched


@dataclass(frozen=True)
class Weights:
    """The weights of one model.

    Args:
        record: the model.
        state: by the names of any of its layouts, without wrappers' prefixes.
        told: what stands beside them, as fields of its configuration.
        source: the file or directory, for messages.
    """

    record: PublishedArchitecture
    state: State
    told: dict[str, Any]
    source: str


def load_tensors(path: Path, safe_globals: list[Any] | None = None) -> Any:
    """The content of a torch file, unpickled with `weights_only=True`.

    Args:
        safe_globals: further classes the file may name, as of `torch.serialization.safe_globals`.

    Raises:
        ValueError: a file that is missing, truncated, or holds more than tensors and plain containers.
    """
    try:
        with torch.serialization.safe_globals(safe_globals or []):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "nsupported" in line), "it is no torch file")
        raise ValueError(
            f"{path} is not loaded: it holds more than tensors ({reason.strip()}), and unpickling that could run any "
            "code; save its state_dict() alone, or convert it to .safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error


def load_safetensors(path: Path) -> State:
    """The content of a `.safetensors` file.

    Raises:
        ValueError: a file that is missing or truncated.
    """
    try:
        tensors: State = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    return tensors


def load_content(path: Path) -> Any:
    """What a `.safetensors` or torch file holds."""
    return load_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)


def find_weights(content: Any, source: str, records: Sequence[PublishedArchitecture] = ()) -> Weights:
    """The weights of the one model in the content of a file, in whatever mapping they lie (`model`, `state_dict`, …).

    Args:
        source: for messages.
        records: what is looked for; default: every model of this package that others publish.

    Raises:
        ValueError: none, or several (a model and its average).
    """
    records = records or published_architectures()
    found: list[tuple[str, Weights]] = []
    names: list[str] = []
    try:
        for path, mapping, around in _mappings(content, "", {}, 0):
            tensors = _tensors_in(mapping)
            names += tensors
            for record in records:
                state = unwrap(tensors, record.landmark)
                if state is not None:
                    told = _told(record, mapping) | _told(record, around)
                    found.append((path, Weights(record, state, told, source)))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    _refuse_several(source, [path for path, _ in found])
    if not found:
        _refuse_no_state(source, names)
        raise ValueError(
            f"{source}: the weights are neither those of a {' nor of a '.join(record.title for record in records)}; "
            f"they begin with {', '.join(names[:4])}. Give a directory with a config.json instead, or to the stage "
            "`import_model` the `factory` that builds the model"
        )
    return found[0][1]


def _refuse_several(source: str, places: Sequence[str]) -> None:
    if len(places) > 1:
        raise ValueError(
            f"{source} holds several models, below {', '.join(places)}; save the one you mean in a file of its own"
        )


def _refuse_no_state(source: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"{source} holds no state dict: expected tensors by name")


def _tensors_in(mapping: Mapping[Any, Any]) -> State:
    tensors = {str(name): value for name, value in mapping.items() if isinstance(value, Tensor)}
    if odd := next((name for name, t in tensors.items() if t.is_meta or t.layout != torch.strided), None):
        raise ValueError(f"{odd} has no numbers, or not all of them (a meta or sparse tensor)")
    return tensors


def load_into(model: nn.Module, content: Any, source: str) -> nn.Module:
    """Put the weights of the one model in the content of a file into a fresh module, by the module's own names.

    They may lie in a mapping of mappings (`model`, `state_dict`, …) and below names of wrappers (DDP, Lightning, …).

    Args:
        source: for messages.

    Returns:
        `model`, in evaluation mode.

    Raises:
        ValueError: no weights of it, or those of several models (one and its average); weights that do not fit.
    """
    own = set(model.state_dict())
    if not own:
        raise ValueError(f"{source}: a {type(model).__name__} has no weights")
    # Of its names the least likely to be another model's.
    landmark = re.escape(max(own, key=lambda name: (name.count("."), len(name), name)))
    found: list[tuple[str, State]] = []
    names: list[str] = []
    try:
        for path, mapping, _ in _mappings(content, "", {}, 0):
            tensors = _tensors_in(mapping)
            names += tensors
            state = tensors if set(tensors) <= own else unwrap(tensors, rf"(|.*\.){landmark}")
            if state is not None:
                found.append((path, state))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    _refuse_several(source, [path for path, _ in found])
    if not found:
        _refuse_no_state(source, names)
        raise ValueError(
            f"{source}: the weights are not those of the {type(model).__name__}: they begin with "
            f"{', '.join(names[:4])}, the model's with {', '.join(list(model.state_dict())[:4])}"
        )
    load_exactly(model, found[0][1], source)
    return model.eval()


def _mappings(
    content: Any, path: str, around: Mapping[Any, Any], depth: int
) -> Iterator[tuple[str, Mapping[Any, Any], Mapping[Any, Any]]]:
    """Every mapping in `content` that has tensors, with its path and the mapping it lies in."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    if any(isinstance(value, Tensor) for value in content.values()):
        yield path or "the top", content, around
    for key, value in content.items():
        yield from _mappings(value, f"{path}.{key}" if path else str(key), content, depth + 1)


def _told(record: PublishedArchitecture, mapping: Mapping[Any, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for key, read in record.told.items():
        if isinstance(mapping.get(key), Mapping):
            told |= read(mapping[key])
    return told


def build_from_weights(weights: Weights, config: Mapping[str, Any]) -> nn.Module:
    """The model these weights belong to, loaded.

    Args:
        config: what neither the shapes nor the file tell.

    Raises:
        ValueError: a field that is missing, or contradicts the file; weights that do not fit.
    """
    record, source = weights.record, weights.source
    try:
        state = record.own_names(weights.state)
        fields = record.sizes(state)
        _agree(fields, weights.told, "the shapes of the weights say", "the file")
        fields |= weights.told
        _agree(weights.told, config, "the file says", "what was given")
        fields |= config
        asked = {name: hint for name, hint in record.asked(weights.state).items() if name not in fields}
        if asked:
            shapes = record.sizes(state)
            told = ", ".join(f"{name} = {value!r}" for name, value in weights.told.items() if name not in shapes)
            raise ValueError(
                f"{', '.join(asked)}: the file does not say, so give "
                + " and ".join(f"{name} ({hint})" for name, hint in asked.items())
                + f": `polytrope convert … {' '.join(f'--set {name}=VALUE' for name in asked)}`, "
                + f"`config: {{{', '.join(f'{name}: VALUE' for name in asked)}}}` of the stage `import_model`"
                + (f"; it says {told}" if told else "")
            )
        model = record.build(make_config(record.config, fields))
        record.load(model, state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return model


def _agree(known: Mapping[str, Any], other: Mapping[str, Any], who: str, whom: str) -> None:
    for name, value in other.items():
        if name in known and known[name] != value:
            raise ValueError(f"{name}: {who} {known[name]!r}, {whom} {value!r}")
