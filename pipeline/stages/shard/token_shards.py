"""Documents → tokens → blocks → tar shards. Each group of documents makes its shard on its own, so that the output does
not depend on how many tasks work at it."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polytrope.pipeline.data.tarfiles import build_tar
from polytrope.pipeline.data.tokenization import Tokenizer, tokenizer_from_json
from polytrope.pipeline.stages.shard.corpus import Documents


@dataclass(frozen=True)
class ShardTask:
    """One shard to make: which documents, and how."""

    path: Path
    documents: Documents
    rows: np.ndarray  # int64, ascending
    tokenizer: str  # content of tokenizer.json
    end_of_text: int
    sequence_length: int
    dtype: str


@dataclass(frozen=True)
class ShardResult:
    """One line of a manifest, and what the summary needs. `counts`: int64 occurrences per token id."""

    path: str
    bytes: int
    sha256: str
    samples: int
    documents: int
    tokens: int
    text_bytes: int
    counts: np.ndarray


def group_rows(rows: np.ndarray, sizes: np.ndarray, group_bytes: int) -> Iterator[np.ndarray]:
    """Consecutive rows, at least `group_bytes` of text per group but for the last.

    Args:
        rows, sizes: int64, of equal length.
    """
    ends = np.cumsum(sizes)
    first, used = 0, 0
    while first < len(rows):
        last = min(int(np.searchsorted(ends, used + group_bytes)), len(rows) - 1)
        yield rows[first : last + 1]
        first, used = last + 1, int(ends[last])


def make_shard(task: ShardTask) -> ShardResult:
    """Tokenize a group of documents, cut it into blocks, write the tar.

    The blocks of `sequence_length + 1` tokens overlap by one token, so that every token but the first is a target once.
    The rest that does not fill a block is dropped: less than one block per shard.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tasks are the parallelism; threads on top would only compete
    tokenizer = _tokenizer(task.tokenizer, task.end_of_text)
    texts = list(task.documents.texts(task.rows))
    pieces = tokenizer.encode_documents(texts, np.dtype(task.dtype))
    stream = np.concatenate(pieces)
    length = task.sequence_length
    samples = max(0, (len(stream) - 1) // length)
    used = samples * length + 1 if samples else 0
    if samples:
        blocks = np.lib.stride_tricks.sliding_window_view(stream[:used], length + 1)[::length]
    else:
        blocks = np.empty((0, length + 1), dtype=stream.dtype)
    payload = np.ascontiguousarray(blocks, dtype=np.dtype(task.dtype).newbyteorder("<")).view(np.uint8)
    archive = build_tar(task.path.stem, {"tokens": payload})
    task.path.write_bytes(archive.data)
    return ShardResult(
        path=task.path.name,
        bytes=len(archive),
        sha256=hashlib.sha256(archive.data).hexdigest(),
        samples=samples,
        documents=len(texts),
        tokens=samples * length,
        text_bytes=_covered_bytes(texts, pieces, used),
        counts=np.bincount(stream[1:used], minlength=tokenizer.vocab_size),
    )


@functools.lru_cache(maxsize=1)
def _tokenizer(content: str, end_of_text: int) -> Tokenizer:
    """Built once in a process, not once for each of its shards: GPT-2's takes as long as a megabyte of text."""
    return tokenizer_from_json(content, end_of_text)


def _covered_bytes(texts: list[str], pieces: list[np.ndarray], used: int) -> int:
    """Bytes of text that the first `used` tokens stand for; a document that is cut counts by its share of tokens."""
    covered = 0
    for text, piece in zip(texts, pieces, strict=True):
        size = len(text.encode())
        if used < len(piece):
            return covered + round(size * used / len(piece))
        covered += size
        used -= len(piece)
    return covered
