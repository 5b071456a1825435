"""Directories that appear whole."""

from __future__ import annotations

from pathlib import Path

from polytrope.models.writing import appearing


def test_a_directory_is_written_again_with_its_folders_and_keeps_what_else_it_holds(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        with appearing(target, "config.json") as aside:
            for name in ("config.json", "1_Pooling/config.json", "2_Normalize/notes/a.txt"):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).write_text(content, encoding="utf-8")
            (aside / "3_Empty").mkdir()
        (target / "1_Pooling" / "own.txt").touch()
    files = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert files == {
        "config.json": "second",
        "1_Pooling/config.json": "second",
        "2_Normalize/notes/a.txt": "second",
        "1_Pooling/own.txt": "",
    }
    assert (target / "3_Empty").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
