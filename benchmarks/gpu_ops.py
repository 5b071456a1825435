"""The CUDA kernels in one command: build, time against a copy, GELU and Inductor, tests, compute-sanitizer.

    python -m benchmarks.gpu_ops [--skip-tests] [--skip-blocks] [--skip-inductor] [--repeats 50]

bfloat16 on [12, 1024, 3072] and [48, 1024, 3072]. Bandwidth counts the bytes that must move: 4 an element forward
(x, y), 6 backward (x, g, dx), and is given as a share of what a copy of the same tensor reaches in the same run. The
contestants of a row take turns; medians. The blocks of `benchmarks.compiled`, at GPT-2's sizes, come first. They and
Inductor's versions of a row, for the first shape, are compiled several at a time before, into its cache on the disk.
Writes benchmarks/results/ops-gpu.json and .png and prints tables. Needs a GPU, nvcc and, for the tests,
compute-sanitizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import compiled as blocks
from benchmarks.ops import ByHand, label
from polytrope.ops import build, build_activation, cuda

ROOT = Path(__file__).parents[1]
SHAPES = ((12, 1024, 3072), (48, 1024, 3072))
ROWS: list[dict[str, Any]] = [
    *({"name": name, "degree": degree} for name in ("hermite",) for degree in (1, 2, 3, 4, 5, 6, 7, 8)),
    *({"name": name, "degree": degree} for name in ("chebyshev", "legendre") for degree in (3, 8)),
    *({"name": "hermite", "degree": degree, "interval": [-3.0, 3.0]} for degree in (3, 8)),
    *({"name": "hermite", "degree": degree, "num_parameters": 3072} for degree in (3, 8)),
    {"name": "hermite", "degree": 8, "interval": [-3.0, 3.0], "num_parameters": 3072},
    {"name": "tropical", "degree": 6},
    {"name": "tropical_rational", "degree": 6},
    {"name": "fourier", "degree": 6},
    {"name": "fourier", "degree": 6, "harmonic": True},
    {"name": "rational", "degree": 5},
    {"name": "polyrelu", "degree": 3},
    {"name": "polynorm", "degree": 3},
]
BLOCKS = [config for config in blocks.ROWS if config in ROWS or config.get("interval")]
BARS = {"forward_share": 0.85, "backward_share": 0.80, "times_gelu": 1.1}


def check(console: Console) -> dict[str, Any]:
    """Runs tests/gpu, and runs a part of it again under compute-sanitizer."""
    done: dict[str, Any] = {}
    # Without the conftest of all tests, which needs the whole of polytrope's dependencies.
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "gpu"),
    ]
    together = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    done["tests"] = subprocess.run([*tests, *together], cwd=ROOT).returncode == 0
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for kind in ("memcheck", "racecheck") if tool else ():
        few = [
            *tests,
            "-k",
            "8-torch.bfloat16 or 3-torch.float32 or FOURIER-6-torch.bfloat16 or groups_and_gates"
            " or the_columns_of_channels and not launches",
            "--timeout",
            "1800",
        ]
        command = [str(tool), "--tool", kind, "--error-exitcode", "9", "--kernel-name", "kns=polytrope"]
        command += ["--report-api-errors", "no", *few]
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
    return {name: statistics.median(values) for name, values in turns(calls, repeats).items()}


def turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds on the GPU of each turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(2_000_000)  # the launches wait in the queue, so that their cost on the CPU does not count
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def compiled(config: dict[str, Any]) -> nn.Module:
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # its backward runs more than once for each forward
    module: nn.Module = torch.compile(ByHand(config).cuda(), dynamic=False)
    return module


def compile_ahead(config: dict[str, Any]) -> None:
    """In a process of its own: what Inductor makes of a row goes to its cache on the disk."""
    module, x = compiled(config), torch.randn(SHAPES[0], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.grad(module(x), [x, *module.parameters()], torch.ones_like(x))
    with torch.no_grad():
        module(x)


def block_contestants(config: dict[str, Any]) -> dict[str, Callable[[], object]]:
    return blocks.contestants(config, blocks.GPU_SHAPE, "cuda", torch.bfloat16)


def compile_block_ahead(config: dict[str, Any]) -> None:
    """`compile_ahead` of the contestants of a block."""
    for call in block_contestants(config).values():
        call()


def compile_all_ahead(
    configs: list[dict[str, Any]], compile_one: Callable[[dict[str, Any]], None], console: Console
) -> list[dict[str, Any]]:
    """The rows that could be compiled."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    cores, done = len(os.sched_getaffinity(0)), []
    with ProcessPoolExecutor(min(10, cores), multiprocessing.get_context("spawn")) as pool:
        for config, future in [(config, pool.submit(compile_one, config)) for config in configs]:
            failure = future.exception()
            if failure is None:
                done.append(config)
            else:
                console.print(f"torch.compile cannot do {label(config)}: {failure!r}"[:300], markup=False)
    return done


def measure(config: dict[str, Any], shape: tuple[int, ...], repeats: int, with_compiled: bool) -> dict[str, Any]:
    x, seed = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    modules: dict[str, nn.Module] = {"gelu": nn.GELU(), "polytrope": build_activation(config).cuda()}
    if with_compiled:
        modules["compiled"] = compiled(config)
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
        "faster_than_compiled": round(total["compiled"] / total["polytrope"], 2) if with_compiled else None,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="bfloat16 on a GPU: share of copy bandwidth (bars: ≥ 0.85, ≥ 0.80), times GELU (bar: ≤ 1.1)")
    for heading in ("activation", "shape", "forward", "backward", "× GELU", "faster than torch.compile"):
        shown.add_column(heading, justify="left" if heading == "activation" else "right")
    for row in rows:
        shown.add_row(
            label(row["config"]),
            "×".join(map(str, row["shape"])),
            f"{row['forward_share']:.2f}",
            f"{row['backward_share']:.2f}",
            f"{row['times_gelu']:.2f}",
            f"{row['faster_than_compiled']:g}×" if row["faster_than_compiled"] else "",
        )
    return shown


def markdown(document: dict[str, Any]) -> str:
    """The tables of docs/ops.md: kernels, for both shapes, and compiled blocks."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        found.setdefault(label(row["config"]), []).append(row)
    bars = document["bars"]
    lines = [
        f"| activation | forward, share of a copy (bar: ≥ {bars['forward_share']}) "
        f"| backward (≥ {bars['backward_share']}) | both, × `nn.GELU` (≤ {bars['times_gelu']}) |",
        "|---|---|---|---|",
    ]
    for name, rows in found.items():
        cells = [", ".join(_cell(row[key], bars[key]) for row in rows) for key in bars]
        lines.append(" | ".join((f"| {name}", *cells)) + " |")
    return "\n".join([*lines, "", blocks.markdown(document["compiled"], label)])


def _cell(value: float, bar: float) -> str:
    return f"{value:.2f}" + ("" if (value >= bar if bar < 1 else value <= bar) else " ✗")


def plot(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["shape"] == list(SHAPES[0])]
    places = range(len(rows))
    figure, axes = plt.subplots(figsize=(9, 6), constrained_layout=True)
    for way, shift, color in (("forward", 0.2, "#4477aa"), ("backward", -0.2, "#ee6677")):
        axes.barh(
            [place + shift for place in places], [row[f"{way}_share"] for row in rows], 0.38, label=way, color=color
        )
        axes.axvline(BARS[f"{way}_share"], color=color, linestyle="--", linewidth=1)
    axes.set_yticks(places, [label(row["config"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of a copy's bandwidth (dashed: bars)")
    axes.set_title(f"bfloat16 {rows[0]['shape']} on {machine['gpu']}")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--skip-blocks", action="store_true", help="without the compiled blocks")
    parser.add_argument("--skip-inductor", action="store_true", help="rows without torch.compile's versions")
    parser.add_argument("--repeats", type=int, default=50, help="turns of each contestant")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ops-gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu_ops needs an NVIDIA GPU; torch sees none on this machine", file=sys.stderr)
        return 2
    start = time.perf_counter()
    try:
        library = cuda.library_path()
    except build.BuildError as error:
        print(f"benchmarks.gpu_ops needs the CUDA kernels: {error}", file=sys.stderr)
        return 2
    built = {"seconds": round(time.perf_counter() - start, 1), "bytes": library.stat().st_size}
    console, rows = Console(width=None if sys.stdout.isatty() else 160), list[dict[str, Any]]()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    document = {
        "machine": machine,
        "build": built,
        "bars": BARS,
        "repeats": options.repeats,
        "checks": {},
        "compiled": [],
        "rows": rows,
    }
    if not options.skip_blocks:
        for config in compile_all_ahead(BLOCKS, compile_block_ahead, console):
            calls = block_contestants(config)
            document["compiled"].append(
                blocks.compare(config, "GPT-2", blocks.GPU_SHAPE, "bfloat16", calls, turns, options.repeats)
            )
            write(document, options.out)
        console.print(blocks.table(document["compiled"], label))
    compilable = [] if options.skip_inductor else compile_all_ahead(ROWS, compile_ahead, console)
    for shape in SHAPES:
        for config in ROWS:
            row = measure(config, shape, options.repeats, shape == SHAPES[0] and config in compilable)
            rows.append(row)
            console.print(f"{label(config)} {shape}: {row['forward_share']}, {row['backward_share']} of a copy")
            write(document, options.out)
    plot(rows, machine, options.out.with_suffix(".png"))
    console.print(table(rows))
    if not options.skip_tests:
        document["checks"] = check(console)
        write(document, options.out)
    return 0 if all(document["checks"].get(name, True) for name in ("tests", "memcheck", "racecheck")) else 1


def write(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
