"""Small JSON files that one stage writes and others read: each is one pydantic model, which reads and writes it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from polytrope.pipeline.errors import UserError


class Record(BaseModel):
    """What was not set is left out of the file."""

    model_config = ConfigDict(frozen=True)


class OpenRecord(BaseModel):
    """The same with further figures, whose names are open."""

    model_config = ConfigDict(frozen=True, extra="allow")


Found = TypeVar("Found", bound=BaseModel)


def write_record(path: Path, record: BaseModel) -> None:
    """Write what is set in `record`."""
    write_json(path, record.model_dump(exclude_unset=True))


def write_json(path: Path, content: Any) -> None:
    """Write the content as JSON; NaN and infinity become null."""
    path.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(path: Path, kind: type[Found], hint: str) -> Found:
    """Read it again.

    Raises:
        UserError: not there, damaged, or of another version; with `hint` as the way out.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        raise UserError(f"{path} is not what it should be: {place}: {first['msg']}", hint) from error
