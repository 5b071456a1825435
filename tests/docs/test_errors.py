"""Typical mistakes: each is refused with its place and a way out, and docs/errors.md shows what is said."""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import mistakes
import pytest

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.workflow.source import parse_source

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, str]]:
    return mistakes.all_said()


def test_every_mistake_is_refused_with_its_place_its_value_and_a_way_out(texts: dict[str, dict[str, str]]) -> None:
    assert sum(map(len, texts.values())) >= 40
    for section, found in texts.items():
        for title, text in found.items():
            assert text.startswith("polytrope"), (title, text)
            assert "→ " in text or "expected" in text, (title, text)
            assert not re.search(r"Input should|pydantic|Traceback|unexpected|usage:", text), (title, text)
            if section != "The command line":
                assert re.match(r"polytrope: workflow\.yaml:\d+: [\w./ ]+: ", text), (title, text)


def test_every_mistake_is_shown_where_it_was_made_with_what_was_written(texts: dict[str, dict[str, str]]) -> None:
    for section, found in mistakes.SECTIONS.items():
        for mistake in found if section != "The command line" else ():
            said = texts[section][mistake.title].partition("\n  →")[0]
            place = re.search(r"workflow\.yaml:(\d+): (?:([\w./]+): )?(.*)", said, re.DOTALL)
            assert place is not None, said
            lines, before = mistake.text.splitlines(), mistake.base.splitlines()
            operations = difflib.SequenceMatcher(None, before, lines).get_opcodes()
            changed = {line for kind, *_, start, end in operations if kind != "equal" for line in range(start, end + 1)}
            named = mistake.title in ELSEWHERE or int(place[1]) - 1 in changed
            assert named, (mistake.title, said)
            written = {word for line in lines if line not in before for word in re.findall(WORD, line)}
            new = written - {word for line in before if line not in lines for word in re.findall(WORD, line)}
            assert not new or any(word in said for word in new), (mistake.title, new, said)


WORD = r"[\w./-]*\w"
# said where the mistake shows, which is another line than the one it was made in
ELSEWHERE = {
    "a misspelled key of the file",
    "a branch where one stage is meant",
    "a missing input",
    "both steps and epochs",
    "neither a model nor one to start from",
    "a model, and one to start from",
    "a trial without a stage function",
}


def test_every_mistake_is_made_in_a_workflow_that_is_right_without_it(tmp_path: Path) -> None:
    for base in {mistake.base for section in mistakes.SECTIONS.values() for mistake in section}:
        assert mistakes.said(mistakes.Mistake("none", base=base), tmp_path) == (0, "")


def test_exit_codes_of_mistakes_are_those_of_a_refusal(tmp_path: Path) -> None:
    for mistake in (mistakes.SECTIONS["The model"][0], *mistakes.SECTIONS["The command line"]):
        assert mistakes.said(mistake, tmp_path)[0] == 2, mistake.title


def test_the_page_shows_what_is_said(texts: dict[str, dict[str, str]]) -> None:
    assert mistakes.PAGE.read_text(encoding="utf-8") == mistakes.page(texts), "run `python tests/docs/mistakes.py`"


def test_the_schema_accepts_what_is_right_and_refuses_what_it_can_see(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    kept = (ROOT / "workflows" / "workflow.schema.json").read_text(encoding="utf-8")
    assert kept == printed, "run `polytrope schema > workflows/workflow.schema.json`"
    jsonschema.Draft202012Validator.check_schema(json.loads(printed))
    validator = jsonschema.Draft202012Validator(json.loads(printed))

    def accepted(text: str) -> bool:
        return validator.is_valid(parse_source(text, "workflow.yaml").data)

    for path in (ROOT / "workflows").glob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=workflow.schema.json\n")
        assert accepted(path.read_text(encoding="utf-8")), path
    assert accepted(mistakes.TEXT)
    assert accepted(mistakes.IMAGES)
    assert accepted(mistakes.SEARCH)
    assert accepted(mistakes.TEXT.replace("degree: 8", 'degree: "${params.steps}"'))
    seen = {
        mistake.title
        for section in mistakes.SECTIONS.values()
        for mistake in section
        if mistake.arguments[0] == "validate" and not mistake.arguments[2:] and mistake.new
        if "line" not in mistake.title and "twice" not in mistake.title and not accepted(mistake.text)
    }
    assert seen >= {
        "a misspelled key of the file",
        "a misspelled key of a stage",
        "a misspelled resource",
        "an input that the stage does not have",
        "a misspelled activation",
        "a misspelled option of an activation",
        "a degree that is too high",
        "a misspelled parameter",
        "text for a number",
        "a family that there is not",
    }


def test_a_workflow_is_checked_without_torch_numpy_and_ray(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("A text.")
    (tmp_path / "workflow.yaml").write_text(mistakes.TEXT)
    program = (
        "import sys; from polytrope.pipeline.commands.cli import main\n"
        "assert main(['validate', 'workflow.yaml']) == 0\n"
        "heavy = {'torch', 'numpy', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, timeout=60)
