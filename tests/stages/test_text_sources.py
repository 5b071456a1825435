"""Documents from files of the world: names are names, errors say which file and line, other fields do not matter."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.shard.corpus import FilesSource, find_files, read_documents, source_fingerprint


def texts(directory: Path, paths: list[str], **options: Any) -> list[str]:
    source = FilesSource(kind="files", paths=paths, **options)
    source_fingerprint(source, directory)
    documents = read_documents(source, directory, directory / "cache [x]")
    return list(documents.texts(np.arange(sum(len(chunk) for chunk in documents.chunks()))))


def test_names_are_no_patterns(tmp_path: Path) -> None:
    directory = tmp_path / "a [1]::%s?"
    directory.mkdir()
    for name in ("a[1].txt", "a1.txt", "b.txt"):
        (directory / name).write_text(name)
    assert texts(directory, ["a[1].txt"]) == ["a[1].txt"]
    assert texts(directory, ["*.txt"]) == ["a1.txt", "a[1].txt", "b.txt"]
    assert texts(directory, ["[ab]*.txt", "b.txt"]) == ["a1.txt", "a[1].txt", "b.txt"]


def test_a_directory_stands_for_its_files(tmp_path: Path) -> None:
    (tmp_path / "texts/.git").mkdir(parents=True)
    (tmp_path / "texts/more").mkdir()
    for name in ("b.txt", "more/a.txt", ".git/x", ".hidden"):
        (tmp_path / "texts" / name).write_text(name)
    assert texts(tmp_path, ["texts/"]) == ["b.txt", "more/a.txt"]


def test_the_file_that_is_no_utf8_is_named_and_no_other(tmp_path: Path) -> None:
    for number in range(20):
        content = b"first line\ncaf\xe9" if number == 13 else b"words"
        (tmp_path / f"{number:02}.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"13\.txt:2: not UTF-8: byte 0xe9") as refused:
        texts(tmp_path, ["*.txt"])
    assert "00.txt" not in str(refused.value)


def test_a_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    for number in range(4):
        packed = gzip.compress(f"document {number} ".encode() * 500)
        (tmp_path / f"{number}.txt.gz").write_bytes(packed[:-30] if number == 2 else packed)
    with pytest.raises(UserError, match=r"2\.txt\.gz cannot be read"):
        texts(tmp_path, ["*.txt.gz"])
    assert texts(tmp_path, ["1.txt.gz"]) == ["document 1 " * 500]


def rows(first: int, last: int, **other: Any) -> list[dict[str, Any]]:
    return [{"text": f"document {number}", **other} for number in range(first, last)]


def lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_jsonl_may_be_compressed_and_may_differ_in_other_fields(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(lines(rows(0, 10, n=1)))
    (tmp_path / "two.jsonl").write_bytes(lines(rows(10, 20, n="text", other={"deep": [1]})))
    (tmp_path / "three.jsonl.gz").write_bytes(gzip.compress(lines(rows(20, 30))))
    found = texts(tmp_path, ["one.jsonl", "two.jsonl", "three.jsonl.gz"], format="jsonl")
    assert found == [f"document {number}" for number in range(30)]


def test_a_line_longer_than_a_block_is_read(tmp_path: Path) -> None:
    long = "word " * 5_000_000
    (tmp_path / "long.jsonl").write_bytes(lines([*rows(0, 2), {"text": long}, *rows(2, 3)]))
    assert [len(text) for text in texts(tmp_path, ["long.jsonl"], format="jsonl")] == [10, 10, len(long), 10]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9"),
        (b'{"text": "cut', "not JSON"),
        (b'{"body": "x"}', "no text in field `text`.*\n.*this line has body"),
        (b'{"text": 5}', "no text in field `text`"),
        (b'{"text": null}', "no text in field `text`"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_the_wrong_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    content = lines(rows(0, 20)).splitlines()
    content[17] = line
    (tmp_path / "good.jsonl").write_bytes(lines(rows(0, 3)))
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(content))
    with pytest.raises(UserError, match=rf"x\.jsonl:18: {message}"):
        texts(tmp_path, ["good.jsonl", "x.jsonl"], format="jsonl")


def test_parquet_names_file_field_and_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b"], "n": [1, 2]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"m": [1, 2], "text": ["c", "d"]}), tmp_path / "b.parquet")
    assert texts(tmp_path, ["*.parquet"], format="parquet") == ["a", "b", "c", "d"]
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: row 1 has no text"):
        texts(tmp_path, ["*.parquet"], format="parquet")
    with pytest.raises(UserError, match=r"a\.parquet: there is no field `body`"):
        texts(tmp_path, ["a.parquet"], format="parquet", text_field="body")
    (tmp_path / "d.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"d\.parquet cannot be read as parquet"):
        texts(tmp_path, ["d.parquet"], format="parquet")


def test_a_signature_of_utf8_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("from Windows", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + lines(rows(0, 2)))
    assert texts(tmp_path, ["a.txt"]) == ["from Windows"]
    assert texts(tmp_path, ["a.jsonl"], format="jsonl") == ["document 0", "document 1"]


@pytest.mark.parametrize(
    ("content", "way"),
    [
        ("words".encode("utf-16"), "it is UTF-16: convert it"),
        (gzip.compress(b"words"), "let its name end in .gz"),
        (bz2.compress(b"words" * 99), "let its name end in .bz2"),
        (lzma.compress(b"words"), "unpack it (`unxz`)"),
        (b"caf\xe9", None),
    ],
)
def test_a_file_that_is_no_text_says_what_it_is(tmp_path: Path, content: bytes, way: str | None) -> None:
    (tmp_path / "x.text").write_bytes(content)
    for file_format, otherwise in (("text", "iconv -f LATIN1"), ("jsonl", "JSON is UTF-8")):
        with pytest.raises(UserError, match=r"x\.text:1: not UTF-8") as caught:
            texts(tmp_path, ["x.text"], format=file_format)
        assert (way or otherwise) in str(caught.value.hint)


def test_parquet_takes_every_kind_of_text_column(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.array(["a", "b", "a"])
    kinds = [
        column,
        column.dictionary_encode(),
        column.cast(pyarrow.large_string()),
        column.cast(pyarrow.string_view()),
    ]
    for number, kind in enumerate(kinds):
        parquet.write_table(pyarrow.table({"text": kind}), tmp_path / f"{number}.parquet")
    assert texts(tmp_path, ["*.parquet"], format="parquet") == ["a", "b", "a"] * 4
    parquet.write_table(pyarrow.table({"text": pyarrow.array([b"a"])}), tmp_path / "bytes.parquet")
    with pytest.raises(UserError, match=r"bytes\.parquet: field `text` is not text but binary"):
        texts(tmp_path, ["bytes.parquet"], format="parquet")


def test_a_name_that_is_not_utf_8_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("there")
    (tmp_path / "caf\udce9.txt").write_text("there")
    with pytest.raises(UserError, match=r"caf\\xe9\.txt' is not UTF-8"):
        find_files(["*.txt"], tmp_path)


def test_links_to_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("there")
    (tmp_path / "1.txt").symlink_to("/nowhere/1")
    with pytest.raises(UserError, match=r"1\.txt is a link to /nowhere/1"):
        find_files(["*.txt"], tmp_path)
