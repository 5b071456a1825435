"""Names in MLflow's model registry, by MLflow's own rules (tested against it)."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator


def _name(value: str) -> str:
    if not value.strip() or "/" in value or ":" in value or value in (".", "..") or value != value.strip():
        raise ValueError("expected a name without `/` and `:`, and without spaces around it")
    return value


def _alias(value: str) -> str:
    if not re.fullmatch(r"[\w-]{1,255}", value) or re.fullmatch(r"[vV]\d+|latest", value):
        raise ValueError("expected letters, digits, _ and -, and neither `latest` nor `v1`, which mean versions")
    return value


RegisteredName = Annotated[str, AfterValidator(_name)]
RegisteredAlias = Annotated[str, AfterValidator(_alias)]
