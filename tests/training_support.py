"""A small data set and a small training, for the tests of the `train` stage."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.stage import Artifact, Resources, StageContext, stage_context
from polytrope.pipeline.stages.train.parameters import TrainParameters
from polytrope.pipeline.stages.train.train import train

SEQUENCE_LENGTH = 32
TRAINS_IN_FP16 = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())  # what DeepSpeed asks on a CPU
MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "activation": {"name": "hermite", "degree": 3}}
PARAMETERS: dict[str, Any] = {
    "model": MODEL,
    "steps": 12,
    "global_batch_size": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "log_every": 4,
    "validation_every": 6,
    "validation_samples": 7,  # odd: the ranks' shares differ
    "checkpoint_every": 4,
}


def make_dataset(directory: Path, texts: list[str] | None = None) -> Artifact:
    """A text data set of bytes in the format of the `shard` stage, with two training shards."""
    texts = texts or [f"line {number} of a text that is easy to learn; " * 12 for number in range(60)]
    splits = {}
    for name, groups in (("train", [texts[:25], texts[25:50]]), ("validation", [texts[50:]])):
        (directory / name).mkdir(parents=True)
        shards = [
            write_shard(directory / name / f"shard-{number:06d}.tar", group) for number, group in enumerate(groups)
        ]
        manifest = {
            "format": 1,
            "sample": {"tokens": SEQUENCE_LENGTH + 1, "dtype": "uint16"},
            "shards": shards,
        }
        (directory / name / "manifest.json").write_text(json.dumps(manifest))
        samples = sum(shard["samples"] for shard in shards)
        splits[name] = {
            "manifest": f"{name}/manifest.json", "documents": 1, "bytes": samples * SEQUENCE_LENGTH,
            "tokens": samples * SEQUENCE_LENGTH, "samples": samples,
        }  # fmt: skip
    description = {
        "format": 1,
        "kind": "text",
        "name": "lines",
        "tokenizer": {"kind": "bytes", "vocab_size": 257},
        "sequence_length": SEQUENCE_LENGTH,
        "splits": splits,
        "unigram_entropy": 3.0,
        "digest": "0" * 64,
    }
    (directory / "dataset.json").write_text(json.dumps(description))
    (directory / "tokenizer.json").write_text('{"kind": "bytes"}')
    return Artifact(directory, "digest", "shard")


def make_initial(directory: Path, dataset: Artifact, config: dict[str, Any]) -> Artifact:
    """A GPT-2 that no seed of a training gives: what stays must come from here."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_model(directory, build_model("gpt2", config), tokenizer=dataset.path)
    return Artifact(directory, "digest", "train")


def write_shard(path: Path, texts: list[str]) -> dict[str, Any]:
    """Blocks of SEQUENCE_LENGTH + 1 bytes of the joined texts as a tar; returns the shard's manifest entry."""
    tokens = np.frombuffer("".join(texts).encode(), dtype=np.uint8).astype("<u2")
    blocks = tokens[: len(tokens) // (SEQUENCE_LENGTH + 1) * (SEQUENCE_LENGTH + 1)].reshape(-1, SEQUENCE_LENGTH + 1)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, block in enumerate(blocks):
            member = tarfile.TarInfo(f"{path.stem}-{index:08d}.tokens")
            member.size = block.nbytes
            archive.addfile(member, io.BytesIO(block.tobytes()))
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"path": path.name, "bytes": len(content), "sha256": digest, "samples": len(blocks)}


def make_context(directory: Path, workers: int = 2, executor: str = "local", cpus: float = 1.0) -> StageContext:
    """A stage context with its directories below `directory`; the same directory continues the same training."""
    return stage_context(directory, stage="train", executor=executor, resources=Resources(workers=workers, cpus=cpus))


def run_training(
    directory: Path,
    dataset: Artifact,
    *,
    workers: int = 2,
    executor: str = "local",
    initial: Artifact | None = None,
    teacher: Artifact | None = None,
    **changes: Any,
) -> dict[str, float]:
    """Run the stage function in this process, as the engine would."""
    context = make_context(directory, workers, executor, cpus=1.0 if executor == "local" else 0.5)
    return train(context, dataset, TrainParameters.model_validate({**PARAMETERS, **changes}), initial, teacher)


def weights_hash(directory: Path) -> str:
    """Identity of the trained weights."""
    return hashlib.sha256((directory / "output" / "model.safetensors").read_bytes()).hexdigest()


def validation_loss(directory: Path, dataset: Artifact, samples: int) -> float:
    """Of the model that the training in `directory` wrote, on the first validation samples."""
    blocks = torch.from_numpy(open_split(dataset.path, "validation").samples(np.arange(samples)).astype(np.int64))
    with torch.no_grad():
        return float(load_model(directory / "output")(blocks[:, :-1], blocks[:, 1:]))


def read_events(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind, in order of time."""
    lines = [line for path in (directory / "events").glob("*.jsonl") for line in path.read_text().splitlines()]
    events = [json.loads(line) for line in lines]
    return sorted((event for event in events if event["kind"] == kind), key=lambda event: event["time"])


def history(directory: Path) -> list[dict[str, float]]:
    return list(json.loads((directory / "output" / "history.json").read_text()))
