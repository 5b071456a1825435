"""The HTML page: plain templates, inline CSS, pictures inside. It needs no network and no scripts."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from polytrope.pipeline.support.page_style import CSS

Pictures = Mapping[str, Mapping[str, bytes]]  # plot name → theme → PNG


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
    parts = [
        f"<header><h1>{escape(figures['title'])}</h1>",
        f'<p class="muted">{escape(figures["description"])}</p>' if figures["description"] else "",
        f"<p>{headline(figures)}</p></header>",
        _tiles(figures),
        _groups(figures, pictures) if "groups" in figures else _results(figures),
        _failures(figures),
        _speed(figures),
        _picture_section(
            "Loss during training",
            "Thin lines: training loss, averaged between two log points. Lines with points: validation loss."
            + (" Means over the repeats; bands, if any: 95 % confidence interval." if "groups" in figures else ""),
            pictures.get("losses"),
        ),
        _picture_section(
            "Gradient norms",
            "Norm of the whole gradient before clipping, means over the repeats.",
            pictures.get("gradients"),
        ),
        _picture_section(
            "Moments of the activations during training",
            "By block: the deviation of what enters the activation and the mean square of what it gives, in one "
            "training batch. Weights are drawn so that the first inputs have deviation 1.",
            pictures.get("moments"),
        ),
        _drift(figures),
        _conversion(figures, pictures),
        _picture_section(
            "Shapes of the activations",
            "Every block's activation as it is after training. Shaded: how often each input occurs (pre-activations on "
            f"validation data, in “{escape(name_of(figures, figures['shapes_density_of']))}”)."
            if figures.get("shapes_density_of")
            else "",
            pictures.get("shapes"),
        ),
        _picture_section("Confusion", "Share of each true class (rows) by prediction.", pictures.get("confusion")),
        _samples(figures),
        _data(figures, configurations),
        _reproduce(inputs, command),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(figures['title'])}</title><style>{CSS}</style></head><body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n<footer>Made by the report stage of polytrope. The same figures are in report.json, the plots in plots/."
        "</footer></main></body></html>\n"
    )


def name_of(figures: Mapping[str, Any], label: str | None) -> str:
    """The name shown for a label."""
    return next((row["name"] for row in figures["table"] if row["label"] == label), str(label))


def headline(figures: Mapping[str, Any]) -> str:
    """What came out, in at most three sentences of HTML."""
    text = figures["kind"] == "text"
    unit = "token" if text else "image"
    if "groups" in figures:
        best = figures["groups"][0]
        interval = best["loss"]["half_width"]
        return (
            f"Lowest mean validation loss: <b>{escape(best['group'])}</b>, {best['loss']['mean']:.4f}"
            + (f" ± {interval:.4f}" if interval is not None else "")
            + f" nats per {unit} over {best['count']} runs. {_significance(figures)}"
        )
    rows = figures["table"]
    best = min(rows, key=lambda row: row["loss"])
    sentences = [f"Lowest validation loss: <b>{escape(best['name'])}</b> with {best['loss']:.4f} nats per {unit}."]
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
    return " ".join(sentences)


def _significance(figures: Mapping[str, Any]) -> str:
    better: list[str] = []
    worse: list[str] = []
    for group in figures["groups"]:
        difference = group.get("difference")
        if difference and difference["half_width"] is not None and abs(difference["mean"]) > difference["half_width"]:
            (better if difference["mean"] < 0 else worse).append(group["group"])
    baseline = escape(figures["baseline"])
    if not better and not worse:
        return f"No difference to {baseline} is outside its 95 % interval."
    clauses = [f"better: {escape(', '.join(better))}"] if better else []
    clauses += [f"worse: {escape(', '.join(worse))}"] if worse else []
    return f"Outside the 95 % interval of the paired difference to {baseline}: {'; '.join(clauses)}."


def _tiles(figures: Mapping[str, Any]) -> str:
    rows = figures["table"]
    best = min(rows, key=lambda row: row["loss"])
    tiles = [(f"{best['loss']:.3f}", "lowest validation loss (nats)")]
    if best.get("bits_per_byte") is not None:
        tiles.append((f"{best['bits_per_byte']:.3f}", "its bits per byte"))
        perplexity = best.get("perplexity")
        tiles.append(("–" if perplexity is None else f"{perplexity:.1f}", "its perplexity per token"))
    else:
        tiles.append((f"{100 * best['top1']:.1f} %", "its top-1 accuracy"))
    tiles.append((count(max(row["parameters"] for row in rows)), "parameters (largest model)"))
    if len(tiles) < 4 or figures["kind"] != "text":
        tiles.append((str(len(rows)), "models evaluated"))
    inner = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)
    return f'<div class="tiles">{inner}</div>'


def _results(figures: Mapping[str, Any]) -> str:
    text = figures["kind"] == "text"
    rows, entropy = figures["table"], figures["unigram_entropy"]
    best = min(rows, key=lambda row: row["loss"])
    drift = any("drift" in row for row in rows)
    heads = ["model", "parameters", "validation loss", "Δ to baseline"]
    heads += ["perplexity", "bits per byte", "top-1"] if text else ["top-1", "top-5", "calibration error"]
    heads += ["KL to reference"] if drift else []
    body = []
    worst = max([row["loss"] for row in rows] + ([entropy] if text and entropy is not None else []))
    for row in rows:
        share = 100 * row["loss"] / worst if worst > 0 else 0
        cells = [
            f"<td>{escape(row['name'])}<small>{escape(row['activation'])}</small></td>",
            f"<td>{count(row['parameters'])}</td>",
            f'<td class="bar" style="background-size:{share:.1f}% 62%">{row["loss"]:.4f}</td>',
            _difference_cell(row, figures["baseline"]),
        ]
        if text:
            bits = row.get("bits_per_byte")
            cells += [f"<td>{_optional(row.get('perplexity'), '.2f')}</td>", f"<td>{_optional(bits, '.4f')}</td>"]
            cells += [f"<td>{100 * row['top1']:.1f} %</td>"]
        else:
            cells += [f"<td>{100 * row['top1']:.2f} %</td>", f"<td>{100 * row['top5']:.2f} %</td>"]
            cells += [f"<td>{row['calibration_error']:.4f}</td>"]
        if drift:
            cells.append(f"<td>{row['drift']['kl_divergence']:.2e}</td>" if "drift" in row else "<td>–</td>")
        body.append(f'<tr class="{"best" if row is best else ""}">{"".join(cells)}</tr>')
    if text and entropy is not None:
        empty = "<td></td>" * (len(heads) - 5)
        body.append(
            '<tr class="reference"><td>unigram entropy<small>token frequencies only, no context</small></td><td></td>'
            f'<td class="bar" style="background-size:{100 * entropy / worst:.1f}% 62%">{entropy:.4f}</td><td></td>'
            f"<td>{2.718281828459045**entropy:.2f}</td>{empty}</tr>"
        )
    scored = rows[0].get("tokens") or rows[0].get("images")
    stride = figures["protocol"].get("stride")
    how = (
        f"windows that slide by {stride} tokens"
        if stride
        else f"blocks of {figures['dataset'].get('sequence_length')} tokens, each on its own"
    )
    note = (
        f"Loss in nats per token over {scored:,} validation tokens ({how}). Bits per byte do not depend on the "
        "tokenizer: the summed loss over the bytes of text behind those same tokens. "
        if text
        else f"Loss in nats per image over {scored:,} validation images. "
    )
    note += (
        "KL to reference: mean divergence of the predictions from those of the model it was made from." if drift else ""
    )
    return _section("Results", f'<div class="scroll">{_table(heads, body)}</div><p class="note">{note}</p>')


def _difference_cell(row: Mapping[str, Any], baseline: str) -> str:
    difference = row.get("difference")
    if difference is None:
        return "<td>–</td>"
    if row["label"] == baseline:
        return '<td class="muted">baseline</td>'
    kind = "good" if difference < 0 else "bad"
    return f'<td class="{kind}">{difference:+.4f}</td>'


def _groups(figures: Mapping[str, Any], pictures: Pictures) -> str:
    text = figures["kind"] == "text"
    heads = ["activation", "runs", "parameters", "validation loss", "Δ to baseline, paired", "p"]
    heads += ["bits per byte"] if text else ["top-1", "calibration error"]
    body = []
    for index, group in enumerate(figures["groups"]):
        if "loss" not in group:
            body.append(
                f'<tr><td>{escape(group["group"])}</td><td class="bad">{_runs(group)}</td>'
                + "<td>–</td>" * (len(heads) - 2)
                + "</tr>"
            )
            continue
        difference = group.get("difference")
        if difference is None:
            cells = (
                '<td class="muted">baseline</td><td></td>'
                if group["group"] == figures["baseline"]
                else "<td>–</td><td></td>"
            )
        else:
            clear = difference["half_width"] is not None and abs(difference["mean"]) > difference["half_width"]
            kind = ("good" if difference["mean"] < 0 else "bad") if clear else ""
            p_value = difference["p_value"]
            cells = f'<td class="{kind}">{_plus_minus(difference, "+.4f")}</td>'
            cells += f"<td>{_p_value(p_value)}</td>"
        others = [group.get(key) for key in (("bits_per_byte",) if text else ("top1", "calibration_error"))]
        last = "".join(f"<td>{'–' if other is None else _plus_minus(other, '.3f')}</td>" for other in others)
        body.append(
            f'<tr class="{"best" if index == 0 else ""}"><td class="name">{escape(group["group"])}'
            f"<small>{escape(group['activation'])}</small></td><td>{_runs(group)}</td><td>{count(group['parameters'])}</td>"
            f"<td>{_plus_minus(group['loss'], '.4f')}</td>{cells}{last}</tr>"
        )
    entropy = figures["unigram_entropy"]
    note = (
        "Mean ± half of the 95 % confidence interval (Student). Differences are paired: the same seed, so the same "
        "data order, with either activation; p is that of the paired t-test, not corrected for "
        "the number of comparisons."
    )
    if text and entropy is not None:
        note += f" Unigram entropy: {entropy:.4f}."
    return _section(
        "Results",
        f'<div class="scroll">{_table(heads, body)}</div><p class="note">{note}</p>'
        + _figure(pictures.get("groups"), "mean loss of each group")
        + '<p class="note">Points: single runs and their mean; bars: 95 % confidence interval of the mean. Left: the '
        "loss, which varies with the seed. Right: the paired difference, in which the seed's share cancels.</p>",
    )


def _runs(group: Mapping[str, Any]) -> str:
    return str(group["count"]) + (f" <small>{group['failed']} failed</small>" if group["failed"] else "")


def _failures(figures: Mapping[str, Any]) -> str:
    if not figures["failures"]:
        return ""
    body = [
        f'<tr><td>{escape(entry["name"])}</td><td class="left bad">{escape(entry["failure"])}</td></tr>'
        for entry in figures["failures"]
    ]
    return _section(
        "Failures",
        '<p class="note">These are in no mean above.</p>'
        f'<div class="scroll">{_table(["model", "what happened"], body, left=(1,))}</div>',
    )


_SPEED = (  # figure, heading, factor, layout
    ("step_milliseconds", "training step (ms)", 1, ".1f"),
    ("training_throughput", "{unit} per second, training", 1, ",.0f"),
    ("forward_throughput", "{unit} per second, forward", 1, ",.0f"),
    ("latency_milliseconds", "latency of one sample (ms)", 1, ".2f"),
    ("bytes_kept_for_backward", "kept for backward (MB)", 1e-6, ".1f"),
    ("peak_memory", "peak memory (MB)", 1e-6, ".0f"),
)


def _speed(figures: Mapping[str, Any]) -> str:
    if not figures["speed"]:
        return ""
    protocol = figures["speed"]
    if "groups" in figures:
        entries = [(group["group"], group.get("speed")) for group in figures["groups"]]
    else:
        entries = [(row["name"], row.get("speed")) for row in figures["table"]]
    known = [(name, speed) for name, speed in entries if speed]
    columns = [column for column in _SPEED if any(column[0] in speed for _, speed in known)]
    body = [
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{format(factor * speed[key], layout)}</td>" for key, _, factor, layout in columns)
        + "</tr>"
        for name, speed in known
    ]
    heads = ["activation" if "groups" in figures else "model"]
    heads += [heading.format(unit=protocol["unit"]) for _, heading, _, _ in columns]
    note = (
        f"Batches of {protocol['batch_size']} samples, device {protocol['device']}, {protocol['threads']} CPU threads; "
        f"medians of {protocol['rounds']} rounds that go over all models in turn. A training step is forward, backward "
        "and AdamW. Kept for backward: all that autograd holds between forward and backward, weights included."
    )
    return _section("Speed and memory", f'<div class="scroll">{_table(heads, body)}</div><p class="note">{note}</p>')


def _p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _plus_minus(entry: Mapping[str, Any], layout: str) -> str:
    half = entry.get("half_width")
    return format(entry["mean"], layout) + (f" ± {format(half, layout.lstrip('+'))}" if half is not None else "")


def _conversion(figures: Mapping[str, Any], pictures: Pictures) -> str:
    if not figures["conversion"]:
        return ""
    body = [
        f"<tr><td>{escape(row['layer'])}</td>"
        f'<td class="left">{escape(str(row["target"]))} → {escape(str(row["family"]))}, degree {row["degree"]}</td>'
        f"<td>{_interval(row['interval'])}</td>"
        f"<td>{row['rms_error']:.2e}</td><td>{row['maximum_error']:.2e}</td></tr>"
        for row in figures["conversion"]
    ]
    heads = ["layer", "replacement", "fitted on", "error (rms over inputs)", "largest error"]
    return _section(
        "Conversion, layer by layer",
        '<p class="note">Each activation was fitted on the inputs that this layer really sees (shaded); dotted lines '
        "mark the fitted interval, outside of which the replacement goes on along its tangent.</p>"
        + _figure(pictures.get("conversion"), "")
        + f'<div class="scroll">{_table(heads, body, left=(1,))}</div>',
    )


def _drift(figures: Mapping[str, Any]) -> str:
    """Block by block, how near the outputs are to those of the model it was made from."""
    rows = [row for row in figures["table"] if row.get("drift", {}).get("cosine")]
    if not rows:
        return ""
    blocks = max(len(row["drift"]["cosine"]) for row in rows)
    body = []
    for row in rows:
        cosines = row["drift"]["cosine"]
        cells = [f"{row['drift']['kl_divergence']:.2e}", f"{100 * row['drift']['agreement']:.2f} %"]
        cells += [f"{cosine:.5f}" for cosine in cosines] + ["–"] * (blocks - len(cosines))
        body.append(f"<tr><td>{escape(row['name'])}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ["model", "KL of the predictions", "same first choice", *(f"block {index + 1}" for index in range(blocks))]
    return _section(
        "Distance from the reference",
        f'<div class="scroll">{_table(heads, body)}</div><p class="note">Right: cosine between the outputs of each '
        "block and those of the reference's, mean over the positions of a few validation samples; 1: the same.</p>",
    )


def _interval(interval: Sequence[float] | None) -> str:
    return "–" if not interval else f"[{interval[0]:.2f}, {interval[1]:.2f}]"


def _samples(figures: Mapping[str, Any]) -> str:
    if not figures["samples"]:
        return ""
    shown = list(figures["samples"].items())
    inner = "".join(
        f"<div><h3>{escape(name_of(figures, label))}</h3><pre>{escape(text)}</pre></div>" for label, text in shown
    )
    return _section(
        "Sampled texts",
        f'<p class="note">The same prompt and the same seed for all.</p><div class="samples">{inner}</div>',
    )


def _data(figures: Mapping[str, Any], configurations: Mapping[str, Any]) -> str:
    dataset = figures["dataset"]
    splits = dataset["splits"]
    keys = list(dict.fromkeys(key for split in splits.values() for key in split))
    body = [
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{split[key]:,}</td>" if key in split else "<td>–</td>" for key in keys)
        + "</tr>"
        for name, split in splits.items()
    ]
    lines = [f"<p>Dataset <b>{escape(str(dataset['name']))}</b>"]
    tokenizer = dataset.get("tokenizer")
    if tokenizer:
        lines.append(
            f", {escape(str(tokenizer['kind']))} tokenizer with {tokenizer['vocab_size']:,} tokens, "
            f"sequences of {dataset['sequence_length']} tokens"
        )
    lines.append(f'.</p><div class="scroll">{_table(["split", *keys], body)}</div>')
    if figures["training"]:
        keys = [
            key
            for key in ("steps", "samples", "tokens", "train/loss", "val/loss", "val/best_loss")
            if any(key in entry for entry in figures["training"])
        ]
        body = [
            f"<tr><td>{escape(entry['name'])}</td>"
            + "".join(f"<td>{_number(entry.get(key))}</td>" for key in keys)
            + "</tr>"
            for entry in figures["training"]
        ]
        lines.append(f'<div class="scroll">{_table(["training", *keys], body)}</div>')
        lines.append(
            '<p class="note">The validation loss during training is measured on the first validation samples only.</p>'
        )
    for label, content in configurations.items():
        lines.append(
            f"<details><summary>Configuration of {escape(name_of(figures, label))}</summary>"
            f"<pre>{escape(json.dumps(content, indent=2))}</pre></details>"
        )
    return _section("Data and configuration", "".join(lines))


def _optional(value: float | None, layout: str) -> str:
    return "–" if value is None else format(value, layout)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _reproduce(inputs: Sequence[Mapping[str, str]], command: str) -> str:
    body = [
        f'<tr><td>{escape(entry["input"])}</td><td class="left">{escape(entry["stage"])}</td>'
        f'<td class="left"><code>{escape(entry["digest"])}</code></td></tr>'
        for entry in inputs
    ]
    heads = ["input", "made by stage", "sha256 of the artifact"]
    commands = (f"{command}\n" if command else "") + "polytrope runs                  # find the run\n"
    commands += "polytrope reproduce RUN         # run it again from its record and compare every digest"
    return _section(
        "How to reproduce",
        f'<pre>{escape(commands)}</pre><p class="note">This page was made from these artifacts; equal digests mean '
        f'equal bytes.</p><div class="scroll">{_table(heads, body, left=(1, 2))}</div>',
    )


def _picture_section(title: str, note: str, picture: Mapping[str, bytes] | None) -> str:
    return _section(title, f'<p class="note">{note}</p>{_figure(picture, title)}') if picture else ""


def _figure(picture: Mapping[str, bytes] | None, alternative: str) -> str:
    if not picture:
        return ""
    sources = {theme: f"data:image/png;base64,{base64.b64encode(data).decode()}" for theme, data in picture.items()}
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
        f'<img src="{sources["light"]}" alt="{escape(alternative)}"></picture></figure>'
    )


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def _table(heads: Sequence[str], rows: Iterable[str], left: Sequence[int] = ()) -> str:
    """`left`: columns, beside the first, whose heading is aligned to the left."""
    head = "".join(f'<th class="left">{text}</th>' if i in left else f"<th>{text}</th>" for i, text in enumerate(heads))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def count(number: float) -> str:
    """`1.23 M`, `124 M`, `45.6 k`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"
