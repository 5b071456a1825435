"""Where documents come from: this machine's Python, local files or the hub, all through Hugging Face `datasets`."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np

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
    paths: list[str] = Field(min_length=1, description="files or globs, relative to the workflow file")
    format: Literal["text", "jsonl", "parquet"] = Field("text", description="text: a file is a document")
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


Source = Annotated[PythonSource | FilesSource | HubSource, Field(discriminator="kind")]


def source_fingerprint(source: Source, directory: Path) -> dict[str, str]:
    """What decides the documents beyond the parameters: a digest of the files' content, or the hub's revision.

    Raises:
        UserError: a file is missing, empty or unreadable, its first record lacks the field, or the hub is switched off.
    """
    if isinstance(source, HubSource):
        refuse_offline_hub(source.dataset)
        return {"hub": f"{source.dataset}@{source.revision or 'main'}"}
    files = _named_files(source, directory)
    if isinstance(source, FilesSource) and source.format == "jsonl":
        for _, path in files:
            _check_jsonl([path], source.text_field, lines=1)
    return {"files": digest_files(files)}


def digest_files(files: Iterable[tuple[str, Path]]) -> str:
    """One sha256 over names and contents.

    Raises:
        UserError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for name, path in files:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"source: cannot read {path}: {error}", "mend its permissions or leave it out") from error
        digest.update(f"{name}:{content}\n".encode())
    return digest.hexdigest()


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

    Raises:
        UserError: a pattern without a file, or a file without content.
    """
    found: list[Path] = []
    for pattern in patterns:
        full = pattern if Path(pattern).is_absolute() else str(directory / pattern)
        names = glob.glob(pattern, root_dir=directory, recursive=True)  # brackets in the directory's name mean nothing
        paths = sorted(directory / name for name in names if (directory / name).is_file())
        if not paths:
            raise UserError(
                f"source.paths: no file matches `{pattern}`",
                f"paths are relative to the workflow file: looked for {full}",
            )
        found += paths
    for path in found:
        if path.stat().st_size == 0:
            raise UserError(f"source.paths: {path} is empty", "leave it out, or give a file with text")
    return list(dict.fromkeys(found))


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
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Deal the documents out by a hash of their text: equal texts are never on both sides.

    Blank documents are left out. Reading stops when `max_bytes` of text are reached.

    Returns:
        For `train` and `validation` the rows of their documents and the documents' sizes in bytes, int64.
    """
    import numpy as np

    rows: dict[str, list[int]] = {"train": [], "validation": []}
    sizes: dict[str, list[int]] = {"train": [], "validation": []}
    row, left = -1, float("inf") if max_bytes is None else float(max_bytes)
    for chunk in documents.chunks():
        if left <= 0:
            break
        for text in chunk.to_pylist():
            row += 1
            if left <= 0:
                break
            if not text or text.isspace():
                continue
            content = text.encode(errors="surrogatepass")
            name = "validation" if is_validation(content, validation_fraction) else "train"
            rows[name].append(row)
            sizes[name].append(len(content))
            left -= len(content)
    return {name: (np.asarray(rows[name], np.int64), np.asarray(sizes[name], np.int64)) for name in rows}


def is_validation(content: bytes, fraction: float) -> bool:
    """Whether a document belongs to the validation split: a function of its content alone."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < fraction * 2**64


def read_documents(source: Source, directory: Path, cache: Path) -> Documents:
    """The documents of a source, through `datasets`, in a fixed order.

    Args:
        directory: the workflow file's, for relative paths.
        cache: where `datasets` keeps its Arrow files; they must stay while the documents are used.

    Raises:
        UserError: unreadable file or line, missing field, hub out of reach, no document at all.
    """
    import datasets

    datasets.disable_progress_bars()
    field = "text"
    if isinstance(source, PythonSource):
        loaded = datasets.Dataset.from_generator(
            _python_documents, gen_kwargs={"source": source, "directory": directory}, cache_dir=str(cache)
        )
    elif isinstance(source, FilesSource):
        loaded = _load_files(source, directory, cache)
        field = "text" if source.format == "text" else source.text_field
    else:
        loaded = load_hub(source.dataset, source.config, source.split, source.revision, cache)
        field = source.text_field
    if field not in loaded.column_names:
        raise UserError(
            f"source.text_field: there is no field `{field}`", f"the fields are {', '.join(loaded.column_names)}"
        )
    if not _is_text(loaded, field):
        raise UserError(f"source.text_field: `{field}` is not text but {loaded.features[field]}", "name a text field")
    if not len(loaded):
        raise UserError("source: there is no document", "give files with text in them")
    return Documents(tuple(file["filename"] for file in loaded.cache_files), field)


def _python_documents(source: PythonSource, directory: Path) -> Iterator[dict[str, str]]:
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
            yield {"text": text}


def _load_files(source: FilesSource, directory: Path, cache: Path) -> Any:
    import datasets

    paths = find_files(source.paths, directory)
    builder = {"text": "text", "jsonl": "json", "parquet": "parquet"}[source.format]
    options = {"sample_by": "document"} if source.format == "text" else {}
    try:
        loaded = datasets.load_dataset(
            builder, data_files=[str(path) for path in paths], split="train", cache_dir=str(cache), **options
        )
    except Exception as error:  # the library raises many kinds for an unreadable file
        if source.format == "jsonl":
            _check_jsonl(paths, source.text_field)
        cause = error.__cause__ or error
        raise UserError(
            f"source.paths: cannot read {', '.join(map(str, paths[:3]))} as {source.format}: {cause}",
            "check `source.format` (text, jsonl or parquet) and the file",
        ) from error
    field = source.text_field
    if source.format == "jsonl" and not _all_text(loaded, field):
        _check_jsonl(paths, field)
    return loaded


def _all_text(loaded: Any, field: str) -> bool:
    return field in loaded.column_names and _is_text(loaded, field) and not loaded.data.column(field).null_count


def _is_text(loaded: Any, field: str) -> bool:
    return getattr(loaded.features[field], "dtype", "") in ("string", "large_string")


def _check_jsonl(paths: list[Path], field: str, lines: int | None = None) -> None:
    """Name the first line that has no text in `field`. `lines`: look at so many lines with content per file."""
    for path in paths:
        seen = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:  # not JSON, or not UTF-8
                    raise UserError(f"{path}:{number}: not JSON: {error}", "each line must be a JSON object") from error
                if not isinstance(record, dict) or not isinstance(record.get(field), str):
                    fields = ", ".join(record) if isinstance(record, dict) else "no fields"
                    raise UserError(
                        f"{path}:{number}: no text in field `{field}`", f"set source.text_field; this line has {fields}"
                    )
                seen += 1
                if seen == lines:
                    break


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
