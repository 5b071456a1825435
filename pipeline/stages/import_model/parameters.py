"""The parameters of the `import_model` stage: which checkpoint, and what it does not say itself."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo


def _check_factory(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+", value):
        raise ValueError("expected package.module:function")
    return value


def _check_options(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    if value and info.data.get("factory") is None:
        raise ValueError("they go to the factory, and there is none: give factory, or leave them out")
    if wrong := _not_finite(value):
        raise ValueError(f"{wrong[0]}: {wrong[1]} is no number that JSON has; give a finite one, or leave it out")
    if not _is_plain(value):
        raise ValueError("expected texts, numbers, lists, and mappings with names: they are kept in JSON")
    return value


def _not_finite(value: Any, name: str = "") -> tuple[str, float] | None:
    """Where NaN or infinity is, as `a.b.0`, and which; None: nowhere."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (name, value)
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_not_finite(entry, f"{name}.{key}" if name else str(key)) for key, entry in entries)
    return next((each for each in found if each is not None), None)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(entry) for name, entry in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool | int | float)


def _check_config(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    if value and info.data.get("factory") is not None:
        raise ValueError("is of GPT-2 and ConvNeXt, and the factory builds the model: use options")
    return value


class ImportModelParameters(BaseModel):
    """A checkpoint on disk. The content of its files decides whether the stage runs again."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str = Field(
        min_length=1,
        description="a directory of polytrope, Hugging Face or DeepSpeed, or a file with a state dict; "
        "relative to the workflow file",
    )
    factory: Annotated[str | None, AfterValidator(_check_factory)] = Field(
        None,
        description="package.module:function of your own code, which builds the model that a state dict belongs to; "
        "its code, and that of all project modules it imports, is part of the key; not needed for GPT-2 and ConvNeXt",
    )
    options: Annotated[dict[str, Any], AfterValidator(_check_options)] = Field(
        default_factory=dict, description="keyword arguments of the factory"
    )
    config: Annotated[dict[str, Any], AfterValidator(_check_config)] = Field(
        default_factory=dict,
        description="fields of the model's configuration that a state dict or DeepSpeed checkpoint of a GPT-2 or "
        "ConvNeXt does not tell: n_head, activation",
    )
