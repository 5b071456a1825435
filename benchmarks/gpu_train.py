"""A whole job on one GPU, in one command for a bare machine: training, resume, conversion, images, kernels.

    python -m benchmarks.gpu_train prepare [DIRECTORY]     # where pip works, without a GPU: what must travel
    python -m benchmarks.gpu_train run [DIRECTORY]         # on the GPU machine; --small rehearses it on a CPU

`prepare` fills the directory (default: .gpu, which git ignores) with sharded text, so that the GPU machine needs
neither `datasets` nor time for it, and with wheels for its Python of what is missing there; MLflow, Ray and datasets
are not needed. `run` goes through the steps in order of worth and writes the record after each, so that a cut loses
nothing; a step that fails is written down with its error, and the exit code is 1. Everything goes through the product:
workflows on the `local` executor, DeepSpeed, its own resume. The bars (`BARS`: a Hermite step ≤ 1.02 × GELU's, MFU ≥
0.45, resume in the same bytes, no call of an activation that the reference answered, a compiled block with a learnable
activation ≤ 1.05 × the one with GELU) stand in the record with what was measured and whether they are met; null where
their step has not come that far.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import operator
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

if TYPE_CHECKING:
    from polytrope.pipeline.runs.journal import StageState

ROOT = Path(__file__).resolve().parent.parent
# What a machine with torch, transformers, tokenizers, safetensors, pyyaml, rich, psutil, jinja2, scipy lacks.
WHEELS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "hjson", "webdataset", "braceexpand")
PYTHON, PLATFORM = "3.12", "manylinux_2_17_x86_64"


class Bar(NamedTuple):
    """What the figures of a step have to reach, each of them.

    Args:
        step: of `STEPS`.
        figure: whose values, by name, are compared.
        relation: `≤`, `≥` or `=`.
        bar: what they are compared with.
    """

    step: str
    figure: str
    relation: str
    bar: float


BARS = (
    Bar("training", "step_over_gelu", "≤", 1.02),
    Bar("training", "mfu", "≥", 0.45),
    Bar("training", "activation_fallbacks", "=", 0),
    Bar("resume", "same_bytes", "=", True),
    Bar("images", "activation_fallbacks", "=", 0),
    Bar("kernels", "compiled_block_over_gelu", "≤", 1.05),
)
RELATIONS: dict[str, Callable[[float, float], bool]] = {"≤": operator.le, "≥": operator.ge, "=": operator.eq}
DATASET, SOURCES = "dataset", "sources.jsonl"  # in the directory
BASELINES = ("gelu", "gelu_tanh")
GELU_START = {"init": "gelu", "interval": [-4, 4]}
FULL: dict[str, Any] = {
    "shard": {
        "name": "python-sources",
        "tokenizer": {"kind": "bpe", "vocab_size": 50_304},  # a multiple of 64: rows that matrix units take
        "sequence_length": 1024,
        "validation_fraction": 0.02,
    },
    "model": {"preset": "gpt2", "bias": False},
    "training": {
        "steps": 900,
        "global_batch_size": 32,
        "learning_rate": 6e-4,
        "warmup_steps": 100,
        "precision": "bf16",
        "zero_stage": 1,
        "compile": True,
        "deterministic": False,  # as the speed of others is measured; `resumed` is
        "log_every": 10,
        "validation_every": 300,
        "validation_samples": 256,
        "checkpoint_every": 0,
        "data_threads": 4,
    },
    "resumed": {
        "steps": 40,
        "warmup_steps": 10,
        "checkpoint_every": 10,
        "validation_every": 0,
        "compile": False,
        "deterministic": True,
    },
    "images": {"count": 512, "size": 224, "classes": 8, "batch": 128, "steps": 60, "preset": "convnext-tiny"},
    "sources": ("", "sklearn"),  # Python's own library, and a package
    "activations": {"gelu_tanh": {}, "hermite4": {}, "hermite8": {"steps": 200}},
    "gpus": 1,
    "cpus": 8,
}
SMALL: dict[str, Any] = {
    "shard": {
        **FULL["shard"],
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
        "sequence_length": 32,
    },
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "bias": False},
    "training": {
        **FULL["training"],
        "steps": 6,
        "global_batch_size": 4,
        "warmup_steps": 1,
        "compile": False,
        "log_every": 2,
        "validation_every": 0,
        "validation_samples": 4,
        "data_threads": 1,
    },
    "resumed": {"steps": 6, "checkpoint_every": 2, "validation_every": 0, "compile": False},
    "images": {"count": 16, "size": 32, "classes": 2, "batch": 4, "steps": 2, "preset": "convnext-atto"},
    "sources": ("scipy/linalg",),
    "activations": {"gelu_tanh": {}, "hermite4": {}, "hermite8": {"steps": 3}},
    "gpus": 0,
    "cpus": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / ".gpu")
    parser.add_argument("--small", action="store_true", help="a rehearsal: seconds on a CPU, figures without meaning")
    parser.add_argument("--no-wheels", action="store_true", help="prepare: the store alone")
    parser.add_argument("--only", nargs="+", choices=tuple(STEPS), default=list(STEPS), help="run: these steps")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu-train.json")
    parser.add_argument("--peak-flops", type=float, default=989e12, help="of the GPU in bf16 (default: an H100 SXM's)")
    options = parser.parse_args()
    directory = options.directory.resolve()
    make_importable(directory)
    scale = SMALL if options.small else FULL
    if options.what == "prepare":
        prepare(directory, scale, wheels=not options.no_wheels)
    else:
        measure(directory, {**scale, "peak_flops": options.peak_flops}, options.only, options.output)


def prepare(directory: Path, scale: dict[str, Any], *, wheels: bool) -> None:
    """Make the data set, and fetch or build the wheels."""
    text = {"kind": "files", "format": "jsonl", "paths": [str(write_sources(directory, scale["sources"]))]}
    made = run_workflow(directory, "data", {"shard": {"uses": "shard", "with": {**scale["shard"], "source": text}}})
    shutil.rmtree(directory / DATASET, ignore_errors=True)
    shutil.copytree(Path(directory / "store" / "artifacts" / str(made["shard"].key)) / "files", directory / DATASET)
    (directory / SOURCES).unlink()
    shutil.rmtree(directory / "store")  # the result is what travels: how it came about depends on this Python
    if wheels:
        place = directory / "wheels"
        pip = [sys.executable, "-m", "pip"]
        versions = [f"{name}=={_installed(name)}" for name in WHEELS]
        binary = ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, "--platform", PLATFORM]
        subprocess.run([*pip, "download", "-q", "--no-deps", *binary, "-d", str(place), *versions], check=True)
        # DeepSpeed comes as source only; without its own kernels the wheel is for any Python.
        environment = {**os.environ, "DS_BUILD_OPS": "0"}
        source = [f"deepspeed=={_installed('deepspeed')}", "--no-build-isolation"]
        subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(place), *source], check=True, env=environment)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{directory}: {size / 2**20:.1f} MiB. There:")
    print(f"  python3 -m pip install -q --no-index --no-deps --target /tmp/site {directory.name}/wheels/*.whl")
    print(f"  PYTHONPATH=/tmp/site python3 -m benchmarks.gpu_train run {directory.name}")


def write_sources(directory: Path, packages: Sequence[str]) -> Path:
    """A JSON line for each Python file, not those without text, of installed packages, or of Python's library ("")."""
    places = sysconfig.get_paths()
    path = directory / SOURCES
    directory.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for package in packages:
            root = Path(places["purelib"], package) if package else Path(places["stdlib"])
            for source in sorted(root.rglob("*.py")):
                if package or "site-packages" not in source.parts:
                    text = source.read_text(encoding="utf-8", errors="replace")
                    if text.strip():
                        file.write(json.dumps({"text": text}) + "\n")
    return path


def _installed(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def measure(directory: Path, scale: dict[str, Any], only: list[str], output: Path) -> None:
    """Every step in turn; the record is written after each.

    Raises:
        SystemExit: a step failed; after all the others.
    """
    import torch

    gpu = torch.cuda.is_available()
    if scale["gpus"] and not gpu:
        raise SystemExit("gpu_train: no GPU here; --small rehearses it on a CPU")
    record: dict[str, Any] = {
        "command": "python -m benchmarks.gpu_train run",
        "machine": {
            "device": torch.cuda.get_device_name() if gpu else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "time": time.strftime("%Y-%m-%d", time.gmtime()),
        "bars": [],
        "rehearsal": not scale["gpus"],
        "steps": {},
    }
    for name in only:
        started = time.perf_counter()
        try:
            figures = STEPS[name](directory, scale)
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-4000:]}
        record["steps"][name] = {"seconds": round(time.perf_counter() - started, 1), **figures}
        record["bars"] = judge(record["steps"])
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _show(name, record["steps"][name])
    _show_bars(record["bars"])
    failed = [name for name, figures in record["steps"].items() if "error" in figures]
    if failed:
        raise SystemExit(f"gpu_train: {', '.join(failed)} failed; the record says why: {output}")


def judge(steps: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar with the values of its figure, and whether all of them meet it; null where there are none."""
    judged = []
    for bar in BARS:
        values = steps.get(bar.step, {}).get(bar.figure)
        met = all(RELATIONS[bar.relation](value, bar.bar) for value in values.values()) if values else None
        judged.append({**bar._asdict(), "values": values, "met": met})
    return judged


def _show_bars(bars: list[dict[str, Any]]) -> None:
    words = {True: "met", False: "missed", None: "not measured"}
    for bar in bars:
        values = ", ".join(f"{name} {_number(value)}" for name, value in (bar["values"] or {}).items())
        print(
            f"{bar['step']}: {bar['figure']} {bar['relation']} {bar['bar']}: {words[bar['met']]} ({values})", flush=True
        )


def _show(name: str, figures: dict[str, Any]) -> None:
    print(f"{name} ({figures['seconds']} s)", flush=True)
    for key, value in figures.items():
        if isinstance(value, dict):
            print(f"  {key:<28} " + ", ".join(f"{inner} {_number(item)}" for inner, item in value.items()))
        elif key not in ("seconds", "traceback"):
            print(f"  {key:<28} {_number(value)}")
    sys.stdout.flush()


def _number(value: Any) -> str:
    return (
        f"{value:.5g}"
        if isinstance(value, float)
        else f"{len(value)} values"
        if isinstance(value, list)
        else str(value)
    )


def dataset_stage(directory: Path) -> dict[str, Any]:
    return {"uses": "benchmarks.gpu_stages:prepared", "with": {"path": str(directory / DATASET)}}


def train_stage(scale: dict[str, Any], activation: str, **changes: Any) -> dict[str, Any]:
    """GPT-2 with one activation, by the recipe if it learns: it starts as GELU."""
    options = {} if activation in BASELINES else {"activation_options": GELU_START}
    model = {**scale["model"], "activation": activation, **options}
    return {
        "uses": "train",
        "inputs": {"dataset": "dataset"},
        "with": {"model": model, **scale["training"], "peak_flops": scale.get("peak_flops"), **changes},
        "resources": {"gpus": scale["gpus"]},
    }


def run_workflow(directory: Path, name: str, stages: dict[str, Any]) -> dict[str, StageState]:
    """Run stages on the local executor, in a process of their own; what became of each.

    Raises:
        RuntimeError: it did not succeed, with the end of what it printed.
    """
    from polytrope.pipeline.runs.journal import fold, read

    run_id = f"{name}-{time.time_ns()}"
    _polytrope("run", write_workflow(directory, name, stages), directory, "--no-tracking", "-q", "--run-id", run_id)
    return fold(read(directory / "store" / "runs" / run_id)).stages


def write_workflow(directory: Path, name: str, stages: dict[str, Any]) -> Path:
    """As a file, so that a person can run the same by hand."""
    path = directory / f"{name}.yaml"
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"name": name, "stages": stages}, sort_keys=False), encoding="utf-8")
    return path


def _polytrope(verb: str, workflow: Path, directory: Path, *options: str) -> str:
    command = [sys.executable, "-m", "polytrope.pipeline.commands.cli", verb, str(workflow)]
    place = ["--executor", "local", "--concurrency", "1", "--store", str(directory / "store")]
    done = subprocess.run(
        [*command, *place, *options],
        cwd=ROOT,  # where `benchmarks` is
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{verb} {workflow.name}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def curves(directory: Path, name: str, stage: str) -> dict[str, dict[int, float]]:
    """What the newest run of a workflow said while it trained: metric → step → value."""
    from polytrope.pipeline.runs.spool import SpoolReader

    run = max((directory / "store" / "runs").glob(f"{name}-*"), key=lambda path: path.name)
    found: dict[str, dict[int, float]] = {}
    for event in SpoolReader(run / "spool", stage=stage).read_new():
        if event.event["kind"] == "metrics" and event.event["step"] is not None:
            for metric, value in event.event["values"].items():
                found.setdefault(metric, {})[event.event["step"]] = value
    return found


def training_workflows(directory: Path, scale: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Activation → stages."""
    return {
        activation: {"dataset": dataset_stage(directory), "train": train_stage(scale, activation, **changes)}
        for activation, changes in scale["activations"].items()
    }


def training(directory: Path, scale: dict[str, Any]) -> dict[str, Any]:
    """GPT-2 with GELU and Hermite polynomials: speed, MFU, memory, curves, activations that the reference ran."""
    figures: dict[str, Any] = {name: {} for name in ("tokens_per_second", "mfu", "peak_memory_gigabytes", "loss")}
    figures |= {"validation_loss": {}, "activation_fallbacks": {}, "curve": {}}
    for activation, stages in training_workflows(directory, scale).items():
        name = f"train-{activation}"
        run_workflow(directory, name, stages)
        seen = curves(directory, name, "train")
        steady = list(seen["tokens_per_second"].values())[len(seen["tokens_per_second"]) // 3 :]  # compiled by then
        figures["tokens_per_second"][activation] = statistics.median(steady)
        figures["mfu"][activation] = statistics.median(list(seen["mfu"].values())[len(seen["mfu"]) // 3 :])
        figures["peak_memory_gigabytes"][activation] = max(seen["peak_memory"].values()) / 1e9
        figures["loss"][activation] = list(seen["train/loss"].values())[-1]
        figures["validation_loss"][activation] = list(seen["val/loss"].values())[-1]
        figures["activation_fallbacks"][activation] = sum(seen["activation_fallbacks"].values())
        figures["curve"][activation] = {step: round(value, 4) for step, value in seen["train/loss"].items()}
    speeds = figures["tokens_per_second"]
    figures["step_over_gelu"] = {
        name: speeds["gelu_tanh"] / speed for name, speed in speeds.items() if name != "gelu_tanh"
    }
    return figures


def resume_stages(directory: Path, scale: dict[str, Any]) -> dict[str, Any]:
    return {"dataset": dataset_stage(directory), "train": train_stage(scale, "hermite4", **scale["resumed"])}


def resume(directory: Path, scale: dict[str, Any]) -> dict[str, Any]:
    """Driver and worker killed at checkpoints, resumed: the same bytes as undisturbed (`polytrope verify-resume`)."""
    from polytrope.pipeline.proof.verify_resume import verify_resume

    place = directory / f"resume-{time.time_ns()}"
    workflow = write_workflow(directory, "resume", resume_stages(directory, scale))
    command = [str(workflow), "--executor", "local", "--no-tracking"]
    compared = verify_resume(command, place, kill_workers=True, say=lambda text: print(f"  {text}", flush=True))
    return {"same_bytes": {comparison.stage: comparison.equal for comparison in compared}}


def conversion_stages(directory: Path, scale: dict[str, Any]) -> dict[str, Any]:
    return {
        "dataset": dataset_stage(directory),
        "train": train_stage(scale, "gelu_tanh"),  # that of `training`
        "convert": {
            "uses": "convert",
            "inputs": {"model": "train", "dataset": "dataset"},
            "with": {"family": "hermite", "degree": 8, "calibration_samples": 32},
            "resources": {"cpus": scale["cpus"]},  # one core took minutes for this
        },
        "evaluate": {
            "uses": "evaluate",
            "inputs": {"dataset": "dataset", "models": {"before": "train", "after": "convert"}},
            "with": {"sample_tokens": 0, "drift": {"after": "before"}},
            "resources": {"gpus": scale["gpus"]},
        },
    }


def conversion(directory: Path, scale: dict[str, Any]) -> dict[str, Any]:
    """GELU replaced by Hermite polynomials of degree 8 fitted to measured inputs, on the CPU; both evaluated."""
    done = run_workflow(directory, "convert", conversion_stages(directory, scale))
    return {name: done[name].summary | {"seconds": done[name].duration} for name in ("convert", "evaluate")}


def image_workflows(directory: Path, scale: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Activation → stages; the pictures are drawn."""
    wanted = scale["images"]
    folder = directory / "pictures"
    _draw(folder, wanted["count"], wanted["size"], wanted["classes"])
    shards = {"source": {"kind": "folder", "path": str(folder)}, "image_size": wanted["size"], "channels": 3}
    options = {"steps": wanted["steps"], "global_batch_size": wanted["batch"], "warmup_steps": 1}
    found = {}
    for activation in ("gelu", "hermite4"):
        changed = {**scale, "model": {"architecture": "convnext", "preset": wanted["preset"]}}
        stage = train_stage(changed, activation, validation_samples=4, validation_every=0, **options)
        found[activation] = {"dataset": {"uses": "shard_images", "with": shards}, "train": stage}
    return found


def images(directory: Path, scale: dict[str, Any]) -> dict[str, Any]:
    """ConvNeXt on random pictures, GELU and Hermite: images per second."""
    figures: dict[str, Any] = {"images_per_second": {}, "peak_memory_gigabytes": {}, "activation_fallbacks": {}}
    for activation, stages in image_workflows(directory, scale).items():
        name = f"images-{activation}"
        run_workflow(directory, name, stages)
        seen = curves(directory, name, "train")
        rates = list(seen["images_per_second"].values())
        figures["images_per_second"][activation] = statistics.median(rates[len(rates) // 3 :])
        figures["peak_memory_gigabytes"][activation] = max(seen["peak_memory"].values()) / 1e9
        figures["activation_fallbacks"][activation] = sum(seen["activation_fallbacks"].values())
    return figures


def _draw(folder: Path, count: int, size: int, classes: int) -> None:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class-{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:05d}.jpg")


def kernels(directory: Path, scale: dict[str, Any]) -> dict[str, Any]:
    """The kernels beside copy, GELU and torch.compile, compiled blocks, tests/gpu and compute-sanitizer."""
    if not scale["gpus"]:
        return {"skipped": "needs a GPU"}
    log = directory / "gpu_ops.log"
    with log.open("wb") as file:
        done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_ops"], stdout=file, stderr=file, check=False)
    if done.returncode:
        raise RuntimeError(f"gpu_ops: exit code {done.returncode}\n{log.read_text(encoding='utf-8')[-3000:]}")
    from benchmarks.ops import label

    place = ROOT / "benchmarks" / "results" / "ops-gpu.json"
    blocks = json.loads(place.read_text(encoding="utf-8"))["compiled"]
    ratios = {label(row["config"]): row["times_gelu"] for row in blocks}
    return {"record": str(place.relative_to(ROOT)), "compiled_block_over_gelu": ratios}


def make_importable(directory: Path) -> None:
    """`polytrope` from this tree, for a machine where it is not installed; for child processes too."""
    if importlib.util.find_spec("polytrope") is not None:
        return
    packages = directory / "packages" / "polytrope"
    packages.mkdir(parents=True, exist_ok=True)
    for name, place in {"ops": "ops", "models": "models", "pipeline": "pipeline", "infra": "infra"}.items():
        if not (packages / name).exists():
            (packages / name).symlink_to(ROOT / place)
    sys.path.insert(0, str(packages.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(packages.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


STEPS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "training": training,
    "resume": resume,
    "conversion": conversion,
    "images": images,
    "kernels": kernels,
}


if __name__ == "__main__":
    main()
