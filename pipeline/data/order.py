"""The order of training samples as a pure function: seek anywhere in constant time, whatever the number of workers."""

from __future__ import annotations

import math

import numpy as np

_ROUNDS = 6


def sample_indices(seed: int, start: int, count: int, total: int) -> np.ndarray:
    """Indices of the samples `start … start + count - 1` of the endless shuffled stream over a data set.

    Epoch e = position // total visits every sample once, in the order of a pseudo-random permutation keyed by
    (seed, e). Nothing of size `total` is built: the permutation is a Feistel network with cycle walking (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002), evaluated only where it is asked for.

    Args:
        seed: any non-negative integer.
        start: global position of the first sample, from 0.
        count: how many.
        total: samples in the data set, at least 1.

    Returns:
        int64 `[count]`, each in 0 … total - 1.
    """
    if total < 1 or start < 0 or count < 0 or seed < 0:
        raise ValueError(f"expected total ≥ 1 and seed, start, count ≥ 0, got {total=}, {seed=}, {start=}, {count=}")
    result = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        epoch, offset = divmod(start + done, total)
        length = min(count - done, total - offset)
        result[done : done + length] = permute(np.arange(offset, offset + length), total, seed, epoch)
        done += length
    return result


def permute(positions: np.ndarray, total: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0 … total - 1 keyed by (seed, epoch), at `positions` (int64, any shape)."""
    side = math.isqrt(total - 1) + 1  # the network permutes 0 … side² - 1 ⊇ 0 … total - 1
    keys = _round_keys(seed, epoch)
    values = _network(positions.astype(np.uint64), np.uint64(side), keys)
    outside = np.nonzero(values >= total)[0]
    while len(outside):  # walk the cycle until it is back inside: a permutation of the smaller set
        values[outside] = _network(values[outside], np.uint64(side), keys)
        outside = outside[values[outside] >= total]
    return values.astype(np.int64)


def _network(values: np.ndarray, side: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    left: np.ndarray = values // side
    right: np.ndarray = values % side
    for key in keys:
        left, right = right, (left + _mix(right ^ key) % side) % side
    joined: np.ndarray = left * side + right
    return joined


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    # Python integers first: any size of seed is folded in, none wraps silently.
    state = np.frombuffer(f"{seed}:{epoch}".encode().ljust(64, b"\0")[:64], dtype=np.uint64)
    key: np.ndarray = np.zeros(1, dtype=np.uint64)
    for word in state:
        key = _mix(key ^ word)
    return [_mix(key + np.uint64(round_number))[0] for round_number in range(_ROUNDS)]


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), modulo 2^64."""
    with np.errstate(over="ignore"):
        mixed: np.ndarray = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed
