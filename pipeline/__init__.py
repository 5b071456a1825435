"""Workflows as durable DAGs: specification, planner, artifact store, journal, engine, executors, tracking, CLI.

The public Python API, imported on first use:

    from polytrope.pipeline import run

    result = run("workflows/quickstart.yaml", overrides=["params.steps=50"], executor="local")
    result["evaluate"].metrics

A stage is written with `from polytrope.pipeline.stage import stage, StageContext, Artifact`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytrope.pipeline.errors import UserError
    from polytrope.pipeline.launch.interface import run
    from polytrope.pipeline.stage import Artifact, StageContext, Stages
    from polytrope.pipeline.workflow.spec import StageSpec, Workflow, load_workflow

_PLACES = {
    "Artifact": "polytrope.pipeline.stage",
    "StageContext": "polytrope.pipeline.stage",
    "StageSpec": "polytrope.pipeline.workflow.spec",
    "Stages": "polytrope.pipeline.stage",
    "UserError": "polytrope.pipeline.errors",
    "Workflow": "polytrope.pipeline.workflow.spec",
    "load_workflow": "polytrope.pipeline.workflow.spec",
    "run": "polytrope.pipeline.launch.interface",
}

__all__ = ["Artifact", "StageContext", "StageSpec", "Stages", "UserError", "Workflow", "load_workflow", "run"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
