"""Reads samples of a data set by index, straight from the tar shards: any sample in constant time, verified."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polytrope.pipeline.data.description import (
    NumbersDataset,
    NumbersSample,
    NumbersTransform,
    Sample,
    TokensSample,
    read_dataset,
    read_manifest,
)
from polytrope.pipeline.data.power_transform import transform_columns
from polytrope.pipeline.data.tarfiles import TAR_BLOCK, member_stride, npy_header
from polytrope.pipeline.errors import UserError

OPEN_SHARDS = 256  # memory-mapped at a time: address space only
# A directory on a node's own disk: shards of a remote file system are copied there when they are first read.
CACHE_VARIABLE = "POLYTROPE_SHARD_CACHE"


@dataclass(frozen=True)
class Field:
    """Where a part of each sample lies in its shard: from the sample's first byte, `shape` values of `dtype`."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Reader:
    """The samples of one split. See `open_split`. Threads may share one.

    Args:
        directory: the split's directory, holding `manifest.json` and the shards.
        cache: where shards are copied before they are read; None: they are read where they are.
        transform: of numbers, applied to what the shards hold.
    """

    def __init__(self, directory: Path, cache: Path | None = None, transform: NumbersTransform | None = None) -> None:
        self.directory, self.cache, self.transform = directory, cache, transform
        self._lock = threading.Lock()
        sample, shards = read_manifest(directory)
        self.fields, self._stride = _layout(sample)
        # Arrays, not objects: a manifest of a million shards takes tens of megabytes.
        self._paths = np.array([shard["path"] for shard in shards], dtype=np.bytes_)
        self._bytes = np.array([shard["bytes"] for shard in shards], dtype=np.int64)
        self._digests = np.frombuffer(bytes.fromhex("".join([shard["sha256"] for shard in shards])), dtype="V32")
        self._ends = np.cumsum([shard["samples"] for shard in shards], dtype=np.int64)
        self._verified = np.zeros(len(shards), dtype=bool)
        self._open: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def samples(self, indices: np.ndarray) -> np.ndarray:
        """The text samples at `indices` (int `[n]`), as token ids `[n, sequence_length + 1]` in the stored dtype.

        Raises:
            IndexError: an index outside 0 … len - 1.
            UserError: a shard that is missing, truncated or altered, named.
        """
        return self._read(indices, ("tokens",))[0]

    def images(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images at `indices` as uint8 `[n, channels, height, width]`, and their classes int64 `[n]`.

        Raises:
            IndexError, UserError: see `samples`.
        """
        pixels, digits = self._read(indices, ("pixels", "label"))
        return pixels, _classes(digits)

    def numbers(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows at `indices`, float32 `[n, inputs]`, and targets float32 `[n, targets]` or classes int64 `[n]`;
        transformed where the data set says so.

        Raises:
            IndexError, UserError: see `samples`.
        """
        rows, wanted = self._read(indices, ("inputs", "label" if "label" in self.fields else "targets"))
        if "label" in self.fields:
            wanted = _classes(wanted)
        if self.transform is not None:
            rows = transform_columns(rows, self.transform.inputs)
            if self.transform.targets is not None:
                wanted = transform_columns(wanted, self.transform.targets)
        return rows, wanted

    def _read(self, indices: np.ndarray, names: tuple[str, ...]) -> list[np.ndarray]:
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"sample index outside 0 … {len(self) - 1} of {self.directory}")
        fields = [self.fields[name] for name in names]
        results = [np.empty((len(indices), *field.shape), dtype=field.dtype) for field in fields]
        shard_numbers = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(shard_numbers):
            rows = np.nonzero(shard_numbers == number)[0]
            first = int(self._ends[number - 1]) if number else 0
            with self._lock:
                views = self._views_of(int(number))
            for name, result in zip(names, results, strict=True):
                result[rows] = views[name][indices[rows] - first]
        return results

    def _views_of(self, number: int) -> dict[str, np.ndarray]:
        """All samples of a shard as memory-mapped views `[samples, …]`, verified when first opened."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self._path(number) if self.cache is None else self._cached(self.cache, number)
        if not self._verified[number]:
            self._compare(path, number)
            self._verified[number] = True
        count = int(self._ends[number] - (self._ends[number - 1] if number else 0))
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        views = {}
        for name, field in self.fields.items():
            inner = np.empty(field.shape, dtype=field.dtype).strides
            views[name] = np.ndarray((count, *field.shape), field.dtype, mapped, field.offset, (self._stride, *inner))
        self._open[number] = views
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return views

    def verify_shard(self, number: int) -> None:
        """Compare a shard's size and sha256 with the manifest.

        Raises:
            UserError: naming the shard and what differs.
        """
        self._compare(self._path(number), number)

    def _compare(self, path: Path, number: int) -> None:
        expected, sha256 = int(self._bytes[number]), bytes(self._digests[number]).hex()
        hint = "the artifact is damaged: `polytrope run` again verifies it and makes it anew"
        try:
            size = os.path.getsize(path)
            if size != expected:
                raise UserError(f"shard {path} has {size} bytes, its manifest says {expected}", hint)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"shard {path} cannot be read: {error}", hint) from error
        if digest != sha256:
            raise UserError(f"shard {path} was altered: sha256 {digest}, its manifest says {sha256}", hint)

    def _cached(self, cache: Path, number: int) -> Path:
        """The copy of a shard, made if it is not there or not whole; all readers of a node share it."""
        path = cache / f"{bytes(self._digests[number]).hex()}.tar"
        if self._verified[number] and path.exists():
            return path
        try:
            self._compare(path, number)
            self._verified[number] = True
            return path
        except UserError:  # not there yet, or damaged
            temporary = cache / f"{path.stem}.{os.getpid()}.tmp"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._path(number), temporary)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"shard {self._path(number)} cannot be copied to {cache} (${CACHE_VARIABLE}): {error}",
                "free space there, name another directory, or unset the variable",
            ) from error
        self._verified[number] = False
        return path

    def verify(self) -> None:
        """`verify_shard` for every shard."""
        for number in range(len(self._paths)):
            self.verify_shard(number)

    def _path(self, number: int) -> Path:
        return self.directory / str(self._paths[number], "utf-8")


def _classes(digits: np.ndarray) -> np.ndarray:
    """int64 `[n]` from their decimal digits, uint8 `[n, digits]`."""
    places = 10 ** np.arange(digits.shape[1] - 1, -1, -1)
    classes: np.ndarray = (digits.astype(np.int64) - ord("0")) @ places
    return classes


def _layout(sample: Sample) -> tuple[dict[str, Field], int]:
    """The parts of a sample, and the bytes from one sample to the next."""
    if isinstance(sample, TokensSample):
        dtype = np.dtype(sample.dtype).newbyteorder("<")
        tokens = Field(TAR_BLOCK, (sample.tokens,), dtype)
        return {"tokens": tokens}, member_stride(tokens.shape[0] * dtype.itemsize)
    if isinstance(sample, NumbersSample):
        return _numbers_layout(sample)
    shape, digits = sample.image, sample.label_digits
    header = len(npy_header(shape))
    image_bytes = header + math.prod(shape)
    label_at = member_stride(image_bytes) + TAR_BLOCK
    bytes_ = np.dtype(np.uint8)
    fields = {"pixels": Field(TAR_BLOCK + header, shape, bytes_), "label": Field(label_at, (digits,), bytes_)}
    return fields, member_stride(image_bytes, digits)


def _numbers_layout(sample: NumbersSample) -> tuple[dict[str, Field], int]:
    float32 = np.dtype("<f4")
    header = len(npy_header((sample.inputs,), float32.str))
    size = header + sample.inputs * float32.itemsize
    fields = {"inputs": Field(TAR_BLOCK + header, (sample.inputs,), float32)}
    behind = member_stride(size) + TAR_BLOCK
    if sample.targets is None:
        assert sample.label_digits is not None
        fields["label"] = Field(behind, (sample.label_digits,), np.dtype(np.uint8))
        return fields, member_stride(size, sample.label_digits)
    header = len(npy_header((sample.targets,), float32.str))
    fields["targets"] = Field(behind + header, (sample.targets,), float32)
    return fields, member_stride(size, header + sample.targets * float32.itemsize)


def open_split(dataset_directory: Path, split: str) -> Reader:
    """The reader of `split` (`train` or `validation`) of a dataset artifact; $POLYTROPE_SHARD_CACHE names its cache.

    Raises:
        UserError: no such data set or split.
    """
    dataset = read_dataset(Path(dataset_directory))
    splits = dataset.splits
    if split not in splits:
        raise UserError(f"{dataset_directory} has no split `{split}`", f"it has {', '.join(splits)}")
    cache = os.environ.get(CACHE_VARIABLE)
    return Reader(
        Path(dataset_directory) / str(Path(splits[split].manifest).parent),
        Path(cache) if cache else None,
        dataset.transform if isinstance(dataset, NumbersDataset) else None,
    )
