"""`polytrope gc`, `alias`, `export`, `import` and `verify`: care of the store."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from polytrope.pipeline.commands.common import find_run, open_store, print_table, say
from polytrope.pipeline.errors import EXIT_RUN_FAILED, EXIT_SUCCESS, UserError
from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.store.aliases import find_alias, read_aliases, set_alias
from polytrope.pipeline.store.archive import export_run
from polytrope.pipeline.store.archive import import_run as unpack
from polytrope.pipeline.store.garbage import collect_garbage
from polytrope.pipeline.support.files import safe_name
from polytrope.pipeline.support.text import command, complete_commands, count


def gc(options: argparse.Namespace) -> int:
    """Remove what no run and no alias refers to."""
    result = collect_garbage(open_store(options), keep_runs=options.keep_runs, dry_run=options.dry_run)
    verb = "would remove" if options.dry_run else "removed"
    for title, names in (("run", result.runs), ("artifact", result.artifacts), ("left-over", result.leftovers)):
        for name in names:
            say(f"{verb} {title} {name}")
    print(
        f"{verb} {count(len(result.runs), 'run')}, {count(len(result.artifacts), 'artifact')}, "
        f"{count(len(result.leftovers), 'left-over')}: "
        f"{result.bytes / 2**20:.1f} MiB"
    )
    return EXIT_SUCCESS


def alias(options: argparse.Namespace) -> int:
    """Set, show, list or remove names of artifacts."""
    store = open_store(options)
    if options.remove is not None:
        if safe_name(options.remove) != options.remove or store.get_alias(options.remove) is None:
            find_alias(store, options.remove)  # says which there are
        store.drop_alias(options.remove)
        say(f"removed alias {options.remove}; `{command('gc', store=store.address)}` may remove what it stood for")
    elif options.name is None:
        rows = [
            [item.name, item.run, item.stage, item.key[:12], "" if store.exists(item.key) else "its artifact is gone"]
            for item in read_aliases(store).values()
        ]
        if rows:
            print_table(["alias", "run", "stage", "key", ""], rows)
        else:
            say(f"there are no aliases in {store.address}")
    elif options.run is None:
        named = find_alias(store, options.name)
        key = named.key
        problems = store.verify(key, full=False)
        artifact = store.load(key)
        if artifact is not None and artifact.digest != named.digest:
            problems = ["a forced run replaced it by another result; what it was lies in the store's quarantine"]
        if problems:
            raise UserError(f"alias {options.name}: artifact {key[:12]}: {problems[0]}", "set it to another result")
        print(store.materialize(key))
    elif options.stage is None:
        raise UserError(
            "alias: the stage is missing", f"`polytrope alias {shlex.quote(options.name)} {options.run} STAGE`"
        )
    else:
        made = set_alias(store, options.name, find_run(store, options.run), options.stage)
        say(f"{made.name} is {made.stage} of run {made.run}: artifact {made.key}")
    return EXIT_SUCCESS


def export(options: argparse.Namespace) -> int:
    """One tar file."""
    store = open_store(options)
    directory = find_run(store, options.run)
    packed = export_run(store, directory, Path(options.output))
    say(f"wrote {options.output}: run {directory.name} with {count(packed, 'artifact')}")
    say(f"read it: polytrope import {shlex.quote(options.output)} --store DIR")
    return EXIT_SUCCESS


def import_run(options: argparse.Namespace) -> int:
    """Back into a store."""
    store = open_store(options)
    run_id, new = unpack(store, Path(options.file))
    say(f"imported run {run_id} into {store.address}: {count(new, 'new artifact')}")
    return EXIT_SUCCESS


def verify(options: argparse.Namespace) -> int:
    """Hash everything again; exit code 1 if something is damaged."""
    store = open_store(options)
    if options.all:
        keys = store.keys()
    else:
        stages = fold(read(find_run(store, options.run))).stages.values()
        keys = list(dict.fromkeys(stage.key for stage in stages if stage.key and stage.digest))
    damaged = 0
    for key in keys:
        problems = store.verify(key)
        if not problems:
            continue
        damaged += 1
        print(f"artifact {key} is damaged:")
        for problem in problems[:10]:
            say(f"  {problem}")
        moved = store.quarantine(key, problems)
        if moved is not None:
            say(f"  moved to {moved}")
    print(f"{count(len(keys), 'artifact')} hashed, {damaged} damaged")
    if damaged:
        say(complete_commands("compute them again: `polytrope resume RUN` or `polytrope run WORKFLOW`", store.address))
    return EXIT_RUN_FAILED if damaged else EXIT_SUCCESS
