"""Parallel coordinates of a sweep: an axis per parameter and one for the figure, a line per trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from polytrope.pipeline.support import figures


def draw_coordinates(rows: Sequence[Mapping[str, Any]], parameters: Sequence[str], metric: str, mode: str) -> bytes:
    """PNG; of each trial the round that it got furthest in, which is an axis where there are several: budgets differ.

    The better of the further round, the darker; the best is drawn thick, what has no figure is dotted.

    Args:
        rows: `trial`, `round`, a value per parameter, the metric or None.
        parameters, metric: the axes, from left to right.
        mode: min or max.
    """
    furthest: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: int(row["round"])):
        furthest[row["trial"]] = row
    sign = 1 if mode == "min" else -1
    trials = sorted(
        furthest.values(),
        key=lambda row: (row[metric] is None, -row["round"], 0 if row[metric] is None else sign * row[metric]),
    )
    names = [*parameters, *(["round"] if any(row["round"] for row in rows) else []), metric]

    def draw(theme: figures.Theme) -> Figure:
        figure = Figure(figsize=(1.9 * len(names) + 0.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        scales = [_Scale([row[name] for row in trials]) for name in names]
        for rank, row in reversed(list(enumerate(trials))):  # the best on top
            heights = [scale.height(row[name]) for scale, name in zip(scales, names, strict=True)]
            shade = 1.0 if rank == 0 else max(0.15, 0.6 * (1 - rank / len(trials)))
            colour = theme.palette[1] if rank == 0 else theme.palette[0]
            axes.plot(heights, ":" if row[metric] is None else "-", color=colour, alpha=shade, linewidth=2 - (rank > 0))
        for place, scale in enumerate(scales):
            axes.axvline(place, color=theme.muted, linewidth=0.8)
            for height, text in scale.ends:
                box = {"facecolor": theme.background, "edgecolor": "none", "pad": 1}
                axes.annotate(
                    text, (place, height), (4, 0), textcoords="offset points", va="center", fontsize=7.5, bbox=box
                )
        axes.set_xticks(range(len(scales)), names, fontsize=8)
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(scales) - 0.5)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(visible=False)
        return figure

    return figures.render(draw, "light")


class _Scale:
    """Heights from 0 to 1 on an axis: of numbers by their size or order of magnitude, of others by their place.

    `ends`: (height, text) of the labels.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        present = [value for value in values if value is not None]
        self._names = None if len(numbers) == len(present) else sorted({str(value) for value in present})
        if self._names is not None:
            self.ends = [(index / max(1, len(self._names) - 1), name) for index, name in enumerate(self._names)]
            return
        low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
        self._log = low > 0 and high / low >= 20
        self._low, self._high = (math.log(low), math.log(high)) if self._log else (float(low), float(high))
        self.ends = [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")] if high > low else [(0.5, f"{low:.4g}")]

    def height(self, value: Any) -> float:
        if value is None:
            return float(np.nan)
        if self._names is not None:
            return self._names.index(str(value)) / max(1, len(self._names) - 1)
        if self._high == self._low:
            return 0.5
        return ((math.log(value) if self._log else float(value)) - self._low) / (self._high - self._low)
