"""In a terminal of Latin-1 (de_DE@euro on a cluster) or ASCII no output ends a command, and its files are UTF-8."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
STAGE = "from polytrope.pipeline.stage import StageContext as C\ndef s(context: C, n: int = 1) -> None: print('→ 漢')\n"
WORKFLOW = """
name: 漢字
tracking: {enabled: false}
executor: local
params: {n: 1}
stages: {s: {uses: "st:s", with: {n: "${params.n}"}}}
"""


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

    assert "run a: ??, 1 stage," in polytrope("run", "w.yaml", "--run-id", "a")
    assert "parameters.n: 1 ? 2" in polytrope("explain", "w.yaml", "s", "--set", "params.n=2")
    assert (tmp_path / ".polytrope/runs/a/logs/s/1.log").read_text(encoding="utf-8") == "→ 漢\n"
    assert polytrope("logs", "a").endswith("? ?\n")
    assert "a: ??, succeeded" in polytrope("status", "a")
    assert '"workflow": "\\u6f22\\u5b57"' in polytrope("status", "a", "--json")
