"""What the activations of the recipe's study became: each block's learned function, every seed, beside GELU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from polytrope.ops import LearnableActivation, build_activation
from polytrope.pipeline.support import figures

Row = dict[str, Any]
X = torch.linspace(-4.0, 4.0, 161)
COLUMNS = 4


def functions(row: Row) -> list[Tensor]:
    """The function of each block after a training, at `X`: float32 `[161]`, from the recorded numbers."""
    found: list[Tensor] = []
    for block in range(len(next(iter(row["learned"].values())))):
        module = build_activation(row["activation"])
        assert isinstance(module, LearnableActivation)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.tensor(row["learned"][name][block]).view_as(parameter))
            found.append(module(X))
    return found


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU": functional.gelu,
    "ReLU²": lambda x: functional.relu(x) ** 2,
    "x²": torch.square,
}


def explained(trainings: Sequence[Row]) -> list[dict[str, float]]:
    """How much of each block's learned function a fixed one explains, scaled and with an offset.

    Returns:
        For each block: name in `FUNCTIONS` → 1 - E[(F - a f - b)²] / Var F at the best a and b, inputs standard normal,
        mean over the trainings.
    """
    weights = torch.exp(-X.double().square() / 2)
    weights /= weights.sum()
    named = {name: of(X.double()) for name, of in FUNCTIONS.items()}
    blocks = zip(*(functions(row) for row in trainings), strict=True)
    return [
        {name: fmean(_correlation(one.double(), f, weights) ** 2 for one in of_block) for name, f in named.items()}
        for of_block in blocks
    ]


def _correlation(one: Tensor, other: Tensor, weights: Tensor) -> float:
    one, other = (values - (weights * values).sum() for values in (one, other))
    norms = (weights * one**2).sum().sqrt() * (weights * other**2).sum().sqrt()
    return float((weights * one * other).sum() / norms)


def picture(trainings: Sequence[Row], baseline: str) -> bytes:
    """A panel for each block; trainings of one activation have one colour, GELU is dashed."""
    return figures.render(lambda theme: _draw(theme, trainings, baseline), "light")


def _draw(theme: figures.Theme, trainings: Sequence[Row], baseline: str) -> Figure:
    learned = [(row["name"], functions(row)) for row in trainings]
    blocks = len(learned[0][1])
    columns = min(COLUMNS, blocks)
    figure: Figure
    figure, grid = plt.subplots(
        -(-blocks // columns),
        columns,
        figsize=(9.2, 2.5 * -(-blocks // columns) + 0.5),
        layout="constrained",
        squeeze=False,
    )
    colours = dict(zip(dict.fromkeys(name for name, _ in learned), theme.palette, strict=False))
    gelu = build_activation(baseline)(X)
    for block, panel in enumerate(grid.flat):
        if block >= blocks:
            panel.set_visible(False)
            continue
        for name, own in learned:
            panel.plot(X, own[block], color=colours[name], linewidth=1.1, alpha=0.7)
        panel.plot(X, gelu, color=theme.text, linewidth=1.3, linestyle="--")
        panel.set_title(f"block {block}")
    seeds = Counter(row["name"] for row in trainings)
    entries = [
        plt.Line2D([], [], color=colour, label=f"{name}, {seeds[name]} seeds") for name, colour in colours.items()
    ]
    entries.append(plt.Line2D([], [], color=theme.text, linestyle="--", label=f"{baseline}: where all began"))
    figure.legend(handles=entries, loc="outside upper center", ncols=2)
    figure.supxlabel(f"{trainings[0]['corpus']}, {trainings[0]['model']}, {trainings[0]['steps']} steps", fontsize=9)
    return figure
