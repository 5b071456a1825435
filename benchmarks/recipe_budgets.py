"""Does the gain grow with the model and the number of steps? The recipe's settings of one text that differ in these."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from polytrope.pipeline.support import figures

Row = dict[str, Any]
PLAIN = re.compile(r"GPT-2, \d+ layers of \d+")
FEWEST = 3  # settings that are worth a table of their own


def budgets(settings: Iterable[Row]) -> dict[str, list[Row]]:
    """Text → its settings of plain GPT-2 with one batch, by model and steps; texts with few are left out.

    Of several batches those with the most settings are taken; of several base rates or precisions of one model and
    number of steps the one with the most pairs.
    """
    groups: dict[tuple[str, int], dict[tuple[str, int], Row]] = {}
    for setting in settings:
        if PLAIN.fullmatch(setting["model"]) and _pairs(setting):
            group = groups.setdefault((setting["corpus"], setting["batch"]), {})
            budget = (setting["model"], setting["steps"])
            if budget not in group or _pairs(setting) > _pairs(group[budget]):
                group[budget] = setting
    found: dict[str, list[Row]] = {}
    for (corpus, _), group in groups.items():
        if len(group) >= max(FEWEST, len(found.get(corpus, ()))):
            found[corpus] = sorted(group.values(), key=lambda one: (_width(one), one["model"], one["steps"]))
    return found


def _pairs(setting: Row) -> int:
    """Of all its comparisons with GELU."""
    return sum(one["difference"]["pairs"] for one in setting["activations"] if one.get("difference"))


def _width(setting: Row) -> int:
    return int(setting["model"].rpartition(" ")[2])


def compared(group: Sequence[Row]) -> list[str]:
    """Activations that were compared with GELU, on two seeds or more, at `FEWEST` budgets."""
    names = Counter(
        one["name"]
        for setting in group
        for one in setting["activations"]
        if (one.get("difference") or {"pairs": 0})["pairs"] > 1
    )
    return sorted(name for name, budgets in names.items() if budgets >= FEWEST)


def picture(group: Sequence[Row]) -> bytes:
    """Losses, and paired differences to GELU, over the steps; a line per model and activation, with 95 % intervals."""
    return figures.render(lambda theme: _draw(theme, group), "light")


def _draw(theme: figures.Theme, group: Sequence[Row]) -> Figure:
    figure: Figure
    figure, (losses, gains) = plt.subplots(1, 2, figsize=(9.2, 3.8), layout="constrained")
    models = list(dict.fromkeys(setting["model"] for setting in group))
    for index, name in enumerate([group[0]["baseline"], *compared(group)]):
        for model, style in zip(models, ("-", "--", ":", "-."), strict=False):
            own = [
                (setting["steps"], one)
                for setting in group
                if setting["model"] == model
                for one in setting["activations"]
                if one["name"] == name
            ]
            if not own:
                continue
            for axes, key in ((losses, "loss"), (gains, "difference")):
                if index or key == "loss":
                    axes.errorbar(
                        [steps * (1 + 0.015 * index) for steps, _ in own],  # beside each other
                        [one[key]["mean"] for _, one in own],
                        yerr=[one[key]["half_width"] or 0.0 for _, one in own],
                        color=theme.palette[index],
                        linestyle=style,
                        marker="o",
                        capsize=3,
                        label=f"{name}, {model.removeprefix('GPT-2, ')}" if key == "loss" else None,
                    )
    gains.axhline(0.0, color=theme.muted, linewidth=0.9, linestyle=(0, (4, 3)))
    losses.set_ylabel(f"{group[0]['corpus']}: loss, nats per token")
    gains.set_ylabel(f"paired difference to {group[0]['baseline']}")
    for axes in (losses, gains):
        axes.set_xlabel(f"steps of {group[0]['batch']} samples")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, handlelength=5)
    return figure
