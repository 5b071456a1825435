"""`polytrope init` writes all or nothing; `polytrope completion` is what a shell can run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.commands.starting import SCHEMA, SHIPPED, TEMPLATES


def test_a_project_has_the_files_of_its_template_and_what_exists_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "own.txt").write_text("mine")  # a directory may hold other things
    assert main(["init", "notes", "--template", "custom-stage"]) == 0
    assert "polytrope run workflows/word-count.yaml" in capsys.readouterr().out
    written = {path.relative_to(tmp_path / "notes").as_posix() for path in (tmp_path / "notes").rglob("*.*")}
    names = (*TEMPLATES["custom-stage"].files, SCHEMA)
    assert written == {"own.txt", ".gitignore", "README.md", *(f"workflows/{name}" for name in names)}
    for name in names:
        assert (tmp_path / "notes" / "workflows" / name).read_bytes() == (SHIPPED / name).read_bytes()

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").symlink_to("nowhere")
    assert main(["init", "other", "--template", "images"]) == 2
    assert "other/README.md: already there, and nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["README.md"]

    (tmp_path / "file").write_text("")
    assert main(["init", "file/below"]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["va"], {"validate"}),
        (["run", "--executor", ""], {"ray", "local"}),
        (["run", "file.yaml", "--no-t"], {"--no-tracking"}),
        (["init", "--template", "c"], {"convert", "custom-stage"}),
        (["convert", "--target-e"], {"--target-error"}),  # an option made of a stage's parameters
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["run", ""], set()),  # then the shell completes names of files
    ],
)
def test_bash_completes(words: list[str], expected: set[str], script: str) -> None:
    typed = " ".join(f"'{word}'" for word in ("polytrope", *words))
    program = (
        f"{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words)}; _polytrope; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


def test_zsh_runs_the_functions_of_bash_and_fish_has_a_line_per_option(
    capsys: pytest.CaptureFixture[str], script: str
) -> None:
    assert main(["completion", "zsh"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "bashcompinit" in lines[1]
    assert lines[2:] == script.splitlines()[1:]
    assert main(["completion", "fish"]) == 0
    fish = capsys.readouterr().out
    assert "-n '__fish_seen_subcommand_from run' -l executor -x -a 'ray local'" in fish
    assert "complete -c polytrope -n __fish_use_subcommand -f -a validate -d 'check a workflow" in fish
    assert "'" not in re.sub(r"'(\\.|[^'\\])*'", "", fish)  # every quote is closed, by fish's rules
