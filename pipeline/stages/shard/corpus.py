"""Where documents come from: this machine's Python, local files or the hub, all through Hugging Face `datasets`.

Or they are drawn, by `polytrope.pipeline.stages.shard.symbolic`."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.shard.text_files import TEXT, check_lines, column_of, read_files, write_table
from polytrope.pipeline.support.file_digests import combined_digest, file_digests
from polytrope.pipeline.support.text import is_unicode

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

HUB_HINT = "give local files instead (`source: {kind: files, paths: […]}`), or connect this machine and run again"


class PythonSource(BaseModel):
    """CPython's own documentation topics and standard-library source: real text that every machine has."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["python"] = "python"
    documentation: bool = Field(True, description="the documentation topics (`pydoc_data`), about 0.5 MB of English")
    source: bool = Field(True, description="the standard library's .py files (without its tests), about 15 MB")
    max_bytes: int | None = Field(None, ge=1, description="stop after this many bytes (documentation comes first)")


class FilesSource(BaseModel):
    """Local files."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["files"]
    paths: list[str] = Field(
        min_length=1, description="files, globs, or directories (all files below), relative to the workflow file"
    )
    format: Literal["text", "jsonl", "parquet"] = Field(
        "text", description="text: a file is a document; text and jsonl may be compressed (.gz, .bz2, .zst)"
    )
    text_field: str = Field("text", description="jsonl and parquet: the field that holds the text")
    max_bytes: int | None = Field(None, ge=1, description="stop after this many bytes of text")


class HubSource(BaseModel):
    """A data set of the Hugging Face hub."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["hub"]
    dataset: str = Field(description="its id, for example openwebtext")
    config: str | None = Field(None, description="its configuration, where it has several")
    split: str = Field("train", description="which of its splits to read")
    revision: str | None = Field(None, description="branch, tag or commit; give a commit to be reproducible")
    text_field: str = Field("text", description="the field that holds the text")
    max_bytes: int | None = Field(None, ge=1, description="stop after this many bytes of text")


class SymbolicSource(BaseModel):
    """Expressions and their derivatives, or integrals, drawn at random; one line each."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["symbolic"]
    task: Literal["derivative", "integral"] = Field(
        description="derivative: `EXPRESSION ; DERIVATIVE`; integral: `DERIVATIVE ; EXPRESSION`"
    )
    count: int = Field(
        ge=2, description="lines to draw, one for each split at least; those that come twice are taken once"
    )
    depth: int = Field(4, ge=1, le=4, description="of the expressions: operators within operators, at most")
    seed: int = Field(0, ge=0, lt=2**64, description="of the draw")


Source = Annotated[PythonSource | FilesSource | HubSource | SymbolicSource, Field(discriminator="kind")]


def source_fingerprint(source: Source, directory: Path) -> dict[str, str]:
    """What decides the documents beyond the parameters: a digest of the files' content, the hub's revision, or the
    version of sympy, which writes the derivatives.

    Raises:
        UserError: a file is missing, empty or unreadable, its first record lacks the field, or the hub is switched off.
    """
    if isinstance(source, HubSource):
        refuse_offline_hub(source.dataset)
        return {"hub": f"{source.dataset}@{source.revision or 'main'}"}
    if isinstance(source, SymbolicSource):
        return {"sympy": version("sympy")}
    files = _named_files(source, directory)
    if isinstance(source, FilesSource) and source.format == "jsonl":
        for _, path in files:
            check_lines(path, source.text_field, most=1)
    names, paths = zip(*files, strict=True)
    return {"files": combined_digest(names, file_digests(paths, field="source"))}


def refuse_offline_hub(dataset: str) -> None:
    """Raise UserError if the environment switches the hub off; looks at nothing else, so that a plan stays fast."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise UserError(f"source.dataset: the hub is switched off ({name}), cannot get `{dataset}`", HUB_HINT)


def _named_files(source: PythonSource | FilesSource, directory: Path) -> list[tuple[str, Path]]:
    """Name (part of a document's identity, the same on every machine) and path of each file, in order."""
    if isinstance(source, FilesSource):
        return [(path.name, path) for path in find_files(source.paths, directory)]
    library = Path(sysconfig.get_paths()["stdlib"])
    files: list[tuple[str, Path]] = []
    if source.documentation:
        files.append(("pydoc_data/topics.py", library / "pydoc_data" / "topics.py"))
    if source.source:
        skipped = {"site-packages", "test", "tests", "idlelib", "__pycache__", "pydoc_data", "lib2to3", "ensurepip"}
        paths = sorted(path for path in library.rglob("*.py") if not skipped & set(path.relative_to(library).parts))
        files += [(path.relative_to(library).as_posix(), path) for path in paths]
    if not files:
        raise UserError("source: `documentation` and `source` are both false", "set one of them to true")
    return files


def find_files(patterns: list[str], directory: Path) -> list[Path]:
    """The files that the patterns name, sorted, each once.

    A pattern that is the name of a file is that file, whatever characters it has; that of a directory stands for all
    files below it that are not hidden; any other is a glob.

    Raises:
        UserError: a pattern without a file, a file without content, a link to nowhere, a name that is not UTF-8.
    """
    found: list[Path] = []
    for pattern in patterns:
        exact = directory / pattern
        if exact.is_dir():
            paths = [path for path in exact.rglob("*") if not _is_hidden(path.relative_to(exact))]
        elif os.path.lexists(exact):
            paths = [exact]
        else:
            names = glob.glob(pattern, root_dir=directory, recursive=True)
            paths = [directory / name for name in names]
        for path in paths:
            if path.is_symlink() and not path.exists():
                raise UserError(
                    f"source.paths: {path} is a link to {os.readlink(path)}, which does not exist",
                    "fetch the data (git-annex, DVC and Git LFS leave such links), or remove the link",
                )
        files = sorted(path for path in paths if path.is_file())
        if not files:
            raise UserError(
                f"source.paths: no file matches `{pattern}`",
                f"paths are relative to the workflow file: looked for {exact}",
            )
        found += files
    for path in found:
        if not is_unicode(str(path)):
            raise UserError(
                f"source.paths: the name {os.fsencode(path)!r} is not UTF-8", "rename the file (convmv renames many)"
            )
        if path.stat().st_size == 0:
            raise UserError(f"source.paths: {path} is empty", "leave it out, or give a file with content")
    return list(dict.fromkeys(found))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


@dataclass(frozen=True)
class Documents:
    """Texts in Arrow files, read through memory maps: small to send to a task, whatever their size.

    Args:
        files: Arrow stream files, in order.
        column: the string column that holds the text.
    """

    files: tuple[str, ...]
    column: str

    def chunks(self) -> list[Any]:
        """The column as pyarrow arrays, in order; nothing is read before it is used."""
        import pyarrow

        tables = [pyarrow.ipc.open_stream(pyarrow.memory_map(name)).read_all() for name in self.files]
        return [chunk for table in tables for chunk in table.column(self.column).chunks]

    def texts(self, rows: np.ndarray) -> Iterator[str]:
        """The documents at `rows` (int64, ascending)."""
        import numpy as np

        first = 0
        for chunk in self.chunks():
            begin, end = np.searchsorted(rows, [first, first + len(chunk)])
            if begin < end:
                # One by one: `take` with an array of numpy imports pandas, a fifth of a second in every worker.
                yield from (chunk[row].as_py() for row in (rows[begin:end] - first).tolist())
            first += len(chunk)


def split_documents(
    documents: Documents, validation_fraction: float, max_bytes: int | None
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, int]]:
    """Deal the documents out by a hash of their text: equal texts are never on both sides.

    Blank documents are left out. Reading stops when `max_bytes` of text are reached.

    Returns:
        For `train` and `validation` the rows of their documents and the documents' sizes in bytes, int64; and what was
        left out, with its count.
    """
    import numpy as np

    rows: dict[str, list[int]] = {"train": [], "validation": []}
    sizes: dict[str, list[int]] = {"train": [], "validation": []}
    left_out: Counter[str] = Counter()
    row, left = -1, float("inf") if max_bytes is None else float(max_bytes)
    for chunk in documents.chunks():
        if left <= 0:
            left_out["documents beyond max_bytes"] += len(chunk)
            continue
        for text in chunk.to_pylist():
            row += 1
            if left <= 0:
                left_out["documents beyond max_bytes"] += 1
                continue
            if not text or text.isspace():
                left_out["blank documents"] += 1
                continue
            content = text.encode(errors="surrogatepass")
            name = "validation" if is_validation(content, validation_fraction) else "train"
            rows[name].append(row)
            sizes[name].append(len(content))
            left -= len(content)
    splits = {name: (np.asarray(rows[name], np.int64), np.asarray(sizes[name], np.int64)) for name in rows}
    return splits, dict(left_out)


def is_validation(content: bytes, fraction: float) -> bool:
    """Whether a document, or an image by its key, belongs to the validation split: a function of its content alone."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < fraction * 2**64


def read_documents(source: PythonSource | FilesSource | HubSource, directory: Path, cache: Path) -> Documents:
    """The documents of a source, through `datasets`, in a fixed order.

    Args:
        directory: the workflow file's, for relative paths.
        cache: gets Arrow files, which must stay while the documents are used.

    Raises:
        UserError: unreadable file or line, missing field, hub out of reach, no document at all.
    """
    if isinstance(source, PythonSource):
        return Documents((str(write_table(_python_documents(source, directory), cache)),), TEXT)
    if isinstance(source, FilesSource):
        paths = find_files(source.paths, directory)
        return Documents((str(write_table(read_files(paths, source.format, source.text_field), cache)),), TEXT)
    loaded = load_hub(source.dataset, source.config, source.split, source.revision, cache)
    field = source.text_field
    check_hub_field(loaded, "text_field", field)
    if getattr(loaded.features[field], "dtype", "") not in ("string", "large_string"):
        raise UserError(f"source.text_field: `{field}` is not text but {loaded.features[field]}", "name a text field")
    if not len(loaded):
        raise UserError(f"source.dataset: {source.dataset} has no document", "name another split")
    return Documents(tuple(file["filename"] for file in loaded.cache_files), field)


def _python_documents(source: PythonSource, directory: Path) -> Iterator[pyarrow.ChunkedArray]:
    left = source.max_bytes if source.max_bytes is not None else float("inf")
    for name, path in _named_files(source, directory):
        if name == "pydoc_data/topics.py":
            from pydoc_data.topics import topics

            texts = [topics[topic] for topic in sorted(topics)]
        else:
            texts = [path.read_text(encoding="utf-8", errors="replace")]
        for text in texts:
            if left <= 0:
                return
            left -= len(text.encode())
            yield column_of([text])


def load_hub(dataset: str, config: str | None, split: str, revision: str | None, cache: Path) -> Any:
    """A data set of the hub, as `datasets.Dataset`.

    Raises:
        UserError: the hub is switched off or out of reach, or has no such data set, split or revision.
    """
    refuse_offline_hub(dataset)
    import datasets
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(dataset, revision=revision, timeout=10)
        return datasets.load_dataset(dataset, config, split=split, revision=revision, cache_dir=str(cache))
    except Exception as error:  # network, authentication, unknown id: the library raises many kinds
        raise UserError(f"source.dataset: cannot get `{dataset}` from the hub: {error}", HUB_HINT) from error


def check_hub_field(loaded: Any, parameter: str, name: str) -> None:
    """Raise UserError if a data set of the hub lacks the field `name`, which `source.PARAMETER` asks for."""
    if name not in loaded.column_names:
        raise UserError(
            f"source.{parameter}: there is no field `{name}`", f"the fields are {', '.join(loaded.column_names)}"
        )
