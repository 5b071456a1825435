"""The notebook of the documentation runs from its first cell to its last, as Jupyter would run it.

Its cells are executed here, in one process as `__main__`, without Jupyter: a kernel would be thirty packages more, for
a notebook whose only magic is `%%writefile`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"

KERNEL = """
import ast, json, sys
from pathlib import Path

sys.path.insert(0, "")
for number, cell in enumerate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cells"]):
    text = "".join(cell["source"])
    if cell["cell_type"] != "code":
        continue
    if text.startswith("%%writefile "):
        first, _, body = text.partition("\\n")
        Path(first.split()[1]).write_text(body, encoding="utf-8")
        continue
    tree = ast.parse(text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), globals())
    if last is not None:  # what Jupyter would show
        print(f"[{number}]", repr(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), globals())))
"""


def test_the_notebook_runs_and_shows_what_it_says(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KERNEL, str(NOTEBOOK)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        "longest: succeeded after",
        "succeeded in ",
        ": 4 succeeded>",
        "({'characters': 11.0}, 'rather long')",
        ": 4 cached>",
        "stage `__main__:in_a_cell` is defined in a script or a notebook",
        "tensor([",
        "GPT2Config(",
    ):
        assert expected in done.stdout


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert cell["id"]
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
