"""A locale without UTF-8 (de_DE@euro on a cluster): files are UTF-8 all the same, and no output ends a command."""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polytrope.pipeline.support.streams import Output

ROOT = Path(__file__).parents[2]
POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
STAGE = "from polytrope.pipeline.stage import StageContext as C\ndef s(context: C, n: int = 1) -> None: print('→ 漢')\n"
WORKFLOW = """
name: 漢字
tracking: {enabled: false}
executor: local
params: {n: 1}
stages: {s: {uses: "st:s", with: {n: "${params.n}"}}}
"""


def without_encoding(path: Path) -> Iterator[int]:
    """Lines of calls that read or write text in whatever encoding the locale has."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        texts = [item.value for item in node.args if isinstance(item, ast.Constant) and isinstance(item.value, str)]
        is_text = {
            "read_text": isinstance(node.func, ast.Attribute),
            "write_text": isinstance(node.func, ast.Attribute),
            "open": isinstance(node.func, ast.Name) and not any("b" in text[-3:] for text in texts[-1:]),
            "NamedTemporaryFile": any(text in ("w", "w+", "a") for text in texts),
            "fdopen": any(text in ("w", "w+", "a", "r") for text in texts),
        }
        if is_text.get(name, False):
            yield node.lineno


def test_every_text_file_is_read_and_written_in_utf_8() -> None:
    paths = [
        path for room in ("pipeline", "models", "ops", "benchmarks", "docs") for path in (ROOT / room).rglob("*.py")
    ]
    assert len(paths) > 200
    found = [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in without_encoding(path)]
    assert not found


@pytest.fixture(scope="module", params=["latin1", "ascii"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a terminal that has no arrow and no 漢."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    if request.param == "ascii":
        return {**own, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if shutil.which("localedef") is None:
        pytest.skip("there is no localedef to make a locale with")
    place = tmp_path_factory.mktemp("locale")
    made = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(place / "de_DE.ISO-8859-1")],
        capture_output=True,
        check=False,
    )
    if not (place / "de_DE.ISO-8859-1").exists():
        pytest.skip(f"the locale cannot be made: {made.stderr.decode(errors='replace')[-200:]}")
    return {**own, "LOCPATH": str(place), "LC_ALL": "de_DE.ISO-8859-1"}


def test_what_the_terminal_cannot_show_ends_no_command(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "st.py").write_text(STAGE, encoding="utf-8")
    (tmp_path / "w.yaml").write_text(WORKFLOW, encoding="utf-8")

    def polytrope(*arguments: str) -> str:
        ended = subprocess.run([POLYTROPE, *arguments], cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert ended.returncode == 0, ended.stderr.decode(errors="replace") + ended.stdout.decode(errors="replace")
        return ended.stdout.decode("ascii")

    assert "run a: ??, 1 stages" in polytrope("run", "w.yaml", "--run-id", "a")
    assert "parameters.n: 1 ? 2" in polytrope("explain", "w.yaml", "s", "--set", "params.n=2")
    assert (tmp_path / ".polytrope/runs/a/logs/s/1.log").read_text(encoding="utf-8") == "→ 漢\n"
    assert polytrope("logs", "a").endswith("? ?\n")
    assert "a: ??, succeeded" in polytrope("status", "a")
    assert '"workflow": "\\u6f22\\u5b57"' in polytrope("status", "a", "--json")


def test_a_run_from_python_prints_on_a_stream_that_lacks_characters() -> None:
    raw = io.BytesIO()
    output = Output(io.TextIOWrapper(raw, encoding="latin-1"))
    assert output.write("é → 漢字\n") == 7
    output.flush()
    assert raw.getvalue() == b"\xe9 ? ??\n"
