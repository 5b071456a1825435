"""Reading samples: the order as a pure function, the cache of a node, and prefetching."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_support import make_dataset

from polytrope.pipeline.data.order import sample_indices
from polytrope.pipeline.data.reader import CACHE_VARIABLE, open_split
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.batches import Prefetcher


@given(total=st.integers(1, 300), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**9))
def test_every_epoch_visits_every_sample_once(total: int, seed: int, epoch: int) -> None:
    assert sorted(sample_indices(seed, epoch * total, total, total)) == list(range(total))


@given(total=st.integers(1, 10**12), seed=st.integers(0, 10**6), start=st.integers(0, 10**15), cut=st.integers(0, 40))
def test_a_part_of_the_stream_is_the_same_wherever_reading_starts(total: int, seed: int, start: int, cut: int) -> None:
    whole = sample_indices(seed, start, 40, total)
    parts = [sample_indices(seed, start, cut, total), sample_indices(seed, start + cut, 40 - cut, total)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_seeds_and_epochs_give_different_orders_without_visible_structure() -> None:
    total = 10_000
    orders = [
        sample_indices(0, 0, total, total),
        sample_indices(0, total, total, total),
        sample_indices(1, 0, total, total),
    ]
    for number, order in enumerate(orders):
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
        for other in orders[:number]:
            assert np.mean(order == other) < 0.002


def test_shards_are_copied_to_the_nodes_cache_verified_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, cache = make_dataset(tmp_path / "dataset"), tmp_path / "cache"
    expected = open_split(dataset.path, "train")
    rows = np.arange(len(expected))
    tokens = expected.samples(rows)
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    assert np.array_equal(open_split(dataset.path, "train").samples(rows), tokens)
    copies = sorted(cache.iterdir())
    assert len(copies) == 2

    content = copies[0].read_bytes()
    copies[0].write_bytes(content[:700] + b"?" + content[701:])
    assert np.array_equal(open_split(dataset.path, "train").samples(rows), tokens)
    assert copies[0].read_bytes() == content

    for shard in (dataset.path / "train").glob("*.tar"):
        shard.unlink()  # the remote file system is away: the copies are enough
    assert np.array_equal(open_split(dataset.path, "train").samples(rows), tokens)
    copies[0].unlink()
    with pytest.raises(UserError, match=r"cannot be copied to .*POLYTROPE_SHARD_CACHE"):
        open_split(dataset.path, "train").samples(rows)


def test_threads_share_a_reader(tmp_path: Path) -> None:
    reader = open_split(make_dataset(tmp_path / "dataset").path, "train")
    expected = [reader.samples(np.array([row])) for row in range(len(reader))]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: reader.samples(np.array([row])), range(len(reader))))
    assert np.array_equal(np.concatenate(expected), np.concatenate(found))


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_come_in_order_from_any_number_of_threads_and_errors_arrive(threads: int) -> None:
    def load(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if step == 17:
            raise UserError("step 17")
        return [(torch.tensor(step), torch.tensor(step))]

    prefetcher = Prefetcher(load, 3, 30, threads)
    assert [int(prefetcher.next_step()[0][0]) for _ in range(3, 17)] == list(range(3, 17))
    with pytest.raises(UserError, match="step 17"):
        prefetcher.next_step()
    prefetcher.close()
