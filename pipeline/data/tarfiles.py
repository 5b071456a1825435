"""Writes webdataset tar shards whose members all have equal sizes: any sample is found by arithmetic."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

TAR_BLOCK = 512
INDEX_DIGITS = 8


def blocks_of(size: int) -> int:
    """Bytes that a payload of `size` takes in a tar: whole blocks."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def member_stride(*sizes: int) -> int:
    """Bytes from a sample to the next, for samples of members with payloads of `sizes`: a header block each, then the
    payload in whole blocks."""
    return sum(TAR_BLOCK + blocks_of(size) for size in sizes)


def npy_header(shape: Sequence[int], dtype: str = "|u1") -> bytes:
    """What stands before the values in an `npy` member of `shape`."""
    import numpy as np

    buffer = io.BytesIO()
    values = np.empty(tuple(shape), dtype=dtype)
    np.save(buffer, values)
    return buffer.getvalue()[: -values.nbytes]


def npy_members(values: np.ndarray) -> np.ndarray:
    """Each `values[index]` as an `npy` file, uint8 `[samples, size]`."""
    import numpy as np

    header = npy_header(values.shape[1:], values.dtype.str)
    payload = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    members = np.empty((len(values), len(header) + payload.shape[1]), dtype=np.uint8)
    members[:, : len(header)] = np.frombuffer(header, dtype=np.uint8)
    members[:, len(header) :] = payload
    return members


def digit_members(labels: np.ndarray, digits: int) -> np.ndarray:
    """Each class as text of so many decimal digits, uint8 `[samples, digits]`."""
    return _digits(labels, 10, digits)


def build_tar(stem: str, members: dict[str, np.ndarray]) -> np.ndarray:
    """A tar of the samples `<stem>-<index>.<extension>`, byte for byte what `tarfile` would write, but vectorised.

    Times, owners and modes are constants, so that equal payloads give equal bytes.

    Args:
        stem: of the names, without a dot (webdataset's keys end at the first one).
        members: for each extension the payloads, uint8 `[samples, size]`.

    Returns:
        uint8 `[bytes]`.
    """
    import numpy as np

    samples = len(next(iter(members.values())))
    stride = member_stride(*(payload.shape[1] for payload in members.values()))
    used = samples * stride + 2 * TAR_BLOCK  # two zero blocks end an archive
    total = -(-used // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    archive = np.zeros(total, dtype=np.uint8)
    rows = archive[: samples * stride].reshape(samples, stride)
    offset = 0
    for extension, payload in members.items():
        rows[:, offset : offset + TAR_BLOCK] = _headers(stem, extension, payload.shape[1], samples)
        offset += TAR_BLOCK
        rows[:, offset : offset + payload.shape[1]] = payload
        offset += blocks_of(payload.shape[1])
    return archive


def _headers(stem: str, extension: str, size: int, samples: int) -> np.ndarray:
    """Header blocks uint8 `[samples, 512]`: one template, then the digits of the name and the checksum."""
    import numpy as np

    member = tarfile.TarInfo(f"{stem}-{0:0{INDEX_DIGITS}d}.{extension}")
    member.size = size
    template = np.frombuffer(member.tobuf(tarfile.USTAR_FORMAT), dtype=np.uint8)
    headers = np.repeat(template[None], samples, axis=0)
    first = len(stem) + 1
    headers[:, first : first + INDEX_DIGITS] = _digits(np.arange(samples), 10, INDEX_DIGITS)
    headers[:, 148:156] = ord(" ")  # the checksum counts its own field as spaces
    headers[:, 148:154] = _digits(headers.sum(axis=1, dtype=np.int64), 8, 6)
    headers[:, 154] = 0
    return headers


def _digits(numbers: np.ndarray, base: int, width: int) -> np.ndarray:
    """ASCII digits uint8 `[len(numbers), width]`, zero-padded."""
    import numpy as np

    places = base ** np.arange(width - 1, -1, -1)
    return (numbers[:, None] // places % base + ord("0")).astype(np.uint8)
