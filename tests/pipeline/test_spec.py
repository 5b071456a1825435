"""The workflow file: what is accepted, and the message for everything that is not."""

import json
from pathlib import Path

import pytest

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import format_duration
from polytrope.pipeline.workflow.references import resolve_environment
from polytrope.pipeline.workflow.spec import StageSpec, Workflow, load_workflow

MINIMAL = """\
name: demo
params:
  steps: 100
  learning_rate: 1e-3
stages:
  make:
    uses: shard
    with:
      steps: ${params.steps}
      note: run for ${params.steps} steps
"""


def write(directory: Path, text: str, name: str = "w.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(path: Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_workflow(path, overrides)
    return caught.value


def test_a_whole_reference_keeps_its_type_and_one_inside_text_is_written_out(tmp_path: Path) -> None:
    workflow = load_workflow(write(tmp_path, MINIMAL))
    assert workflow.stages["make"].parameters == {"steps": 100, "note": "run for 100 steps"}
    assert workflow.directory == tmp_path


def test_numbers_and_booleans_follow_yaml_1_2(tmp_path: Path) -> None:
    text = MINIMAL.replace("steps: 100", "steps: 100\n  a: 1e-3\n  b: no\n  c: 10:30\n  d: true\n  e: 0x10\n  f: .5")
    params = load_workflow(write(tmp_path, text)).params
    assert (params["a"], params["b"], params["c"], params["d"]) == (0.001, "no", "10:30", True)
    assert (params["e"], params["f"]) == (16, 0.5)


def test_set_replaces_parameters_and_any_other_value_with_yaml_types(tmp_path: Path) -> None:
    workflow = load_workflow(
        write(tmp_path, MINIMAL),
        ["params.steps=5", "stages.make.with.note=[a, 2]", "executor=local", "stages.make.retries=0"],
    )
    assert workflow.stages["make"].parameters == {"steps": 5, "note": ["a", 2]}
    assert (workflow.executor, workflow.stages["make"].retries) == ("local", 0)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("params.stepz=3", "no parameter `stepz`", "did you mean `steps`?"),
        ("stages.maker.with.x=3", "`stages.maker` is not a group", "did you mean `make`?"),
        ("params.steps", "expected `name=value`", "--set params.steps=100"),
        ("stages.make.retires=3", "unknown key `retires`", "did you mean `retries`?"),
    ],
)
def test_a_wrong_set_is_refused_with_the_nearest_name(tmp_path: Path, override: str, message: str, hint: str) -> None:
    error = refusal(write(tmp_path, MINIMAL), override)
    assert message in error.message
    assert f"--set {override.split('=')[0]}" in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("    uses: shard", "    use: shard", "w.yaml:7: stages.make: unknown key `use`", "did you mean `uses`?"),
        ("name: demo", "nam: demo", "w.yaml:1: top level: unknown key `nam`", "did you mean `name`?"),
        ("    uses: shard", "    uses: 3", "w.yaml:7: stages.make.uses: expected text, got 3", ""),
        (
            "    uses: shard",
            "    uses: shard\n    retries: abc",
            "w.yaml:8: stages.make.retries: expected a whole number, got 'abc'",
            "",
        ),
        (
            "    uses: shard",
            "    uses: shard\n    timeout: soon",
            "w.yaml:8: stages.make.timeout: expected seconds or a duration such as `90s`, `10m`",
            "",
        ),
        (
            "    uses: shard",
            "    uses: shard\n    resources:\n      memory: 4 elephants",
            "w.yaml:9: stages.make.resources.memory: expected bytes or a size such as `512MiB`",
            "",
        ),
        (
            "    uses: shard",
            "    uses: shard\n    resources: {gpu: 1}",
            "w.yaml:8: stages.make.resources: unknown key `gpu`",
            "did you mean `gpus`?",
        ),
        ("${params.steps}\n", "${params.stepz}\n", "w.yaml:9: stages.make.with.steps: `${params.stepz}`", "`steps`"),
        ("${params.steps}\n", "${parms.steps}\n", "w.yaml:9: stages.make.with.steps: unknown reference", "${params."),
        ("  make:", "  make: {}\n  make:", "w.yaml:7: stages.make: this key is given twice (first at w.yaml:6)", ""),
        ("  steps: 100", "   steps: 100", "w.yaml:4: not valid YAML", "check the indentation"),
        ("  steps: 100", "\tsteps: 100", "w.yaml:3: not valid YAML", "a tab stands in the indentation of this line"),
        ("  make:", "  ma ke:", "the stage name `ma ke` may hold letters", ""),
        ("  make:", "  make: !!python/object:os.system", "python/object:os.system` is not accepted", ""),
        ("params:", "stages: 3\nparams:", "this key is given twice", ""),
        ("steps: 100", "steps: ${params.learning_rate}", "refer to each other in a circle", ""),
        ("steps: 100", "steps: !!int abc", "w.yaml:3: params.steps: 'abc' is not what its tag `!!int` says", "leave"),
        ("steps: 100", "steps: !!bool yes", "w.yaml:3: params.steps: 'yes' is not what its tag `!!bool` says", ""),
        ("steps: 100", "steps: !!null none", "w.yaml:3: params.steps: 'none' is not what its tag `!!null` says", ""),
        ("steps: 100", f"steps: {'9' * 5000}", "w.yaml:3: params.steps: a number of 5000 digits is too long", "quote"),
        ("steps: 100", "steps: 1e-400", "w.yaml:3: params.steps: 1e-400 is smaller than any float", "write 0"),
        (
            "${params.steps}\n",
            "{'a ${params.steps}': 1}\n",
            "w.yaml:9: stages.make.with.steps: a reference stands in the name `a ${params.steps}`",
            "only values are replaced",
        ),
    ],
)
def test_every_mistake_names_file_line_and_field(tmp_path: Path, old: str, new: str, message: str, hint: str) -> None:
    text = MINIMAL.replace(old, new, 1)
    if "circle" in message:
        text = text.replace("learning_rate: 1e-3", "learning_rate: ${params.steps}")
    error = refusal(write(tmp_path, text))
    assert message in error.message
    assert hint in error.hint


def test_missing_empty_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "no workflow file" in refusal(tmp_path / "nothing.yaml").message
    assert "is a directory" in refusal(tmp_path).message
    assert "the file is empty" in refusal(write(tmp_path, "")).message
    assert "is a mapping" in refusal(write(tmp_path, "- a\n- b\n")).message
    assert "stages: this field is required" in refusal(write(tmp_path, "name: x\n")).message


def test_all_mistakes_of_a_file_are_reported_together(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, MINIMAL.replace("    uses: shard", "    usez: shard\n    retries: -1")))
    assert len(error.message.splitlines()) == 3  # uses missing, usez unknown, retries negative


def test_include_merges_below_the_including_file_and_errors_name_the_included_one(tmp_path: Path) -> None:
    write(tmp_path, "params: {steps: 7, width: 2}\nstages:\n  base:\n    uses: shard\n    retries: x\n", "base.yaml")
    path = write(tmp_path, "include: base.yaml\n" + MINIMAL)
    assert "base.yaml:5: stages.base.retries" in refusal(path).message
    write(tmp_path, "params: {steps: 7, width: 2}\nstages:\n  base:\n    uses: shard\n", "base.yaml")
    workflow = load_workflow(path)
    assert set(workflow.stages) == {"base", "make"}
    assert workflow.params == {"steps": 100, "width": 2, "learning_rate": 0.001}


def test_include_cycles_and_missing_includes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "include: w.yaml\n", "other.yaml")
    assert "w.yaml → other.yaml → w.yaml" in refusal(write(tmp_path, "include: [other.yaml]\n" + MINIMAL)).message
    error = refusal(write(tmp_path, "include: gone.yaml\n" + MINIMAL))
    assert "w.yaml:1: include: no file `gone.yaml`" in error.message


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = "name: x\nstages:\n  a: &a\n    uses: shard\n    retries: 1\n  b:\n    <<: *a\n    retries: 4\n"
    stages = load_workflow(write(tmp_path, text)).stages
    assert (stages["b"].uses, stages["b"].retries) == ("shard", 4)


def test_an_environment_reference_stays_a_reference_in_the_resolved_workflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_TOKEN", "s3cr3t")
    workflow = load_workflow(write(tmp_path, MINIMAL.replace("${params.steps}\n", "${env.DEMO_TOKEN}\n", 1)))
    assert "s3cr3t" not in json.dumps(workflow.to_dict())
    assert resolve_environment(workflow.stages["make"].parameters, {"DEMO_TOKEN": "s3cr3t"})["steps"] == "s3cr3t"
    with pytest.raises(UserError, match="`DEMO_TOKEN` is not set"):
        resolve_environment(workflow.stages["make"].parameters, {})


def test_a_dollar_can_be_escaped() -> None:
    assert resolve_environment("$${env.X} ${env.Y}", {"Y": "1"}) == "${env.X} 1"


def test_durations_and_memory_have_units(tmp_path: Path) -> None:
    text = MINIMAL.replace("    uses: shard", "    uses: shard\n    timeout: 1h30m\n    resources: {memory: 4GiB}")
    stage = load_workflow(write(tmp_path, text)).stages["make"]
    assert (stage.timeout, stage.resources.memory) == (5400.0, 4 * 1024**3)
    assert [format_duration(value) for value in (0.42, 12.3, 185, 7620)] == [
        "0.4 s",
        "12 s",
        "3 min 05 s",
        "2 h 07 min",
    ]


def test_a_workflow_survives_the_round_trip_through_its_resolved_form(tmp_path: Path) -> None:
    workflow = load_workflow(write(tmp_path, MINIMAL))
    again = Workflow.from_dict(json.loads(json.dumps(workflow.to_dict())), directory=workflow.directory)
    assert again.to_dict() == workflow.to_dict()


def test_a_workflow_can_be_made_in_python() -> None:
    workflow = Workflow(name="demo", stages={"a": StageSpec(uses=load_workflow, parameters={"x": 1})})
    assert workflow.stages["a"].uses == "polytrope.pipeline.workflow.spec:load_workflow"
    assert workflow.where("stages", "a", "with", "x") == "stages.a.with.x"


def test_the_example_of_the_documentation_is_a_valid_workflow_file(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "workflow-file.md").read_text()
    workflow = load_workflow(write(tmp_path, text.split("```yaml\n")[1].split("```")[0]))
    assert list(workflow.stages) == ["data", "train", "compare"]
    for name, model in (("of the file", Workflow), ("of a stage", StageSpec)):
        table = text.split(f"## Keys {name}")[1].split("##")[0]
        for field, info in model.model_fields.items():
            assert f"`{info.alias or field}`" in table


def test_an_unknown_executor_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    data = {"name": "w", "executor": "slurm", "stages": {"s": {"uses": "shard"}}}
    with pytest.raises(UserError, match=r"executor: expected ray or local \(got 'slurm'\)"):
        Workflow.from_dict(data, directory=tmp_path)
