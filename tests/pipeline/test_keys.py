"""Stage keys: what changes them, what does not, and how the change is explained."""

import subprocess
import sys
from pathlib import Path

import pytest

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, describe_stage
from polytrope.pipeline.workflow import keys
from polytrope.pipeline.workflow.graph import StageNode
from polytrope.pipeline.workflow.keys import canonical_json, code_hash, explain, key_components, stage_key


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
    ]
    assert len({reference, *others}) == 5


def test_resources_retries_timeouts_and_names_do_not() -> None:
    changed = node(name="z", retries=5, timeout=3.0, resources=Resources(workers=4), when="params.x > 1")
    assert key(changed) == key(node())


def test_environment_values_are_not_readable_in_the_components() -> None:
    assert "hunter2" not in canonical_json(key_components(node(environment={"A": "hunter2"}), {"source": "d"}))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "key_test_package"
    directory.mkdir()
    (directory / "__init__.py").write_text("")
    (directory / "a.py").write_text('"""Doc."""\n\ndef f(x):\n    """Doc."""\n    return x + 1  # comment\n')
    (directory / "kernel.cu").write_text("// kernel\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    clear()
    return directory


def clear() -> None:
    keys.code_hash.cache_clear()
    keys.find_source.cache_clear()


def test_comments_docstrings_and_layout_do_not_change_the_code_hash(package: Path) -> None:
    module, whole = code_hash("key_test_package.a"), code_hash("key_test_package")
    (package / "a.py").write_text("def f(x):\n\n    return (x +\n        1)\n")
    clear()
    assert (code_hash("key_test_package.a"), code_hash("key_test_package")) == (module, whole)
    (package / "a.py").write_text("def f(x):\n    return x + 2\n")
    clear()
    assert code_hash("key_test_package.a") != module
    assert code_hash("key_test_package") != whole


def test_native_sources_of_a_package_count_and_build_products_do_not(package: Path) -> None:
    before = code_hash("key_test_package")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.py").write_text("x = 1")
    (package / "notes.txt").write_text("x")
    clear()
    assert code_hash("key_test_package") == before
    (package / "kernel.cu").write_text("// another kernel\n")
    clear()
    assert code_hash("key_test_package") != before


def test_the_code_of_ops_is_hashed_without_importing_torch() -> None:
    program = (
        "import sys; from polytrope.pipeline.workflow.keys import code_hash; print(code_hash('polytrope.ops')); "
        "assert 'torch' not in sys.modules and 'polytrope.ops' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert len(result.stdout.strip()) == 64


def test_a_module_without_source_is_refused() -> None:
    with pytest.raises(UserError, match="no source of module `no_such_module`"):
        code_hash("no_such_module")


def test_explain_names_what_changed() -> None:
    old = key_components(node(environment={"A": "1"}, fingerprint={"corpus": "x" * 64}), {"source": "d" * 64})
    new = key_components(node(degree=5, fingerprint={"corpus": "y"}), {"source": "e" * 64})
    new["code"] = {**new["code"], "polytrope.ops": "1"}
    lines = explain(old, new)
    assert "parameters.degree: 3 → 5" in lines
    assert any(line.startswith("input source changed (dddddddddddd → eeeeeeeeeeee)") for line in lines)
    assert "environment variable A is gone" in lines
    assert "code of polytrope.ops is new" in lines
    assert any(line.startswith("corpus changed") for line in lines)
    assert explain(old, old) == []


def test_explain_goes_into_nested_parameters() -> None:
    old = {"parameters": {"model": {"activation": {"name": "hermite", "degree": 3}}}}
    new = {"parameters": {"model": {"activation": {"name": "hermite", "degree": 5}, "bias": True}}}
    assert explain(old, new) == ["parameters.model.activation.degree: 3 → 5", "parameters.model.bias: (none) → true"]
