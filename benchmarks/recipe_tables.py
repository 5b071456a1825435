"""The tables of the recipe's study, in Markdown: what stands in results/recipe.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import recipe_budgets, recipe_shapes
from benchmarks.recipe_trainings import DEFAULT, RECIPE

Row = dict[str, Any]


def markdown(
    settings: Sequence[Row],
    rates: Sequence[Row],
    texts: Mapping[str, Row],
    in_time: Sequence[Row] = (),
    became: Sequence[Row] = (),
    tuned: Sequence[Row] = (),
) -> str:
    """All tables, those that go over settings first, then one for each setting with two seeds or more to report on."""
    reported = [setting for setting in settings if is_reported(setting)]
    lines = overview(reported)
    for corpus, group in recipe_budgets.budgets(reported).items():
        lines += by_budget(corpus, group)
    lines += at_chosen_rates(tuned) if tuned else []
    lines += functions_became(became) if became else []
    lines += equal_time(in_time) if in_time else []
    lines += base_rates(rates) if rates else []
    for setting in reported:
        lines += one_setting(setting, texts)
    return "\n".join(lines)


def overview(settings: Iterable[Row]) -> list[str]:
    """The recipe, as it was found and as it is the default, in each setting that has it: its difference to GELU, that
    of the control at its rate, and its own beyond the control's.
    """
    rows = [row for setting in settings for name in (RECIPE, DEFAULT) if (row := _in_setting(name, setting))]
    heads = ["data", "model", "steps", "batch", "base rate", "precision", "activation × rate", "seeds", "loss of GELU"]
    heads += ["Δ to GELU", "p, Holm", "Δ of the control", "Δ beyond it", "p, Holm", "failed"]
    return ["**The recipe everywhere**, and the control at its rate", "", *table(heads, rows), ""]


def _in_setting(name: str, setting: Row) -> list[str] | None:
    """A row of the overview; None if the setting has no pair of this activation and GELU."""
    entries = {entry["name"]: entry for entry in setting["activations"]}
    own, baseline = entries.get(name), entries.get(setting["baseline"])
    if own is None or baseline is None or not own.get("difference"):
        return None
    at_its_rate = [control for control in setting["controls"] if rate_of(control) == rate_of(name)]
    control = entries[at_its_rate[0]] if at_its_rate else {}
    beyond = own["differences_to_controls"].get(at_its_rate[0]) if at_its_rate else None
    row = [setting["corpus"], setting["model"], str(setting["steps"]), str(setting["batch"])]
    row += [f"{setting['learning_rate']:g}", setting["precision"], name, str(own["difference"]["pairs"])]
    row += [plus_minus(baseline["loss"], ".4f"), plus_minus(own["difference"], "+.4f"), p_value(own["difference"])]
    row += [plus_minus(control.get("difference"), "+.4f"), plus_minus(beyond, "+.4f"), p_value(beyond)]
    return [*row, str(own["failed"])]


def by_budget(corpus: str, group: Sequence[Row]) -> list[str]:
    """The settings of one text that differ in the model's size and the steps."""
    lines = [f"**{corpus}** by size and number of steps, paired differences to {group[0]['baseline']}", ""]
    names = recipe_budgets.compared(group)
    rows = []
    for setting in group:
        entries = {entry["name"]: entry for entry in setting["activations"]}
        found = [entries[name]["difference"] if name in entries else None for name in names]
        pairs = max(one["pairs"] for one in found if one is not None)
        row = [
            setting["model"],
            setting["precision"],
            f"{setting['learning_rate']:g}",
            str(setting["steps"]),
            str(pairs),
            plus_minus(entries[group[0]["baseline"]]["loss"], ".4f"),
        ]
        rows.append(row + [plus_minus(one, "+.4f") for one in found])
    lines += [
        *table(
            ["model", "precision", "base rate", "steps", "seeds", "loss of GELU", *(f"Δ {name}" for name in names)],
            rows,
        ),
        "",
    ]
    return lines


def at_chosen_rates(tuned: Sequence[Row]) -> list[str]:
    """Each activation at the base rate chosen for it; p is not corrected."""
    rows = []
    for one in tuned:
        row = [one["corpus"], one["model"], str(one["steps"]), one["precision"], one["name"], f"{one['chosen']:g}"]
        row += [str(len(one["loss"]["values"])), plus_minus(one["loss"], ".4f")]
        for compared in (one["difference"], one["difference_to_control"]):
            p = None if compared is None else compared["p_value"]
            row += [plus_minus(compared, "+.4f"), "–" if p is None else f"{p:.4f}"]
        rows.append(row)
    heads = ["data", "model", "steps", "precision", "activation × rate", "base rate", "seeds", "loss"]
    heads += ["Δ to GELU at its own", "p", "Δ to the control at its own", "p"]
    return ["**Each at the base rate chosen for it**", "", *table(heads, rows), ""]


def functions_became(became: Sequence[Row]) -> list[str]:
    """What fixed functions explain of the learned ones: of the first block's, and of the others' on average."""
    lines = [
        "**What the recipe's functions became**: variance explained by fixed functions, scaled and shifted",
        "",
    ]
    names = list(recipe_shapes.FUNCTIONS)
    rows = []
    for one in became:
        first, *others = one["blocks"]
        row = [one["corpus"], one["model"], str(one["steps"]), str(one["batch"]), f"{one['learning_rate']:g}"]
        row += [one["precision"], str(one["seeds"])]
        row += [f"{first[name]:.2f}" for name in names]
        rows.append(row + [f"{statistics.fmean(block[name] for block in others):.2f}" for name in names])
    heads = ["data", "model", "steps", "batch", "base rate", "precision", "seeds"]
    heads += [f"{which}: {name}" for which in ("first block", "others") for name in names]
    return [*lines, *table(heads, rows), ""]


def equal_time(in_time: Sequence[Row]) -> list[str]:
    """Trainings as long as GELU's, in seconds."""
    lines = ["**Equal time**: as many steps as take GELU's time for its own", ""]
    rows = []
    for one in in_time:
        compared = one["difference"]
        pairs = "0" if compared is None else str(compared["pairs"])
        row = [one["corpus"], one["name"], str(one["steps"]), str(one["steps_of_gelu"]), pairs]
        rows.append([*row, plus_minus(one["loss"], ".4f"), plus_minus(compared, "+.4f")])
    heads = ["images", "activation × rate", "steps", "GELU's steps", "seeds", "loss", "Δ to GELU, paired"]
    return [*lines, *table(heads, rows), ""]


def base_rates(rates: Sequence[Row]) -> list[str]:
    """The losses for choosing at every base rate that was tried."""
    lines = ["**Base learning rates**, by the seeds for choosing; of a text, by its documents for choosing", ""]
    rows = []
    for one in rates:
        for rate in one["rates"]:
            shown = " · ".join(f"{seed}: {_shown(loss)}" for seed, loss in sorted(rate["losses"].items()))
            mark = "chosen" if rate["learning_rate"] == one["chosen"] else ""
            about = [one["corpus"], one["model"], str(one["steps"]), one["precision"], one["name"]]
            rows.append([*about, f"{rate['learning_rate']:g}", shown, _shown(rate["mean"]), mark])
    heads = ["text", "model", "steps", "precision", "activation × rate", "base rate", "seeds", "mean", ""]
    return [*lines, *table(heads, rows), ""]


def one_setting(setting: Row, texts: Mapping[str, Row]) -> list[str]:
    """All activations of a setting, compared with GELU and with each control."""
    heads = ["activation × rate", "seeds", "loss", "for choosing", "Δ to GELU, paired", "p, Holm"]
    for control in setting["controls"]:
        heads += [f"Δ to {control}", "p, Holm"]
    images = any(entry.get("accuracy") for entry in setting["activations"])
    heads += ["accuracy", "Δ to GELU", "p, Holm", "failed"] if images else ["failed"]
    lines = [
        f"**{setting['corpus']}** ({setting['data']}): {setting['model']}, {setting['steps']} steps of "
        f"{setting['batch']} samples, base learning rate {setting['learning_rate']:g}, {setting['precision']}",
        "",
    ]
    if setting["data"] in texts:
        lines += [halves(texts[setting["data"]]), ""]
    rows = []
    for entry in setting["activations"]:
        row = [entry["name"], str(len((entry["loss"] or {"values": ()})["values"]))]
        row.append(plus_minus(entry["loss"], ".4f"))
        row.append(" · ".join(f"{seed}: {loss:.4f}" for seed, loss in entry["development"].items()) or "–")
        of_controls = entry.get("differences_to_controls", {})
        for compared in (entry.get("difference"), *(of_controls.get(name) for name in setting["controls"])):
            row += [plus_minus(compared, "+.4f"), p_value(compared)]
        if images:
            compared = entry.get("accuracy_difference")
            row += [plus_minus(entry.get("accuracy"), ".4f"), plus_minus(compared, "+.4f"), p_value(compared)]
        rows.append([*row, str(entry["failed"])])
    return [*lines, *table(heads, rows), ""]


def halves(text: Row) -> str:
    """How many documents, and how long, stand behind the losses of a text."""
    shown = [
        f"{_count(text[half]['documents'], 'document')} of {text[half]['tokens']:,} tokens, the longest of "
        f"{text[half]['longest']:,}"
        for half in ("choosing", "reporting")
    ]
    return f"For choosing: {shown[0]}. Reported: {shown[1]}."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def is_reported(setting: Row) -> bool:
    """Whether something was compared there on two seeds or more."""
    return any((entry.get("difference") or {"pairs": 0})["pairs"] > 1 for entry in setting["activations"])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]


def _shown(loss: float | None) -> str:
    return "failed" if loss is None else f"{loss:.4f}"


def plus_minus(entry: Row | None, layout: str) -> str:
    """`4.2563 ± 0.0123`: mean and half of the 95 % interval."""
    if entry is None:
        return "–"
    half = entry["half_width"]
    return format(entry["mean"], layout) + (f" ± {half:{layout.lstrip('+')}}" if half is not None else "")


def p_value(entry: Row | None) -> str:
    return "–" if entry is None or entry["holm_p_value"] is None else f"{entry['holm_p_value']:.4f}"


def rate_of(name: str) -> str:
    """`10` of `affine gelu × 10, frozen as learned`; empty where no coefficients learn."""
    return name.partition(" × ")[2].partition(",")[0]
