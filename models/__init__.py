"""Models with configurable activations, and their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from polytrope.models.architecture import Architecture, PublishedArchitecture


def _gpt2() -> Architecture:
    from polytrope.models.gpt2 import ARCHITECTURE

    return ARCHITECTURE


def _convnext() -> Architecture:
    from polytrope.models.convnext import ARCHITECTURE

    return ARCHITECTURE


def _mlp() -> Architecture:
    from polytrope.models.mlp import ARCHITECTURE

    return ARCHITECTURE


# Every model; the functions import torch, the names do not.
ARCHITECTURES: dict[str, Callable[[], Architecture]] = {"gpt2": _gpt2, "convnext": _convnext, "mlp": _mlp}


def find_architecture(name: str) -> Architecture:
    """The record of a model.

    Raises:
        ValueError: there is no such model.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture `{name}`; there are: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]()


def published_architectures() -> list[PublishedArchitecture]:
    """The models whose weights others publish, too."""
    from polytrope.models.architecture import PublishedArchitecture

    records = [find_architecture(name) for name in ARCHITECTURES]
    return [record for record in records if isinstance(record, PublishedArchitecture)]


def find_huggingface(model_type: Any) -> PublishedArchitecture | None:
    """The model that transformers calls so, None if this package has none."""
    records = published_architectures()
    return next((record for record in records if record.huggingface.model_type == model_type), None)


def is_own(model: Any) -> bool:
    """Whether a module is a model of this package; others may have an attribute `architecture`, too."""
    name = getattr(model, "architecture", None)
    return name in ARCHITECTURES and isinstance(getattr(model, "config", None), find_architecture(name).config)


def build_model(architecture: str, config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model (from torch's global random state).

    Args:
        architecture: a name in `ARCHITECTURES`.
        config: fields of its configuration, such as `GPT2Config`.

    Raises:
        ValueError: unknown architecture, unknown or impossible field.
    """
    record = find_architecture(architecture)
    return record.build(make_config(record.config, config))


def make_config(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """A configuration of the dataclass `kind`.

    Raises:
        ValueError: unknown or impossible field.
    """
    from polytrope.models.parts.settings import PARTS

    unknown = sorted(set(fields) - set(kind.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"unknown model setting {', '.join(unknown)}; there are: {', '.join(kind.__dataclass_fields__)}"
        )
    usual = asdict(kind())
    for name, value in fields.items():
        if name not in ("activation", *PARTS):
            _check_kind(name, value, usual[name])
        elif not all(isinstance(entry, str | dict) for entry in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{name}: expected a name, its settings, or a list of these, got {value!r}")
    return kind(**fields)


def _check_kind(name: str, value: Any, usual: Any) -> None:
    """Refuse a value of another kind than the default's, such as a text for a number."""
    if isinstance(usual, dict):
        if not isinstance(value, Mapping) or not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"{name}: expected numbers by name, got {value!r}")
        for entry, number in value.items():
            _check_kind(f"{name}.{entry}", number, 1)
        return
    if isinstance(usual, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}: expected a list, got {value!r}")
        for entry in value:
            _check_kind(name, entry, usual[0])
        return
    wanted = {bool: "true or false", int: "an integer", float: "a number", str: "a name"}[type(usual)]
    kinds = (int, float) if isinstance(usual, float) else type(usual)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(usual, bool)):
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
