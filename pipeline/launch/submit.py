"""Runs on a Ray cluster by its Jobs API: the driver runs there, this machine may go away.

Every attempt of a run is one Ray job `RUN-attempt-N`, whose metadata names run, store and workflow; so any machine that
reaches the head can ask for the status, follow the log, cancel or resume, without reading the store itself.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polytrope
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.launch.package import Package, copy_files

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")  # Ray's states of a job that is over
_MODULE = "python -m polytrope.pipeline.commands.cli"


@dataclass(frozen=True)
class Job:
    """One attempt of a run on a cluster. `status` is Ray's: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED."""

    job_id: str
    run_id: str
    attempt: int
    status: str
    store: str
    workflow: str
    message: str

    @property
    def ended(self) -> bool:
        return self.status in ENDED


def connect(address: str) -> Any:
    """A client of the job server.

    Raises:
        UserError: nothing answers there (asked for within 2 s), or it wants a token.
    """
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: expected the job server's URL", "for example http://head:8265")
    try:
        with urllib.request.urlopen(address.rstrip("/") + "/api/version", timeout=2):
            pass
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise UserError(f"{address} answers, but not like a Ray head (HTTP {error.code})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"no Ray job server answers at {address}: {reason}",
            "is the head running, and its dashboard port (8265) reachable from here?",
        ) from None
    from ray.job_submission import JobSubmissionClient

    with _explained(address):
        return JobSubmissionClient(address)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise UserError(
            f"the Ray cluster at {address} wants a token",
            "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or the file ~/.ray/auth_token, as on the head",
        ) from None
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise UserError(f"the Ray cluster at {address} refused: {str(error).splitlines()[0]}") from None


def jobs(client: Any, run_id: str | None = None) -> list[Job]:
    """Attempts of a run (its id or the start of it), or of all runs; oldest first."""
    found: list[Job] = []
    for details in client.list_jobs():
        metadata = details.metadata or {}
        name = metadata.get("polytrope_run", "")
        if not name or (run_id is not None and not name.startswith(run_id)):
            continue
        found.append(
            Job(
                job_id=details.submission_id,
                run_id=name,
                attempt=int(metadata.get("polytrope_attempt", "1")),
                status=str(getattr(details.status, "value", details.status)),
                store=metadata.get("polytrope_store", ""),
                workflow=metadata.get("polytrope_workflow", ""),
                message=details.message or "",
            )
        )
    return sorted(found, key=lambda job: (job.run_id, job.attempt))


def newest_job(client: Any, run_id: str | None, address: str) -> Job:
    """The last attempt of the run; of the run submitted last without `run_id`."""
    found = jobs(client, run_id)
    names = sorted({job.run_id for job in found})
    if not found:
        what = f"run `{run_id}`" if run_id else "run"
        raise UserError(
            f"the cluster at {address} knows no {what}",
            "`polytrope submit WORKFLOW --address …` makes one; a run whose head is lost goes on here with"
            " `polytrope resume RUN --address … --store STORE`",
        )
    if run_id is not None and len(names) > 1 and run_id not in names:
        raise UserError(f"`{run_id}` is the start of {len(names)} runs", "one of " + ", ".join(names[:5]))
    if run_id is not None:
        name = run_id if run_id in names else names[0]
        return max((job for job in found if job.run_id == name), key=lambda job: job.attempt)
    started = {details.submission_id: details.start_time or 0 for details in client.list_jobs()}
    return max(found, key=lambda job: started.get(job.job_id, 0))


def submit(
    client: Any,
    arguments: Sequence[str],
    *,
    run_id: str,
    attempt: int,
    store: str,
    workflow: str,
    package: Package,
    installed: bool = False,
) -> str:
    """Start `polytrope ARGUMENTS` as a Ray job; returns the job id.

    Args:
        client: from `connect`.
        arguments: of the command, paths relative to the working directory.
        run_id: the run.
        attempt: 1 for the first.
        store: address of the store as the cluster sees it.
        workflow: name, for listings.
        package: what is sent and made the current directory of the driver (stages of one's own are found there).
        installed: use the polytrope that is installed on the cluster, instead of sending this one's source.
    """
    with tempfile.TemporaryDirectory(prefix="polytrope-submit-") as temporary:
        sent = Path(temporary) / "working"
        sent.mkdir()
        copy_files(package, sent)
        environment: dict[str, Any] = {"working_dir": str(sent)}
        if not installed:
            environment["py_modules"] = [str(_package_source(Path(temporary)))]
        with _explained("this address"):
            return str(
                client.submit_job(
                    entrypoint=f"{_MODULE} {shlex.join(arguments)}",
                    submission_id=f"{run_id}-attempt-{attempt}",
                    runtime_env=environment,
                    metadata={
                        "polytrope_run": run_id,
                        "polytrope_attempt": str(attempt),
                        "polytrope_store": store,
                        "polytrope_workflow": workflow,
                    },
                    entrypoint_num_cpus=0,
                )
            )


def _package_source(directory: Path) -> Path:
    """A copy of this polytrope's source in the layout that Python imports."""
    root = directory / "polytrope"
    root.mkdir()
    shutil.copy(Path(str(polytrope.__file__)), root)
    source = Path(__file__).parents[2]  # the repository, or the installed package: of one layout
    for folder in ("ops", "models", "pipeline", "infra/deepspeed"):
        shutil.copytree(
            source / folder,
            root / folder,
            ignore=shutil.ignore_patterns("__pycache__", "build", "*.o"),
        )
    return root


def ask(client: Any, arguments: Sequence[str], *, run_id: str, timeout: float = 120.0) -> tuple[int, str]:
    """Run a short `polytrope` command on the head and wait: (0 if it succeeded, what it printed)."""
    with tempfile.TemporaryDirectory(prefix="polytrope-ask-") as temporary, _explained("this address"):
        job_id = client.submit_job(
            entrypoint=f"{_MODULE} {shlex.join(arguments)}",
            submission_id=f"{run_id}-ask-{time.time_ns()}",
            runtime_env={"py_modules": [str(_package_source(Path(temporary)))]},
            entrypoint_num_cpus=0,
        )
        status = wait(client, job_id, timeout)
        text = "".join(
            line for line in client.get_job_logs(job_id).splitlines(keepends=True) if "job_driver" not in line
        )
        if status in ENDED:
            client.delete_job(job_id)
        return (0 if status == "SUCCEEDED" else 1), text


def wait(client: Any, job_id: str, timeout: float) -> str:
    """Ray's status of the job when it has ended, or after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        status = str(getattr(client.get_job_status(job_id), "value", ""))
        if status in ENDED or time.monotonic() > end:
            return status
        time.sleep(0.25)


def follow(client: Any, job_id: str) -> Iterator[str]:
    """The driver's output as it comes, until the job ends; a lost connection is taken up again."""
    shown = 0
    failures = 0
    while True:
        try:
            status = str(getattr(client.get_job_status(job_id), "value", ""))
            text = client.get_job_logs(job_id)
            failures = 0
        except (RuntimeError, ConnectionError, OSError) as error:
            failures += 1
            if failures > 10:
                raise UserError(
                    f"the connection to the cluster is lost: {error}", "ask again with `polytrope logs`"
                ) from None
            time.sleep(1.0)
            continue
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if status in ENDED:
            return
        time.sleep(0.5)


def describe(job: Job) -> str:
    """One line for people."""
    text = f"{job.run_id}: {job.workflow}, attempt {job.attempt}, Ray job {job.job_id} {job.status}"
    return f"{text}: {job.message}" if job.message and job.status == "FAILED" else text
