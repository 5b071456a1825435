"""What a training step costs beside plain PyTorch: `python -m benchmarks.train` → a table and results/train.json.

Both sides run in the same processes and take turns, ten steps each: our step (DeepSpeed engine, data, metrics; Hermite
of degree 3 without tangents) and a bare loop with the same model, batch and optimizer but GELU, which with two workers
is torch's DDP over gloo. The time lost to checkpoints and reports is that of `_Run.step` at the default cadence against
the same steps without any, the median of its repeats. Memory is what a forward pass leaves resident, by
`activation_checkpointing`. The digits are workflows/convnext-digits.yaml as it is. With a GPU: GPT-2 124M, bf16,
compiled; without one its columns stay empty.
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

from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.stage import Artifact, Resources, stage_context
from polytrope.pipeline.stages.shard.parameters import ShardParameters
from polytrope.pipeline.stages.shard.shard import shard
from polytrope.pipeline.stages.train.parameters import TrainParameters

ROOT = Path(__file__).resolve().parent.parent
TURNS, STEPS = 12, 10
MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128}
# As in the record: without tangents. `train` gives `hermite3` alone some, and another start.
HERMITE = {"name": "hermite", "degree": 3, "init": "variance_preserving", "interval": None}
PARAMETERS = {"steps": 100_000, "global_batch_size": 8, "validation_every": 0, "validation_samples": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "train.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--forward", help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=TURNS, help=f"turns of {STEPS} steps, from 2 (default {TURNS})")
    parser.add_argument("--repeats", type=int, default=9, help="of 100 steps with checkpoints and reports (default 9)")
    parser.add_argument("--no-digits", action="store_true", help="leave the workflow on digits out (about 3 minutes)")
    parser.add_argument(
        "--peak-flops", type=float, default=989e12, help="of the GPU in bf16 (default: an H100 SXM's 989e12)"
    )
    options = parser.parse_args()
    if options.turns < 2 or options.repeats < 1:
        parser.error("--turns needs 2 or more (the first is not counted), --repeats 1 or more")
    if options.worker:
        measure(options.worker, options.turns, options.repeats)
        return
    if options.forward:
        print(resident_after_forward(options.forward))
        return
    with tempfile.TemporaryDirectory(prefix="polytrope-benchmark-") as name:
        dataset = make_dataset(Path(name))
        results = {
            f"{workers} worker{'s' if workers > 1 else ''}": run(
                Path(name), dataset, workers, options.turns, options.repeats
            )
            for workers in (1, 2)
        }
        results["memory"] = memory()
        if not options.no_digits:
            results["digits"] = digits(Path(name) / "digits")
        gpu = gpu_figures(Path(name), options.peak_flops) if torch.cuda.is_available() else None
    record = {
        "command": "python -m benchmarks.train",
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
        "results": results,
        "gpu": gpu or {"device": None, "mfu": None, "hermite_over_gelu": None},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for title, values in {**results, **({"gpu": gpu} if gpu else {})}.items():
        print(title)
        for key, value in values.items():
            print(f"  {key:<34} {value:,.4g}" if isinstance(value, int | float) else f"  {key:<34} {value}")


def make_dataset(directory: Path, sequence_length: int = 128, max_bytes: int = 500_000) -> Path:
    """The quickstart's kind of data, smaller."""
    context = stage_context(directory / "dataset", stage="shard")
    source = {"kind": "python", "max_bytes": max_bytes}
    tokenizer = {"kind": "bpe", "vocab_size": 1024}
    parameters = {"source": source, "tokenizer": tokenizer, "sequence_length": sequence_length}
    shard(context, ShardParameters.model_validate(parameters))
    return context.output


def run(directory: Path, dataset: Path, workers: int, turns: int, repeats: int) -> dict[str, float]:
    """Measure in `workers` processes of one thread each; what rank 0 found."""
    task = directory / f"task-{workers}.json"
    task.write_text(
        json.dumps({"dataset": str(dataset), "directory": str(directory / f"run-{workers}")}), encoding="utf-8"
    )
    command = [sys.executable, "-m", "benchmarks.train"]
    processes = [
        subprocess.Popen(
            [*command, "--worker", str(task), "--turns", str(turns), "--repeats", str(repeats)],
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
            encoding="utf-8",
        )
        for rank in range(workers)
    ]
    output = processes[0].communicate()[0]
    if any(process.wait() for process in processes):
        raise SystemExit(f"a worker failed:\n{output}")
    return dict(json.loads(output.splitlines()[-1]))


def measure(task: Path, turns: int, repeats: int) -> None:
    """One rank of both sides; rank 0 prints the figures as its last line."""
    content = json.loads(task.read_text(encoding="utf-8"))
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    from polytrope.pipeline.stages.train.rendezvous import join

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
    for _ in range(repeats):  # 100 steps each: one checkpoint, ten reports
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
            "lost_to_checkpoints": statistics.median(lost),
        }
        print(json.dumps(figures), flush=True)
    os._exit(0)


def _time(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return time.perf_counter() - started


def our_run(
    directory: Path, dataset: Path, rank: int, workers: int, gpu: bool = False, **changes: Any
) -> Callable[[], None]:
    """The `train` stage's step, Hermite of degree 3 unless `model` says otherwise, ZeRO-1 from two workers on."""
    from polytrope.pipeline.stages.train import loop
    from polytrope.pipeline.stages.train.batches import Prefetcher
    from polytrope.pipeline.stages.train.deepspeed_engine import create_engine
    from polytrope.pipeline.stages.train.modality import make_modality
    from polytrope.pipeline.stages.train.training_plan import make_plan
    from polytrope.pipeline.stages.train.training_state import Progress

    resources = Resources(workers=workers, gpus=1.0 if gpu else 0.0)
    context = stage_context(directory, stage="train", resources=resources)
    model = changes.pop("model", None) or {**MODEL, "activation": HERMITE}
    settings = {**PARAMETERS, "model": model, "zero_stage": 0 if workers == 1 else 1, **changes}
    plan = make_plan(context, Artifact(dataset, "d", "shard"), None, TrainParameters.model_validate(settings))
    engine = create_engine(plan, loop._create_model(plan), cpu=not gpu)
    modality = make_modality(plan, rank, pin=gpu)
    prefetcher = Prefetcher(modality.train_step, 0, plan.steps)
    progress = Progress()
    device = torch.device("cuda" if gpu else "cpu")
    return loop._Run(plan, context, rank, device, engine, None, progress, modality, prefetcher).step


def bare_run(dataset: Path, rank: int, workers: int) -> Callable[[], None]:
    """The same model with GELU in a bare loop, in DistributedDataParallel from two workers on."""
    from polytrope.models import build_model
    from polytrope.pipeline.stages.train.batches import text_batch

    reader = open_split(dataset, "train")
    blocks = reader.samples(torch.arange(len(reader)).numpy())
    torch.manual_seed(0)
    sizes = {**MODEL, "vocab_size": 1024, "sequence_length": 128, "activation": "gelu_tanh"}
    model = build_model("gpt2", sizes)
    parallel = torch.nn.parallel.DistributedDataParallel
    wrapped = parallel(model, gradient_as_bucket_view=True) if workers > 1 else model  # its fastest setting here
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


def memory() -> dict[str, float]:
    """Megabytes that a forward pass leaves resident, each in a process of its own."""
    figures = {}
    for mode in ("none", "mlp", "block"):
        command = [sys.executable, "-m", "benchmarks.train", "--forward", mode]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        figures[f"{mode}_megabytes"] = float(done.stdout.split()[-1]) / 1e6
    figures["mlp_saves"] = 1 - figures["mlp_megabytes"] / figures["none_megabytes"]
    figures["block_saves"] = 1 - figures["block_megabytes"] / figures["none_megabytes"]
    return figures


def resident_after_forward(mode: str) -> int:
    """Bytes kept for backward by the benchmark's model with Hermite activations on 64 sequences of 128 tokens."""
    import psutil

    from polytrope.models import build_model

    sizes = {**MODEL, "vocab_size": 1024, "sequence_length": 128, "activation": HERMITE}
    model = build_model("gpt2", sizes)
    model.set_activation_checkpointing(mode)  # type: ignore[operator]
    tokens = torch.randint(1024, (64, 128))
    model(tokens[:1], tokens[:1]).backward()
    before = psutil.Process().memory_info().rss
    loss = model(tokens, tokens)
    kept = psutil.Process().memory_info().rss - before
    loss.backward()
    return int(kept)


def digits(store: Path) -> dict[str, float]:
    """workflows/convnext-digits.yaml: seconds, and the accuracy of each activation on the held-out digits."""
    command = [
        sys.executable,
        "-m",
        "polytrope.pipeline.commands.cli",
        "run",
        "workflows/convnext-digits.yaml",
        "--no-tracking",
    ]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--executor", "local", "--store", str(store), "--quiet"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    figures = {"seconds": time.perf_counter() - started}
    (evaluation,) = (store / "artifacts").glob("*/files/evaluation.json")
    for label, model in json.loads(evaluation.read_text(encoding="utf-8"))["models"].items():
        figures[f"top1 {label}"] = model["top1"]
    return figures


def gpu_figures(directory: Path, peak_flops: float) -> dict[str, Any]:
    """GPT-2 124M, bf16, compiled, on one GPU: seconds per step and MFU with GELU and with Hermite of degree 3."""
    from polytrope.models.gpt2 import GPT2, GPT2_PRESETS, GPT2Config
    from polytrope.pipeline.stages.train.rendezvous import join

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    join(f"file://{directory}/gpu-rendezvous", 0, 1, "nccl", timedelta(seconds=600))
    long = make_dataset(directory / "long", sequence_length=1024, max_bytes=4_000_000)
    shared = {
        "global_batch_size": 32,
        "micro_batch_size": 32,
        "precision": "bf16",
        "compile": True,
        "checkpoint_every": 0,
    }
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    runs = {}
    for name, activation in {"gelu_tanh": "gelu_tanh", "hermite3": HERMITE}.items():
        model = {**GPT2_PRESETS["gpt2"], "vocab_size": 50304, "bias": False, "activation": activation}
        runs[name] = our_run(directory / name, long, 0, 1, gpu=True, model=model, log_every=100_000, **shared)
        for _ in range(20):
            runs[name]()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(6):
        for name, step in runs.items():
            seconds[name].append(_time(step) / STEPS)
    with torch.device("meta"):
        flops = GPT2(GPT2Config(**GPT2_PRESETS["gpt2"], vocab_size=50304, bias=False)).flops_per_token()
    for name, values in seconds.items():
        figures[f"{name}_step_milliseconds"] = 1000 * statistics.median(values)
        figures[f"{name}_mfu"] = 32 * 1024 * flops / statistics.median(values) / peak_flops
    figures["mfu"] = figures["hermite3_mfu"]
    figures["hermite_over_gelu"] = statistics.median(
        a / b for a, b in zip(seconds["hermite3"], seconds["gelu_tanh"], strict=True)
    )
    return figures


if __name__ == "__main__":
    main()
