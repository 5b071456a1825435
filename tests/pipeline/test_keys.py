"""Stage keys: what changes them, what does not, and how the change is explained."""

from polytrope.pipeline.stage import Artifact, Resources, StageContext, describe_stage
from polytrope.pipeline.workflow.code import Code
from polytrope.pipeline.workflow.encoding import canonical_json
from polytrope.pipeline.workflow.graph import StageNode
from polytrope.pipeline.workflow.keys import explain, key_components, stage_key


def example(context: StageContext, source: Artifact, degree: int = 3) -> None:
    """A stage."""


def node(**changes: object) -> StageNode:
    definition = describe_stage("x:example", example)
    fields: dict[str, object] = {
        "name": "a",
        "spec_name": "a",
        "branch": {},
        "definition": definition,
        "parameters": definition.parameters_model(degree=changes.pop("degree", 3)),
        "inputs": {"source": "b"},
        "resources": Resources(),
        "retries": 1,
        "timeout": None,
        "when": None,
        "environment": {},
        "code": Code({"x.py": "1" * 64}, {"x.py": "2" * 64}),
    }
    return StageNode(**{**fields, **changes})  # type: ignore[arg-type]


def key(item: StageNode, digest: str = "d1") -> str:
    return stage_key(key_components(item, {"source": digest}))


def test_parameters_inputs_fingerprint_and_environment_decide_the_key() -> None:
    reference = key(node())
    assert key(node()) == reference
    others = [
        key(node(degree=5)),
        key(node(), "d2"),
        key(node(fingerprint={"file": "x"})),
        key(node(environment={"A": "1"})),
        key(node(reads={"data.csv": "x"})),
        key(node(code=Code({"x.py": "3" * 64}, {"x.py": "2" * 64}))),
    ]
    assert len({reference, *others}) == 7


def test_resources_retries_timeouts_and_names_do_not() -> None:
    layout = Code({"x.py": "1" * 64}, {"x.py": "4" * 64})
    changed = node(name="z", code=layout, retries=5, timeout=3.0, resources=Resources(workers=4), when="params.x > 1")
    assert key(changed) == key(node())


def test_the_order_of_a_fan_in_decides_the_key_and_is_explained() -> None:
    one, other = ({"source": dict.fromkeys(labels, "d" * 64)} for labels in (("a", "b"), ("b", "a")))
    old, new = key_components(node(), one), key_components(node(), other)
    assert old["inputs"] == one  # labels in their own order: as before there was any
    assert stage_key(old) != stage_key(new)
    assert explain(old, new) == ['input source (order) changed (["source.a", "source.b"] → ["source.b", "source.a"])']
    assert explain(new, key_components(node(), {"source": {"b": "d" * 64, "a": "e" * 64}})) == [
        f"input source.a changed ({'d' * 12} → {'e' * 12})"
    ]


def test_environment_values_are_not_readable_in_the_components() -> None:
    assert "hunter2" not in canonical_json(key_components(node(environment={"A": "hunter2"}), {"source": "d"}))


def test_a_key_does_not_change_unseen() -> None:
    """The same components give the same key in every version of polytrope, or `_VERSION` is raised."""
    assert key(node()) == "f8cf848439826969e0e8bcd498b7b2153bdc0113049d27873639fabc5e4d6448"


def test_explain_names_what_changed() -> None:
    old = key_components(node(environment={"A": "1"}, fingerprint={"corpus": "x" * 64}), {"source": "d" * 64})
    new = key_components(node(degree=5, fingerprint={"corpus": "y"}), {"source": "e" * 64})
    new["code"] = {"x.py": "3" * 64, "helper.py": "1"}
    new["reads"] = {"data.csv": "1"}
    lines = explain(old, new)
    assert "parameters.degree: 3 → 5" in lines
    assert any(line.startswith("input source changed (dddddddddddd → eeeeeeeeeeee)") for line in lines)
    assert "environment variable A is gone" in lines
    assert "code of x.py changed" in lines
    assert "code of helper.py is new" in lines
    assert "file data.csv is new" in lines
    assert any(line.startswith("corpus changed") for line in lines)
    assert explain(old, old) == []


def test_explain_goes_into_nested_parameters() -> None:
    old = {"parameters": {"model": {"activation": {"name": "hermite", "degree": 3}}}}
    new = {"parameters": {"model": {"activation": {"name": "hermite", "degree": 5}, "bias": True}}}
    assert explain(old, new) == ["parameters.model.activation.degree: 3 → 5", "parameters.model.bias: (none) → true"]


def test_explain_says_values_of_other_types_and_another_version() -> None:
    assert explain({"parameters": {"limit": None}}, {"parameters": {"limit": {"$float": "inf"}}}) == [
        "parameters.limit: null → inf (float)"
    ]
    assert explain({"version": 1, "parameters": {"a": 1}}, {"version": 2, "parameters": {"a": 2}}) == [
        "the meaning of stage keys changed with this version of polytrope"
    ]
