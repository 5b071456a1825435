"""Models with configurable activations, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURES = ("gpt2", "convnext")


def build_model(architecture: str, config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model (from torch's global random state).

    Args:
        architecture: `gpt2` or `convnext`.
        config: fields of `GPT2Config` or `ConvNeXtConfig`.

    Raises:
        ValueError: unknown architecture, unknown or impossible field.
    """
    if architecture == "gpt2":
        from polytrope.models.gpt2 import GPT2, GPT2Config

        return GPT2(_make_config(GPT2Config, config))
    if architecture == "convnext":
        from polytrope.models.convnext import ConvNeXt, ConvNeXtConfig

        return ConvNeXt(_make_config(ConvNeXtConfig, config))
    raise ValueError(f"unknown architecture `{architecture}`; there are: {', '.join(ARCHITECTURES)}")


def _make_config(kind: Any, config: Mapping[str, Any]) -> Any:
    unknown = sorted(set(config) - set(kind.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"unknown model setting {', '.join(unknown)}; there are: {', '.join(kind.__dataclass_fields__)}"
        )
    return kind(**config)
