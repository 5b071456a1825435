"""`notify:` of a workflow: a command of the user's that is told how a run ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from polytrope.pipeline.launch.progress import counts
from polytrope.pipeline.runs.journal import RunState
from polytrope.pipeline.support.secret_values import hider

_PATIENCE = 60.0  # seconds
_COMMAND = "POLYTROPE_NOTIFY"
_EVALUATE = f'command=${_COMMAND}; unset {_COMMAND}; eval "$command"'


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
    told = {f"POLYTROPE_{name}": value for name, value in told.items()}
    try:
        code, said = _run(command, {**os.environ, **told})
    except (OSError, subprocess.TimeoutExpired) as error:
        why = f"no end after {_PATIENCE:g} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)
        print(hide(f"polytrope: notify: `{command}`: {why}"), file=sys.stderr)
        return
    if code:
        last = "".join(said.strip().splitlines()[-1:])
        print(hide(f"polytrope: notify: `{command}` ended with {code}: {last}"), file=sys.stderr)


def _run(command: str, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a shell command; when it takes too long, all that it started is killed.

    `ps` shows the arguments of every process to every user, so `sh` is given the command, which may have a secret, in
    its environment.
    """
    with tempfile.TemporaryFile() as output:  # no pipe: what the command leaves in the background would hold it open
        process = subprocess.Popen(
            ["sh", "-c", _EVALUATE],
            env={**environment, _COMMAND: command},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(_PATIENCE)
        except BaseException:  # Ctrl-C, too
            if process.poll() is None:  # else its group may be gone
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise
        output.seek(0)
        return code, output.read().decode(errors="replace")
