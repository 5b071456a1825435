"""The activations against `nn.GELU`, torchortho and `torch.compile` of hand-written code: time, saved tensors.

    python -m benchmarks.ops [--threads 2] [--repeats 30] [--dtype float32] [--only kernels | compiled]

Two parts: the kernels, and compiled blocks around an activation (benchmarks/compiled.py), which are the key `compiled`
of the record. Of the kernels: forward and backward with coefficient gradients, on [1, 1024, 3072], in one process. The
contestants of a row take turns, so that a disturbance of the machine meets all of them; what counts is the ratio of
medians. Writes benchmarks/results/ops-cpu.json and .png. Columns without a contestant stay empty.

Two things are there to make a row readable. "copy" is a contestant that only moves the bytes that any activation has to
move: x.clone() forward and torch.add(x, gradient) backward; nothing can be much faster. And the allocator keeps freed
memory, for all contestants alike: else glibc returns it to the system at moments that depend on the sizes of earlier
rows, and the page faults of new memory fall on whoever allocates next. --trim leaves
the allocator as it is. The page faults of a turn are in the JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import compiled as blocks
from polytrope.ops import build_activation
from polytrope.ops.rational_spline import tied

RESULTS = Path(__file__).parent / "results"
SHAPE = (1, 1024, 3072)
DTYPES = ("float32", "bfloat16")
# Configuration, name in torchortho, largest time as a multiple of GELU's, smallest multiple of torchortho's.
ROWS: list[tuple[dict[str, Any], str | None, float | None, float | None]] = [
    ({"name": "hermite", "degree": 3}, "HermiteActivation", 0.5, 300.0),
    ({"name": "hermite", "degree": 8}, "HermiteActivation", 1.2, 1000.0),
    ({"name": "chebyshev", "degree": 8}, None, 1.2, None),
    ({"name": "legendre", "degree": 8}, None, 1.2, None),
    ({"name": "tropical", "degree": 6}, "TropicalActivation", 1.0, None),
    ({"name": "tropical_rational", "degree": 6}, "TropicalRationalActivation", 2.0, None),
    ({"name": "fourier", "degree": 6}, "FourierActivation", 4.0, None),
    ({"name": "fourier", "degree": 6, "harmonic": True}, None, 1.2, None),
    ({"name": "rational", "degree": 5}, None, None, None),
    ({"name": "polyrelu", "degree": 3}, None, None, None),
    ({"name": "polynorm", "degree": 3}, None, None, None),
    ({"name": "piecewise_linear", "degree": 8}, None, None, None),
    ({"name": "rational_spline", "degree": 8}, None, None, None),
    ({"name": "hermite", "degree": 8, "interval": [-3.0, 3.0]}, None, None, None),
    ({"name": "hermite", "degree": 3, "num_parameters": SHAPE[-1]}, None, None, None),
]


def by_hand(config: dict[str, Any]) -> Callable[..., Tensor]:
    """What a user would write in plain torch for this row: a function of x and the module's parameters."""
    name, degree = config["name"], config["degree"]

    def series(x: Tensor, coefficients: Tensor) -> Tensor:
        before, now = torch.ones_like(x), x
        weights = coefficients.unbind(-1)  # numbers, or with coefficients for each channel a row
        value = weights[0] + weights[1] * x
        for k in range(1, degree):
            if name == "hermite":
                following = (x * now - before) / (k + 1)
            elif name == "chebyshev":
                following = 2 * x * now - before
            else:
                following = ((2 * k + 1) * x * now - k * before) / (k + 1)
            before, now = now, following
            value = value + weights[k + 1] * now
        return value

    def hermite_with_tails(x: Tensor, coefficients: Tensor) -> Tensor:
        low, high = config["interval"]
        ends = [torch.tensor(end, device=x.device) for end in (low, high)]
        values = [series(end, coefficients) for end in ends]
        slopes = [series_slope(end, coefficients) for end in ends]
        inside = series(x.clamp(low, high), coefficients)
        inside = torch.where(x < low, values[0] + slopes[0] * (x - low), inside)
        return torch.where(x > high, values[1] + slopes[1] * (x - high), inside)

    def series_slope(x: Tensor, coefficients: Tensor) -> Tensor:
        before, now = torch.ones_like(x), x
        weights = coefficients.unbind(-1)
        value = weights[1] + weights[2] * x
        for k in range(1, degree - 1):
            before, now = now, (x * now - before) / (k + 1)
            value = value + weights[k + 2] * now
        return value

    def powers(x: Tensor, coefficients: Tensor) -> Tensor:
        value = coefficients[-1]
        for k in range(len(coefficients) - 2, -1, -1):
            value = value * x + coefficients[k]
        return value

    def fourier(x: Tensor, bias: Tensor, amplitudes: Tensor, frequencies: Tensor, phases: Tensor) -> Tensor:
        value = bias
        for k in range(degree):
            value = value + amplitudes[k] / math.factorial(k + 1) * torch.cos(frequencies[k] * x - phases[k])
        return value

    def harmonic(x: Tensor, bias: Tensor, frequency: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        c, s = torch.cos(frequency * x), torch.sin(frequency * x)
        c_now, s_now, value = c, s, bias
        for k in range(degree):
            value = value + (cosines[k] * c_now + sines[k] * s_now) / math.factorial(k + 1)
            c_now, s_now = c * c_now - s * s_now, s * c_now + c * s_now
        return value

    def maximum(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
        value = slopes[0] * x + intercepts[0]
        for k in range(1, degree + 1):
            value = torch.maximum(value, slopes[k] * x + intercepts[k])
        return value

    def tropical(x: Tensor, coefficients: Tensor) -> Tensor:
        return math.sqrt(2.0) / degree * maximum(x, torch.arange(degree + 1.0, device=x.device), coefficients)

    def piecewise_linear(x: Tensor, values: Tensor) -> Tensor:
        step = 8.0 / degree
        piece = ((x + 4.0) / step).floor().clamp(0, degree - 1)
        index = piece.long()
        left, right = values[index], values[index + 1]
        return left + (right - left) * ((x + 4.0) / step - piece)

    def rational_spline(
        x: Tensor, widths: Tensor, start: Tensor, rises: Tensor, slopes: Tensor, line: Tensor
    ) -> Tensor:
        knots, heights, rates = tied(widths, slopes, rises, start, (-4.0, 4.0))
        inside = x.clamp(-4.0, 4.0)
        index = torch.searchsorted(knots[1:-1], inside)
        width, rise, rate, next_rate = knots.diff()[index], heights.diff()[index], rates[:-1][index], rates[1:][index]
        t, mean = (inside - knots[:-1][index]) / width, rise / width
        u = t * (1 - t)
        curve = rise * (mean * t * t + rate * u) / (mean + (rate + next_rate - 2 * mean) * u)
        beyond = x - inside
        return heights[:-1][index] + curve + beyond * torch.where(beyond < 0, rates[0], rates[-1]) - line * x

    def polynorm(x: Tensor, coefficients: Tensor, bias: Tensor) -> Tensor:
        value, power = bias, torch.ones_like(x)
        for k in range(degree):
            power = power * x
            value = value + coefficients[k] * power * torch.rsqrt(power.square().mean(-1, keepdim=True) + 1e-6)
        return value

    functions: dict[str, Callable[..., Tensor]] = {
        "tropical": tropical,
        "tropical_rational": lambda x, p, c, q, d: maximum(x, p, c) - maximum(x, q, d),
        "fourier": harmonic if config.get("harmonic") else fourier,
        "rational": lambda x, a, b: powers(x, a) / (1 + (x * powers(x, b)).abs()),
        "polyrelu": lambda x, a: powers(x.clamp(min=0), a),
        "piecewise_linear": piecewise_linear,
        "rational_spline": rational_spline,
        "polynorm": polynorm,
    }
    return functions.get(name, hermite_with_tails if "interval" in config else series)


class ByHand(nn.Module):
    """The hand-written function with the module's parameters; half precision goes through float32 as in the kernels."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.names = by_hand(config), list[str]()
        for name, parameter in build_activation(config).named_parameters():
            self.register_parameter(name, parameter)
            self.names.append(name)

    def forward(self, x: Tensor) -> Tensor:
        own = [getattr(self, name) for name in self.names]  # not a ParameterList, which torch 2.11 cannot compile
        return self.function(x.float(), *own).to(x.dtype)


class Contestant:
    """One module, its input and its times."""

    def __init__(self, module: nn.Module, x: Tensor, seed: Tensor) -> None:
        self.module, self.seed = module, seed
        self.x = x.detach().requires_grad_()
        self.forward: list[float] = []
        self.backward: list[float] = []
        self.faults: list[int] = []

    def turn(self) -> None:
        self.x.grad = None
        self.module.zero_grad()
        faults = page_faults()
        start = time.perf_counter()
        y = self.go_forward()
        middle = time.perf_counter()
        self.go_backward(y)
        end = time.perf_counter()
        self.forward.append(middle - start)
        self.backward.append(end - middle)
        self.faults.append(page_faults() - faults)

    def forget(self) -> None:
        """The turns so far: they were to warm up."""
        for measured in (self.forward, self.backward, self.faults):
            measured.clear()

    def go_forward(self) -> Tensor:
        y: Tensor = self.module(self.x)
        return y

    def go_backward(self, y: Tensor) -> None:
        y.backward(self.seed)

    def saved_tensors(self) -> int:
        """Tensors of the size of x that autograd keeps for backward."""
        saved: set[int] = set()

        def keep(tensor: Tensor) -> Tensor:
            if tensor.numel() >= self.x.numel():
                saved.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.module(self.x)
        return len(saved)

    def milliseconds(self) -> float:
        both = [first + second for first, second in zip(self.forward, self.backward, strict=True)]
        return statistics.median(both) * 1e3

    def report(self) -> dict[str, float]:
        return {
            "forward_ms": round(statistics.median(self.forward) * 1e3, 3),
            "backward_ms": round(statistics.median(self.backward) * 1e3, 3),
            "total_ms": round(self.milliseconds(), 3),
            "fastest_total_ms": round(min(map(sum, zip(self.forward, self.backward, strict=True))) * 1e3, 3),
            "page_faults": statistics.median(self.faults),
        }


class Copy(Contestant):
    """What moves the same bytes and computes nothing: the time that no activation can go below."""

    def go_forward(self) -> Tensor:
        return self.x.detach().clone()

    def go_backward(self, y: Tensor) -> None:  # noqa: ARG002 (lives as long as the others' result)
        self.x.grad = torch.add(self.x.detach(), self.seed)


def page_faults() -> int:
    """Of this process so far, without those that read a file."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory; False where another C library allocates."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold = (-1, 2**31 - 1), (-3, 32 * 2**20)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    return mallopt is not None and all(mallopt(*option) == 1 for option in (trim_threshold, mmap_threshold))


def measure_row(config: dict[str, Any], published: str | None, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Times of one row; torchortho takes seconds per turn, so it gets three turns at most."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    seed = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch._dynamo.reset()
    contestants = {
        "copy": Copy(nn.Identity(), x, seed),
        "gelu": Contestant(nn.GELU(), x, seed),
        "polytrope": Contestant(build_activation(config), x, seed),
        "compiled": Contestant(torch.compile(ByHand(config), dynamic=False), x, seed),
    }
    for contestant in contestants.values():
        for _ in range(3):
            contestant.turn()
        contestant.forget()
    for _ in range(repeats):
        for contestant in contestants.values():
            contestant.turn()
    if published is not None and dtype == torch.float32:
        module = torchortho_module(published, config["degree"])
        if module is not None:
            slow = contestants["torchortho"] = Contestant(module, x, seed)
            slow.turn()
            while len(slow.forward) < 3 and slow.forward[0] + slow.backward[0] < 5.0:
                slow.turn()
    row: dict[str, Any] = {"config": config, "dtype": str(dtype).removeprefix("torch.")}
    row |= {name: contestant.report() for name, contestant in contestants.items()}
    row["saved_tensors"] = {name: contestants[name].saved_tensors() for name in ("gelu", "polytrope")}
    own = contestants["polytrope"].milliseconds()
    for name, time_taken in (("times_gelu", own), ("copy_times_gelu", contestants["copy"].milliseconds())):
        row[name] = round(time_taken / contestants["gelu"].milliseconds(), 3)
    for name in ("compiled", "torchortho"):
        if name in contestants:
            row[f"faster_than_{name}"] = round(contestants[name].milliseconds() / own, 2)
    return row


def torchortho_module(name: str, degree: int) -> nn.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchortho
    except ImportError:
        return None
    module: nn.Module = getattr(torchortho, name)(degree)
    return module


def label(config: dict[str, Any]) -> str:
    names = {"harmonic": "harmonic", "interval": "interval", "num_parameters": "per channel"}
    extras = [extra for name, extra in names.items() if config.get(name)]
    return " ".join(str(config[name]) for name in ("name", "degree") if name in config) + "".join(
        f", {extra}" for extra in extras
    )


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"forward + backward on {list(SHAPE)}: median time")
    for heading in (
        "activation",
        "dtype",
        "ms",
        "× GELU",
        "bar",
        "copy × GELU",
        "torch.compile",
        "torchortho",
        "saved",
    ):
        shown.add_column(heading, justify="left" if heading == "activation" else "right")
    for row in rows:
        bar = row["bar_times_gelu"]
        met = "" if bar is None else f"≤ {bar:g} {'✓' if row['times_gelu'] <= bar else '✗'}"
        slower = [
            f"{row[key]:g}× slower" if key in row else "" for key in ("faster_than_compiled", "faster_than_torchortho")
        ]
        shown.add_row(
            label(row["config"]),
            row["dtype"],
            f"{row['polytrope']['total_ms']:.2f}",
            f"{row['times_gelu']:.2f}",
            met,
            f"{row['copy_times_gelu']:.2f}" if "copy_times_gelu" in row else "",
            *slower,
            str(row["saved_tensors"]["polytrope"]),
        )
    return shown


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["dtype"] == "float32"]
    names = [label(row["config"]) for row in rows]
    figure, axes = plt.subplots(figsize=(9, 5), constrained_layout=True)
    series = {"polytrope": "#1f6f8b", "compiled": "#c9a227", "torchortho": "#8b1f41"}
    for index, (name, color) in enumerate(series.items()):
        places = [k + (index - 1) * 0.27 for k in range(len(rows))]
        heights = [row[name]["total_ms"] / row["gelu"]["total_ms"] if name in row else math.nan for row in rows]
        legend = {"compiled": "torch.compile of hand-written code"}.get(name, name)
        axes.barh(places, heights, height=0.25, color=color, label=legend)
    axes.axvline(1.0, color="black", linewidth=1, label="nn.GELU")
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"time of forward + backward, multiples of nn.GELU (float32, {list(SHAPE)})")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def measure_kernels(dtypes: list[str], repeats: int, console: Console) -> list[dict[str, Any]]:
    rows = []
    for dtype in (getattr(torch, name) for name in dtypes):
        for config, published, bar, published_bar in ROWS:
            row = measure_row(config, published, dtype, repeats)
            rows.append(row | {"bar_times_gelu": bar, "bar_faster_than_torchortho": published_bar})
            console.print(f"{label(config)} {row['dtype']}: {row['times_gelu']:.2f} × GELU")
    return rows


def measure_compiled(dtypes: list[str], repeats: int, console: Console) -> list[dict[str, Any]]:
    rows = []
    for dtype in dtypes:
        for size, shape in blocks.SHAPES.items():
            for config in blocks.ROWS:
                calls = blocks.contestants(config, shape, "cpu", getattr(torch, dtype))
                rows.append(blocks.compare(config, size, shape, dtype, calls, blocks.turns, repeats))
                console.print(f"{label(config)} {dtype}, {size}: {rows[-1]['times_gelu']:.2f} × GELU, compiled")
    return rows


PARTS: dict[str, tuple[str, Callable[[list[str], int, Console], list[dict[str, Any]]]]] = {
    "kernels": ("rows", measure_kernels),
    "compiled": ("compiled", measure_compiled),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtype", choices=DTYPES, help="measure this one only and keep the other's rows")
    parser.add_argument("--only", choices=tuple(PARTS), help="measure this part only and keep the other's rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "ops-cpu.json")
    parser.add_argument("--trim", action="store_true", help="leave the allocator as it is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = not options.trim and keep_freed_memory()
    console = Console(width=None if sys.stdout.isatty() else 160)
    wanted = [options.dtype] if options.dtype else list(DTYPES)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "allocator_keeps_memory": kept,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    document = {"shape": list(SHAPE), "repeats": options.repeats, "machine": machine} | before
    for part in [options.only] if options.only else list(PARTS):
        key, measure_part = PARTS[part]
        rows = [row for row in document.get(key, []) if row["dtype"] not in wanted]
        rows += measure_part(wanted, options.repeats, console)
        rows.sort(key=lambda row: DTYPES.index(row["dtype"]))
        document[key] = rows
        if part == "kernels":
            document |= {"repeats": options.repeats, "machine": machine}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if "rows" in document:
        plot(document["rows"], options.out.with_suffix(".png"))
        console.print(table(document["rows"]))
    if "compiled" in document:
        console.print(blocks.table(document["compiled"], label))


if __name__ == "__main__":
    main()
