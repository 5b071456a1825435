"""The report's page: what its template needs beside the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from polytrope.pipeline.stages.report.contents import loss_unit, predicts_numbers, unit_of
from polytrope.pipeline.support.pages import Picture, count, render_page

Pictures = Mapping[str, Picture]  # plot name → theme → PNG
_TEMPLATE = Path(__file__).with_name("report_page.html")


def build_page(
    figures: Mapping[str, Any],
    pictures: Pictures,
    configurations: Mapping[str, Any],
    inputs: Sequence[Mapping[str, str]],
    command: str,
) -> str:
    """The page.

    Args:
        figures: content of `report.json`.
        pictures: of the plots that exist.
        configurations: label → what the model is made of, for the foldouts.
        inputs: {"input", "stage", "digest"} of every artifact the page was made from.
        command: the command that made the run, or "".
    """
    rows, entropy = figures["table"], figures["unigram_entropy"]
    losses = [row["loss"] for row in rows] + ([entropy] if figures["kind"] == "text" and entropy is not None else [])
    shown = ("losses", "gradients", "moments", "conversion", "shapes", "confusion", "groups", "kernel", "variances")
    density_of = figures.get("shapes_density_of")
    return render_page(
        _TEMPLATE,
        title=figures["title"],
        figures=figures,
        pictures={name: pictures.get(name) for name in shown},
        headline=headline(figures),
        tiles=_tiles(figures),
        best=min(rows, key=lambda row: row["loss"])["label"],
        worst=max(losses),
        scored=rows[0].get("tokens") or rows[0].get("images") or rows[0].get("rows"),
        predicts_numbers=predicts_numbers(figures),
        loss_unit=loss_unit(figures),
        scored_unit=unit_of(figures),
        drifts=any("drift" in row for row in rows),
        budgets=len({row["budget"] for row in rows if row.get("budget")}) > 1,
        speed=_speed(figures),
        drift=_drift(figures),
        analysis=_analysis(figures),
        training=_training(figures),
        density_of=name_of(figures, density_of) if density_of else "",
        samples=[(name_of(figures, label), text) for label, text in figures["samples"].items()],
        split_keys=list(dict.fromkeys(key for split in figures["dataset"]["splits"].values() for key in split)),
        configurations=[(name_of(figures, label), json.dumps(c, indent=2)) for label, c in configurations.items()],
        inputs=inputs,
        command=command,
    )


def name_of(figures: Mapping[str, Any], label: str | None) -> str:
    """The name shown for a label."""
    return next((row["name"] for row in figures["table"] if row["label"] == label), str(label))


def headline(figures: Mapping[str, Any]) -> Markup:
    """What came out, in at most three sentences of HTML."""
    text = figures["kind"] == "text"
    unit = loss_unit(figures)
    if "groups" in figures:
        best = figures["groups"][0]
        interval = best["loss"]["half_width"]
        beyond = f" {_significance(figures, 'difference_to_control', figures['control'])}" if figures["control"] else ""
        return Markup(
            f"Lowest mean validation loss: <b>{escape(best['group'])}</b>, {best['loss']['mean']:.4f}"
            + (f" ± {interval:.4f}" if interval is not None else "")
            + f" {unit} over {best['count']} runs. "
            + _significance(figures, "difference", figures["baseline"])
            + beyond
        )
    rows = figures["table"]
    best = min(rows, key=lambda row: row["loss"])
    sentences = [f"Lowest validation loss: <b>{escape(best['name'])}</b> with {best['loss']:.4f} {unit}."]
    entropy = figures["unigram_entropy"]
    if text and entropy is not None:
        margin = min(entropy - row["loss"] for row in rows)
        sentences.append(
            f"Every model beats the unigram entropy of {entropy:.3f}, the least favourable by {margin:.2f}."
            if margin > 0
            else f"Not every model beats the unigram entropy of {entropy:.3f}: train longer."
        )
    converted = next((row for row in rows if row["label"] == figures["converted"]), None)
    if converted is not None and converted["label"] != figures["baseline"] and converted["difference"] is not None:
        change = converted["difference"]
        sentences.append(
            f"Replacing the activations of “{escape(name_of(figures, figures['baseline']))}” by "
            f"{escape(converted['activation'])} changed its loss by "
            f"{'less than 0.0001' if abs(change) < 0.5e-4 else format(change, '+.4f')}, without training."
        )
    return Markup(" ".join(sentences))


def _significance(figures: Mapping[str, Any], key: str, reference: str) -> str:
    better: list[str] = []
    worse: list[str] = []
    for group in figures["groups"]:
        difference = group.get(key)
        if difference and difference["half_width"] is not None and abs(difference["mean"]) > difference["half_width"]:
            (better if difference["mean"] < 0 else worse).append(group["group"])
    if not better and not worse:
        return f"No difference to {escape(reference)} is outside its 95 % interval."
    clauses = [f"better: {escape(', '.join(better))}"] if better else []
    clauses += [f"worse: {escape(', '.join(worse))}"] if worse else []
    return f"Outside the 95 % interval of the paired difference to {escape(reference)}: {'; '.join(clauses)}."


def _tiles(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Value and label of each."""
    rows = figures["table"]
    best = min(rows, key=lambda row: row["loss"])
    tiles = [(f"{best['loss']:.3f}", f"lowest validation loss ({loss_unit(figures).partition(' per ')[0]})")]
    if best.get("bits_per_byte") is not None:
        tiles.append((f"{best['bits_per_byte']:.3f}", "its bits per byte"))
        perplexity = best.get("perplexity")
        tiles.append(("–" if perplexity is None else f"{perplexity:.1f}", "its perplexity per token"))
    elif best.get("top1") is not None:
        tiles.append((f"{100 * best['top1']:.1f} %", "its top-1 accuracy"))
    elif best.get("r2") is not None:
        tiles.append((f"{best['r2']:.4f}", "its R²"))
    tiles.append((count(max(row["parameters"] for row in rows)), "parameters (largest model)"))
    if len(tiles) < 4 or figures["kind"] != "text":
        tiles.append((str(len(rows)), "models evaluated"))
    return tiles


_SPEED = (  # figure, heading, factor, layout
    ("step_milliseconds", "training step (ms)", 1, ".1f"),
    ("training_throughput", "{unit} per second, training", 1, ",.0f"),
    ("forward_throughput", "{unit} per second, forward", 1, ",.0f"),
    ("latency_milliseconds", "latency of one sample (ms)", 1, ".2f"),
    ("bytes_kept_for_backward", "kept for backward (MB)", 1e-6, ".1f"),
    ("peak_memory", "peak memory (MB)", 1e-6, ".0f"),
)


def _speed(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """Heads and rows of the table of times and memory."""
    if not figures["speed"]:
        return None
    if "groups" in figures:
        entries = [(group["group"], group.get("speed")) for group in figures["groups"]]
    else:
        entries = [(row["name"], row.get("speed")) for row in figures["table"]]
    known = [(name, speed) for name, speed in entries if speed]
    columns = [column for column in _SPEED if any(column[0] in speed for _, speed in known)]
    return {
        "heads": [
            "activation" if "groups" in figures else "model",
            *(heading.format(unit=figures["speed"]["unit"]) for _, heading, _, _ in columns),
        ],
        "rows": [
            (name, [format(factor * speed[key], layout) for key, _, factor, layout in columns]) for name, speed in known
        ],
    }


_ANALYSIS = {  # figure → heading
    "signal/largest_variance_slope": "slope of the map of variances",
    "signal/largest_lipschitz": "Lipschitz constant",
    "signal/largest_mlp_bound": "bound of an MLP",
    "kernel/mean_frequency": "mean frequency of a layer",
    "kernel/network_mean_frequency": "of all layers",
    "modular/train_accuracy": "training pairs right",
    "modular/test_accuracy": "other pairs right",
    "modular/memorised_step": "99 % of the first at step",
    "modular/generalised_step": "of the others",
    "modular/concentration": "Fourier concentration",
    "modular/effective_frequencies": "frequencies in use",
    "modular/margin_share": "share of the best margin",
    "modular/kernel_drift": "drift of the tangent kernel",
    "width/slope": "slope of the kernel's variance",
    "width/slope_error": "its standard error",
    "features/last_dimension": "dimension of the last block",
    "features/utilisation": "utilised rank / width",
    "features/largest_condition": "largest condition number",
    "features/complexity": "complexity of the last block",
    "merging/loss": "loss before merging",
    "arithmetic/loss": "loss, exact products",
    "arithmetic/piecewise_loss": "loss, piecewise affine products",
    "bilinear/error": "error of a bilinear autoencoder",
    "bilinear/principal_error": "of principal components, as many numbers",
    "bilinear/linear_error": "of as many as latents",
    "bilinear/density": "density of the latents",
    "bilinear/squareness": "squareness of the latents",
    "rank/utilisation": "utilisation of the linear layers",
    "rank/saved_share": "parameters that factors save",
}


_MERGED = {"share": "units left", "loss": "loss"}


def _analysis_heads(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures that some model has, with their headings; those of the distances of `merging` after its loss."""
    found = dict.fromkeys(key for row in rows for key in row["figures"])
    heads: dict[str, str] = {}
    for known, heading in _ANALYSIS.items():
        if known in found:
            heads[known] = heading
        if known == "merging/loss":
            for key in found:
                figure, _, distance = key.removeprefix("merging/").partition("_")
                if key.startswith("merging/") and distance:
                    heads[key] = f"{_MERGED[figure]}, merged up to {distance}"
    return heads


def _analysis(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """Heads and rows of the table of analyses; a model without figures has the reason."""
    rows = figures["analysis"]
    heads = _analysis_heads(rows)
    known = list(heads)
    if not rows:
        return None
    cells = [[f"{row['figures'][key]:.4g}" if key in row["figures"] else "–" for key in known] for row in rows]
    return {
        "heads": ["model", *heads.values()],
        "rows": [(row["name"], entry, row["failure"]) for row, entry in zip(rows, cells, strict=True)],
    }


def _drift(figures: Mapping[str, Any]) -> dict[str, Any] | None:
    """Block by block, how near the outputs are to those of the model it was made from."""
    rows = [row for row in figures["table"] if row.get("drift", {}).get("cosine")]
    if not rows:
        return None
    blocks = max(len(row["drift"]["cosine"]) for row in rows)
    body = []
    for row in rows:
        cosines = row["drift"]["cosine"]
        cells = [f"{row['drift']['kl_divergence']:.2e}", f"{100 * row['drift']['agreement']:.2f} %"]
        body.append((row["name"], cells + [f"{cosine:.5f}" for cosine in cosines] + ["–"] * (blocks - len(cosines))))
    blocks_heads = [f"block {index + 1}" for index in range(blocks)]
    return {"heads": ["model", "KL of the predictions", "same first choice", *blocks_heads], "rows": body}


_TRAINING = {  # figure → heading
    "steps": "steps",
    "samples": "samples",
    "tokens": "tokens",
    "total_samples": "samples in all",
    "total_tokens": "tokens in all",
    "lineage": "lineage",
    "teachers": "teachers",
    "train/loss": "train/loss",
    "val/loss": "val/loss",
    "val/best_loss": "val/best_loss",
}


def _training(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and rows of the table of trainings."""
    columns = [key for key in _TRAINING if any(entry.get(key) for entry in figures["training"])]
    return {
        "heads": [_TRAINING[key] for key in columns],
        "rows": [(entry["name"], [_number(entry.get(key)) for key in columns]) for entry in figures["training"]],
    }


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " → ".join(value)
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
