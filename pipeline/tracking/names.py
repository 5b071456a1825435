"""What MLflow accepts: names, lengths, numbers. Whatever a stage says comes out of here as something a server takes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from polytrope.pipeline.workflow.encoding import readable

PARAMETER_LENGTH, TAG_LENGTH, KEY_LENGTH = 6000, 5000, 250  # characters
METRICS_PER_REQUEST, PARAMETERS_PER_REQUEST = 900, 100  # MLflow takes 1000 and 100
_LARGEST_STEP = 2**63 - 1
_CUT = " … (cut)"
LOSSES = "-losses"  # what the curves that matter most are kept under


def mlflow_name(name: str) -> str:
    """A metric or parameter name that MLflow accepts: `train[degree=3]/val/loss` → `train.degree-3/val/loss`."""
    text = name.replace("[", ".").replace("]", "").replace("=", "-").replace(",", ".")
    text = re.sub(r"[^\w\-. :/]", "_", text)[:KEY_LENGTH]
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]  # MLflow wants a plain path
    if parts and parts[0].startswith(".."):
        parts[0] = "_" + parts[0][1:]
    return "/".join(parts) or "unnamed"


def printable(text: str) -> str:
    """A text that every database takes: NUL and halves of surrogate pairs are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def parameter_text(text: str) -> str:
    """A parameter's value; one that is too long for MLflow is cut, and says so."""
    text = printable(text)
    return text if len(text) <= PARAMETER_LENGTH else text[: PARAMETER_LENGTH - len(_CUT)] + _CUT


def parent_folder(stage: str) -> str:
    """Where a stage's files for the workflow's own run stand there: those of `report` at the top, others by stage."""
    return "" if stage == "report" else mlflow_name(stage)


def number(value: float) -> float:
    """MLflow stores no infinity; NaN is kept."""
    return float(value) if not math.isinf(value) else math.copysign(sys.float_info.max, value)


def step_number(step: float | None) -> int:
    """The step of a point; of the stage as a whole: 0."""
    return max(-_LARGEST_STEP, min(_LARGEST_STEP, int(step or 0)))


def loss_curves(stage: str, values: Mapping[str, float]) -> dict[str, float]:
    """Those of a stage's values that are losses, by their names on the workflow's own run: `-losses/train: val`.

    MLflow sorts charts by the part before the last `/`; a dash comes before every stage.
    """
    found = {name: value for name, value in values.items() if name.split("/")[-1] == "loss"}
    return {
        f"{LOSSES}/{stage}" + (f": {name.removesuffix('/loss')}" if "/" in name else ""): value
        for name, value in found.items()
    }


def workflow_run_name(workflow: str, earlier: Iterable[str], run_id: str) -> str:
    """`quickstart #3`, after the names of the earlier runs of the workflow; with the run's id if a person gave it."""
    numbers = [int(match[1]) for name in earlier if (match := re.match(rf"{re.escape(workflow)} #(\d+)", name))]
    given = "" if re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", run_id) else f" {run_id}"
    return f"{workflow} #{max(numbers, default=0) + 1}{given}"


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `a.b.c` → text; lists and scalars as JSON, text as it is; encoded values as one reads them."""
    flat: dict[str, str] = {}
    for key, encoded in values.items():
        name, value = f"{prefix}{key}", readable(encoded)
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat
