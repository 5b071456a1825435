"""The plan: what is stored, what runs, and the reason for each."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polytrope.pipeline.engine.plan import make_plan
from polytrope.pipeline.executors.base import Capacity
from polytrope.pipeline.runs.history import Past
from polytrope.pipeline.stage import Artifact, Resources, StageContext, describe_stage
from polytrope.pipeline.workflow.code import Code
from polytrope.pipeline.workflow.graph import StageNode
from polytrope.pipeline.workflow.keys import key_components, stage_key


def make(context: StageContext, degree: int = 3) -> None:
    """Make."""


def use(context: StageContext, source: Artifact, extra: Artifact | None = None) -> None:
    """Use."""


def join(context: StageContext, sources: dict[str, Artifact]) -> None:
    """Join."""


def node(name: str, function: Any, inputs: Mapping[str, Any] | None = None, **changes: Any) -> StageNode:
    definition = describe_stage(f"m:{function.__name__}", function)
    parameters = definition.parameters_model(**changes.pop("parameters", {}))
    given = {key: (inputs or {}).get(key) for key in definition.inputs}
    return StageNode(
        name,
        name,
        {},
        definition,
        parameters,
        given,
        Resources(),
        1,
        None,
        changes.pop("when", None),
        {},
        code=Code({}, {}),
        **changes,
    )


def chain(degree: int = 3) -> dict[str, StageNode]:
    nodes = [
        node("a", make, parameters={"degree": degree}),
        node("b", use, {"source": "a"}),
        node("c", join, {"sources": {"a": "a", "b": "b"}}),
    ]
    return {item.name: item for item in nodes}


@dataclass
class Stored:
    digest: str
    components: Mapping[str, Any]
    summary: Mapping[str, float] = field(default_factory=dict)
    run_id: str = "r1"
    duration: float = 10.0


class Memory:
    """A store in memory, holding the results of one finished run of a graph."""

    def __init__(self, graph: Mapping[str, StageNode], **summaries: Mapping[str, float]) -> None:
        self.artifacts: dict[str, Stored] = {}
        self.history: dict[str, list[Past]] = {}
        digests: dict[str, str] = {}
        for name, item in graph.items():
            inputs = {
                key: {label: digests[source] for label, source in value.items()}
                if isinstance(value, dict)
                else digests.get(value or "")
                for key, value in item.inputs.items()
            }
            components = key_components(item, inputs)
            key = stage_key(components)
            digests[name] = f"digest of {key}"
            self.artifacts[key] = Stored(digests[name], components, summaries.get(name, {}))
            self.history[name] = [Past("r1", key, components, 10.0, "succeeded")]

    def find(self, key: str) -> Stored | None:
        return self.artifacts.get(key)

    load = find


EMPTY = Memory({})


def test_without_history_everything_is_a_first_run() -> None:
    plan = make_plan(chain(), EMPTY)
    assert [stage.action for stage in plan.stages.values()] == ["run", "run", "run"]
    assert plan.stages["a"].reasons == ["first run"]
    assert plan.stages["c"].reasons == ["input sources will be computed"]
    assert plan.predicted(chain()) is None


def test_an_unchanged_workflow_is_all_hits_and_takes_no_time() -> None:
    store = Memory(chain())
    plan = make_plan(chain(), store, history=store.history)
    assert plan.count("hit") == 3
    assert plan.stages["a"].reasons == ["stored by run r1"]
    assert plan.predicted(chain()) == 0.0


def test_a_changed_parameter_is_named_and_what_follows_is_recomputed() -> None:
    store = Memory(chain())
    plan = make_plan(chain(degree=5), store, history=store.history)
    assert plan.stages["a"].reasons == ["parameters.degree: 3 → 5"]
    assert plan.stages["b"].reasons == ["input source will be computed"]
    assert plan.predicted(chain()) == 30.0  # the longest path: a, b, c


def test_the_predicted_time_counts_cores_and_the_limit_of_concurrent_stages() -> None:
    graph = {name: node(name, make) for name in ("a", "b", "c", "d")}
    graph["wide"] = dataclasses.replace(node("wide", make), resources=Resources(workers=2))
    store = Memory({})
    history = {name: [Past("r1", None, None, 10.0, "succeeded")] for name in graph}
    plan = make_plan(graph, store, history=history)
    assert plan.predicted(graph) == 10.0
    assert plan.predicted(graph, Capacity(2.0, 0.0)) == 30.0  # two and two, then the wide one
    assert plan.predicted(graph, Capacity(1.0, 0.0)) == 50.0  # the wide one can only run alone
    assert plan.predicted(graph, Capacity(8.0, 0.0), concurrency=3) == 20.0


def test_the_change_of_a_stage_that_was_cached_last_time_is_explained_by_its_artifact() -> None:
    store = Memory(chain())
    history = {"a": [dataclasses.replace(store.history["a"][0], components=None, state="cached")]}
    assert make_plan(chain(degree=5), store, history=history).stages["a"].reasons == ["parameters.degree: 3 → 5"]


def test_a_lost_artifact_is_computed_again_and_the_rest_may_stay() -> None:
    store = Memory(chain())
    del store.artifacts[store.history["a"][0].key or ""]
    plan = make_plan(chain(), store, history=store.history)
    assert plan.stages["a"].reasons == ["its artifact is missing or damaged"]
    assert plan.stages["b"].action == "unknown"
    assert "perhaps with the same result" in plan.stages["b"].reasons[0]


def test_a_forced_stage_runs_although_it_is_stored() -> None:
    store = Memory(chain())
    plan = make_plan(chain(), store, history=store.history, force=["b"])
    assert [stage.action for stage in plan.stages.values()] == ["hit", "run", "unknown"]
    assert plan.stages["b"].reasons == ["forced"]


def test_a_failed_attempt_is_the_reason_to_run_again() -> None:
    store = Memory(chain())
    past = store.history["a"][0]
    history = {"a": [dataclasses.replace(past, state="failed", run_id="r2")]}
    store.artifacts.clear()
    assert make_plan(chain(), store, history=history).stages["a"].reasons == ["did not finish in run r2 (failed)"]


def test_conditions_are_decided_as_far_as_they_can_be() -> None:
    graph = chain()
    graph["never"] = node("never", make, when="params.degree > 3")
    graph["after"] = node("after", use, {"source": "never"})
    graph["good"] = node(
        "good", make, parameters={"degree": 4}, when="stages.a.loss < 3", after=("a",), when_reads={"a": "a"}
    )
    graph["wrong"] = node("wrong", make, when="stages.a.nothing < 3", after=("a",), when_reads={"a": "a"})
    store = Memory({"a": graph["a"]}, a={"loss": 2.0})
    plan = make_plan(graph, store, params={"degree": 3})
    assert plan.stages["wrong"].action == "unknown"  # the run would fail it, not skip it
    assert "nothing" in plan.stages["wrong"].reasons[0]
    assert plan.stages["never"].action == "skip"
    assert plan.stages["after"].reasons == ["its input source comes from never, which is skipped"]
    assert plan.stages["good"].action == "run"
    assert make_plan(graph, EMPTY, params={"degree": 3}).stages["good"].action == "unknown"


def test_a_condition_decides_also_where_an_input_will_be_computed() -> None:
    graph = chain()
    graph["never"] = node("never", use, {"source": "a"}, when="params.degree > 3")
    graph["behind"] = node("behind", use, {"source": "never"})
    graph["perhaps"] = node(
        "perhaps", use, {"source": "a"}, when="stages.a.loss < 3", after=("a",), when_reads={"a": "a"}
    )
    graph["both"] = node("both", use, {"source": "never"}, when="params.degree > 3")
    plan = make_plan(graph, EMPTY, params={"degree": 3}).stages
    assert [plan[name].action for name in ("a", "never", "behind", "perhaps")] == ["run", "skip", "skip", "unknown"]
    assert plan["never"].reasons == ["`when: params.degree > 3` does not hold"]
    assert plan["both"].reasons == ["its input source comes from never, which is skipped"]  # as the run says
