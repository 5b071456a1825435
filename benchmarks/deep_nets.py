"""What a deep net without normalisation keeps of its inputs' second moment: `python -m benchmarks.deep_nets`, 20 s.

Random nets of 30 layers of width 256 (weights of variance 1 / 256, no bias) are given normal numbers of variance 1;
after each layer the second moment over the channels of every input is taken. The bar is a mean within 0.8 and 1.25 in
every layer. Degree 2 misses it without an interval: so other quadratics with the same two moments go through the same
nets, and that of `stable` through wider ones. It writes results/deep_nets.json and deep_nets.md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.ops import build_activation, moments

RESULTS = Path(__file__).parent / "results"
BAR = (0.8, 1.25)
WIDTH = 256
LAYERS = 30
STARTS = ("stable", "variance_preserving")
INTERVALS = (None, [-4, 4], [-2, 2])


SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # of the square in E[F'²]; `stable` has 0.5, at 1 nothing is linear
WIDER = (512, 1024)


def second_moments(activation: nn.Module, nets: int, inputs: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    """`[layers, nets, inputs]` float32: mean square over the channels after each layer; infinity where it overflows."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(LAYERS, nets, inputs)
    with torch.no_grad():
        for net in range(nets):
            x = torch.randn(inputs, width, generator=generator)
            for layer in range(LAYERS):
                x = activation(x) @ (torch.randn(width, width, generator=generator) / math.sqrt(width))
                found[layer, net] = x.square().mean(1).nan_to_num(math.inf)
    return found


def quadratic(share: float) -> nn.Module:
    """√(1 - share) x - √share (x² - 1) / 2 + √(share / 2): with other signs, every quadratic with both moments 1.

    E[F'²] = 1 and E[F²] = 1 leave one number of three; E[F(√q z)²] is 1 + (1 - share / √2) (q - 1) + ¾ share (q - 1)².
    """
    activation = build_activation({"name": "hermite", "degree": 2})
    coefficients = [math.sqrt(share / 2), math.sqrt(1 - share), -math.sqrt(share)]
    with torch.no_grad():
        activation.coefficients.copy_(torch.tensor(coefficients))  # type: ignore[operator, union-attr]
    return activation


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


def markdown(content: dict[str, Any]) -> str:
    """Tables of the starts (without [-4, 4], which changes little), and of quadratics."""
    heads = ["start", "interval", "degree", "mean", "median", "single nets", "inputs lost", "mean within 0.8 and 1.25"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for row in content["rows"]:
        if row["interval"] is None or (row["init"] == "stable" and row["interval"] == [-2, 2]):
            ranges = [" to ".join(_shown(value) for value in row[key]) for key in ("mean", "median", "single_net")]
            lost = f"{100 * row['lost']:.1f} %"
            cells = [
                f"`{row['init']}`",
                str(row["interval"] or "–"),
                str(row["degree"]),
                *ranges,
                lost,
                "yes" if row["within_bar"] else "no",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    heads = ["degree 2", "width", "slope χ", "mean", "median", "inputs lost", "mean within 0.8 and 1.25"]
    lines += ["", "| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for row in content["quadratics"]:
        name = f"share {row['share']:g}" + (" (`stable`)" if row["share"] == 0.5 else "")
        ranges = [" to ".join(_shown(value) for value in row[key]) for key in ("mean", "median")]
        cells = [name, str(row["width"]), f"{row['slope']:.2f}", *ranges, f"{100 * row['lost']:.1f} %"]
        lines.append("| " + " | ".join([*cells, "yes" if row["within_bar"] else "no"]) + " |")
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
        for interval in INTERVALS:
            for degree in range(1, 9):
                config = {"name": "hermite", "degree": degree, "init": init, "interval": interval}
                found = summarize(second_moments(build_activation(config), options.nets, options.inputs))
                rows.append({"init": init, "degree": degree, "interval": interval, **found})
    quadratics = []
    for share, width in [*((share, WIDTH) for share in SHARES), *((0.5, width) for width in WIDER)]:
        activation = quadratic(share)
        nets = options.nets if width == WIDTH else options.nets // 2
        found = summarize(second_moments(activation, nets, options.inputs, width))
        quadratics.append({"share": share, "width": width, "nets": nets, "slope": moments(activation).slope, **found})
    content = {
        "command": "python -m benchmarks.deep_nets",
        "layers": LAYERS,
        "width": WIDTH,
        "nets": options.nets,
        "inputs": options.inputs,
        "bar": BAR,
        "rows": rows,
        "quadratics": quadratics,
    }
    (options.output / "deep_nets.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (options.output / "deep_nets.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content))


if __name__ == "__main__":
    main()
