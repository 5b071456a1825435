"""`polytrope reproduce`, `verify-resume` and `card`: runs computed again and compared; a model described for others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from polytrope.pipeline.commands.common import find_run, open_store, print_table, say, store_address, workflow_of
from polytrope.pipeline.engine.options import new_run_id
from polytrope.pipeline.errors import EXIT_RUN_FAILED, EXIT_SUCCESS, UserError
from polytrope.pipeline.proof.reproduce import Comparison, reproduce_run
from polytrope.pipeline.support.files import remove_tree

_SHOWN = 12  # lines of one kind


def reproduce(options: argparse.Namespace) -> int:
    """Everything is computed again in a store of its own; exit code 1 if a result is another one."""
    store = open_store(options)
    directory = find_run(store, options.run)
    place = Path(options.into) if options.into else store.local("reproductions") / new_run_id()
    rows = reproduce_run(
        store,
        directory,
        place,
        stage=options.stage,
        executor=options.executor,
        tolerance=options.tolerance,
        display="auto",
    )
    print()
    table = [[row.stage, (row.before or "-")[:12], (row.after or "-")[:12], row.verdict] for row in rows]
    print_table(["stage", "digest then", "digest now", "verdict"], table)
    different = [row for row in rows if row.verdict not in ("identical", "taken over", "measured", "no result")]
    if different:
        _explain(different[0], options.tolerance)
    else:
        _print_harmless(rows)
    count = sum(row.verdict == "identical" for row in rows)
    computed = sum(row.verdict not in ("taken over", "no result") for row in rows)
    say(f"\n{count} of {computed} results are bit-equal to run {directory.name}")
    if different or options.into:
        say(f"the new results are in {place}")
    else:
        remove_tree(place)  # the same bytes are in the run's own store
    return EXIT_SUCCESS if all(row.accepted for row in rows) else EXIT_RUN_FAILED


def _print_harmless(rows: Sequence[Comparison]) -> None:
    """What is other than recorded and changed nothing."""
    lines = list(dict.fromkeys(line for row in rows for line in row.harmless))
    if lines:
        say("\nother than recorded, without an effect on these results:")
    for line in lines[:_SHOWN]:
        say(f"  {line}")
    if len(lines) > _SHOWN:
        say(f"  and {len(lines) - _SHOWN} more")


def _explain(row: Comparison, tolerance: float) -> None:
    """What can be said about the first stage that is another one."""
    say(f"\nfirst difference: {row.stage}")
    if row.files:
        say(f"  files: {', '.join(row.files[:_SHOWN])}" + " …" * (len(row.files) > _SHOWN))
    for line in row.causes[:_SHOWN]:
        say(f"  because {line}")
    if len(row.causes) > _SHOWN:
        say(f"  and {len(row.causes) - _SHOWN} more: polytrope diff")
    if not row.causes:
        say("  code, parameters, data, packages and threads are as recorded: the stage itself is not deterministic")
    for line in row.metrics[:_SHOWN]:
        say(f"  {line}")
    if row.verdict == "within tolerance":
        judgement = "accepted: the environment is another one" if row.excused else "not accepted: bytes should be equal"
        say(f"  all metrics agree within {tolerance:g} ({judgement})")


def verify_resume(options: argparse.Namespace) -> int:
    """The workflow undisturbed and disturbed, in two stores of their own; exit code 1 if a result is another one."""
    from polytrope.pipeline.proof.verify_resume import verify_resume as run_both
    from polytrope.pipeline.workflow.graph import build_graph

    workflow = workflow_of(options)
    build_graph(workflow)  # refuse what `run` would refuse, before anything starts
    command = [options.workflow, "--quiet", "--no-tracking"]
    command += [f"--set={override}" for override in options.overrides]
    for name in ("executor", "ray_address", "concurrency"):
        if getattr(options, name) is not None:
            command.append(f"--{name.replace('_', '-')}={getattr(options, name)}")
    address = store_address(options, workflow)
    if "://" in address and not options.into:
        raise UserError(
            f"--into: the runs need stores on this machine, and the store is {address}",
            "name a new directory: --into DIR",
        )
    root = Path(options.into or address).absolute()
    place = root if options.into else root / "verify-resume" / new_run_id()
    if place.exists():
        raise UserError(f"--into {place}: exists already", "name a new directory")
    rows = run_both(command, place, kill_workers=workflow.ray_address is None, say=lambda line: print(line, flush=True))
    print()
    table = [
        [
            row.stage,
            (row.undisturbed or "-")[:12],
            (row.disturbed or "-")[:12],
            "identical" if row.equal else "different" if row.completions <= 1 else f"completed {row.completions} times",
        ]
        for row in rows
    ]
    print_table(["stage", "undisturbed", "disturbed", "verdict"], table)
    equal = all(row.equal for row in rows)
    say(f"\n{sum(row.equal for row in rows)} of {len(rows)} results are bit-equal; no finished stage ran again" * equal)
    if equal and not options.into:
        remove_tree(place)
    else:
        say(f"both runs are in {place}")
    return EXIT_SUCCESS if equal else EXIT_RUN_FAILED


def card(options: argparse.Namespace) -> int:
    """Write a model card."""
    from polytrope.pipeline.proof.card import write_card

    store = open_store(options)
    directory = find_run(store, options.run)
    output = Path(options.output or f"card-{directory.name}.md")
    write_card(store, directory, output, options.stage, options.license)
    say(f"wrote {output}")
    if options.license is None and output.suffix == ".md":
        say("  the license stands there as unknown: `--license apache-2.0` names one")
    return EXIT_SUCCESS
