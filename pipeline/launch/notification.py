"""`notify:` of a workflow: a command of the user's that is told how a run ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from polytrope.pipeline.launch.progress import counts
from polytrope.pipeline.runs.journal import RunState
from polytrope.pipeline.support.secret_values import hider

_PATIENCE = 60.0  # seconds


def notify(command: str, secrets: Mapping[str, str], state: RunState, run_id: str, store: str) -> None:
    """Run the shell command with $POLYTROPE_STATUS, …; that it fails is said, and changes nothing.

    Args:
        command: for `sh`, with the values of its `${env.NAME}`.
        secrets: NAME → that value; no message has it.
        state: how the run ended.
        run_id, store: where it can be looked at.
    """
    hide = hider(secrets)
    stages = counts(stage.state for stage in state.stages.values())
    status = state.status if state.done else "interrupted"
    told = {
        "RUN": run_id,
        "STATUS": status,
        "WORKFLOW": state.workflow,
        "STORE": store,
        "MESSAGE": f"{state.workflow}: run {run_id} {status}: {stages}",
    }
    environment = {**os.environ, **{f"POLYTROPE_{name}": value for name, value in told.items()}}
    try:
        done = subprocess.run(
            command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8",
            errors="replace", timeout=_PATIENCE, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        print(hide(f"polytrope: notify: {error}"), file=sys.stderr)
        return
    if done.returncode:
        said = done.stdout.strip().splitlines()[-1:]
        text = f"polytrope: notify: `{command}` ended with {done.returncode}: {''.join(said)}"
        print(hide(text), file=sys.stderr)
