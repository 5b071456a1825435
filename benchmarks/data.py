"""What reading and sharding cost: `python -m benchmarks.data` prints a table and writes benchmarks/results/data.json.

Peers run in the same process or command, one after the other: a memory-mapped token file read as nanoGPT does, and
Hugging Face `datasets` (map with two processes, save_to_disk) on the same documents with the same tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polytrope.pipeline.corpus import PythonSource, read_documents
from polytrope.pipeline.order import sample_indices
from polytrope.pipeline.reader import Reader, open_split
from polytrope.pipeline.stage import EventWriter, Resources, StageContext
from polytrope.pipeline.stages.shard import ShardParameters, shard
from polytrope.pipeline.tokenization import BpeTokenizer, make_tokenizer, tokenizer_from_json
from polytrope.pipeline.training.batches import text_batch

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 8_000_000  # of text
LENGTH, BATCH = 128, 8  # the quickstart's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "data.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="polytrope-benchmark-") as directory:
        run_shard(Path(directory) / "warm", max_bytes=200_000)  # imports count for neither
        dataset, ours = run_shard(Path(directory) / "ours")
        theirs = run_datasets(Path(directory) / "theirs", dataset)
        results = {
            "sharding": {"seconds": ours, "datasets_seconds": theirs, "ratio": theirs / ours},
            "reader": reading(Path(directory), dataset),
            "seek": seeking(Path(directory) / "large"),
        }
    record = {
        "command": "python -m benchmarks.data",
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    for name, values in results.items():
        print(name)
        for key, value in values.items():
            print(f"  {key:<34} {value:,.4g}")


def run_shard(directory: Path, max_bytes: int = MAX_BYTES) -> tuple[Path, float]:
    """The shard stage with two tasks, its tokenizer included: the data set, seconds."""
    (directory / "output").mkdir(parents=True)
    (directory / "scratch").mkdir()
    context = StageContext(
        stage="shard",
        run_id="benchmark",
        key="k",
        attempt=1,
        output=directory / "output",
        scratch=directory / "scratch",
        executor="local",
        resources=Resources(workers=2),
        events=EventWriter(directory / "events"),
    )
    parameters = ShardParameters.model_validate(
        {
            "source": {"kind": "python", "max_bytes": max_bytes},
            "tokenizer": {"kind": "bpe", "vocab_size": 1024},
            "sequence_length": LENGTH,
            "shard_bytes": 1_000_000,
        }
    )
    started = time.perf_counter()
    shard(context, parameters)
    return directory / "output", time.perf_counter() - started


def run_datasets(directory: Path, dataset: Path) -> float:
    """The same documents and tokenizer through `datasets`; the training of the tokenizer counts for both."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    started = time.perf_counter()
    documents = read_documents(PythonSource(max_bytes=MAX_BYTES), directory, directory / "cache")
    texts = list(documents.texts(np.arange(sum(len(chunk) for chunk in documents.chunks()))))
    make_tokenizer(BpeTokenizer(vocab_size=1024), texts, directory)
    content = (dataset / "tokenizer.json").read_text()

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokenizer = tokenizer_from_json(content)
        tokens: list[int] = []
        for piece in tokenizer.encode_documents(batch["text"], np.dtype("uint16")):
            tokens += piece.tolist()
        count = (len(tokens) - 1) // LENGTH
        return {"tokens": [tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)]}

    table = Dataset.from_dict({"text": texts})
    blocks = table.map(tokenize, batched=True, num_proc=2, remove_columns=["text"], keep_in_memory=False)
    blocks.save_to_disk(str(directory / "saved"))
    return time.perf_counter() - started


def reading(directory: Path, dataset: Path) -> dict[str, float]:
    """Tokens per second of shuffled batches, inputs and targets as int64 tensors, beside a memory-mapped file."""
    reader = open_split(dataset, "train")
    total = len(reader)
    blocks = reader.samples(np.arange(total))
    file = directory / "train.bin"
    np.concatenate([blocks[:, :-1].reshape(-1), blocks[-1, -1:]]).tofile(file)

    def ours(step: int) -> None:
        text_batch(reader.samples(sample_indices(0, step * BATCH, BATCH, total)))

    def theirs(_step: int) -> None:  # get_batch of nanoGPT's train.py, which opens the file for each batch
        data = np.memmap(file, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - LENGTH, (BATCH,))
        torch.stack([torch.from_numpy(data[i : i + LENGTH].astype(np.int64)) for i in starts])
        torch.stack([torch.from_numpy(data[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in starts])

    rates: dict[str, list[float]] = {"ours": [], "memmap": []}
    for _ in range(5):  # taking turns, so that a busy moment of the machine meets both
        rates["ours"].append(_rate(ours))
        rates["memmap"].append(_rate(theirs))
    best = {name: max(values) for name, values in rates.items()}
    return {
        "tokens_per_second": best["ours"],
        "memmap_tokens_per_second": best["memmap"],
        "ratio": best["ours"] / best["memmap"],
    }


def _rate(load: Callable[[int], None], steps: int = 1000) -> float:
    started = time.perf_counter()
    for step in range(steps):
        load(step)
    return steps * BATCH * LENGTH / (time.perf_counter() - started)


def seeking(directory: Path) -> dict[str, float]:
    """A manifest of a million shards (all one file) with 2 · 10^9 samples: time of a seek, memory while reading."""
    from polytrope.pipeline.tarfiles import build_tar

    directory.mkdir()
    samples, tokens, shards = 2000, 17, 1_000_000
    payload = np.zeros((samples, 2 * tokens), dtype=np.uint8)
    content = build_tar("shard", {"tokens": payload}).tobytes()
    (directory / "shard.tar").write_bytes(content)
    entry: dict[str, Any] = {
        "path": "shard.tar",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "samples": samples,
    }
    manifest = {"format": 1, "sample": {"tokens": tokens, "dtype": "uint16"}, "shards": []}
    text = json.dumps(manifest).replace("[]", "[" + ", ".join([json.dumps(entry)] * shards) + "]")
    (directory / "manifest.json").write_text(text)
    del text
    started = time.perf_counter()
    reader = Reader(directory)
    opened = time.perf_counter() - started
    seeks = []
    for position in (10**9, 10**9 + 12345, 1, 1_999_999_999):
        started = time.perf_counter()
        reader.samples(sample_indices(7, position, 1, len(reader)))
        seeks.append(time.perf_counter() - started)
    before = _own_memory()
    for step in range(500):
        reader.samples(sample_indices(7, 10**9 + step * BATCH, BATCH, len(reader)))
    after = _own_memory()
    return {
        "shards": shards,
        "open_seconds": opened,
        "seek_milliseconds": 1000 * max(seeks),
        "growth_megabytes_over_4000_shards": (after - before) / 1e6,
    }


def _own_memory() -> int:
    """Bytes of this process without mapped files (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
