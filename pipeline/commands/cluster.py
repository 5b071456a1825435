"""`polytrope submit`, and `status`, `logs`, `cancel`, `resume` with `--address`: runs on a cluster, from outside it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from polytrope.pipeline.commands.common import find_run, open_store, store_address, workflow_of
from polytrope.pipeline.engine.options import checked_run_id
from polytrope.pipeline.errors import EXIT_RUN_FAILED, EXIT_SUCCESS, RunElsewhereError, UserError
from polytrope.pipeline.launch import submit as cluster
from polytrope.pipeline.launch.package import Package, choose_files, refuse_left_out
from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.runs.record import workflow_files
from polytrope.pipeline.support.text import count
from polytrope.pipeline.workflow.graph import build_graph


def submit(options: argparse.Namespace) -> int:
    """Check the workflow here, then start its driver there."""
    workflow = workflow_of(options)
    graph = build_graph(workflow, environment=False)
    store = _shared_store(options, store_address(options, workflow))
    directory = Path(options.working_dir).resolve()
    package = choose_files(directory)
    if options.dry_run:
        _print_package(package)
    file = Path(options.workflow).resolve()
    files = [Path(path) for path in workflow_files(file)]
    for needed in files:
        if not needed.is_relative_to(directory):
            raise UserError(
                f"{needed} is not below {directory}, the directory that is sent",
                "start from the project's directory, or give `--working-dir DIR`",
            )
    refuse_left_out(package, files)
    if options.dry_run:
        return EXIT_SUCCESS
    client = cluster.connect(options.address)
    run_id = checked_run_id(options.run_id)
    arguments = ["run", str(file.relative_to(directory)), "--run-id", run_id, "--store", store, "--ray-address", "auto"]
    for override in options.overrides:
        arguments += ["--set", override]
    earlier = cluster.jobs(client, run_id)
    _refuse_running(earlier, run_id, options.address)
    attempt = 1 + max((job.attempt for job in earlier if job.run_id == run_id), default=0)
    job_id = cluster.submit(
        client, arguments, run_id=run_id, attempt=attempt, store=store, workflow=workflow.name,
        package=package, installed=options.installed,
    )  # fmt: skip
    print(f"run {run_id}: {workflow.name}, {count(len(graph), 'stage')}, Ray job {job_id}")
    for reason, said in (("credentials", "since they may hold credentials"), ("cannot be read", "they cannot be read")):
        if kept := package.left_out.get(reason):
            print(f"  not sent, {said}: {', '.join(map(str, sorted(kept)[:8]))}{' …' if len(kept) > 8 else ''}")
    _print_next(run_id, options.address)
    return _follow(client, job_id) if options.wait else EXIT_SUCCESS


def _print_package(package: Package) -> None:
    """What `submit` would send, and what stays here."""
    for path, size in sorted(package.files.items()):
        print(f"{size:>12,}  {path}")
    print(f"{count(len(package.files), 'file')}, {package.size / 1e6:.1f} MB, from {package.directory}")
    for reason, paths in package.left_out.items():
        shown = ", ".join(map(str, sorted(paths)[:8])) + (" …" if len(paths) > 8 else "")
        print(f"left out ({reason}): {shown}")


def _shared_store(options: argparse.Namespace, store: str) -> str:
    """A store that the driver on the cluster can open: absolute, or an address."""
    if "://" in store or Path(store).is_absolute():
        return store
    if options.store is not None:
        return str(Path(store).resolve())
    raise UserError(
        f"the store `{store}` would be inside the job's own directory, which Ray removes",
        "give one that every node reaches: `--store /shared/polytrope` or `--store s3://bucket/polytrope`",
    )


def _refuse_running(earlier: list[cluster.Job], run_id: str, address: str) -> None:
    for job in earlier:
        if job.run_id == run_id and not job.ended:
            raise RunElsewhereError(
                f"run {run_id} is being driven by Ray job {job.job_id} ({job.status})",
                f"follow it: polytrope logs {run_id} -f --address {address}",
            )


def _print_next(run_id: str, address: str) -> None:
    print(f"  status: polytrope status {run_id} --address {address}")
    print(f"  log:    polytrope logs {run_id} -f --address {address}")
    print(f"  cancel: polytrope cancel {run_id} --address {address}")
    print(f"  Ray:    {address.rstrip('/')}/#/jobs")


def _follow(client: Any, job_id: str) -> int:
    for text in cluster.follow(client, job_id):
        sys.stdout.write(text)
        sys.stdout.flush()
    return EXIT_SUCCESS if cluster.wait(client, job_id, 10) == "SUCCEEDED" else EXIT_RUN_FAILED


def _store_of(job: cluster.Job, options: argparse.Namespace) -> str:
    """`--store`, else where the job's driver was told to keep its runs."""
    return job.store if options.store is None else str(options.store)


def status(options: argparse.Namespace) -> int:
    """The job's state, and what `polytrope status` says on the head."""
    client = cluster.connect(options.address)
    job = cluster.newest_job(client, options.run, options.address)
    arguments = ["status", job.run_id, "--store", _store_of(job, options)]
    code, text = cluster.ask(client, [*arguments, *(["--json"] if options.json else [])], run_id=job.run_id)
    if not options.json:
        print(cluster.describe(job))
    print(text, end="")
    if job.ended and job.status != "SUCCEEDED" and not options.json:
        print(f"go on: polytrope resume {job.run_id} --address {options.address}")
    return EXIT_RUN_FAILED if job.status == "FAILED" else code if job.ended else EXIT_SUCCESS


def logs(options: argparse.Namespace) -> int:
    """The driver's output, with `--stage` that of a stage."""
    if options.stage is not None and options.follow:
        raise UserError("--follow with --stage does not work with --address", "leave one of them out")
    if options.stage is None and options.tail is not None:
        raise UserError("--tail with --address needs --stage: the driver's output has no stages", "add --stage STAGE")
    client = cluster.connect(options.address)
    job = cluster.newest_job(client, options.run, options.address)
    if options.stage is not None:
        arguments = ["logs", job.run_id, "--store", _store_of(job, options), "--stage", options.stage]
        if options.tail is not None:
            arguments += ["--tail", str(options.tail)]
        code, text = cluster.ask(client, arguments, run_id=job.run_id)
        print(text, end="")
        return code
    if options.follow:
        return _follow(client, job.job_id)
    print(client.get_job_logs(job.job_id), end="")
    return EXIT_SUCCESS


def cancel(options: argparse.Namespace) -> int:
    """Ask the driver to stop; the job ends by itself, and the run can be resumed."""
    client = cluster.connect(options.address)
    job = cluster.newest_job(client, options.run, options.address)
    if job.ended:
        print(f"{cluster.describe(job)}: nothing to cancel")
        return EXIT_SUCCESS
    arguments = ["cancel", job.run_id, "--store", _store_of(job, options), "--wait", str(options.wait)]
    _, text = cluster.ask(client, arguments, run_id=job.run_id, timeout=options.wait + 60)
    print(text, end="")
    ray_state = cluster.wait(client, job.job_id, options.wait)
    if ray_state not in cluster.ENDED:
        client.stop_job(job.job_id)  # the driver does not answer: Ray ends it
        ray_state = cluster.wait(client, job.job_id, options.wait)
    if ray_state not in cluster.ENDED:
        print(f"Ray job {job.job_id} was told to stop and is {ray_state}: ask again", file=sys.stderr)
        return EXIT_RUN_FAILED
    if ray_state == "SUCCEEDED":
        print(f"run {job.run_id} succeeded before it could be cancelled")
        return EXIT_SUCCESS
    print(f"cancelled; go on: polytrope resume {job.run_id} --address {options.address}")
    return EXIT_SUCCESS


def _last_attempt(options: argparse.Namespace) -> cluster.Job:
    """The last attempt by the journal: the head that knew of it is gone. Where the store is out of reach: as named."""
    run_id, attempt, workflow = options.run, 0, ""
    with contextlib.suppress(UserError):
        directory = find_run(open_store(options), options.run)
        state = fold(read(directory))
        run_id, attempt, workflow = directory.name, state.attempt, state.workflow
    return cluster.Job("", run_id, attempt, "FAILED", options.store, workflow, "")


def resume(options: argparse.Namespace) -> int:
    """The next attempt of a run, as a new Ray job; on a cluster that never saw the run if `--store` has it."""
    passed = _passed_on(options)
    client = cluster.connect(options.address)
    if options.run and options.store and not cluster.jobs(client, options.run):
        job = _last_attempt(options)
    else:
        job = cluster.newest_job(client, options.run, options.address)
    _refuse_running([job], job.run_id, options.address)
    store = _store_of(job, options)
    arguments = ["resume", job.run_id, "--store", store, "--ray-address", "auto"]
    arguments += passed
    job_id = cluster.submit(
        client, arguments, run_id=job.run_id, attempt=job.attempt + 1, store=store, workflow=job.workflow,
        package=choose_files(Path.cwd()),
    )  # fmt: skip
    print(f"run {job.run_id}: attempt {job.attempt + 1}, Ray job {job_id}")
    _print_next(job.run_id, options.address)
    return EXIT_SUCCESS


def _passed_on(options: argparse.Namespace) -> list[str]:
    """The options of `resume` that its driver on the cluster is started with.

    Raises:
        UserError: one that means nothing there.
    """
    if options.all:
        raise UserError("--all does not work with --address", "name one run")
    if options.ray_address is not None:
        raise UserError(
            f"--ray-address {options.ray_address} does not work with --address",
            "the driver uses the cluster it runs on",
        )
    words = [word for stage in options.force for word in ("--force", stage)]
    for option, value in (
        ("--from", options.from_stage),
        ("--executor", options.executor),
        ("--concurrency", options.concurrency),
        ("--inject-faults", options.inject_faults),
    ):
        if value is not None:
            words += [option, str(value)]
    for name in ("allow_code_change", "keep_going", "no_tracking", "quiet"):
        if getattr(options, name):
            words.append(f"--{name.replace('_', '-')}")
    return words
