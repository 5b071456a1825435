"""Documents from local files, one column of text: every error names the file, and the line where lines count."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import is_unicode

if TYPE_CHECKING:
    import pyarrow

TEXT = "text"  # the column of what is written
_LINES_BLOCK = 1 << 24  # bytes that pyarrow parses at a time
_WRITE_BLOCK = 1 << 25  # bytes of small columns that are written together, at the most
_WRITE_COLUMNS = 500
_NO_TEXT = {  # what a file begins with → what to do
    codecs.BOM_UTF16_LE: "it is UTF-16: convert it (`iconv -f UTF-16 -t UTF-8`)",
    codecs.BOM_UTF16_BE: "it is UTF-16: convert it (`iconv -f UTF-16 -t UTF-8`)",
    b"\x1f\x8b": "it is compressed: let its name end in .gz",
    b"BZh": "it is compressed: let its name end in .bz2",
    b"\x28\xb5\x2f\xfd": "it is compressed: let its name end in .zst",
    b"\xfd7zXZ\0": "it is compressed: unpack it (`unxz`)",
    b"PK\3\4": "it is a zip archive: unpack it (`unzip`)",
}


def read_files(
    paths: Sequence[Path], file_format: Literal["text", "jsonl", "parquet"], field: str
) -> Iterator[pyarrow.ChunkedArray]:
    """The documents of the files, in order, as columns of text.

    Args:
        paths: the files; text and jsonl may be compressed, by their suffix (.gz, .bz2, .zst, …). A UTF-8
            signature at their start (byte order mark) is no text.
        file_format: text: a file is a document; jsonl: a line; parquet: a row.
        field: jsonl and parquet: the field that holds the text. Other fields may differ from file to file.

    Raises:
        UserError: a file (and line) that cannot be read, or has no text in `field`.
    """
    read = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_parquet}[file_format]
    for path in paths:
        yield from read(path, field)


def column_of(texts: Sequence[str]) -> pyarrow.ChunkedArray:
    """Texts as a column."""
    import pyarrow

    return pyarrow.chunked_array([pyarrow.array(texts, pyarrow.large_string())])


def write_table(columns: Iterable[pyarrow.ChunkedArray], cache: Path) -> Path:
    """Write columns of text, one behind the other, as one Arrow stream file below `cache` with the column `text`."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    cache.mkdir(parents=True, exist_ok=True)
    target = cache / "documents.arrow"
    features = datasets.Features({TEXT: datasets.Value("large_string")})
    with target.open("wb") as stream, ArrowWriter(stream=stream, features=features) as writer:
        waiting: list[pyarrow.ChunkedArray] = []  # small ones are written together
        for column in columns:
            waiting.append(column)
            if sum(part.nbytes for part in waiting) > _WRITE_BLOCK or len(waiting) > _WRITE_COLUMNS:
                writer.write_table(_table(waiting))
                waiting = []
        if waiting:
            writer.write_table(_table(waiting))
        writer.finalize()
    return target


def _table(columns: Sequence[pyarrow.ChunkedArray]) -> pyarrow.Table:
    import pyarrow

    chunks = [chunk for column in columns for chunk in column.cast(pyarrow.large_string()).chunks]
    return pyarrow.table({TEXT: pyarrow.chunked_array(chunks, pyarrow.large_string())}).combine_chunks()


def _read_text(path: Path, _field: str) -> Iterator[pyarrow.ChunkedArray]:
    content = _content(path)
    try:
        # with \n for every kind of line end
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8: byte 0x{content[error.start]:02x} at {error.start}",
            _way_to_text(content, "convert it (`iconv -f LATIN1 -t UTF-8`), or leave it out"),
        ) from None
    yield column_of([text.removeprefix(codecs.BOM_UTF8.decode())])


def _way_to_text(content: bytes, otherwise: str) -> str:
    """What to do with a file that is no UTF-8, by what it begins with."""
    ways = (way for start, way in _NO_TEXT.items() if content.startswith(start))
    return next(ways, otherwise)


def _content(path: Path) -> bytes:
    import pyarrow

    try:
        with pyarrow.input_stream(str(path), compression="detect") as stream:
            content: bytes = stream.read()
            return content
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}", "is it damaged, or another format?") from None


def _read_lines(path: Path, field: str) -> Iterator[pyarrow.ChunkedArray]:
    """pyarrow reads quickly and says little; where it does not succeed, Python reads line by line."""
    import pyarrow
    from pyarrow import json as lines

    schema = pyarrow.schema([(field, pyarrow.large_string())])
    parse = lines.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        with pyarrow.input_stream(str(path), compression="detect") as stream:
            column = lines.read_json(stream, lines.ReadOptions(block_size=_LINES_BLOCK), parse).column(field)
        column.validate(full=True)  # UTF-8
        if column.null_count == 0:
            yield column
            return
    except (OSError, pyarrow.ArrowException):
        pass  # a line longer than a block, or one that is wrong: found below
    yield column_of(list(_texts_of_lines(path, field)))


def check_lines(path: Path, field: str, most: int) -> None:
    """Read the first `most` lines with content.

    Raises:
        UserError: one that is no JSON object with text in `field`, with its number.
    """
    for number, _ in enumerate(_texts_of_lines(path, field), 1):
        if number == most:
            return


def _texts_of_lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        place = f"{path}:{number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{place}: not UTF-8: byte 0x{line[error.start]:02x}",
                _way_to_text(line if number == 1 else b"", "JSON is UTF-8: convert the file"),
            ) from None
        except ValueError as error:
            raise UserError(f"{place}: not JSON: {error}", "each line must be a JSON object") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            fields = ", ".join(record) if isinstance(record, dict) else "no fields"
            raise UserError(f"{place}: no text in field `{field}`", f"set source.text_field; this line has {fields}")
        text: str = record[field]
        if not is_unicode(text):
            raise UserError(f"{place}: half of a surrogate pair in `{field}`", "mend or remove the line")
        yield text


def _lines(path: Path) -> Iterator[bytes]:
    import pyarrow

    try:
        with pyarrow.input_stream(str(path), compression="detect") as stream:
            yield from io.BufferedReader(stream)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}", "is it damaged, or another format?") from None


def _read_parquet(path: Path, field: str) -> Iterator[pyarrow.ChunkedArray]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(
                    f"{path}: there is no field `{field}`",
                    f"set source.text_field; the fields are {', '.join(file.schema_arrow.names)}",
                )
            kind = file.schema_arrow.field(field).type
            values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if values not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise UserError(f"{path}: field `{field}` is not text but {kind}", "set source.text_field")
            row = 0
            for batch in file.iter_batches(columns=[field]):
                column = pyarrow.chunked_array([batch.column(0)])
                column.validate(full=True)
                if column.null_count:
                    row += column.to_pylist().index(None)
                    raise UserError(f"{path}: row {row} has no text in field `{field}`", "remove such rows")
                row += len(column)
                yield column
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}", "check `source.format`, and the file") from None
