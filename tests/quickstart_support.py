"""The quickstart run as a user runs it, only smaller; one run of it serves the tests of several folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.store.store import Store

REPOSITORY = Path(__file__).parents[1]
SETTINGS = {
    "vocab_size": 512,
    "sequence_length": 64,
    "corpus_bytes": 600_000,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "steps": 200,
    "finetune_steps": 20,
}


@dataclass(frozen=True)
class Run:
    """A finished `polytrope run`."""

    store: Store
    state: RunState
    output: str

    def artifact(self, stage: str) -> Path:
        key = self.state.stages[stage].key
        assert key is not None
        found = self.store.find(key)
        assert found is not None
        return self.store.materialize(key)

    def read(self, stage: str, name: str) -> Any:
        return json.loads((self.artifact(stage) / name).read_text())


def run_quickstart(root: Path, executor: str) -> Run:
    """`polytrope run workflows/quickstart.yaml` in the repository, with its store at `root`."""
    command = [str(Path(sys.executable).parent / "polytrope"), "run", "workflows/quickstart.yaml"]
    command += ["--executor", executor, "--set", f"store={root}"]
    for name, value in SETTINGS.items():
        command += ["--set", f"params.{name}={value}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
    before = set((root / "runs").glob("*")) if root.exists() else set()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (directory,) = set((root / "runs").glob("*")) - before
    return Run(Store(root), fold(read(directory)), done.stdout + done.stderr)
