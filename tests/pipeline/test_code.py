"""The code in a key: every first-party file that a stage's module reaches by import, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import BUILTIN_STAGES
from polytrope.pipeline.workflow.code import Code, Finder, find_file, read_code, read_named_code

FILES = {
    "stage_module.py": """
import json, numpy
from typing import TYPE_CHECKING
import code_test_helper as helper
from code_test_package.inner import deep
from code_test_package import sibling
if TYPE_CHECKING:
    import code_test_types
def f(x):
    from code_test_late import late
    import importlib
    importlib.import_module("code_test_dynamic")
    return late(x) + 1
""",
    "code_test_helper.py": "from code_test_constants import *\nfrom code_test_constants import VALUE\n",
    "code_test_constants.py": "VALUE = 3\n",
    "code_test_late.py": "def late(x): return x\n",
    "code_test_dynamic.py": "",
    "code_test_types.py": "",
    "code_test_unused.py": "",
    "code_test_package/__init__.py": "COMMAND = ['-m', 'code_test_package.worker']\n",
    "code_test_package/sibling.py": "",
    "code_test_package/unused.py": "",
    "code_test_package/worker.py": "",
    "code_test_package/kernel.cu": "// kernel\n",
    "code_test_package/build/kernel.cu": "// a product\n",
    "code_test_package/notes.txt": "no code\n",
    "code_test_package/inner/__init__.py": "from . import beside\nfrom ..above import thing\n",
    "code_test_package/inner/beside.py": "",
    "code_test_package/inner/deep.py": "from code_test_stars import *\n",
    "code_test_package/above.py": "thing = 1\n",
    "code_test_stars/__init__.py": "__all__ = ['star']\n",
    "code_test_stars/star.py": "",
    "code_test_stars/dark.py": "",
}
REACHED = set(FILES) - {
    "code_test_types.py", "code_test_unused.py", "code_test_package/unused.py", "code_test_package/build/kernel.cu",
    "code_test_package/notes.txt", "code_test_stars/dark.py",
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def code() -> Code:
    return read_code(["stage_module"])


def test_every_import_is_followed_and_nothing_is_run(project: Path) -> None:
    found = code()
    assert set(found.files) == REACHED
    assert not {name for name in sys.modules if name.startswith("code_test_")}
    for label in found.files:
        assert find_file(label, Finder()) == project / label


@pytest.mark.parametrize("name", sorted(REACHED))
def test_a_change_of_any_file_is_named(project: Path, name: str) -> None:
    before = code()
    with (project / name).open("a") as file:
        file.write("CHANGED = 1\n")
    after = code()
    assert {label for label in after.files if after.files[label] != before.files.get(label)} == {name}


def test_an_edit_that_keeps_time_and_size_is_noticed(project: Path) -> None:
    path = project / "code_test_constants.py"
    status, before = path.stat(), code()
    path.write_text("VALUE = 4\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert code().files["code_test_constants.py"] != before.files["code_test_constants.py"]


def test_comments_docstrings_and_layout_do_not_count(project: Path) -> None:
    (project / "stage_module.py").write_text('"""Doc."""\n\ndef f(x):\n    """Doc."""\n    return x + 1  # comment\n')
    before = code()
    (project / "stage_module.py").write_text("def f(x):\n\n    return (x +\n        1)\n")
    after = code()
    assert after.files == before.files
    assert after.sources != before.sources
    (project / "stage_module.py").write_text('def f(x):\n    return "x" + 1\n')
    assert code().files != before.files


def test_a_module_that_appears_later_counts_from_then_on(project: Path) -> None:
    (project / "code_test_helper.py").write_text("try:\n    import code_test_fast\nexcept ImportError:\n    pass\n")
    before = set(code().files)
    (project / "code_test_fast.py").write_text("")
    assert set(code().files) - before == {"code_test_fast.py"}


def test_a_circle_of_imports_and_a_namespace_package(project: Path) -> None:
    (project / "code_test_space" / "part").mkdir(parents=True)
    (project / "code_test_space" / "part" / "one.py").write_text("from code_test_space.part import two\n")
    (project / "code_test_space" / "part" / "two.py").write_text("import code_test_space.part.one\n")
    found = read_code(["code_test_space.part.one"])
    assert set(found.files) == {"code_test_space/part/one.py", "code_test_space/part/two.py"}


def test_of_polytrope_the_work_counts_and_the_engine_does_not() -> None:
    program = (
        "import sys; from polytrope.pipeline.stage import BUILTIN_STAGES\n"
        "from polytrope.pipeline.workflow.code import read_code\n"
        "for name, uses in BUILTIN_STAGES.items():\n"
        "    print(name, *read_code([uses.partition(':')[0]]).files)\n"
        "assert 'torch' not in sys.modules and 'polytrope.ops' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    files = {line.split()[0]: set(line.split()[1:]) for line in result.stdout.splitlines()}
    assert files.keys() == BUILTIN_STAGES.keys()
    rooms = ("ops/", "models/", "pipeline/data/", "pipeline/support/", "pipeline/stages/")
    for name, found in files.items():
        beyond = {label for label in found if not label.startswith(tuple(f"polytrope/{room}" for room in rooms))}
        assert beyond <= {"polytrope/pipeline/launch/subworkflow.py"}, name
    kernels = {f"polytrope/ops/csrc/{path.name}" for path in Path(__file__).parents[2].glob("ops/csrc/*.*")}
    for name in ("train", "convert", "evaluate", "measure_speed"):
        assert len(kernels) > 10
        assert kernels <= files[name]
    assert "polytrope/pipeline/stages/train/worker_process.py" in files["train"]
    assert {"polytrope/pipeline/data/tokenization.py", "polytrope/pipeline/data/tarfiles.py"} <= files["shard"]
    for name in ("shard", "shard_images", "report"):  # no data set is made anew for a change of a model or a kernel
        assert not [label for label in files[name] if label.startswith(("polytrope/models", "polytrope/ops"))], name


@pytest.mark.parametrize(
    ("text", "reaches_ops", "reaches_models"),
    [
        ("from polytrope import Artifact, StageContext", False, False),
        ("from polytrope import Hermite", True, False),
        ("from polytrope import ops", True, False),
        ("from polytrope import read_model", True, True),
        ("import polytrope", True, True),  # whatever it uses of it
        ("from polytrope import *", True, True),
    ],
)
def test_what_a_stage_imports_from_polytrope_itself_counts(
    project: Path, text: str, reaches_ops: bool, reaches_models: bool
) -> None:
    (project / "code_test_helper.py").write_text(f"{text}\n")
    files = code().files
    assert ("polytrope/ops/modules.py" in files) == reaches_ops
    assert ("polytrope/models/formats/__init__.py" in files) == reaches_models
    assert "polytrope/__init__.py" not in files


def test_what_has_no_source_or_is_no_python_is_refused_by_name(project: Path) -> None:
    with pytest.raises(UserError, match="module `no_such_module` has no source file"):
        read_code(["no_such_module"])
    (project / "code_test_late.py").write_text("def late(x: return x\n")
    with pytest.raises(UserError, match=r"code_test_late\.py: not valid Python"):
        code()


def test_a_package_that_defines_stages_counts_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "site-packages"
    (place / "code_test_installed").mkdir(parents=True)
    (place / "code_test_installed" / "__init__.py").write_text("")
    (place / "code_test_installed" / "stages.py").write_text("from . import helper\nimport code_test_library\n")
    (place / "code_test_installed" / "helper.py").write_text("")
    (place / "code_test_library.py").write_text("")
    monkeypatch.syspath_prepend(place)
    found = read_code(["code_test_installed.stages"])
    assert set(found.files) == {f"code_test_installed/{name}.py" for name in ("__init__", "stages", "helper")}


NAMED = """
import json as parsing
from os.path import join
if True:
    conditional = len
class Kind:
    def method(self): local = 1
def function(argument=1):
    global bound_late
    bound_late = lambda: 1
    def nested(): pass
"""


def test_a_function_that_a_parameter_names_is_the_module_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "code_test_named.py").write_text(NAMED)
    for name in ("parsing", "join", "conditional", "Kind", "function", "bound_late"):
        assert list(read_named_code(f"code_test_named:{name}").files) == ["code_test_named.py"]
    for name in ("method", "nested", "local", "argument", "functio"):
        with pytest.raises(UserError, match=f"module `code_test_named` has no function `{name}`"):
            read_named_code(f"code_test_named:{name}")
    (tmp_path / "code_test_named.py").write_text("from code_test_named_elsewhere import *\n")
    assert read_named_code("code_test_named:anything").files  # only its import tells
