"""The command itself, as a person starts it: help, exit codes, and the refusal of bad input before anything starts."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from polytrope.pipeline.commands.cli import build_parser, main
from polytrope.pipeline.commands.cluster import _passed_on
from polytrope.pipeline.support.text import STORE_COMMANDS, command, complete_commands

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))

STAGES = '''
"""Stages of this test."""
from polytrope.pipeline.stage import Artifact, StageContext

def make(context: StageContext, steps: int = 3) -> dict[str, float]:
    """Make a file of `steps` lines."""
    (context.output / "x.txt").write_text("line\\n" * steps)
    context.progress(steps, steps, "written")
    print("hello from make")
    return {"lines": steps}

def use(context: StageContext, source: Artifact, fail: bool = False) -> dict[str, float]:
    """Count lines."""
    if fail:
        raise RuntimeError("made to fail")
    text = (source.path / "x.txt").read_text()
    (context.output / "y.txt").write_text(text.upper())
    return {"lines": len(text.splitlines())}
'''

WORKFLOW = """\
name: demo
executor: local
tracking: {enabled: false}
params:
  steps: 3
  fail: false
stages:
  make:
    uses: cli_test_stages:make
    with:
      steps: ${params.steps}
    retries: 0
  use:
    uses: cli_test_stages:use
    inputs: {source: make}
    with: {fail: "${params.fail}"}
    retries: 0
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "cli_test_stages.py").write_text(STAGES)
    (tmp_path / "w.yaml").write_text(WORKFLOW)
    return tmp_path


def polytrope(directory: Path, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [POLYTROPE, *arguments], cwd=directory, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_help_names_every_command_and_the_exit_codes_and_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; from polytrope.pipeline.commands.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'pydantic', 'yaml', 'torch', 'ray', 'mlflow', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    for word in ("run", "plan", "status", "resume", "runs", "logs", "graph", "ui", "stages", "validate", "130"):
        assert word in result.stdout


def commands() -> list[str]:
    actions = [action for action in build_parser()._actions if action.dest == "command"]
    return list(actions[0].choices or [])


@pytest.mark.parametrize("command", commands())
def test_each_command_teaches_by_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"  polytrope {command}" in text.split("example:")[1]
    assert "exit codes:" in text


def test_each_command_has_its_function() -> None:
    import importlib

    parser = build_parser()
    for action in parser._actions:
        for name, sub in (action.choices or {}).items() if action.dest == "command" else ():
            module, function = sub.get_default("function").split(":")
            assert callable(getattr(importlib.import_module(f"polytrope.pipeline.commands.{module}"), function)), name


def test_version_and_no_command(project: Path) -> None:
    assert polytrope(project, "--version").stdout.startswith("polytrope 0.")
    assert polytrope(project).returncode == 2


BAD_INPUT = {
    "unknown key": ("    retries: 0", "    retry: 0", "w.yaml:12: stages.make: unknown key `retry`", "`retries`"),
    "wrong type": (
        "  steps: 3",
        "  steps: many",
        "w.yaml:11: stages.make.with.steps: expected a whole number, got 'many'",
        "polytrope stages",
    ),
    "cycle": ("    retries: 0", "    after: [use]", "make → use → make", "remove one"),
    "missing dependency": (
        "{source: make}",
        "{source: mak}",
        "w.yaml:15: stages.use.inputs.source: there is no",
        "`make`",
    ),
    "unknown stage": ("cli_test_stages:make", "shart", "w.yaml:9: stages.make.uses: unknown stage `shart`", "`shard`"),
    "unknown module": (
        "cli_test_stages:make",
        "gone:make",
        "w.yaml:9: stages.make.uses: cannot import `gone`",
        "importable",
    ),
    "unknown reference": ("${params.steps}", "${params.step}", "w.yaml:11: stages.make.with.steps", "`steps`"),
    "broken YAML": ("params:", "params: [", "w.yaml:", "not valid YAML"),
    "more GPUs than there are": (
        "    retries: 0",
        "    resources: {workers: 2, gpus: 64}",
        "w.yaml:12: stages.make.resources: stage `make` asks for 128 GPUs (2 × 64), this machine has",
        "resources",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_with_one_message_and_nothing_is_started(project: Path, case: str) -> None:
    old, new, message, hint = BAD_INPUT[case]
    (project / "w.yaml").write_text(WORKFLOW.replace(old, new, 1))
    result = polytrope(project, "run", "w.yaml")
    assert result.returncode == 2
    assert message in result.stderr
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(project.glob(".polytrope/runs/*"))


def test_a_missing_workflow_file_is_refused(project: Path) -> None:
    result = polytrope(project, "run", "gone.yaml")
    assert (result.returncode, "no workflow file `gone.yaml`" in result.stderr) == (2, True)


BAD_DATA = {
    "missing file": ({"source": {"kind": "files", "paths": ["gone.txt"]}}, "no file matches `gone.txt`"),
    "empty corpus": ({"source": {"kind": "files", "paths": ["empty.txt"]}}, "empty.txt is empty"),
    "vocabulary": ({"tokenizer": {"kind": "bpe", "vocab_size": 4096}}, "(4096 tokens) is larger than the model's"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be_used_is_refused_by_the_stage_before_anything_starts(project: Path, case: str) -> None:
    parameters, message = BAD_DATA[case]
    (project / "empty.txt").write_text("")
    model = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 2048}
    stages = {
        "shard": {"uses": "shard", "with": parameters},
        "train": {"uses": "train", "inputs": {"dataset": "shard"}, "with": {"steps": 1, "model": model}},
    }
    (project / "w.yaml").write_text(json.dumps({"name": "demo", "stages": stages}))
    result = polytrope(project, "run", "w.yaml")
    assert result.returncode == 2
    assert message in result.stderr
    assert "w.yaml:1: stages." in result.stderr
    assert not list(project.glob(".polytrope/runs/*"))


def test_a_secret_reaches_the_stage_and_nothing_else(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_TOKEN", "hunter2-hunter2")
    (project / "secret_stages.py").write_text(
        "from polytrope.pipeline.stage import StageContext\n"
        "def use(context: StageContext, token: str) -> dict[str, float]:\n"
        "    print('using', token)\n"
        "    assert token != 'Bearer hunter2-hunter2', f'{token} is refused'\n"
    )
    text = "name: demo\nexecutor: local\ntracking: {enabled: false}\nstages:\n"
    stage = "  use: {uses: 'secret_stages:use', retries: 0, with: {token: 'Bearer ${env.DEMO_TOKEN}'}}\n"
    (project / "w.yaml").write_text(text + stage)
    result = polytrope(project, "run", "w.yaml")
    assert result.returncode == 1
    assert "Bearer ${env.DEMO_TOKEN} is refused" in result.stdout  # it arrived, and is hidden in the message
    assert "hunter2" not in result.stdout + result.stderr
    for path in (project / ".polytrope").rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    monkeypatch.delenv("DEMO_TOKEN")
    assert "the environment variable `DEMO_TOKEN` is not set" in polytrope(project, "run", "w.yaml").stderr


def test_the_python_interface_runs_the_same_workflow(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polytrope import StageSpec, Workflow, load_workflow, run

    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    result = run(load_workflow("w.yaml", ["params.steps=7"]), executor="local")
    assert (result.status, result["use"].metrics) == ("succeeded", {"lines": 7.0})
    made = Workflow(name="made", stages={"make": StageSpec(uses="cli_test_stages:make", parameters={"steps": 7})})
    again = run(made, executor="local", tracking=False)
    assert again["make"].state == "cached"  # the same stage, whoever names it


def test_an_unwritable_store_is_refused(project: Path) -> None:
    (project / "file").write_text("x")
    result = polytrope(project, "run", "w.yaml", "--store", "file/store")
    assert result.returncode == 2
    assert "cannot be used: a part of its path is a file" in result.stderr
    assert "use another place" in result.stderr


def test_an_unreachable_mlflow_is_refused_before_anything_runs(project: Path) -> None:
    started = time.monotonic()
    result = polytrope(project, "run", "w.yaml", "--set", "tracking={uri: 'http://127.0.0.1:9', enabled: true}")
    assert result.returncode == 2
    assert "http://127.0.0.1:9" in result.stderr
    assert "--no-tracking" in result.stderr
    assert not list((project / ".polytrope" / "runs").glob("*"))
    assert time.monotonic() - started < 30  # it does not wait for MLflow's own retries (minutes)


def test_run_then_everything_is_stored_then_a_change_is_explained(project: Path) -> None:
    first = polytrope(project, "run", "w.yaml")
    assert first.returncode == 0, first.stderr
    assert "make: succeeded" in first.stdout
    assert "lines 3" in first.stdout
    second = polytrope(project, "run", "w.yaml")
    assert second.stdout.count(": cached") == 2
    assert "all 2 stages are stored" in polytrope(project, "plan", "w.yaml").stdout
    changed = polytrope(project, "plan", "w.yaml", "--set", "params.steps=5")
    assert "parameters.steps: 3 → 5" in changed.stdout
    assert "input source will be computed" in changed.stdout
    explained = polytrope(project, "explain", "w.yaml", "make", "--set", "params.steps=5")
    assert "parameters.steps: 3 → 5" in explained.stdout

    status = json.loads(polytrope(project, "status", "--json").stdout)
    assert status["status"] == "succeeded"
    assert [stage["state"] for stage in status["stages"]] == ["cached", "cached"]
    runs = json.loads(polytrope(project, "runs", "--json").stdout)
    assert [run["status"] for run in runs] == ["succeeded", "succeeded"]
    assert "hello from make" in polytrope(project, "logs", runs[1]["run_id"]).stdout
    assert "class n0,n1 cached" in polytrope(project, "graph", "w.yaml", "--run", runs[0]["run_id"][:20]).stdout
    same = polytrope(project, "diff", runs[1]["run_id"], runs[0]["run_id"])
    assert (same.returncode, "no difference" in same.stdout) == (0, True)
    assert "about " in changed.stdout  # the predicted time
    assert polytrope(project, "run", "w.yaml", "--set", "params.steps=5", "--run-id", "five").returncode == 0
    compared = polytrope(project, "diff", runs[0]["run_id"], "five")
    assert compared.returncode == 1
    difference = compared.stdout
    for line in ("params.steps: 3 → 5", "make: parameters.steps: 3 → 5", "use: lines: 3 → 5"):
        assert line in difference


def test_a_failure_says_why_where_and_what_to_do_and_resume_finishes(project: Path) -> None:
    failed = polytrope(project, "run", "w.yaml", "--set", "params.fail=true", "--run-id", "bad")
    assert failed.returncode == 1
    assert "use failed: RuntimeError: made to fail" in failed.stdout
    assert "polytrope resume bad" in failed.stdout
    assert "RuntimeError" in polytrope(project, "logs", "bad", "--stage", "use").stdout
    assert polytrope(project, "status", "bad").returncode == 1
    assert polytrope(project, "resume", "bad").returncode == 1
    (project / "cli_test_stages.py").write_text(STAGES.replace("if fail:", "if fail is None:"))
    refused = polytrope(project, "resume", "bad")
    assert refused.returncode == 2
    assert "stage `make` is finished, but since then code of cli_test_stages.py changed" in refused.stderr
    assert "--allow-code-change" in refused.stderr
    record = json.loads((project / ".polytrope" / "runs" / "bad" / "workflow.json").read_bytes())
    record["environment"]["packages"]["torch"] = "0.1"
    (project / ".polytrope" / "runs" / "bad" / "workflow.json").write_text(json.dumps(record))
    allowed = polytrope(project, "resume", "bad", "--allow-code-change")
    assert allowed.returncode == 0
    assert "finished stages stay, though versions are others than in the attempt before" in allowed.stderr
    assert "package torch: 0.1 → " in allowed.stderr


def test_a_failure_names_the_command_that_fits_what_was_edited_since(project: Path) -> None:
    """Every line that is printed as a command is one that works as it stands."""
    store = str(project / "my store")
    given = ("--store", "my store", "--set", "params.fail=true", "--concurrency", "1")
    failed = polytrope(project, "run", "w.yaml", *given, "--run-id", "bad")
    assert failed.returncode == 1
    anew = f"polytrope run w.yaml --set params.fail=true --concurrency 1 --store '{store}'"
    block = [
        "use failed: RuntimeError: made to fail",
        f"  at {project / 'cli_test_stages.py'}:15",
        f"  log: {store}/runs/bad/logs/use/1.log",
        f"go on: polytrope resume bad --store '{store}'",
        f"  after an edit of w.yaml: {anew}",
        "",
    ]
    summary = failed.stdout.split("\n\n")[1]
    assert [*summary.splitlines(), ""] == block
    assert "run bad failed in" in failed.stdout.split("\n\n")[2]
    assert summary.replace("go on:", "\ngo on:") in polytrope(project, "status", "bad", "--store", store).stdout

    (project / "cli_test_stages.py").write_text(STAGES.replace("* steps", "* steps + ''"))
    lines = polytrope(project, "status", "bad", "--store", store).stdout.split("\n\n")[-1].splitlines()
    assert lines == [
        f"go on: polytrope resume bad --store '{store}' --allow-code-change",
        "  cli_test_stages.py was edited since: `make`, which is finished, is computed again",
        f"  after an edit of w.yaml: {anew}",
    ]
    refused = polytrope(project, "resume", "bad", "--store", store)
    assert f"`polytrope resume bad --allow-code-change --store '{store}'` computes it again" in refused.stderr
    (project / "cli_test_stages.py").write_text(STAGES + "# a comment decides nothing\n")
    assert f"go on: polytrope resume bad --store '{store}'\n" in polytrope(project, "status", "--store", store).stdout

    (project / "w.yaml").write_text(WORKFLOW.replace("steps: 3", "steps: 4"))
    again = polytrope(project, "resume", "bad", "--store", store)
    assert again.returncode == 1
    assert f"the new one, in a run of its own that keeps what still fits: {anew}\n" in again.stderr
    assert f"go on: {anew}\n  w.yaml was edited since" in again.stdout
    assert "polytrope resume" not in again.stdout + again.stderr


def test_commands_name_the_store_that_they_would_not_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POLYTROPE_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert command("resume", "a", store=str(tmp_path / ".polytrope")) == "polytrope resume a"
    assert command("resume", "a", store="s3://bucket/x") == "polytrope resume a --store s3://bucket/x"
    monkeypatch.setenv("POLYTROPE_STORE", "s3://bucket/x/")
    assert command("resume", "a", store="s3://bucket/x") == "polytrope resume a"
    assert command("resume", "a", store=".polytrope") == "polytrope resume a --store .polytrope"
    hint = "`polytrope resume` or `polytrope resume --allow-code-change`, `polytrope stages train`; `--store DIR`"
    assert complete_commands(hint, "b", "run1") == (
        "`polytrope resume run1 --store b` or `polytrope resume run1 --allow-code-change --store b`, "
        "`polytrope stages train`; `--store DIR`"
    )
    done = "`polytrope resume RUN --address http://head --store x`"
    assert complete_commands(done, "b", "run1") == done


def test_the_commands_that_look_into_a_store_are_known() -> None:
    actions = [action for action in build_parser()._actions if action.dest == "command"]
    taking = {name for name, sub in (actions[0].choices or {}).items() if "--store" in sub._option_string_actions}
    assert taking - {"submit", "verify-resume"} == STORE_COMMANDS


def test_reproduce_computes_everything_again_and_compares_digests(project: Path) -> None:
    assert polytrope(project, "run", "w.yaml").returncode == 0
    same = polytrope(project, "reproduce")
    assert same.returncode == 0, same.stdout + same.stderr
    assert "2 of 2 results are bit-equal" in same.stdout
    (project / "cli_test_stages.py").write_text(STAGES.replace(".upper()", ".title()"))
    different = polytrope(project, "reproduce", "--into", "elsewhere")
    assert different.returncode == 1
    assert "1 of 2 results are bit-equal" in different.stdout


def test_an_unexpected_error_is_short_and_leaves_its_traceback_in_a_file(project: Path) -> None:
    (project / "cli_test_stages.py").write_text(STAGES + "\nraise KeyError('boom')\n")
    result = polytrope(project, "validate", "w.yaml")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "boom" in result.stderr


def test_stages_lists_parameters_from_their_models(project: Path) -> None:
    text = polytrope(project, "stages", "cli_test_stages:make").stdout
    assert "Make a file of `steps` lines." in text
    assert "steps" in text
    built_in = polytrope(project, "stages", "train").stdout
    assert "learning_rate" in built_in
    assert "model.n_layer" in built_in


def test_graph_is_drawn_to_a_file(project: Path) -> None:
    assert polytrope(project, "graph", "w.yaml", "--output", "g.svg").returncode == 0
    assert "<svg" in (project / "g.svg").read_text()
    assert polytrope(project, "graph", "w.yaml", "--output", "g.pdf").returncode == 2


def test_a_plan_of_200_stages_needs_no_store_and_starts_nothing(project: Path) -> None:
    lines = ["name: big", "stages:", "  s0: {uses: 'cli_test_stages:make'}"]
    lines += [f"  s{i}: {{uses: 'cli_test_stages:use', inputs: {{source: s0}}}}" for i in range(1, 200)]
    (project / "big.yaml").write_text("\n".join(lines))
    result = polytrope(project, "plan", "big.yaml")
    assert "200 of 200 stages will run" in result.stdout
    assert not (project / ".polytrope").exists()


def test_json_of_a_plan_is_machine_readable(project: Path) -> None:
    data = json.loads(polytrope(project, "plan", "w.yaml", "--json").stdout)
    assert [stage["action"] for stage in data["stages"]] == ["run", "run"]


def test_ui_says_where_the_results_are_or_that_there_are_none(project: Path) -> None:
    assert "there are no results" in polytrope(project, "ui").stderr
    elsewhere = polytrope(project, "ui", "--uri", "http://mlflow.example:5000")
    assert "the results are on the MLflow server http://mlflow.example:5000" in elsewhere.stdout


def test_a_killed_driver_leaves_an_interrupted_run_that_resume_all_finishes(project: Path) -> None:
    waiting = STAGES + "\nimport time\ndef slow(context: StageContext) -> None:\n    time.sleep(SECONDS)\n"
    (project / "cli_test_stages.py").write_text(waiting + "SECONDS = 600\n")
    (project / "w.yaml").write_text(WORKFLOW + "  last:\n    uses: cli_test_stages:slow\n    after: [use]\n")
    driver = subprocess.Popen(
        [POLYTROPE, "run", "w.yaml", "--run-id", "killed"], cwd=project, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while "running" not in polytrope(project, "status", "killed").stdout.split("last")[-1]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        elsewhere = polytrope(project, "resume", "killed")
        assert elsewhere.returncode == 3
        assert "run killed is driven by process" in elsewhere.stderr
    finally:
        driver.kill()
        driver.wait()
    assert ", interrupted," in polytrope(project, "status", "killed").stdout
    (project / "cli_test_stages.py").write_text(waiting + "SECONDS = 0\n")
    finished = polytrope(project, "resume", "--all", "--allow-code-change")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert json.loads(polytrope(project, "status", "killed", "--json").stdout)["status"] == "succeeded"
    assert "there is nothing to resume" in polytrope(project, "resume", "--all").stdout


def test_cancel_ends_a_run_from_another_terminal_and_it_can_be_resumed(project: Path) -> None:
    (project / "cli_test_stages.py").write_text(
        STAGES + "\nimport time\ndef slow(context: StageContext, seconds: float) -> None:\n    time.sleep(seconds)\n"
    )
    text = "name: slow\nexecutor: local\ntracking: {enabled: false}\nstages:\n"
    (project / "w.yaml").write_text(text + "  slow: {uses: 'cli_test_stages:slow', with: {seconds: 600}}\n")
    driver = subprocess.Popen(
        [POLYTROPE, "run", "w.yaml", "--run-id", "c"], cwd=project, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    while "slow: running" not in driver.stdout.readline():
        assert driver.poll() is None
    cancelled = polytrope(project, "cancel", "c")
    assert cancelled.returncode == 0
    assert "polytrope resume c" in cancelled.stdout
    assert driver.wait(timeout=60) == 130
    driver.stdout.close()
    assert "nothing to cancel" in polytrope(project, "cancel", "c").stdout


def test_the_documentation_lists_every_command() -> None:
    text = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    for name in commands():
        assert f"`{name}" in text, name


def test_an_empty_run_id_is_refused(project: Path) -> None:
    result = polytrope(project, "run", "w.yaml", "--run-id", "")
    assert (result.returncode, result.stderr.splitlines()[0]) == (2, "polytrope: `` cannot be a run id")
    assert not list(project.glob(".polytrope/runs/*"))
    assert polytrope(project, "run", "w.yaml", "--run-id", "a").returncode == 0
    assert "there is no run ``" in polytrope(project, "status", "").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alias", "--remove", "x\udcff"), "there is no alias"),
        (("run", "w.yaml", "--run-id", "x\udcff"), "cannot be a run id"),
        (("run", "w.yaml", "--set", "params.steps=x\udcff"), "--set: the value 'x\\udcff' is not UTF-8"),
        (("run", "w.yaml", "--store", "x\udcff"), "store: the path '{project}/x\\udcff' is not UTF-8"),
        (("run", "x\udcff.yaml"), "the path of the workflow file '{project}/x\\udcff.yaml' is not UTF-8"),
    ],
)
def test_words_of_another_encoding_are_refused_by_name(
    project: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(project)
    (project / "x\udcff.yaml").write_bytes((project / "w.yaml").read_bytes())
    assert main(list(arguments)) == 2
    assert message.format(project=project) in capsys.readouterr().err
    assert not list(project.glob("**/runs/*"))


def test_a_journal_that_is_a_directory_is_named_and_hides_no_other_run(project: Path) -> None:
    assert polytrope(project, "run", "w.yaml", "--run-id", "good").returncode == 0
    assert polytrope(project, "run", "w.yaml", "--run-id", "odd").returncode == 0
    journal = project / ".polytrope" / "runs" / "odd" / "journal.jsonl"
    journal.unlink()
    journal.mkdir()
    message = f"polytrope: {journal} is a directory and no journal"
    for arguments in (("status", "odd"), ("run", "w.yaml", "--run-id", "odd"), ("logs", "odd")):
        result = polytrope(project, *arguments)
        assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    listed = polytrope(project, "runs")
    assert (listed.returncode, message in listed.stderr) == (1, True)
    assert "good" in listed.stdout


def test_the_options_of_a_resume_on_a_cluster_reach_its_driver() -> None:
    given = "--force a --force b --from c --executor local --concurrency 2 --inject-faults 7 --keep-going --no-tracking"
    words = [*given.split(), "--allow-code-change", "--quiet"]
    options = build_parser().parse_args(["resume", "r1", "--address", "http://head:8265", *words])
    assert sorted(_passed_on(options)) == sorted(words)


@pytest.mark.parametrize(
    "command",
    [
        ("resume", "r1", "--all"),
        ("resume", "r1", "--ray-address", "auto"),
        ("logs", "r1", "--stage", "make", "--follow"),
        ("logs", "r1", "--tail", "5"),
    ],
)
def test_an_option_that_means_nothing_on_a_cluster_is_refused(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anybody is asked: nothing answers at this address."""
    assert main([*command, "--address", "http://127.0.0.1:1"]) == 2
    option = next(word for word in command if word in ("--all", "--ray-address", "--follow", "--tail"))
    assert capsys.readouterr().err.startswith(f"polytrope: {option} ")
