"""The plots, each drawn for a light and a dark page. Equal figures give equal bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from polytrope.pipeline.support.text import count

# Okabe and Ito's palette: told apart with every common colour blindness; lightened a little for dark pages.
_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#AA5C94", "#B08900", "#56B4E9", "#555555", "#7A4FB5", "#8C3B1B", "#5C7A00")
_DARK = ("#4FA8DC", "#F08A4B", "#3CC9A0", "#D98CC0", "#E0BE4A", "#8ED0F5", "#B5B5B5", "#B497E7", "#D98E6E", "#A9C94A")
_MOST_CLASSES, _LONGEST_NAME = 20, 14  # names at the axes of a confusion matrix, and characters of each
_NO_POWER = 1e-14  # a share of a spectrum below it is rounding
_HIGHEST_LOSS = 2.0  # of the unigram entropy; above it, losses are cut off that are not their curve's last
_LEGEND_INCHES = 0.55  # that the height of a figure has for its legend: two rows


@dataclass(frozen=True)
class Theme:
    """Colours of one variant."""

    background: str
    text: str
    muted: str
    grid: str
    fill: str
    palette: tuple[str, ...]


THEMES = {
    "light": Theme("#ffffff", "#1c2430", "#667085", "#e4e8ee", "#dfe6f0", _LIGHT),
    "dark": Theme("#171d27", "#e6eaf0", "#98a2b3", "#2b3442", "#2c394b", _DARK),
}


@dataclass(frozen=True)
class Curve:
    """Losses of one training, or of the repeats of one group. `steps`, `values` are equally long."""

    name: str
    steps: Sequence[float]
    train: Sequence[float | None]
    validation_steps: Sequence[float]
    validation: Sequence[float]
    spread: Sequence[float] | None = None  # half-width around the validation values


Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name → steps, values


@dataclass(frozen=True)
class Moments:
    """One block's activation over the training: deviation of what enters it, mean square of what it gives."""

    inputs: Series
    outputs: Series


def render(draw: Any, theme_name: str) -> bytes:
    """PNG bytes of `draw(theme) -> Figure`. No dates, no versions inside."""
    theme = THEMES[theme_name]
    settings = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "text.color": theme.text,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "axes.titlecolor": theme.text,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "grid.color": theme.grid,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9,
        "legend.frameon": False,
        "figure.dpi": 100,
        "svg.hashsalt": "polytrope",
    }
    with matplotlib.rc_context(settings):
        figure: Figure = draw(theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        plt.close(figure)
    return buffer.getvalue()


def draw_losses(theme: Theme, curves: Sequence[Curve], entropy: float | None, unit: str) -> Figure:
    """Training (thin) and validation (with points) loss over steps, and the unigram entropy as a line.

    A start far above that entropy would press all that follows into a line: it is cut off, and the plot says so.
    """
    figure: Figure
    figure, axes = plt.subplots(figsize=(9.2, 4.2), layout="constrained")
    every: list[float] = []
    ends: list[float] = []
    for index, curve in enumerate(curves):
        colour = theme.palette[index % len(theme.palette)]
        train = [math.nan if value is None else value for value in curve.train]
        if train:
            axes.plot(curve.steps, train, color=colour, linewidth=1.0, alpha=0.45)
        values = np.asarray(curve.validation, dtype=float)
        axes.plot(
            curve.validation_steps, values, color=colour, linewidth=2.0, marker="o", markersize=4, label=curve.name
        )
        if curve.spread is not None:
            spread = np.asarray(curve.spread)
            axes.fill_between(curve.validation_steps, values - spread, values + spread, color=colour, alpha=0.15, lw=0)
        for losses in (train, values.tolist()):
            seen = [value for value in losses if math.isfinite(value)]
            every += seen
            ends += seen[-1:]
    lowest, highest = min(every, default=math.inf), max(every, default=-math.inf)
    if entropy is not None:
        limit = max([_HIGHEST_LOSS * entropy, *ends])
        if above := sum(value > limit for value in every):
            axes.annotate(
                f"not shown: {count(above, 'loss', 'losses')} above {limit:.3g}, up to {highest:.3g}",
                (0.5, 1.0),
                xycoords="axes fraction",
                xytext=(0, -12),
                textcoords="offset points",
                ha="center",
                color=theme.muted,
            )
            highest = limit
        axes.axhline(entropy, color=theme.muted, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate(
            f"unigram entropy {entropy:.2f}",
            (1.0, entropy),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=theme.muted,
        )
        highest = max(highest, entropy)
    if math.isfinite(lowest):
        margin = 0.05 * (highest - lowest) + 1e-6
        axes.set_ylim(lowest - margin, highest + 2 * margin)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"loss, {unit}")
    _name_above(figure, axes, theme, len(curves))
    return figure


def draw_gradients(theme: Theme, series: Series) -> Figure:
    """Global gradient norm before clipping over the steps, logarithmic."""
    figure: Figure
    figure, axes = plt.subplots(figsize=(9.2, 3.6), layout="constrained")
    _draw_series(axes, theme, series)
    axes.set_yscale("log")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("gradient norm")
    _name_above(figure, axes, theme, len(series))
    return figure


def draw_moments(theme: Theme, moments: Mapping[str, Moments], blocks: Sequence[str]) -> Figure:
    """A column per block: above, the deviation of its activation's inputs; below, the mean square of its outputs."""
    figure: Figure
    figure, grid = plt.subplots(
        2, len(blocks), figsize=(9.2, 4.8), layout="constrained", squeeze=False, sharex=True, sharey="row"
    )
    for column, block in enumerate(blocks):
        for row, series in enumerate((moments[block].inputs, moments[block].outputs)):
            _draw_series(grid[row, column], theme, series)
            grid[row, column].set_yscale("log")
        grid[0, column].set_title(block)
        grid[1, column].set_xlabel("optimizer steps")
    grid[0, 0].set_ylabel("input: deviation")
    grid[1, 0].set_ylabel("output: mean square")
    _name_above(figure, grid[0, 0], theme, len(moments[blocks[0]].inputs))
    return figure


def _draw_series(axes: Axes, theme: Theme, series: Series) -> None:
    for index, (name, (steps, values)) in enumerate(series.items()):
        axes.plot(steps, values, color=theme.palette[index % len(theme.palette)], linewidth=1.4, label=name)


def _name_above(figure: Figure, axes: Axes, theme: Theme, entries: int) -> None:
    """The legend over the panels: at most five names side by side, as many as fit, and room for their rows."""
    for columns in range(min(5, max(1, entries)), 0, -1):
        legend = figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns, labelcolor=theme.text
        )
        extent = legend.get_window_extent()
        if extent.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    taken = extent.height / figure.dpi - _LEGEND_INCHES
    if taken > 0:
        figure.set_figheight(figure.get_figheight() + taken)


def draw_shapes(
    theme: Theme, layers: Sequence[str], models: Mapping[str, Sequence[Mapping[str, Any]]], density_of: str
) -> Figure:
    """Each block's activation in every model, over the distribution of its inputs in the model `density_of`.

    Args:
        layers: names of the blocks to show.
        models: name of the model → records of `measure_activations`.
    """
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure: Figure
    figure, grid = plt.subplots(rows, columns, figsize=(9.2, 2.35 * rows + 0.5), layout="constrained", squeeze=False)
    for panel, name in zip(grid.flat, layers, strict=False):
        records = {model: record for model, entries in models.items() for record in entries if record["name"] == name}
        reference = records.get(density_of) or next(iter(records.values()))
        low, high = reference["edges"]
        _fill_density(panel, theme, reference["edges"], reference["density"])
        inside: list[float] = []
        for index, model in enumerate(models):
            if model not in records:
                continue
            record = records[model]
            colour = theme.palette[index % len(theme.palette)]
            panel.plot(record["x"], record["y"], color=colour, linewidth=1.7, label=model)
            if "low" in record:
                panel.fill_between(record["x"], record["low"], record["high"], color=colour, alpha=0.18, lw=0)
            inside += [y for x, y in zip(record["x"], record["y"], strict=True) if low <= x <= high]
        panel.set_xlim(low, high)
        _limit(panel, inside)
        panel.set_title(name)
    for panel in list(grid.flat)[len(layers) :]:
        panel.set_visible(False)
    _name_above(figure, grid.flat[0], theme, len(models))
    return figure


def draw_conversion(theme: Theme, layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Above: the original activation, its replacement, and the inputs it sees. Below: the distance, logarithmic."""
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure: Figure
    figure, grid = plt.subplots(
        2 * rows,
        columns,
        figsize=(9.2, 3.5 * rows + 0.5),
        layout="constrained",
        squeeze=False,
        height_ratios=[1.6, 1.0] * rows,
    )
    for number in range(rows * columns):
        above, below = (
            grid[2 * (number // columns), number % columns],
            grid[2 * (number // columns) + 1, number % columns],
        )
        if number >= len(layers):
            above.set_visible(False)
            below.set_visible(False)
            continue
        layer = layers[number]
        curve = layer["curve"]
        x = np.asarray(curve["x"], dtype=float)
        target, fit = np.asarray(curve["target"], dtype=float), np.asarray(curve["fit"], dtype=float)
        if curve.get("density"):
            _fill_curve(above, theme, x, np.asarray(curve["density"], dtype=float))
        above.plot(x, target, color=theme.muted, linewidth=3.2, alpha=0.55, label=f"before: {layer.get('target')}")
        above.plot(x, fit, color=theme.palette[1], linewidth=1.5, label=f"after: {layer['family']}")
        _limit(above, [*target.tolist(), *fit.tolist()])
        above.set_title(short_layer(layer["name"], number))
        below.semilogy(x, np.maximum(np.abs(fit - target), 1e-8), color=theme.palette[1], linewidth=1.2)
        if layer.get("interval"):
            for panel in (above, below):
                for end in layer["interval"]:
                    panel.axvline(end, color=theme.muted, linewidth=0.8, linestyle=(0, (2, 2)))
        for panel in (above, below):
            panel.set_xlim(x[0], x[-1])
        if number % columns == 0:
            below.set_ylabel("|after - before|")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, labelcolor=theme.text)
    return figure


def draw_groups(
    theme: Theme,
    groups: Sequence[Mapping[str, Any]],
    baseline: str,
    metric: str,
    title: str,
    control: str | None = None,
) -> Figure:
    """Mean, 95 % interval and single runs of each group, with the baseline as a line.

    Beside it the paired differences to the baseline, and to the control where there is one.
    """
    groups = [group for group in groups if metric in group]
    names = {"difference": baseline, "difference_to_control": f"the control ({control})"}
    shown = [key for key in names if any(key in group for group in groups)]
    figure: Figure
    figure, grid = plt.subplots(
        1, 1 + len(shown), figsize=(9.2, 0.34 * len(groups) + 1.2), layout="constrained", squeeze=False, sharey=True
    )
    axes = grid[0, 0]
    for position, group in enumerate(reversed(groups)):
        colour = theme.palette[1] if group["group"] == baseline else theme.palette[0]
        _draw_interval(axes, group[metric], position, colour)
        if group["group"] == baseline:
            axes.axvline(group[metric]["mean"], color=colour, linewidth=0.9, linestyle=(0, (4, 3)))
        for panel, key in zip(grid[0, 1:], shown, strict=True):
            if key in group:
                _draw_interval(panel, group[key], position, theme.palette[0])
    axes.set_yticks(range(len(groups)), [group["group"] for group in reversed(groups)])
    axes.set_xlabel(title)
    for panel, key in zip(grid[0, 1:], shown, strict=True):
        panel.axvline(0.0, color=theme.palette[1], linewidth=0.9, linestyle=(0, (4, 3)))
        panel.set_xlabel(f"paired difference to\n{names[key]}")
    for panel in grid.flat:
        panel.grid(visible=False, axis="y")
    return figure


def _draw_interval(axes: Axes, entry: Mapping[str, Any], position: int, colour: str) -> None:
    if entry["half_width"] is not None:
        axes.errorbar(
            entry["mean"], position, xerr=entry["half_width"], color=colour, capsize=3, linewidth=1.6, zorder=2
        )
    axes.scatter(entry["values"], [position] * len(entry["values"]), color=colour, alpha=0.4, s=14, zorder=3)
    axes.scatter([entry["mean"]], [position], color=colour, s=42, zorder=4)


def draw_confusion(
    theme: Theme, matrices: Mapping[str, Sequence[Sequence[int]]], class_names: Sequence[str] | None = None
) -> Figure:
    """Confusion matrices: rows are true classes, columns predictions; shares of each row.

    `class_names`: of all classes; of more than 20 some are written. None: they have numbers.
    """
    longest = max((len(name) for name in class_names or ()), default=0)
    columns = min(3 if longest <= 6 else 2, len(matrices))
    rows = -(-len(matrices) // columns)
    figure: Figure
    height = 3.1 if columns == 3 else 4.4
    figure, grid = plt.subplots(rows, columns, figsize=(9.2, height * rows), layout="constrained", squeeze=False)
    for panel, (name, matrix) in zip(grid.flat, matrices.items(), strict=False):
        counts = np.asarray(matrix, dtype=float)
        shares = counts / np.maximum(1.0, counts.sum(axis=1, keepdims=True))
        panel.imshow(shares, cmap="Blues" if theme.background == "#ffffff" else "cividis", vmin=0.0, vmax=1.0)
        panel.grid(visible=False)
        panel.set_title(name)
        if class_names is not None:
            shown = evenly(range(len(class_names)), _MOST_CLASSES)
            texts = [_shortened(class_names[index]) for index in shown]
            panel.set_xticks(shown, texts, rotation=0 if longest <= 2 else 90, fontsize=7)
            panel.set_yticks(shown, texts, fontsize=7)
        panel.set_xlabel("predicted")
        panel.set_ylabel("true")
    for panel in list(grid.flat)[len(matrices) :]:
        panel.set_visible(False)
    return figure


VarianceMaps = Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]  # model → layer → q, its image
_MOST_LAYERS = 8  # in a plot of variance maps


Accuracies = Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]]  # model → steps, train, test


def analysis_drawings(
    spectra: Mapping[str, Sequence[float]], maps: VarianceMaps, accuracies: Accuracies
) -> dict[str, Callable[[Theme], Figure]]:
    """Plot name → what draws it, of what an analysis found."""
    drawings: dict[str, Callable[[Theme], Figure]] = {}
    if spectra:
        drawings["kernel"] = partial(draw_spectra, spectra=spectra)
    if maps:
        drawings["variances"] = partial(draw_variance_maps, maps=maps)
    if accuracies:
        drawings["modular"] = partial(draw_accuracies, accuracies=accuracies)
    return drawings


def draw_spectra(theme: Theme, spectra: Mapping[str, Sequence[float]]) -> Figure:
    """Eigenvalues over frequency, logarithmic; those that are 0 are left out.

    Args:
        spectra: name of the model → eigenvalue of each frequency, from 0 on.
    """
    figure: Figure
    figure, axes = plt.subplots(figsize=(9.2, 3.8), layout="constrained")
    for index, (name, values) in enumerate(spectra.items()):
        shown = [value if value > _NO_POWER else math.nan for value in values]
        axes.plot(
            range(len(shown)),
            shown,
            color=theme.palette[index % len(theme.palette)],
            marker="o",
            markersize=4,
            label=name,
        )
    axes.set_yscale("log")
    axes.set_xlabel("frequency on the circle")
    axes.set_ylabel("share of the tangent kernel")
    _name_above(figure, axes, theme, len(spectra))
    return figure


def draw_accuracies(theme: Theme, accuracies: Accuracies) -> Figure:
    """Accuracy on the training data (thin) and on the other pairs, over steps."""
    figure: Figure
    figure, axes = plt.subplots(figsize=(9.2, 3.8), layout="constrained")
    for index, (name, (steps, train, test)) in enumerate(accuracies.items()):
        colour = theme.palette[index % len(theme.palette)]
        axes.plot(steps, train, color=colour, linewidth=0.9, alpha=0.6, linestyle=(0, (2, 2)))
        axes.plot(steps, test, color=colour, linewidth=1.6, label=name)
    axes.set_xscale("log")
    axes.set_ylim(0.0, 1.03)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy (dashed: on the training data)")
    _name_above(figure, axes, theme, len(accuracies))
    return figure


def draw_variance_maps(theme: Theme, maps: VarianceMaps) -> Figure:
    """A panel per layer: what its activation makes of the variance of its inputs. Dashed: variances that stay."""
    layers = evenly(list(dict.fromkeys(layer for model in maps.values() for layer in model)), _MOST_LAYERS)
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure: Figure
    figure, grid = plt.subplots(
        rows, columns, figsize=(9.2, 2.35 * rows + 0.5), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for panel, layer in zip(grid.flat, layers, strict=False):
        for index, (name, known) in enumerate(maps.items()):
            if layer in known:
                variances, images = known[layer]
                panel.plot(
                    variances, images, color=theme.palette[index % len(theme.palette)], linewidth=1.5, label=name
                )
        panel.plot(variances, variances, color=theme.muted, linewidth=0.9, linestyle=(0, (4, 3)))
        panel.set_ylim(variances[0], variances[-1])
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(layer)
    for panel in list(grid.flat)[len(layers) :]:
        panel.set_visible(False)
    figure.supxlabel("variance of the inputs", color=theme.muted, fontsize=9)
    figure.supylabel("of the outputs", color=theme.muted, fontsize=9)
    _name_above(figure, grid.flat[0], theme, len(maps))
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def short_layer(name: str, number: int) -> str:
    """`block 3` for `transformer.h.2.mlp.activation`, else the end of the name."""
    digits = [part for part in name.split(".") if part.isdigit()]
    if len(digits) == 1:
        return f"block {int(digits[0]) + 1}"
    return name if len(name) < 24 else f"layer {number + 1}"


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, with the first and the last."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def _fill_density(panel: Axes, theme: Theme, edges: Sequence[float], density: Sequence[float]) -> None:
    bounds = np.linspace(edges[0], edges[1], len(density) + 1)
    _fill_curve(panel, theme, 0.5 * (bounds[1:] + bounds[:-1]), np.asarray(density, dtype=float))


def _fill_curve(panel: Axes, theme: Theme, x: np.ndarray, density: np.ndarray) -> None:
    """The distribution of inputs on a hidden second axis, behind the curves."""
    behind = panel.twinx()
    behind.fill_between(x, density, color=theme.fill, lw=0)
    behind.set_ylim(0, 1.35 * max(float(density.max()), 1e-12))
    behind.set_axis_off()
    behind.set_zorder(0)
    panel.set_zorder(1)
    panel.patch.set_visible(False)


def _limit(panel: Axes, values: Sequence[float]) -> None:
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        low, high = min(finite), max(finite)
        margin = 0.08 * (high - low) + 1e-3
        panel.set_ylim(low - margin, high + margin)
