"""What a training step costs beside plain PyTorch: `python -m benchmarks.train` → a table and results/train.json.

Both sides run in the same processes and take turns, ten steps each: our step (DeepSpeed engine, data, metrics; Hermite
of degree 3) and a bare loop with the same model, batch and optimizer but GELU, which with two workers is torch's DDP
over gloo. The time lost to checkpoints and reports is that of `_Run.step` at the default cadence against the same
steps without any. Without a GPU its columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from polytrope.pipeline.reader import open_split
from polytrope.pipeline.stage import Artifact, EventWriter, Resources, StageContext
from polytrope.pipeline.stages.shard import ShardParameters, shard
from polytrope.pipeline.stages.train import TrainParameters

ROOT = Path(__file__).resolve().parent.parent
TURNS, STEPS = 12, 10
MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128}
PARAMETERS = {"steps": 100_000, "global_batch_size": 8, "validation_every": 0, "validation_samples": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "train.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=TURNS, help=f"turns of {STEPS} steps (default {TURNS})")
    options = parser.parse_args()
    if options.worker:
        measure(options.worker, options.turns)
        return
    with tempfile.TemporaryDirectory(prefix="polytrope-benchmark-") as name:
        dataset = make_dataset(Path(name))
        results = {
            f"{workers} worker{'s' if workers > 1 else ''}": run(Path(name), dataset, workers, options.turns)
            for workers in (1, 2)
        }
    record = {
        "command": "python -m benchmarks.train",
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
        "results": results,
        "gpu": {"mfu": None, "hermite_over_gelu": None},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    for title, values in results.items():
        print(title)
        for key, value in values.items():
            print(f"  {key:<28} {value:,.4g}")


def make_dataset(directory: Path) -> Path:
    """The quickstart's kind of data, smaller."""
    context = make_context(directory / "dataset", 1)
    text = {"kind": "python", "max_bytes": 500_000}
    shard(context, ShardParameters.model_validate({"source": text, "tokenizer": {"kind": "bpe", "vocab_size": 1024}}))
    return context.output


def make_context(directory: Path, workers: int) -> StageContext:
    for name in ("output", "scratch"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    return StageContext(
        stage="train",
        run_id="benchmark",
        key="k",
        attempt=1,
        output=directory / "output",
        scratch=directory / "scratch",
        executor="local",
        resources=Resources(workers=workers),
        events=EventWriter(directory / "events"),
    )


def run(directory: Path, dataset: Path, workers: int, turns: int) -> dict[str, float]:
    """Measure in `workers` processes of one thread each; what rank 0 found."""
    task = directory / f"task-{workers}.json"
    task.write_text(json.dumps({"dataset": str(dataset), "directory": str(directory / f"run-{workers}")}))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train", "--worker", str(task), "--turns", str(turns)],
            env={
                "GLOO_SOCKET_IFNAME": "lo",
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(workers),
                "LOCAL_WORLD_SIZE": str(workers),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(workers)
    ]
    output = processes[0].communicate()[0]
    if any(process.wait() for process in processes):
        raise SystemExit(f"a worker failed:\n{output}")
    return dict(json.loads(output.splitlines()[-1]))


def measure(task: Path, turns: int) -> None:
    """One rank of both sides; rank 0 prints the figures as its last line."""
    content = json.loads(task.read_text())
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    from polytrope.pipeline.training.rendezvous import join

    torch.set_num_threads(1)
    Path(content["directory"]).mkdir(parents=True, exist_ok=True)
    join(f"file://{content['directory']}/rendezvous", rank, workers, "gloo", timedelta(seconds=120))
    dataset = Path(content["dataset"])
    plain = our_run(Path(content["directory"]) / "plain", dataset, rank, workers, checkpoint_every=0, log_every=100_000)
    peer = bare_run(dataset, rank, workers)
    usual = our_run(Path(content["directory"]) / "usual", dataset, rank, workers)
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(turns):
        seconds["ours"].append(_time(plain))
        seconds["peer"].append(_time(peer))
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"][1:], seconds["peer"][1:], strict=True))
    lost = []
    for _ in range(max(1, turns // 6)):  # 100 steps: one checkpoint, ten reports
        bare, full = 0.0, 0.0
        for _ in range(10):
            bare += _time(plain)
            full += _time(usual)
        lost.append(full / bare - 1)
    if rank == 0:
        figures = {
            "step_milliseconds": 1000 * statistics.median(seconds["ours"]) / STEPS,
            "peer_step_milliseconds": 1000 * statistics.median(seconds["peer"]) / STEPS,
            "ratio": ratio,
            "lost_to_checkpoints": min(lost),
        }
        print(json.dumps(figures), flush=True)
    os._exit(0)


def _time(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return time.perf_counter() - started


def our_run(directory: Path, dataset: Path, rank: int, workers: int, **changes: Any) -> Callable[[], None]:
    """The `train` stage's step, Hermite of degree 3, ZeRO-1 from two workers on."""
    from polytrope.pipeline.training import loop
    from polytrope.pipeline.training.batches import Prefetcher
    from polytrope.pipeline.training.deepspeed_engine import create_engine
    from polytrope.pipeline.training.plan import make_plan
    from polytrope.pipeline.training.state import Progress
    from polytrope.pipeline.training.tasks import make_task

    context = make_context(directory, workers)
    model = {**MODEL, "activation": {"name": "hermite", "degree": 3}}
    settings = {**PARAMETERS, "model": model, "zero_stage": 0 if workers == 1 else 1, **changes}
    plan = make_plan(context, Artifact(dataset, "d", "shard"), None, TrainParameters.model_validate(settings))
    engine = create_engine(plan, loop._create_model(plan), cpu=True)
    task = make_task(plan, rank, pin=False)
    prefetcher = Prefetcher(task.train_step, 0, plan.steps)
    progress = Progress()
    return loop._Run(plan, context, rank, torch.device("cpu"), engine, None, progress, task, prefetcher).step


def bare_run(dataset: Path, rank: int, workers: int) -> Callable[[], None]:
    """The same model with GELU in a bare loop, in DistributedDataParallel from two workers on."""
    from polytrope.models import build_model
    from polytrope.pipeline.training.batches import text_batch

    reader = open_split(dataset, "train")
    blocks = reader.samples(torch.arange(len(reader)).numpy())
    torch.manual_seed(0)
    sizes = {**MODEL, "vocab_size": 1024, "sequence_length": 128, "activation": "gelu_tanh"}
    model = build_model("gpt2", sizes)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if workers > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    share = int(PARAMETERS["global_batch_size"]) // workers
    torch.manual_seed(rank)

    def step() -> None:
        rows = torch.randint(len(blocks), (share,)).numpy()
        loss = wrapped(*text_batch(blocks[rows]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a loop shows its loss

    return step


if __name__ == "__main__":
    main()
