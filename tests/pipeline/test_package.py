"""What `submit` sends: the project, and neither credentials nor environments nor what git ignores."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.launch import package


@pytest.fixture
def project(tmp_path: Path) -> Path:
    files = [
        "w.yaml", "st.py", "data/texts/a.txt", ".env", ".env.local", "conf/prod.env", ".ssh/config", "keys/id_rsa",
        "server.pem", "aws/credentials", "gcp-credentials.json", "infra/live.tfstate",
        "kubeconfig", "client_secret_1.json", "conf/gcloud/x.json", "secrets/db.txt", ".cache/x/token", "cache.sqlite3",
        "mine/pyvenv.cfg", "mine/lib/big.py", ".git/config", "node_modules/x.js", "notes.ignored", "environment.yaml",
    ]  # fmt: skip
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "gone").symlink_to("/nowhere")
    return tmp_path


def test_only_the_project_is_chosen(project: Path) -> None:
    subprocess.run(["rm", "-r", str(project / ".git")], check=True)
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    (project / ".gitignore").write_text("*.ignored\n")
    chosen = package.choose_files(project)
    assert sorted(map(str, chosen.files)) == [".gitignore", "data/texts/a.txt", "environment.yaml", "st.py", "w.yaml"]
    assert {str(path) for path in chosen.left_out["credentials"]} == {
        ".env", ".env.local", "conf/prod.env", ".ssh", "keys/id_rsa", "server.pem", "aws/credentials",
        "gcp-credentials.json", "infra/live.tfstate", "kubeconfig", "client_secret_1.json", "conf/gcloud", "secrets",
    }  # fmt: skip
    assert {str(path) for path in chosen.left_out["ignored by git"]} == {"notes.ignored"}
    assert {str(path) for path in chosen.left_out["databases"]} == {"cache.sqlite3"}
    target = project / "sent"
    target.mkdir()
    package.copy_files(chosen, target)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()) == sorted(
        map(str, chosen.files)
    )


def test_what_is_too_large_is_refused_with_the_largest_files(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "LARGEST", 1000)
    (project / "data/huge.bin").write_bytes(b"x" * 2_000_000)
    with pytest.raises(UserError, match=r"to send, more than .*; the largest: data/huge\.bin \(2 MB\)"):
        package.choose_files(project)


def test_a_dry_run_lists_what_would_be_sent_and_needs_no_cluster(project: Path) -> None:
    (project / "st.py").write_text("def s() -> None: ...\n")
    stages = {"s": {"uses": "st:s"}}
    (project / "w.yaml").write_text(yaml.safe_dump({"name": "w", "stages": stages}))
    command = [str(Path(sys.executable).parent / "polytrope"), "submit", "w.yaml", "--dry-run", "--store", "/shared"]
    done = subprocess.run(
        [*command, "--address", "http://127.0.0.1:1"], cwd=project, capture_output=True, text=True, check=True
    )
    assert "st.py" in done.stdout
    assert "left out (credentials): .env, " in done.stdout


def test_a_link_to_a_directory_is_named_among_what_stays(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`os.walk` does not enter it: without a word the job would miss its files."""
    (project / "linked").symlink_to(tmp_path_factory.mktemp("data"))
    assert package.choose_files(project).left_out["links to directories"] == [Path("linked")]


def test_without_an_answer_from_git_nothing_is_sent(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What git ignores may be secret."""
    (project / ".gitignore").write_text("*.ignored\n")
    subprocess.run(["rm", "-r", str(project / ".git")], check=True)
    (project / ".git").write_text("not a git file")
    with pytest.raises(UserError, match=r"git does not say which files of .* it ignores: fatal: invalid gitfile"):
        package.choose_files(project)
    monkeypatch.setenv("PATH", "")  # no git at all
    with pytest.raises(UserError, match="git does not say which files"):
        package.choose_files(project)
    (project / ".git").unlink()
    assert Path("notes.ignored") in package.choose_files(project).files, "outside a repository nothing is ignored"


@pytest.mark.parametrize("ignored", ["w.yaml", "base.yaml"])
def test_a_workflow_file_that_git_ignores_is_refused_not_left_out_in_silence(
    project: Path, ignored: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["rm", "-r", str(project / ".git")], check=True)
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    (project / ".gitignore").write_text(f"{ignored}\n")
    (project / "base.yaml").write_text("name: w\n")
    (project / "w.yaml").write_text('include: base.yaml\nstages: {s: {uses: wait_for, with: {path: "x"}}}\n')
    monkeypatch.chdir(project)
    assert main(["submit", "w.yaml", "--address", "http://127.0.0.1:1", "--store", "/shared"]) == 2
    assert f"{ignored} would not be sent (ignored by git), and the run needs it" in capsys.readouterr().err


def test_what_cannot_be_read_is_named_among_what_stays() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own belongs to this user alone
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "closed").mkdir()
        (directory / "closed" / "data.txt").write_text("data")
        (directory / "secret.txt").write_text("secret")
        (directory / "open.txt").write_text("open")
        (directory / "closed").chmod(0)
        (directory / "secret.txt").chmod(0)
        user = os.geteuid()
        if user == 0:  # may read everything
            os.seteuid(65534)
        try:
            chosen = package.choose_files(directory)
        finally:
            os.seteuid(user)
            (directory / "closed").chmod(0o755)
    assert list(chosen.files) == [Path("open.txt")]
    assert sorted(chosen.left_out["cannot be read"]) == [Path("closed"), Path("secret.txt")]
