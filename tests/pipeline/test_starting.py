"""`polytrope init` writes all or nothing; `polytrope completion` is what a shell can run."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
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


COMPLETED = {  # what was typed → what Tab makes of it
    "sche": "schema",
    "stages shard_i": "shard_images",
    "run file.yaml --no-t": "--no-tracking",
    "run file.yaml --executor l": "local",
    "init --template cu": "custom-stage",
    "convert --target-e": "--target-error",  # an option made of a stage's parameters
    "completion f": "fish",
}
ZSHRC = """\
PROMPT='READY '
source ./script
shown() { print -r -- $BUFFER >> shown; BUFFER=''; zle redisplay }
zle -N shown
bindkey '^X' shown
"""


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    shells = ("bash", "zsh", "fish")
    program = f"from polytrope.pipeline.commands.cli import main\nfor shell in {shells}:\n"
    program += "    print('<<<>>>')\n    main(['completion', shell])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return dict(zip(shells, done.stdout.split("<<<>>>\n")[1:], strict=True))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_options_and_stages(shell: str, scripts: dict[str, str], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} (Debian package `{shell}`)")
    (tmp_path / "script").write_text(scripts[shell])
    assert {"bash": in_bash, "zsh": in_zsh, "fish": in_fish}[shell](tmp_path) == list(COMPLETED.values())


def in_bash(directory: Path) -> list[str]:
    program = [". ./script"]
    for typed in COMPLETED:
        words = f"polytrope {typed}".split()
        program.append(
            f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _polytrope; echo ${{COMPREPLY[*]}}"
        )
    program.append("COMP_WORDS=(polytrope run ''); COMP_CWORD=2; _polytrope; echo ${COMPREPLY[*]}")
    *found, files = output_of(["bash", "-c", "\n".join(program)], directory)
    assert files == "", "then bash completes names of files"
    return found


def in_fish(directory: Path) -> list[str]:
    lines = ["source ./script", *(f"complete -C {shlex.quote(f'polytrope {typed}')}" for typed in COMPLETED)]
    return [line.split("\t")[0] for line in output_of(["fish", "--no-config", "-c", "\n".join(lines)], directory)]


def output_of(command: list[str], directory: Path) -> list[str]:
    home = {"HOME": str(directory), "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    done = subprocess.run(
        command, cwd=directory, env={**os.environ, **home}, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.removesuffix("\n").split("\n")


def in_zsh(directory: Path) -> list[str]:
    """Its completion works in an editor of lines only, so it gets a terminal, and the keys."""
    (directory / ".zshrc").write_text(ZSHRC)
    shown = directory / "shown"
    leader, follower = pty.openpty()
    environment = {**os.environ, "ZDOTDIR": str(directory), "HOME": str(directory), "TERM": "xterm"}
    process = subprocess.Popen(
        ["zsh", "-i"],
        cwd=directory,
        env=environment,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    said = b""
    try:
        while b"READY" not in said:
            said += os.read(leader, 4096)
        for typed in COMPLETED:
            os.write(leader, f"polytrope {typed}\t\x18".encode())
        end = time.monotonic() + 30
        while not shown.exists() or len(shown.read_text().splitlines()) < len(COMPLETED):
            assert time.monotonic() < end, said
            if select.select([leader], [], [], 0.05)[0]:
                said += os.read(leader, 4096)
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    return [line.split()[-1] for line in shown.read_text().splitlines()]
