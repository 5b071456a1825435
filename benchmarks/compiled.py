"""A compiled MLP block, linear - activation - linear: learnable activations as torch.compile sees them, against GELU.

    python -m benchmarks.ops --only compiled      # on the CPU; on a GPU it is a part of `benchmarks.gpu_ops`

Forward and backward with all gradients. Activations that can be lowered to arithmetic, which fuses with bias and casts,
are there twice: as they are, which on a CPU is the arithmetic and on a GPU the operator, which the compiler does not
look into, and the other way. The contestants of a row take
turns; what counts is the median of a turn's ratios to GELU's time in the same turn, all compiled. On the CPU, time is
processor time: with `--threads 1` the work of others on the machine disturbs the caches only.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from polytrope.ops import LearnableActivation, build_activation, functional, kernels, lowering
from polytrope.ops.families import Family

BAR = 1.05  # times GELU
SHAPES = {"small": (8, 128, 128, 512), "large": (4, 256, 512, 2048)}  # batch, length, width, hidden width
GPU_SHAPE = (32, 1024, 768, 3072)
ROWS: list[dict[str, Any]] = [
    {"name": "hermite", "degree": 3},
    {"name": "hermite", "degree": 8},
    {"name": "hermite", "degree": 8, "interval": [-4.0, 4.0]},
    {"name": "chebyshev", "degree": 8},
    {"name": "legendre", "degree": 8},
    {"name": "polyrelu", "degree": 3},
    {"name": "tropical", "degree": 6},
    {"name": "tropical_rational", "degree": 6},
    {"name": "rational", "degree": 5},
    {"name": "affine"},
]
_AS = {"operator": "as an operator", "arithmetic": "as arithmetic"}
Turns = Callable[[dict[str, Callable[[], object]], int], dict[str, list[float]]]


class OtherWay(nn.Module):
    """The same activation as an operator that is not lowered, which does not name its arithmetic, or as one that is."""

    def __init__(self, activation: LearnableActivation, *, lowered: bool) -> None:
        super().__init__()
        self.lowered = lowered
        self.activation = activation
        own = list(activation.parameters())
        family = Family[activation.name.upper()]
        shapes = tuple(part.shape for part in own)
        options = {"interval": activation.interval, "variable": activation.variable}
        formula, self.packing = functional.describe(
            family, own[0].dtype, torch.Size([1]), shapes, -1, glu=False, epsilon=0.0, **options
        )
        self.arguments = kernels._listed(formula)

    def forward(self, x: Tensor) -> Tensor:
        own = list(self.activation.parameters())
        packed = self.packing.side_by_side(own) if self.lowered else self.packing.pack(own, None)
        version = (lowering.version(),) if self.lowered else ()
        result: Tensor = torch.ops.polytrope.activation(x, packed, *self.arguments, *version)
        return result


def block(activation: nn.Module, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> nn.Module:
    """Linear - activation - linear, the linear parts in this dtype; coefficients stay in float32."""
    torch.manual_seed(0)
    inner, outer = nn.Linear(shape[2], shape[3]).to(device, dtype), nn.Linear(shape[3], shape[2]).to(device, dtype)
    return nn.Sequential(inner, activation.to(device), outer)


def contestants(
    config: dict[str, Any], shape: tuple[int, ...], device: str, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """One step each, compiled by the first call."""
    torch._dynamo.reset()
    x = torch.randn(shape[:3], device=device, dtype=dtype, requires_grad=True)
    seed = torch.randn(shape[:3], device=device, dtype=dtype)
    activations: dict[str, nn.Module] = {"gelu": nn.GELU(), "polytrope": build_activation(config)}
    if config["name"].upper() in Family.__members__ and lowering.is_lowered(Family[config["name"].upper()]):
        other = "arithmetic" if device == "cuda" else "operator"
        activations[other] = OtherWay(build_activation(config), lowered=device == "cuda")

    def step(activation: nn.Module) -> Callable[[], object]:
        module = torch.compile(block(activation, shape, device, dtype), fullgraph=True, dynamic=False)
        inputs = [x, *module.parameters()]
        return lambda: torch.autograd.grad(module(x), inputs, seed)

    return {name: step(activation) for name, activation in activations.items()}


def turns(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each turn: what else runs on the machine takes its time, but not this."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append((time.process_time() - start) * 1e3)
    return times


def compare(
    config: dict[str, Any],
    size: str,
    shape: tuple[int, ...],
    dtype: str,
    calls: dict[str, Callable[[], object]],
    take_turns: Turns,
    repeats: int,
) -> dict[str, Any]:
    """The row of these contestants."""
    for call in calls.values():
        for _ in range(5):
            call()
    times = take_turns(calls, repeats)
    row: dict[str, Any] = {"config": config, "size": size, "shape": list(shape), "dtype": dtype}
    row |= {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
    row["ms"] = {name: round(statistics.median(own), 4) for name, own in times.items()}
    for name in times:
        if name != "gelu":
            key = "times_gelu" if name == "polytrope" else f"{name}_times_gelu"
            ratios = [ours / gelu for ours, gelu in zip(times[name], times["gelu"], strict=True)]
            row[key] = round(statistics.median(ratios), 3)
    return row | {"bar_times_gelu": BAR, "meets_bar": row["times_gelu"] <= BAR}


def _other(rows: list[dict[str, Any]]) -> str:
    return "arithmetic" if any("arithmetic_times_gelu" in row for row in rows) else "operator"


def table(rows: list[dict[str, Any]], label: Callable[[dict[str, Any]], str]) -> Table:
    shown = Table(title=f"compiled linear - activation - linear, forward + backward: × GELU (bar: ≤ {BAR:g})")
    other = _other(rows)
    for heading in ("activation", "block", "dtype", "GELU, ms", "× GELU", _AS[other]):
        shown.add_column(heading, justify="left" if heading == "activation" else "right")
    for row in rows:
        shown.add_row(
            label(row["config"]),
            row["size"],
            row["dtype"],
            f"{row['ms']['gelu']:.2f}",
            f"{row['times_gelu']:.2f} {'✓' if row['meets_bar'] else '✗'}",
            f"{row[f'{other}_times_gelu']:.2f}" if f"{other}_times_gelu" in row else "",
        )
    return shown


def markdown(rows: list[dict[str, Any]], label: Callable[[dict[str, Any]], str]) -> str:
    """The tables of docs/ops.md, one per dtype: × GELU as the compiler gets it, and the other way, for each block."""
    other = _other(rows)
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = {(label(row["config"]), row["size"]): row for row in rows if row["dtype"] == dtype}
        headings = [cell for size in sizes for cell in (f"{dtype}, {size}", _AS[other])]
        lines += ["| " + " | ".join(("activation", *headings)) + " |", "|---" * (1 + len(headings)) + "|"]
        for name in dict.fromkeys(label(row["config"]) for row in rows):
            cells = [name]
            for size in sizes:
                row = own[name, size]
                cells.append(f"{row['times_gelu']:.2f}" + ("" if row["meets_bar"] else " ✗"))
                cells.append(f"{row[f'{other}_times_gelu']:.2f}" if f"{other}_times_gelu" in row else "")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
