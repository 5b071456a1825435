"""The graph: branches, dependencies, order, and the refusal of everything that cannot run."""

import json
import re
import sys
import textwrap
from pathlib import Path

import pytest

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import BUILTIN_STAGES, load_stage
from polytrope.pipeline.workflow.graph import StageNode, build_graph, condition_holds, resolve_parameters
from polytrope.pipeline.workflow.spec import Workflow, load_workflow

HOOKS = ("check", "promise", "fingerprint", "imports", "returns")
STAGES = '''
"""Stages of this test."""
from pathlib import Path
from pydantic import BaseModel, field_validator
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, stage

def make(context: StageContext, steps: int = 3, text: str = "x") -> None:
    """Make."""

def use(context: StageContext, source: Artifact, extra: Artifact | None = None) -> None:
    """Use."""

def join(context: StageContext, sources: dict[str, Artifact]) -> None:
    """Join."""

def check(parameters, upstream):
    if upstream["source"].steps > parameters.limit:
        raise UserError(f"{upstream['source'].steps} steps are more than {parameters.limit}", "raise `limit`")

@stage(check=check)
def limited(context: StageContext, source: Artifact, limit: int = 5) -> None:
    """Limited."""

def fingerprint(parameters, directory: Path):
    return {"data": (directory / "data.txt").read_text()}

@stage(fingerprint=fingerprint)
def read(context: StageContext) -> None:
    """Read."""

def untyped(context) -> None:
    """Untyped."""

class Loud(BaseModel):
    x: int = 1

    @field_validator("x", mode="before")
    @classmethod
    def said(cls, value):
        print("validated")
        return value

def say(*given):
    print("asked")
    return {}

@stage(check=say, promise=say, fingerprint=say, imports=say, returns=lambda parameters: (say(), say()))
def loud(context: StageContext, parameters: Loud) -> None:
    """Loud."""

def lost(parameters, *_):
    return {}["lost"]
''' + "".join(
    f"""
@stage({hook}=lost)
def lost_in_{hook}(context: StageContext) -> None:
    '''Lost.'''
"""
    for hook in HOOKS
)


@pytest.fixture(autouse=True)
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "graph_test_stages.py").write_text(STAGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "graph_test_stages", raising=False)


def workflow_from(text: str) -> Workflow:
    path = Path("w.yaml")
    path.write_text("name: demo\nparams: {steps: 4}\nstages:\n" + textwrap.indent(textwrap.dedent(text), "  "))
    return load_workflow(path)


def graph_from(text: str) -> dict[str, StageNode]:
    return build_graph(workflow_from(text))


def refusal(text: str) -> UserError:
    with pytest.raises(UserError) as caught:
        graph_from(text)
    return caught.value


MATRIX = """
make:
  uses: graph_test_stages:make
  matrix: {letter: [a, b], steps: [1, 2]}
  with: {steps: "${matrix.steps}", text: "${matrix.letter}!"}
use:
  uses: graph_test_stages:use
  matrix: {letter: [a, b], steps: [1, 2]}
  inputs: {source: make}
half:
  uses: graph_test_stages:join
  matrix: {letter: [a, b]}
  inputs: {sources: make}
join:
  uses: graph_test_stages:join
  inputs: {sources: use}
"""


def test_a_matrix_becomes_one_node_per_combination_with_its_values() -> None:
    graph = graph_from(MATRIX)
    made = [name for name in graph if name.startswith("make")]
    assert made == [f"make[letter={letter},steps={steps}]" for letter in "ab" for steps in (1, 2)]
    assert graph["make[letter=b,steps=2]"].parameters.model_dump() == {"steps": 2, "text": "b!"}
    assert graph["make[letter=b,steps=2]"].branch == {"letter": "b", "steps": "2"}


def branches(matrix: str) -> list[dict[str, object]]:
    text = (
        f"make:\n  uses: graph_test_stages:make\n  matrix:\n{textwrap.indent(textwrap.dedent(matrix).strip(), '    ')}"
    )
    return [node.matrix for node in graph_from(text).values()]


def test_include_and_exclude_mean_what_github_actions_documents() -> None:
    """The examples of "Running variations of jobs in a workflow", with the combinations that it lists."""
    assert branches(
        """
        fruit: [apple, pear]
        animal: [cat, dog]
        include:
          - color: green
          - {color: pink, animal: cat}
          - {fruit: apple, shape: circle}
          - {fruit: banana}
          - {fruit: banana, animal: cat}
        """
    ) == [
        {"fruit": "apple", "animal": "cat", "color": "pink", "shape": "circle"},
        {"fruit": "apple", "animal": "dog", "color": "green", "shape": "circle"},
        {"fruit": "pear", "animal": "cat", "color": "pink"},
        {"fruit": "pear", "animal": "dog", "color": "green"},
        {"fruit": "banana"},
        {"fruit": "banana", "animal": "cat"},
    ]
    assert branches(
        """
        os: [macos, windows]
        version: [12, 14, 16]
        environment: [staging, production]
        exclude:
          - {os: macos, version: 12, environment: production}
          - {os: windows, version: 16}
        """
    ) == [
        {"os": "macos", "version": 12, "environment": "staging"},
        *({"os": "macos", "version": n, "environment": kind} for n in (14, 16) for kind in ("staging", "production")),
        *({"os": "windows", "version": n, "environment": kind} for n in (12, 14) for kind in ("staging", "production")),
    ]
    assert branches("include: [{site: production, datacenter: a}, {site: staging, datacenter: b}]") == [
        {"site": "production", "datacenter": "a"},
        {"site": "staging", "datacenter": "b"},
    ]
    # what `exclude` took away, `include` may bring back
    assert branches("x: [1, 2]\nexclude: [{x: 1}]\ninclude: [{x: 1, y: 3}]") == [{"x": 2}, {"x": 1, "y": 3}]


def test_entries_name_a_mapping_by_its_label_and_added_branches_connect_like_others() -> None:
    graph = graph_from(
        """
        make: &same
          uses: graph_test_stages:make
          matrix: &matrix
            kind: [plain, {label: h3, name: hermite, degree: 3}]
            steps: [1, 2]
            exclude: [{kind: h3, steps: 1}]
            include: [{kind: h3, rate: 0.1}, {kind: h3, steps: 7}, {kind: new}]
        use: {uses: "graph_test_stages:use", matrix: *matrix, inputs: {source: make}}
        join: {uses: "graph_test_stages:join", matrix: {kind: [plain, new]}, inputs: {sources: make}}
        """
    )
    kinds = [
        "[kind=plain,steps=1]",
        "[kind=plain,steps=2]",
        "[kind=h3,steps=2,rate=0.1]",
        "[kind=h3,steps=7]",
        "[kind=new]",
    ]
    assert [name for name in graph if name.startswith("make")] == [f"make{kind}" for kind in kinds]
    assert graph["make[kind=h3,steps=7]"].matrix == {"kind": {"name": "hermite", "degree": 3}, "steps": 7}
    assert {name: node.inputs["source"] for name, node in graph.items() if name.startswith("use")} == {
        f"use{kind}": f"make{kind}" for kind in kinds
    }
    assert graph["join[kind=plain]"].input_nodes == ("make[kind=plain,steps=1]", "make[kind=plain,steps=2]")
    assert graph["join[kind=new]"].input_nodes == ("make[kind=new]",)


@pytest.mark.parametrize(
    ("matrix", "message", "hint"),
    [
        ("x: [1, 2]\nexclude: [{y: 1}]", "w.yaml:8: stages.make.matrix.exclude.0: no branch matches {'y': 1}", "`x`"),
        ("kind: [gelu]\nexclude: [{kind: gleu}]", "no branch matches {'kind': 'gleu'}", "values of `kind` are: gelu"),
        ("x: [1, 2]\nexclude: [{x: 1}, {x: 1}]", "exclude.1: no branch matches", "remove it"),
        ("x: [1]\nexclude: [{x: 1}]", "stages.make.matrix: no branch is left", "exclude less"),
        ("x: [1]\ninclude: [{x: 2}, {x: 2}]", "two branches are called `make[x=2]`", "remove one"),
        ("x: [1]\ninclude: [2]", "`include`: expected a list of `{axis: value}`, got 2 in it", ""),
        ("x: [1]\nexclude: [{}]", "`exclude`: expected a list of `{axis: value}`, got {} in it", ""),
    ],
)
def test_a_change_of_a_matrix_that_changes_nothing_is_refused(matrix: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        branches(matrix)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_label_names_the_branch_of_a_mapping_and_is_no_part_of_its_value() -> None:
    values = "[{label: few, name: x, steps: 1}, {name: y, steps: 2}]"
    text = f'make: {{uses: "graph_test_stages:make", matrix: {{v: {values}}}, with: {{text: "is ${{matrix.v}}"}}}}'
    values = {name: node.parameters.model_dump()["text"] for name, node in graph_from(text).items()}
    assert list(values) == ["make[v=few]", "make[v=y]"]
    assert "label" not in values["make[v=few]"]
    assert "steps" in values["make[v=few]"]


def test_the_same_axes_connect_matching_branches_and_shared_axes_select_some() -> None:
    graph = graph_from(MATRIX)
    assert graph["use[letter=b,steps=1]"].inputs == {"source": "make[letter=b,steps=1]", "extra": None}
    assert list(graph["half[letter=a]"].inputs["sources"].values()) == [  # type: ignore[union-attr]
        "make[letter=a,steps=1]",
        "make[letter=a,steps=2]",
    ]


@pytest.mark.parametrize(
    ("made", "used"),
    [
        ("{name: hermite, degree: 3}", "{name: hermite, degree: 5}"),  # called by their name
        ("{degree: 3}", "{degree: 5}"),  # called by their place
        ("[a-b, c]", "[a, b-c]"),
        ("'a,b'", "a=b"),
    ],
)
def test_branches_that_are_called_the_same_and_have_other_values_are_not_connected(made: str, used: str) -> None:
    text = """
        make: {{uses: "graph_test_stages:make", matrix: {{v: [{}]}}}}
        use: {{uses: "graph_test_stages:use", matrix: {{v: [{}]}}, inputs: {{source: make}}}}
        """
    error = refusal(text.format(made, used))
    assert "w.yaml:6: stages.use.inputs.source: `make` has a branch v=" in error.message
    assert "of another value" in error.message
    assert "the same `label:`" in error.hint
    assert len(graph_from(text.format(made, made))) == 2


@pytest.mark.parametrize(
    ("made", "used"),
    [
        ("{label: few, steps: 1}", "{label: few, rate: 2}"),  # the file says that they belong together
        ("{label: few, steps: 1}", "few"),
        ("{name: few, steps: 1}", "few"),
        ("1", "'1'"),
        ("true", "'true'"),
    ],
)
def test_branches_of_one_label_are_connected(made: str, used: str) -> None:
    graph = graph_from(
        f"""
        make: {{uses: "graph_test_stages:make", matrix: {{v: [{made}]}}}}
        use: {{uses: "graph_test_stages:use", matrix: {{v: [{used}]}}, inputs: {{source: make}}}}
        """
    )
    makes, uses = graph
    assert graph[uses].inputs["source"] == makes


def test_one_label_of_an_axis_has_one_value() -> None:
    entries = "[{v: {name: x, steps: 1}, w: 1}, {v: {name: x, steps: 2}, w: 2}]"
    error = refusal(f'make: {{uses: "graph_test_stages:make", matrix: {{include: {entries}}}}}')
    assert "stages.make.matrix: two values of `v` have the label `x`" in error.message


def test_a_fan_in_receives_all_branches_by_label() -> None:
    graph = graph_from(MATRIX)
    assert graph["join"].input_nodes == tuple(name for name in graph if name.startswith("use"))
    single = graph_from(
        """
        make: {uses: "graph_test_stages:make", matrix: {letter: [a, b]}}
        other: {uses: "graph_test_stages:make"}
        join: {uses: "graph_test_stages:join", inputs: {sources: make}}
        listed: {uses: "graph_test_stages:join", inputs: {sources: [make, other]}}
        named: {uses: "graph_test_stages:join", inputs: {sources: {first: "make[letter=a]", rest: other}}}
        """
    )
    assert single["join"].inputs["sources"] == {"a": "make[letter=a]", "b": "make[letter=b]"}
    assert list(single["listed"].inputs["sources"]) == ["make[letter=a]", "make[letter=b]", "other"]  # type: ignore[arg-type]
    assert single["named"].inputs["sources"] == {"first": "make[letter=a]", "rest": "other"}


def test_the_order_is_topological_and_otherwise_that_of_the_file() -> None:
    graph = graph_from(
        """
        last: {uses: "graph_test_stages:use", inputs: {source: first}}
        lonely: {uses: "graph_test_stages:make", after: [last]}
        first: {uses: "graph_test_stages:make"}
        second: {uses: "graph_test_stages:make"}
        """
    )
    assert list(graph) == ["first", "last", "lonely", "second"]
    assert graph["lonely"].dependencies == ("last",)


def test_a_cycle_is_named_with_its_path() -> None:
    error = refusal(
        """
        start: {uses: "graph_test_stages:make"}
        a: {uses: "graph_test_stages:use", inputs: {source: c}}
        b: {uses: "graph_test_stages:use", inputs: {source: a}}
        c: {uses: "graph_test_stages:use", inputs: {source: b, extra: start}}
        """
    )
    assert "w.yaml:6: stages.a.inputs" in error.message
    assert "a → b → c → a" in error.message


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            'a: {uses: "graph_test_stages:use", inputs: {source: mak}}\nmake: {uses: "graph_test_stages:make"}',
            "w.yaml:4: stages.a.inputs.source: there is no stage `mak`",
            "did you mean `make`?",
        ),
        ('a: {uses: "graph_test_stages:use"}', "w.yaml:4: stages.a: the input `source`", "inputs: {source: STAGE}"),
        (
            'a: {uses: "graph_test_stages:use", inputs: {sourc: a}}',
            "stages.a.inputs.sourc: stage `graph_test_stages:use` has no input `sourc`",
            "did you mean `source`?",
        ),
        ("a: {uses: shart}", "w.yaml:4: stages.a.uses: unknown stage `shart`", "did you mean `shard`?"),
        ("a: {uses: 'no_module:f'}", "cannot import `no_module`", "importable"),
        ("a: {uses: 'graph_test_stages:gone'}", "has no function `gone`", ""),
        ("a: {uses: 'graph_test_stages:untyped'}", "argument `context` needs a type annotation", ""),
        (
            'a:\n  uses: "graph_test_stages:make"\n  with:\n    steps: abc',
            "w.yaml:7: stages.a.with.steps: expected a whole number, got 'abc'",
            "polytrope stages graph_test_stages:make",
        ),
        (
            'a:\n  uses: "graph_test_stages:make"\n  with:\n    steps: true',
            "w.yaml:7: stages.a.with.steps: expected a whole number, got True",
            "polytrope stages graph_test_stages:make",
        ),
        (
            "a:\n  uses: shard\n  with:\n    validation_fraction: 0.1\n    source:\n      kind: symbolic\n"
            "      task: derivative\n      count: 5\n      depth: true",
            "w.yaml:12: stages.a.with.source.depth: expected a whole number, got True",
            "polytrope stages shard",
        ),
        (
            "a: {uses: sweep, with: {stage: {uses: shard}, ranges: {x: {low: false, high: 2}, y: [true]}, trials: 2, "
            "metric: a, mode: min}}",
            "stages.a.with.ranges.x.low: expected a whole number, got False",
            "",
        ),
        (
            "a: {uses: shard_images, with: {background: [1, true, 3]}}",
            "stages.a.with.background.1: expected a whole number, got True",
            "",
        ),
        (
            "a: {uses: shard, with: {validation_fraction: true}}",
            "stages.a.with.validation_fraction: expected less than 1, got True",
            "",
        ),
        (
            "a: {uses: shard_numbers, with: {source: {kind: circle, rows: 8, amplitudes: [1, true]}}}",
            "stages.a.with.source.amplitudes.1: expected a number, got True",
            "",
        ),
        (
            'a:\n  uses: "graph_test_stages:make"\n  with:\n    step: 3',
            "w.yaml:7: stages.a.with.step: stage `graph_test_stages:make` has no parameter `step`",
            "did you mean `steps`?",
        ),
        (
            'make: {uses: "graph_test_stages:make", matrix: {x: [1, 2]}}\n'
            'a: {uses: "graph_test_stages:use", inputs: {source: make}}',
            "`make` has 2 branches, but this input takes one",
            "make[x=1]",
        ),
        (
            'make: {uses: "graph_test_stages:make", matrix: {x: [1, 2]}}\n'
            'a: {uses: "graph_test_stages:use", matrix: {x: [3]}, inputs: {source: make}}',
            "`make` has no branch with x=3",
            "",
        ),
        ('a: {uses: "graph_test_stages:make", matrix: {x: []}}', "the axis `x` has no values", ""),
        ('a: {uses: "graph_test_stages:make", matrix: {x: [1, "1"]}}', "two values have the label `1`", ""),
        (
            'a: {uses: "graph_test_stages:make", matrix: {x: [1]}, with: {steps: "${matrix.y}"}}',
            "no matrix axis `y`",
            "`x`",
        ),
        (
            'a: {uses: "graph_test_stages:make", with: {steps: 9}}\n'
            'b: {uses: "graph_test_stages:limited", inputs: {source: a}}',
            "w.yaml:5: stages.b: 9 steps are more than 5",
            "raise `limit`",
        ),
        ('a: {uses: "graph_test_stages:make", when: "stages.b.loss < 3"}', "stages.a.when: there is no stage `b`", ""),
        ('a: {uses: "graph_test_stages:make", when: "open(1)"}', "Call is not accepted in a condition", ""),
        ('a: {uses: "graph_test_stages:make", when: "steps > 1"}', "unknown name `steps`", ""),
        (
            'a: {uses: "graph_test_stages:make", environment: [NOT_SET_ANYWHERE]}',
            "the environment variable `NOT_SET_ANYWHERE` is not set",
            "export",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_file_line_field_and_a_hint(text: str, message: str, hint: str) -> None:
    error = refusal(text)
    assert message in error.message
    assert hint in error.hint


def test_a_gpu_for_a_stage_that_makes_no_use_of_one_is_refused_before_anything_starts() -> None:
    assert graph_from("own: {uses: 'graph_test_stages:make', resources: {gpus: 1}}")["own"].resources.gpus == 1
    error = refusal("wait:\n  uses: wait_for\n  with: {path: x}\n  resources: {gpus: 1}")
    assert error.message == "w.yaml:7: stages.wait.resources.gpus: `wait_for` computes on the CPU"
    assert error.hint == "leave it out"
    taking = {name for name in BUILTIN_STAGES if not load_stage(name).options.cpu_only}
    assert taking == {"train", "evaluate", "measure_speed"}


def test_a_stage_says_what_beyond_its_parameters_decides_the_result(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("42")
    assert graph_from('a: {uses: "graph_test_stages:read"}')["a"].fingerprint == {"data": "42"}


def test_conditions_see_parameters_matrix_and_metrics_of_earlier_stages() -> None:
    workflow = workflow_from(
        """
        make: {uses: "graph_test_stages:make", matrix: {x: [1, 2]}}
        a:
          uses: graph_test_stages:make
          matrix: {x: [1, 2]}
          when: ${params.steps} > 3 and matrix.x == 1 and stages.make["val/loss"] < 2.5
        never: {uses: "graph_test_stages:make", when: false}
        later:
          uses: graph_test_stages:make
          matrix: {x: [1]}
          when: stages.make["val/loss"] < 2.5
          after: ["make[x=2]"]
        """
    )
    graph = build_graph(workflow)
    of_both = {"make[x=1]": {"val/loss": 2.0}, "make[x=2]": {"val/loss": 9.0}}
    assert condition_holds(graph["later[x=1]"], workflow.params, of_both)  # what `after:` names is not read
    metrics = {"make[x=1]": {"val/loss": 2.0}, "make[x=2]": {"val/loss": 2.0}}
    assert condition_holds(graph["a[x=1]"], workflow.params, metrics)
    assert not condition_holds(graph["a[x=2]"], workflow.params, metrics)
    assert not condition_holds(graph["a[x=1]"], workflow.params, {"make[x=1]": {"val/loss": 3.0}})
    assert not condition_holds(graph["never"], workflow.params, {})
    assert "make[x=1]" in graph["a[x=1]"].dependencies
    with pytest.raises(UserError, match="there is no `val/loss`"):
        condition_holds(graph["a[x=1]"], workflow.params, {"make[x=1]": {"loss": 3.0}})


def test_secrets_are_replaced_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_TOKEN", "s3cr3t")
    node = graph_from('a: {uses: "graph_test_stages:make", with: {text: "Bearer ${env.DEMO_TOKEN}"}}')["a"]
    assert node.secrets == ("DEMO_TOKEN",)
    assert "s3cr3t" not in repr(node)
    assert resolve_parameters(node.parameters).text == "Bearer s3cr3t"  # type: ignore[attr-defined]


def test_ten_thousand_stages_are_planned_without_reading_each_function_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import polytrope.pipeline.workflow.graph as module

    loads: list[str] = []
    original = module.load_stage
    monkeypatch.setattr(module, "load_stage", lambda uses: loads.append(uses) or original(uses))
    lines = ['s0: {uses: "graph_test_stages:make"}']
    lines += [f's{i}: {{uses: "graph_test_stages:use", inputs: {{source: s{i // 2}}}}}' for i in range(1, 10_000)]
    assert len(graph_from("\n".join(lines))) == 10_000
    assert loads == ["graph_test_stages:make", "graph_test_stages:use"]


def test_what_stages_print_before_a_run_is_no_part_of_a_commands_answer(capsys: pytest.CaptureFixture[str]) -> None:
    workflow_from("loud: {uses: 'graph_test_stages:loud', with: {x: 2}}")
    assert main(["plan", "w.yaml", "--json"]) == 0
    printed = capsys.readouterr()
    assert [stage["stage"] for stage in json.loads(printed.out)["stages"]] == ["loud"]
    assert printed.err.split().count("asked") == 6
    assert set(printed.err.split()) == {"validated", "asked"}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_stage_that_fails_before_it_runs_is_named(hook: str) -> None:
    error = refusal(f"only: {{uses: 'graph_test_stages:lost_in_{hook}'}}")
    assert re.match(
        r"w\.yaml:4: stages\.only: what `graph_test_stages:lost_in_\w+` says of itself before it runs failed: "
        r"KeyError: 'lost' \(.*graph_test_stages\.py:\d+\)$",
        error.message,
    ), error.message
