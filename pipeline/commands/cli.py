"""The `polytrope` command: its arguments, and how errors become messages and exit codes.

Only the standard library is imported before a command runs, so `polytrope --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Protocol

from polytrope.pipeline.errors import (
    EXIT_CANCELLED,
    EXIT_READER_LEFT,
    EXIT_RUN_ELSEWHERE,
    EXIT_RUN_FAILED,
    EXIT_SUCCESS,
    EXIT_USER_ERROR,
    RunElsewhereError,
    UserError,
)
from polytrope.pipeline.support.executor_table import EXECUTORS
from polytrope.pipeline.support.streams import let_go, occupy_standard_descriptors, show_what_can_be_shown
from polytrope.pipeline.support.terminal import columns, wrapped

EXIT_CODES = f"""\
exit codes:
  {EXIT_SUCCESS:<4} success
  {EXIT_RUN_FAILED:<4} a stage failed after its retries, or a check found a difference
  {EXIT_USER_ERROR:<4} refused before anything started: workflow, parameter, store, address
  {EXIT_RUN_ELSEWHERE:<4} another process drives this run
  {EXIT_CANCELLED:<4} cancelled by Ctrl-C, SIGTERM or `polytrope cancel`; can be resumed
  {EXIT_READER_LEFT:<4} the reader of the output left before the result was known
"""


class _Parser(argparse.ArgumentParser):
    """What it refuses is said as everything else is: what is wrong, then the way out."""

    def error(self, message: str) -> NoReturn:
        hint = f"`{self.prog} --help` lists what there is"
        choice = re.fullmatch(r"argument (\S+?): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice is not None:
            known = re.findall(r"[\w-]+", choice[3])
            message = f"{choice[1]} {choice[2]}: expected {' or '.join(known)}"
            if choice[1] == "COMMAND":
                message = f"there is no command `{choice[2]}`"
            hint = _nearest(choice[2], known) or hint
        kind = re.fullmatch(r"argument (\S+?): invalid (int|float) value: '(.*)'", message)
        if kind is not None:
            message = f"{kind[1]} {kind[3]}: expected a {'whole ' if kind[2] == 'int' else ''}number"
        _refuse(self.prog, message, hint)
        raise SystemExit(EXIT_USER_ERROR)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            chosen = self._commands().get(getattr(options, "command", None), self)
            near = _nearest(unknown[0].partition("=")[0], chosen._option_string_actions)
            hint = near or f"`{chosen.prog} --help` lists what there is"
            _refuse(chosen.prog, f"unknown argument `{unknown[0]}`", hint)
            raise SystemExit(EXIT_USER_ERROR)
        return options

    def _commands(self) -> dict[Any, _Parser]:
        found = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0]) if found else {}


def _refuse(who: str, message: str, hint: str) -> None:
    """What is wrong, and the way out, to stderr."""
    text = f"{who}: {message}" + (f"\n  → {hint}" if hint else "")
    print(wrapped(text, columns(sys.stderr)), file=sys.stderr)


def _nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean `x`?`, or "" where nothing is near."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean `{close[0]}`?" if close else ""


class _Command(_Parser):
    """A command.

    `options_from` is the module:function that adds its options once it is chosen, where they are those of something
    else (fields of a stage's parameters, names of templates): to import it would hold up every other command.
    """

    options_from = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.complete()
        return super().parse_known_args(args, namespace)

    def complete(self) -> None:
        """Add the options that are still missing."""
        if self.options_from:
            module, function = self.options_from.split(":")
            self.options_from = ""
            getattr(importlib.import_module(f"polytrope.pipeline.commands.{module}"), function)(self)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=help_width())


def help_width() -> int:
    """Of the terminal, but no wider than one reads well; 80 where there is none."""
    return min(110, shutil.get_terminal_size().columns)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _Parser(
        prog="polytrope",
        formatter_class=_Help,
        description=textwrap.fill(
            "Run durable training workflows on Ray: every result is stored, every run can be resumed.", help_width()
        ),
        epilog="example:\n"
        "  polytrope plan workflows/quickstart.yaml     what would run, and why\n"
        "  polytrope run workflows/quickstart.yaml      run it, with a live display\n"
        "  polytrope status                             how the newest run stands\n"
        "  polytrope resume                             go on after it was interrupted\n"
        "  polytrope ui                                 browse the results in MLflow\n\n" + EXIT_CODES,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Command)
    shared = _shared_options()

    def command(name: str, function: str, summary: str, example: str, *options: str, description: str = "") -> _Command:
        """`function`: module:function below polytrope.pipeline.commands; `options`: names of shared option groups."""
        sub = commands.add_parser(
            name,
            help=summary,
            formatter_class=_Help,
            parents=[shared[option] for option in ("debug", *options)],
            description=textwrap.fill(f"{summary[0].upper()}{summary[1:]}. {description}".strip(), help_width()),
            epilog="example:\n" + textwrap.indent(textwrap.dedent(example).strip(), "  ") + "\n\n" + EXIT_CODES,
        )
        sub.set_defaults(function=function)
        return sub

    _start_commands(command, parser)
    _run_commands(command)
    _look_commands(command)
    _workflow_commands(command)
    _store_commands(command)
    _service_commands(command)
    return parser


def _shared_options() -> dict[str, _Command]:
    def group() -> _Command:
        return _Command(add_help=False)

    debug = group()
    debug.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")
    store = group()
    store.add_argument(
        "--store",
        metavar="DIR",
        help="where artifacts and runs are kept (default: the workflow's `store:`, $POLYTROPE_STORE, or .polytrope)",
    )
    workflow = group()
    workflow.add_argument("workflow", metavar="WORKFLOW", help="the workflow's YAML file")
    workflow.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace a value: params.steps=100, stages.train.with.learning_rate=1e-3, executor=local; repeatable",
    )
    run = group()
    run.add_argument("run", metavar="RUN", nargs="?", help="run id or its start; default: the newest run")
    execution = group()
    execution.add_argument("--executor", choices=tuple(EXECUTORS), help="replace the workflow's `executor:`")
    execution.add_argument("--ray-address", metavar="ADDRESS", help="use this Ray cluster, for example auto")
    execution.add_argument("--no-tracking", action="store_true", help="send nothing to MLflow")
    execution.add_argument("--concurrency", type=int, metavar="N", help="at most N stages at the same time")
    execution.add_argument("--keep-going", action="store_true", help="after a failure, finish what does not need it")
    execution.add_argument(
        "--inject-faults", metavar="SEED", help="kill driver and workers at random points, to see that nothing is lost"
    )
    execution.add_argument("--quiet", "-q", action="store_true", help="print errors and the summary only")
    address = group()
    address.add_argument("--address", metavar="URL", help="a Ray cluster's job server, such as http://head:8265")
    return {
        "debug": debug,
        "store": store,
        "workflow": workflow,
        "run": run,
        "execution": execution,
        "address": address,
    }


def _start_commands(command: _AddCommand, parser: argparse.ArgumentParser) -> None:
    init = command(
        "init",
        "starting:init",
        "start a project: a workflow, its stages, a README",
        """
        polytrope init my-project
        polytrope init my-project --template custom-stage
        """,
        description="Nothing that exists is overwritten.",
    )
    init.add_argument("directory", metavar="DIR", help="where; it need not exist")
    init.options_from = "starting:add_options"
    completion = command(
        "completion",
        "completion:completion",
        "print a script that completes commands and options in your shell",
        """
        eval "$(polytrope completion bash)"       # in ~/.bashrc; `zsh` in ~/.zshrc
        polytrope completion fish | source        # in ~/.config/fish/config.fish
        """,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")
    completion.set_defaults(parser=parser)  # which it describes


def _run_commands(command: _AddCommand) -> None:
    run = command(
        "run",
        "running:run",
        "run a workflow",
        """
        polytrope run workflows/quickstart.yaml
        polytrope run workflows/quickstart.yaml --set params.steps=50 --executor local
        polytrope run workflows/quickstart.yaml --force train   # compute it again
        """,
        "workflow",
        "store",
        "execution",
        description="Stages whose code, parameters and inputs did not change are taken from the store.",
    )
    run.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="run this stage even if its result is stored"
    )
    run.add_argument("--verify", action="store_true", help="hash every stored artifact again before it is used")
    run.add_argument(
        "--run-id", metavar="ID", help="name the run (letters, digits, - and _); if it exists already, go on with it"
    )
    plan = command(
        "plan",
        "planning:plan",
        "show what would run and why, starting nothing",
        """
        polytrope plan workflows/quickstart.yaml
        polytrope plan workflows/quickstart.yaml --set params.degree=5
        """,
        "workflow",
        "store",
    )
    plan.add_argument("--force", action="append", default=[], metavar="STAGE", help="as for `run`")
    plan.add_argument("--json", action="store_true", help="print JSON")
    resume = command(
        "resume",
        "running:resume",
        "go on with a failed, cancelled or crashed run",
        """
        polytrope resume                        # the newest run
        polytrope resume 20261123-1712-ab12 --from evaluate
        polytrope resume --all                  # every run that did not end
        polytrope resume RUN --address http://new-head:8265 --store s3://bucket/store
        """,
        "run",
        "store",
        "execution",
        "address",
        description="Finished stages are not run again; a training stage goes on from its newest valid checkpoint.",
    )
    resume.add_argument("--all", action="store_true", help="every run that neither succeeded nor is being driven")
    resume.add_argument("--from", dest="from_stage", metavar="STAGE", help="run this stage and all after it again")
    resume.add_argument("--force", action="append", default=[], metavar="STAGE", help="run this stage again")
    resume.add_argument(
        "--allow-code-change", action="store_true", help="go on although the code of a stage has changed since"
    )
    reproduce = command(
        "reproduce",
        "proving:reproduce",
        "run a finished run again from nothing and compare the results",
        "polytrope reproduce\npolytrope reproduce 20261123-1712-ab12 --stage train",
        "run",
        "store",
        description="Uses the code as it is now, in a store of its own, and names the first thing that differs: code, "
        "parameters, data, package version, threads.",
    )
    reproduce.add_argument("--stage", metavar="STAGE", help="compute this one only, on the stored results before it")
    reproduce.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="X",
        help="relative difference of metrics that is accepted where packages or machine differ (default 0.001)",
    )
    reproduce.add_argument("--executor", choices=tuple(EXECUTORS), help="default: that of the run")
    reproduce.add_argument("--into", metavar="DIR", help="store of the new results (default: below the run's store)")
    verify_resume = command(
        "verify-resume",
        "proving:verify_resume",
        "prove that an interrupted run ends in the same bytes as an undisturbed one",
        """
        polytrope verify-resume workflows/quickstart.yaml --executor local
        polytrope verify-resume workflows/quickstart.yaml --set params.steps=120
        """,
        "workflow",
        description="Runs the workflow twice, in stores of its own. The second time, in every training, the driver is "
        "killed after the first checkpoint and resumed, and a worker is killed after the next one. Then the digests of "
        "all results are compared: exit code 1 if one differs or a finished stage ran again.",
    )
    verify_resume.add_argument("--executor", choices=tuple(EXECUTORS), help="replace the workflow's `executor:`")
    verify_resume.add_argument(
        "--ray-address", metavar="ADDRESS", help="use this Ray cluster (only drivers are killed)"
    )
    verify_resume.add_argument("--concurrency", type=int, metavar="N", help="at most N stages at the same time")
    verify_resume.add_argument(
        "--store", metavar="DIR", help="the runs' stores are made below it (default: as for `run`)"
    )
    verify_resume.add_argument("--into", metavar="DIR", help="keep both stores in this new directory")
    card = command(
        "card",
        "proving:card",
        "write a model card: data, model, training, results, how to reproduce",
        "polytrope card\npolytrope card 20261123-1712-ab12 --stage finetune --output card.html",
        "run",
        "store",
    )
    card.add_argument("--stage", metavar="STAGE", help="that made the model (default: the last one that made one)")
    card.add_argument("--output", "-o", metavar="FILE", help=".md or .html (default: card-RUN.md)")
    card.add_argument("--license", metavar="ID", help="of the model, as Hugging Face names it: apache-2.0, mit, …")
    cancel = command(
        "cancel",
        "running:cancel",
        "ask the driver of a run to stop; the run can be resumed",
        "polytrope cancel\npolytrope cancel 20261123-1712-ab12",
        "run",
        "store",
        "address",
    )
    cancel.add_argument("--wait", type=float, default=30.0, metavar="SECONDS", help="wait so long for it (default 30)")
    explain = command(
        "explain",
        "planning:explain",
        "say which part of a stage's key changed since it last ran",
        "polytrope explain workflows/quickstart.yaml train",
        "workflow",
        "store",
    )
    explain.add_argument("stage", metavar="STAGE", help="a stage, with its branch if it has one: `train[degree=3]`")
    submit = command(
        "submit",
        "cluster:submit",
        "run a workflow on a Ray cluster; this machine may go away",
        """
        polytrope submit w.yaml --address http://head:8265 --store /shared/polytrope
        polytrope status RUN --address http://head:8265
        """,
        "workflow",
        "store",
        description="The working tree is packed and its driver runs as a Ray job; needs a store the cluster can reach.",
    )
    submit.add_argument("--address", required=True, metavar="URL", help="the cluster's job server: http://head:8265")
    submit.add_argument("--run-id", metavar="ID", help="name the run (letters, digits, - and _)")
    submit.add_argument("--working-dir", metavar="DIR", default=".", help="directory to pack (default: this one)")
    submit.add_argument("--dry-run", action="store_true", help="only list what would be sent, and what would not")
    submit.add_argument("--installed", action="store_true", help="use the cluster's polytrope; pack the workflow only")
    submit.add_argument("--wait", action="store_true", help="follow the log until the run ends")


def _look_commands(command: _AddCommand) -> None:
    status = command(
        "status",
        "looking:status",
        "show the stages of a run",
        "polytrope status\npolytrope status --watch\npolytrope status 20261123-1712-ab12 --json",
        "run",
        "store",
        "address",
        description="Reads the run's files only: works without Ray and MLflow, and while the run goes on. A running "
        "stage shows how far it is, what is left at its pace, and what it said last.",
    )
    status.add_argument("--watch", "-w", action="store_true", help="the display of `run`, until the run ends")
    status.add_argument("--json", action="store_true", help="print JSON")
    runs = command("runs", "looking:runs", "list the runs in a store", "polytrope runs\npolytrope runs --json", "store")
    runs.add_argument("--json", action="store_true", help="print JSON")
    runs.add_argument("--limit", type=int, default=20, metavar="N", help="the newest N (default 20)")
    logs = command(
        "logs",
        "looking:logs",
        "print what a run's stages said and printed",
        "polytrope logs --stage train -f\npolytrope logs 20261123-1712-ab12",
        "run",
        "store",
        "address",
    )
    logs.add_argument("--stage", metavar="STAGE", help="this stage only")
    logs.add_argument("--follow", "-f", action="store_true", help="go on printing until the run ends")
    logs.add_argument("--tail", type=int, metavar="N", help="the last N lines of each stage")
    diff = command(
        "diff",
        "looking:diff",
        "compare two runs: parameters, code, data, environment, metrics",
        "polytrope diff 20261122 20261123\npolytrope diff RUN_A RUN_B --json",
        "store",
    )
    diff.add_argument("run_a", metavar="RUN_A", help="run id or its start")
    diff.add_argument("run_b", metavar="RUN_B", help="run id or its start")
    diff.add_argument("--json", action="store_true", help="print JSON")

    opened = command(
        "open",
        "opening:open_result",
        "print where the result of a run is, and open it in the browser",
        """
        polytrope open     # the newest run: its report, else its page in MLflow
        polytrope open 20261123-1712-ab12 mlflow
        polytrope open card
        ls "$(polytrope open artifact train --print)"
        """,
        "store",
        description="Where there is no browser it only prints. A local MLflow server is started if none is there.",
    )
    opened.add_argument(
        "words",
        nargs="*",
        metavar="[RUN] [report|mlflow|card|artifact [STAGE]]",
        help="a run (default: the newest), what to open, and of which stage",
    )
    opened.add_argument("--print", action="store_true", help="only print the path or address, for scripts")


def _workflow_commands(command: _AddCommand) -> None:
    graph = command(
        "graph",
        "workflow_files:graph",
        "draw the stages: Mermaid text, SVG or PNG",
        """
        polytrope graph workflows/quickstart.yaml
        polytrope graph workflows/quickstart.yaml --output docs/quickstart.svg
        """,
        "workflow",
        "store",
    )
    graph.add_argument("--output", "-o", metavar="FILE", help="write FILE.svg or FILE.png instead of Mermaid text")
    graph.add_argument("--run", metavar="RUN", help="colour the stages by their state in this run")
    stages = command(
        "stages",
        "workflow_files:stages",
        "list the built-in stages, or the parameters of one",
        "polytrope stages\npolytrope stages train\npolytrope stages my_package.my_module:my_stage",
    )
    stages.add_argument("stage", metavar="NAME", nargs="?", help="a built-in stage, or package.module:function")
    stages.add_argument("--json", action="store_true", help="print the JSON schema")
    command(
        "validate",
        "workflow_files:validate",
        "check a workflow file without running it",
        "polytrope validate workflows/quickstart.yaml",
        "workflow",
    )
    command(
        "schema",
        "workflow_files:schema",
        "print the JSON Schema of workflow files, for editors",
        "polytrope schema > workflow.schema.json",
        description="With `# yaml-language-server: $schema=workflow.schema.json` as the first line of a workflow file, "
        "editors complete and check its keys and parameters.",
    )


def _store_commands(command: _AddCommand) -> None:
    gc = command(
        "gc",
        "storing:gc",
        "remove artifacts that no run and no alias refers to",
        "polytrope gc --dry-run\npolytrope gc --keep-runs 10",
        "store",
    )
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    gc.add_argument("--keep-runs", type=int, metavar="N", help="forget all but the newest N ended runs first")
    alias = command(
        "alias",
        "storing:alias",
        "name a result, so that gc keeps it",
        """
        polytrope alias best 20261123-1712-ab12 train
        polytrope convert "$(polytrope alias best)/model" converted/
        """,
        "store",
        description="With NAME alone it prints the directory of the result's files; without NAME it lists all.",
    )
    alias.add_argument("name", metavar="NAME", nargs="?", help="letters, digits, - and _")
    alias.add_argument("run", metavar="RUN", nargs="?", help="run id or its start")
    alias.add_argument("stage", metavar="STAGE", nargs="?", help="a stage with a result: train, or train[degree=3]")
    alias.add_argument("--remove", metavar="NAME", help="remove one; gc may then remove what it stood for")
    export = command(
        "export",
        "storing:export",
        "pack a run and its artifacts into one file",
        "polytrope export 20261123-1712-ab12 --output run.tar",
        "run",
        "store",
    )
    export.add_argument("--output", "-o", metavar="FILE", required=True, help="the .tar file to write")
    imported = command(
        "import",
        "storing:import_run",
        "unpack an exported run into a store",
        "polytrope import run.tar --store .polytrope",
        "store",
    )
    imported.add_argument("file", metavar="FILE", help="made by `polytrope export`")
    verify = command(
        "verify",
        "storing:verify",
        "hash stored artifacts again and report damage",
        "polytrope verify\npolytrope verify 20261123-1712-ab12",
        "run",
        "store",
        description="Damaged artifacts are moved to `quarantine/` and computed again by the next run.",
    )
    verify.add_argument("--all", action="store_true", help="every artifact of the store, not only those of one run")


def _service_commands(command: _AddCommand) -> None:
    ui = command(
        "ui",
        "services:ui",
        "start MLflow's web page on the results",
        "polytrope ui\npolytrope ui 20261123-1712-ab12 --port 5001",
        "run",
        "store",
        description="It prints the address of the run itself.",
    )
    ui.add_argument("--port", type=int, default=5000, help="default 5000")
    ui.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: reachable from this machine only")
    ui.add_argument("--uri", metavar="URI", help="MLflow tracking URI (default: that of the run)")
    sync = command(
        "sync",
        "services:sync",
        "send what MLflow has not received yet",
        "polytrope sync 20261123-1712-ab12\npolytrope sync --all",
        "run",
        "store",
        description="Runs do so by themselves; use it after the tracking server was away until the end.",
    )
    sync.add_argument("--all", action="store_true", help="every run of the store")
    build = command(
        "build-ops",
        "services:build_ops",
        "compile the activation kernels for this machine",
        "polytrope build-ops",
    )
    build.add_argument("--cuda", action="store_true", help="the CUDA kernels as well (needs nvcc)")
    convert = command(
        "convert",
        "conversion:convert",
        "replace the activations of a model by a fitted basis",
        """
        polytrope convert model/ converted/ --degree 8
        polytrope convert model/ --dry-run --target-error 0.01
        polytrope convert trained/ serving/ --as-is --onnx --tables
        """,
        description="MODEL: a directory of polytrope, of Hugging Face or of DeepSpeed, or a file with a state dict. It "
        "stays as it is; OUTPUT gets the converted model, conversion.json and conversion.html.",
    )
    convert.options_from = "conversion:add_options"


class _AddCommand(Protocol):
    """Type of the `command` helper in `build_parser`."""

    def __call__(
        self, name: str, function: str, summary: str, example: str, *options: str, description: str = ""
    ) -> _Command: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns the exit code."""
    occupy_standard_descriptors()
    show_what_can_be_shown()
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        from importlib.metadata import version

        print(f"polytrope {version('polytrope')}")
        return EXIT_SUCCESS
    if options.command is None:
        parser.print_help()
        return EXIT_USER_ERROR
    module, function = options.function.split(":")
    try:
        command = getattr(importlib.import_module(f"polytrope.pipeline.commands.{module}"), function)
        code = int(command(options))
    except UserError as error:
        _refuse("polytrope", error.message, _complete(error.hint, options))
        return EXIT_RUN_ELSEWHERE if isinstance(error, RunElsewhereError) else EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("polytrope: interrupted", file=sys.stderr)
        return EXIT_CANCELLED
    except BrokenPipeError:  # `polytrope runs | head`
        let_go(sys.stdout)
        return EXIT_READER_LEFT
    except Exception as error:
        from polytrope.pipeline.support.files import is_disk_full

        if not is_disk_full(error):
            return _unexpected(error, debug=options.debug)
        _refuse("polytrope", str(error), "free some space: on the disk, or where the output goes")
        code = EXIT_RUN_FAILED
    return _flushed(code)


def _complete(hint: str, options: argparse.Namespace) -> str:
    """A hint whose commands work on the store that this one was given."""
    from polytrope.pipeline.support.text import complete_commands

    store = getattr(options, "store", None)
    return hint if store is None or getattr(options, "address", None) else complete_commands(hint, store)


def _flushed(code: int) -> int:
    """The exit code, when the last of the output is written; a result that is known stays what it is."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        let_go(sys.stdout)
    except OSError as error:
        let_go(sys.stdout)
        print(f"polytrope: the output cannot be written: {error}", file=sys.stderr)
        return code or EXIT_RUN_FAILED
    return code


def _unexpected(error: Exception, *, debug: bool) -> int:
    """A defect of polytrope or of the machine: a short line, the traceback in a file (on the terminal with --debug)."""
    import tempfile
    import traceback

    if debug:
        traceback.print_exception(error)
        return EXIT_RUN_FAILED
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="polytrope-error-", suffix=".log", delete=False
        ) as log:
            traceback.print_exception(error, file=log)
    except OSError:  # nowhere to write it
        traceback.print_exception(error)
        return EXIT_RUN_FAILED
    print(f"polytrope: unexpected {type(error).__name__}: {error}", file=sys.stderr)
    print(f"  → the traceback is in {log.name}; `--debug` prints it", file=sys.stderr)
    return EXIT_RUN_FAILED


if __name__ == "__main__":
    sys.exit(main())
