"""Models with configurable activations, and their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from polytrope.models.architecture import Architecture


def _gpt2() -> Architecture:
    from polytrope.models.gpt2 import ARCHITECTURE

    return ARCHITECTURE


def _convnext() -> Architecture:
    from polytrope.models.convnext import ARCHITECTURE

    return ARCHITECTURE


# Every model; the functions import torch, the names do not.
ARCHITECTURES: dict[str, Callable[[], Architecture]] = {"gpt2": _gpt2, "convnext": _convnext}


def find_architecture(name: str) -> Architecture:
    """The record of a model.

    Raises:
        ValueError: there is no such model.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture `{name}`; there are: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]()


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
    unknown = sorted(set(fields) - set(kind.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"unknown model setting {', '.join(unknown)}; there are: {', '.join(kind.__dataclass_fields__)}"
        )
    return kind(**fields)
