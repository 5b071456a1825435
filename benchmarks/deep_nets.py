"""What a deep net without normalisation keeps of its inputs' second moment: `python -m benchmarks.deep_nets`, seconds.

Random nets of 30 layers of width 256 (weights of variance 1 / 256, no bias) are given normal numbers of variance 1;
after each layer the second moment over the channels of every input is taken. The bar is a mean within 0.8 and 1.25 in
every layer. It writes results/deep_nets.json and deep_nets.md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.ops import build_activation

RESULTS = Path(__file__).parent / "results"
BAR = (0.8, 1.25)
WIDTH = 256
LAYERS = 30
STARTS = ("stable", "variance_preserving")


def second_moments(activation: nn.Module, nets: int, inputs: int, seed: int = 0) -> Tensor:
    """`[layers, nets, inputs]` float32: mean square over the channels after each layer; infinity where it overflows."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(LAYERS, nets, inputs)
    with torch.no_grad():
        for net in range(nets):
            x = torch.randn(inputs, WIDTH, generator=generator)
            for layer in range(LAYERS):
                x = activation(x) @ (torch.randn(WIDTH, WIDTH, generator=generator) / math.sqrt(WIDTH))
                found[layer, net] = x.square().mean(1).nan_to_num(math.inf)
    return found


def summarize(moments: Tensor) -> dict[str, Any]:
    """Over the layers the smallest and largest of: the mean over nets and inputs, the median, and the means of nets.

    `lost`: share of the inputs that are not finite, or above 10, after the last layer.
    """
    means = moments.mean((1, 2))
    of_nets = moments.mean(2)
    medians = moments.flatten(1).median(1).values
    return {
        "mean": _range(means),
        "median": _range(medians),
        "single_net": _range(of_nets),
        "lost": float((moments[-1] > 10).float().mean()),
        "within_bar": bool(BAR[0] <= means.min() and means.max() <= BAR[1]),
    }


def _range(values: Tensor) -> list[float | None]:
    """Smallest and largest; None where it is infinite, which JSON has no number for."""
    return [value if math.isfinite(value) else None for value in (float(values.min()), float(values.max()))]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of the functions that go on everywhere; tangents outside an interval change little."""
    heads = ["start", "degree", "mean", "median", "single nets", "inputs lost", "mean within 0.8 and 1.25"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for row in rows:
        if row["interval"] is None:
            ranges = [" to ".join(_shown(value) for value in row[key]) for key in ("mean", "median", "single_net")]
            lost = f"{100 * row['lost']:.1f} %"
            cells = [f"`{row['init']}`", str(row["degree"]), *ranges, lost, "yes" if row["within_bar"] else "no"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    if value is None:
        return "∞"
    return f"{value:.2f}" if value < 1000 else f"{value:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for init in STARTS:
        for interval in (None, [-4, 4]):
            for degree in range(1, 9):
                config = {"name": "hermite", "degree": degree, "init": init, "interval": interval}
                found = summarize(second_moments(build_activation(config), options.nets, options.inputs))
                rows.append({"init": init, "degree": degree, "interval": interval, **found})
    content = {
        "command": "python -m benchmarks.deep_nets",
        "layers": LAYERS,
        "width": WIDTH,
        "nets": options.nets,
        "inputs": options.inputs,
        "bar": BAR,
        "rows": rows,
    }
    (options.output / "deep_nets.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (options.output / "deep_nets.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
