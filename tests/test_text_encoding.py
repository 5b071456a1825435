"""Whatever the machine's locale: files are UTF-8, and what is printed is shown as far as the terminal can show it."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from polytrope.pipeline.support.streams import Output

ROOT = Path(__file__).parents[1]
PACKAGES = ("ops", "models", "pipeline", "workflows", "benchmarks", "docs")

_STAGE = """\
from polytrope.pipeline.stage import StageContext

def speak(context: StageContext, n: int = 1) -> dict[str, float]:
    print("stage → 漢字")
    return {"größe": n}
"""
_WORKFLOW = """\
name: 漢字
tracking: {enabled: false}
executor: local
params: {n: 1}
stages: {s: {uses: "speaking:speak", with: {n: "${params.n}"}}}
"""
_COMMANDS = """\
import sys
from polytrope.pipeline.commands.cli import main
for line in (
    ["run", "w.yaml"], ["explain", "w.yaml", "s", "--set", "params.n=2"], ["status"], ["runs"], ["logs"],
    ["run", "w.yaml", "--set", "params.ñ=2"], ["status", "--json"],
):
    print(main(line), line[0], flush=True) if line[-1] != "--json" else main(line)
"""


def test_commands_work_where_the_locale_has_no_arrow(tmp_path: Path) -> None:
    (tmp_path / "speaking.py").write_text(_STAGE, encoding="utf-8")
    (tmp_path / "w.yaml").write_text(_WORKFLOW, encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "POLYTROPE_STORE": "store"}
    environment = {**os.environ, **ascii_only}
    environment.pop("PYTHONIOENCODING", None)
    line = [sys.executable, "-c", _COMMANDS.replace("ñ", "\\xf1")]
    done = subprocess.run(
        line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False
    )
    shown = done.stdout.decode("ascii")
    assert json.loads(shown[shown.index("\n{") :])["workflow"] == "漢字"
    codes = [said.split()[0] for said in shown.splitlines() if said[2:] in ("run", "explain", "status", "runs", "logs")]
    assert codes == ["0", "0", "0", "0", "0", "2"], shown
    assert "Unicode" not in shown
    assert "stage ? ??" in shown  # of `logs`: the log itself is UTF-8
    (log,) = tmp_path.glob("store/runs/*/logs/s/1.log")
    assert "stage → 漢字" in log.read_text(encoding="utf-8")


def test_a_run_from_python_prints_on_a_stream_that_lacks_characters() -> None:
    raw = io.BytesIO()
    output = Output(io.TextIOWrapper(raw, encoding="latin-1"))
    assert output.write("é → 漢字\n") == 7
    output.flush()
    assert raw.getvalue() == b"\xe9 ? ??\n"


OPENED_OTHERWISE = ("os", "Image", "tarfile", "webbrowser")  # their `open` knows no text


def _is_bare(call: ast.Call) -> bool:
    """Text is read or written, and the call leaves the encoding to the locale."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    owner, _, name = ast.unparse(call.func).rpartition(".")
    if "encoding" in given:
        return False
    match name:
        case "read_text" | "write_text":
            return len(call.args) <= (name == "write_text")
        case "run" | "Popen" | "check_output":
            return bool(given.keys() & {"text", "universal_newlines"})
        case "open" if owner in OPENED_OTHERWISE:
            return False
        case "open" | "fdopen" | "NamedTemporaryFile" | "TemporaryFile":
            position = 1 if name == "fdopen" or (name == "open" and not owner) else 0
            usual = ast.Constant("w+b" if "Temporary" in name else "r")
            mode = given.get("mode", (call.args[position:] or [usual])[0])
            return isinstance(mode, ast.Constant) and "b" not in str(mode.value)
    return False


@pytest.mark.parametrize("package", PACKAGES)
def test_no_text_file_is_left_to_the_locale(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _is_bare(node)
    ]
    assert found == []
