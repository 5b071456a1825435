"""The CUDA kernels in one command: build, tests, compute-sanitizer, and time against a copy, GELU and Inductor.

    python -m benchmarks.gpu_ops [--skip-tests] [--repeats 50]

bfloat16 on [12, 1024, 3072] and [48, 1024, 3072]. Bandwidth counts the bytes that must move: 4 an element forward
(x, y), 6 backward (x, g, dx), and is given as a share of what a copy of the same tensor reaches in the same run. The
contestants of a row take turns; medians. Writes benchmarks/results/ops-gpu.json and prints a table. Needs a GPU, nvcc
and, for that step, compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.ops import ByHand, label
from polytrope.ops import build_activation, cuda

ROOT = Path(__file__).parents[1]
SHAPES = ((12, 1024, 3072), (48, 1024, 3072))
ROWS: list[dict[str, Any]] = [
    *({"name": name, "degree": degree} for name in ("hermite",) for degree in (1, 2, 3, 4, 5, 6, 7, 8)),
    *({"name": name, "degree": degree} for name in ("chebyshev", "legendre") for degree in (3, 8)),
    {"name": "hermite", "degree": 8, "interval": [-3.0, 3.0]},
    {"name": "tropical", "degree": 6},
    {"name": "tropical_rational", "degree": 6},
    {"name": "fourier", "degree": 6},
    {"name": "fourier", "degree": 6, "harmonic": True},
    {"name": "rational", "degree": 5},
    {"name": "polyrelu", "degree": 3},
    {"name": "polynorm", "degree": 3},
]
BARS = {"forward_share": 0.85, "backward_share": 0.80, "times_gelu": 1.1}


def check(console: Console) -> dict[str, Any]:
    """Compiles, runs tests/gpu, and runs a part of it again under compute-sanitizer."""
    start = time.perf_counter()
    library = cuda.library_path()
    done: dict[str, Any] = {
        "build_seconds": round(time.perf_counter() - start, 1),
        "library_bytes": library.stat().st_size,
    }
    tests = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "gpu")]
    done["tests"] = subprocess.run(tests, cwd=ROOT).returncode == 0
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for kind in ("memcheck", "racecheck") if tool else ():
        few = [*tests, "-k", "agrees_with_the_reference or on_the_gpu", "--timeout", "1800", "-p", "no:cacheprovider"]
        command = [str(tool), "--tool", kind, "--error-exitcode", "9", "--target-processes", "all", *few]
        done[kind] = subprocess.run(command, cwd=ROOT).returncode == 0
    if not tool:
        done["compute_sanitizer"] = "not on this machine"
    console.print(done)
    return done


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time on the GPU of each, taking turns."""
    for call in calls.values():
        for _ in range(5):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(1_000_000)  # the launches wait in the queue, so that their cost on the CPU does not count
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(config: dict[str, Any], shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    x, seed = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch._dynamo.reset()
    modules: dict[str, nn.Module] = {
        "gelu": nn.GELU(),
        "polytrope": build_activation(config).cuda(),
        "compiled": torch.compile(ByHand(config).cuda(), dynamic=False),
    }
    leaf = x.detach().requires_grad_()
    outputs: dict[str, Tensor] = {name: module(leaf) for name, module in modules.items()}
    target = torch.empty_like(x)

    def forward(module: nn.Module) -> Callable[[], object]:
        def call() -> Tensor:
            with torch.no_grad():
                result: Tensor = module(x)
            return result

        return call

    def backward(name: str) -> Callable[[], object]:
        inputs = [leaf, *modules[name].parameters()]
        return lambda: torch.autograd.grad(outputs[name], inputs, seed, retain_graph=True)

    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(x)}
    calls |= {f"{name} forward": forward(module) for name, module in modules.items()}
    calls |= {f"{name} backward": backward(name) for name in modules}
    times = milliseconds(calls, repeats)
    rate = 4 * x.numel() / times["copy"]  # bytes a millisecond
    own = {way: times[f"polytrope {way}"] for way in ("forward", "backward")}
    total = {name: times[f"{name} forward"] + times[f"{name} backward"] for name in modules}
    return {
        "config": config,
        "shape": list(shape),
        "ms": {name: round(value, 4) for name, value in times.items()},
        "copy_terabytes_per_second": round(rate * 1e-9, 3),
        "forward_share": round(4 * x.numel() / own["forward"] / rate, 3),
        "backward_share": round(6 * x.numel() / own["backward"] / rate, 3),
        "times_gelu": round(total["polytrope"] / total["gelu"], 3),
        "faster_than_compiled": round(total["compiled"] / total["polytrope"], 2),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="bfloat16 on a GPU: share of copy bandwidth (bars: ≥ 0.85, ≥ 0.80), times GELU (bar: ≤ 1.1)")
    for heading in ("activation", "shape", "forward", "backward", "× GELU", "torch.compile"):
        shown.add_column(heading, justify="left" if heading == "activation" else "right")
    for row in rows:
        shown.add_row(
            label(row["config"]),
            "×".join(map(str, row["shape"])),
            f"{row['forward_share']:.2f}",
            f"{row['backward_share']:.2f}",
            f"{row['times_gelu']:.2f}",
            f"{row['faster_than_compiled']:g}× slower",
        )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--repeats", type=int, default=50, help="turns of each contestant")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ops-gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu_ops needs an NVIDIA GPU; torch sees none on this machine", file=sys.stderr)
        return 2
    if cuda.library() is None:
        print("benchmarks.gpu_ops needs the CUDA kernels: install nvcc, or set NVCC", file=sys.stderr)
        return 2
    console = Console()
    checks = {} if options.skip_tests else check(console)
    rows = []
    for shape in SHAPES:
        for config in ROWS:
            rows.append(measure(config, shape, options.repeats))
            console.print(
                f"{label(config)} {shape}: {rows[-1]['forward_share']}, {rows[-1]['backward_share']} of a copy"
            )
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    document = {"machine": machine, "checks": checks, "bars": BARS, "repeats": options.repeats, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    console.print(table(rows))
    return 0 if all(checks.get(name, True) for name in ("tests", "memcheck", "racecheck")) else 1


if __name__ == "__main__":
    sys.exit(main())
