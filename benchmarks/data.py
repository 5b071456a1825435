"""What reading and sharding cost: `python -m benchmarks.data` prints a table and writes benchmarks/results/data.json.

Sharding: the shard stage with two workers beside Hugging Face `datasets` (`map` with two processes, `save_to_disk`),
in turns, on the same documents. Both read the documents into Arrow, train the tokenizer, tokenize, cut into blocks and
write them; the stage also deals out the splits, counts tokens and hashes its shards. Reader: batches of the quickstart
beside a token file memory-mapped as nanoGPT does, in turns, and beside what the quickstart's training consumes: its
stages `shard` and `baseline` as they are, only with fewer steps. Seek: the first sample of a run that starts anywhere
in a manifest of a million shards, the check of its shard's hash included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from polytrope.pipeline.stage import Resources, stage_context
from polytrope.pipeline.stages.shard.parameters import ShardParameters
from polytrope.pipeline.stages.shard.shard import shard

# Imports stay small here: processes that the shard stage starts import the main module again, which is a tiny one where
# the engine runs it.

ROOT = Path(__file__).resolve().parent.parent
LENGTH, BATCH = 128, 8  # the quickstart's
VOCABULARY = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "data.json")
    parser.add_argument("--megabytes", type=float, default=8, help="of text to shard (default 8)")
    parser.add_argument("--turns", type=int, default=3, help="of sharding (default 3)")
    parser.add_argument("--shards", type=int, default=1_000_000, help="in the manifest to seek in (default 1000000)")
    parser.add_argument("--steps", type=int, default=100, help="of the quickstart's training (default 100)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="polytrope-benchmark-") as name:
        directory = Path(name)
        consumed = quickstart_consumes(directory / "quickstart", options.steps)
        dataset, results = sharding(directory, int(options.megabytes * 1e6), options.turns)
        results = {
            "sharding": results,
            "reader": reading(directory, dataset, consumed),
            "seek": seeking(directory / "large", options.shards),
        }
    record = {
        "command": "python -m benchmarks.data",
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for title, values in results.items():
        print(title)
        for key, value in values.items():
            print(f"  {key:<36} {value:,.4g}")


def quickstart_consumes(store: Path, steps: int) -> float:
    """Tokens per second of the quickstart's first training: two workers, the median of its reports after the first."""
    from polytrope import load_workflow, run

    workflow = load_workflow(ROOT / "workflows" / "quickstart.yaml", [f"params.steps={steps}"])
    stages = {name: workflow.stages[name] for name in ("shard", "baseline")}
    run(workflow.model_copy(update={"stages": stages}), executor="local", store=store, tracking=False, display="none")
    rates = []
    for path in store.rglob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event.get("kind") == "metrics" and "tokens_per_second" in event["values"]:
                rates.append(event["values"]["tokens_per_second"])
    return statistics.median(rates[1:])


def sharding(directory: Path, max_bytes: int, turns: int) -> tuple[Path, dict[str, float]]:
    """Seconds of both sides in turns. Returns the data set, too."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    run_shard(directory / "warm", 200_000)  # imports count for neither
    run_datasets(directory / "warm-datasets", 200_000)
    for turn in range(turns):
        seconds["ours"].append(run_shard(directory / f"ours-{turn}", max_bytes))
        seconds["theirs"].append(run_datasets(directory / f"theirs-{turn}", max_bytes))
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return directory / "ours-0" / "output", {
        "megabytes": max_bytes / 1e6,
        "seconds": statistics.median(seconds["ours"]),
        "datasets_seconds": statistics.median(seconds["theirs"]),
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
    }


def run_shard(directory: Path, max_bytes: int) -> float:
    """The shard stage with two workers, its tokenizer included, in seconds; the data set is in `output`."""
    context = stage_context(directory, stage="shard", resources=Resources(workers=2))
    parameters = ShardParameters.model_validate(
        {
            "source": {"kind": "python", "max_bytes": max_bytes},
            "tokenizer": {"kind": "bpe", "vocab_size": VOCABULARY},
            "sequence_length": LENGTH,
            "shard_bytes": 1_000_000,
        }
    )
    started = time.perf_counter()
    shard(context, parameters)
    return time.perf_counter() - started


def run_datasets(directory: Path, max_bytes: int) -> float:
    """The same documents, tokenizer and blocks through `datasets` in seconds."""
    from datasets import Dataset, disable_progress_bars

    from polytrope.pipeline.data.tokenization import BpeTokenizer, make_tokenizer, tokenizer_from_json
    from polytrope.pipeline.stages.shard.corpus import PythonSource, read_documents

    disable_progress_bars()
    started = time.perf_counter()
    documents = read_documents(PythonSource(max_bytes=max_bytes), directory, directory / "cache")
    (file,) = documents.files
    table = Dataset.from_file(file)
    content = make_tokenizer(BpeTokenizer(vocab_size=VOCABULARY), table["text"], directory).to_json()

    def tokenize(batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the stage's workers
        tokens = np.concatenate(tokenizer_from_json(content).encode_documents(batch["text"], np.dtype("uint16")))
        count = (len(tokens) - 1) // LENGTH
        windows = np.lib.stride_tricks.sliding_window_view(tokens[: count * LENGTH + 1], LENGTH + 1)
        return {"tokens": np.ascontiguousarray(windows[::LENGTH])}

    blocks = table.map(tokenize, batched=True, num_proc=2, remove_columns=["text"])
    blocks.save_to_disk(str(directory / "saved"))
    return time.perf_counter() - started


def reading(directory: Path, dataset: Path, consumed: float) -> dict[str, float]:
    """Tokens per second of shuffled batches, inputs and targets as int64 tensors, beside a memory-mapped file."""
    import torch

    from polytrope.pipeline.data.order import sample_indices
    from polytrope.pipeline.data.reader import open_split
    from polytrope.pipeline.stages.train.batches import text_batch

    torch.set_num_threads(1)
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
    rate = statistics.median(rates["ours"])
    return {
        "tokens_per_second": rate,
        "memmap_tokens_per_second": statistics.median(rates["memmap"]),
        "ratio": statistics.median(a / b for a, b in zip(rates["ours"], rates["memmap"], strict=True)),
        "quickstart_tokens_per_second": consumed,
        "ratio_to_quickstart": rate / consumed,
    }


def _rate(load: Callable[[int], None], steps: int = 1000) -> float:
    started = time.perf_counter()
    for step in range(steps):
        load(step)
    return steps * BATCH * LENGTH / (time.perf_counter() - started)


def seeking(directory: Path, shards: int) -> dict[str, float]:
    """A manifest of `shards` (all one file) of 2000 samples: time of a first sample, memory while reading."""
    from polytrope.pipeline.data.order import sample_indices
    from polytrope.pipeline.data.reader import Reader
    from polytrope.pipeline.data.tarfiles import build_tar

    directory.mkdir()
    samples, tokens = 2000, 17
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
    (directory / "manifest.json").write_text(text, encoding="utf-8")
    del text
    started = time.perf_counter()
    reader = Reader(directory)
    opened = time.perf_counter() - started
    seeks = []
    middle = len(reader) // 2  # sample 10^9 of the usual manifest
    for position in (middle, 1, len(reader) - 1, *range(middle + 12_345, middle + 12_353)):
        started = time.perf_counter()
        reader.samples(sample_indices(7, position, 1, len(reader)))  # of a shard not seen before: its hash is checked
        seeks.append(1000 * (time.perf_counter() - started))
    before = _own_memory()
    for step in range(500):
        reader.samples(sample_indices(7, middle + step * BATCH, BATCH, len(reader)))
    after = _own_memory()
    return {
        "shards": shards,
        "open_seconds": opened,
        "seek_milliseconds": seeks[0],
        "median_seek_milliseconds": statistics.median(seeks),
        "greatest_seek_milliseconds": max(seeks),
        "growth_megabytes_over_4000_shards": (after - before) / 1e6,
    }


def _own_memory() -> int:
    """Bytes of this process without mapped files (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
