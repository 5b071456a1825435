"""One HTML page about a conversion: every layer's target, fit, error and inputs, the certificates, and the advice."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from polytrope.pipeline.support.figures import THEMES, draw_conversion, render
from polytrope.pipeline.support.page_style import CSS

_LAYERS_PER_PLOT = 8


def write_page(directory: Path, content: Mapping[str, Any], title: str) -> Path:
    """Write `conversion.html` and the plots in `plots/` below `directory`; equal content gives equal bytes.

    Args:
        content: of `conversion.json`.
    """
    plots = directory / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    layers = content["layers"]
    numbered = [{**layer, "name": f"layer {number}"} for number, layer in enumerate(layers)]
    pictures = []
    for number, start in enumerate(range(0, len(layers), _LAYERS_PER_PLOT)):
        draw = partial(draw_conversion, layers=numbered[start : start + _LAYERS_PER_PLOT])
        shown = {theme: render(draw, theme) for theme in THEMES}
        (plots / f"conversion-{number}.png").write_bytes(shown["light"])
        pictures.append(_picture(shown, f"layers {start} to {min(len(layers), start + _LAYERS_PER_PLOT) - 1}"))
    path = directory / "conversion.html"
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>\n<h1>{escape(title)}</h1>\n"
        + _advice(content.get("advice"))
        + '<section><h2>Layers</h2><p class="note">Above: the original activation and its replacement, over the '
        "density of the inputs that this layer receives (shaded). Below: their distance. Dotted lines mark where the "
        "polynomial ends and its tangent lines begin.</p>"
        + "".join(pictures)
        + "</section>\n"
        + _certificates(layers)
        + "</main></body></html>\n"
    )
    return path


def _picture(shown: Mapping[str, bytes], text: str) -> str:
    light, dark = (base64.b64encode(shown[theme]).decode() for theme in ("light", "dark"))
    return (
        '<figure><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{dark}"><img src="data:image/png;base64,{light}" alt="{escape(text)}">'
        "</picture></figure>"
    )


def _advice(advice: Any) -> str:
    if not advice:
        return ""
    rows = "".join(
        f'<tr><td class="name">{_name(entry["name"])}</td><td>{entry["cost"]:.2e}</td>'
        f'<td class="bar" style="background-size:{100 * entry["share"]:.0f}% 70%">{entry["share"]:.0%}</td>'
        f"<td>{entry['relative_error']:.2e}</td><td>{entry['degree']}</td>"
        f'<td class="left name">{escape(entry.get("advice", ""))}</td></tr>'
        for entry in advice
    )
    return (
        '<section><h2>What costs most</h2><p class="note">How far the model\'s output moves when only this layer is '
        'converted, relative to the output; share of the sum of squares.</p><div class="scroll"><table><tr>'
        "<th>layer</th><th>output moves by</th><th>share</th><th>relative error</th><th>degree</th>"
        f'<th class="left">advice</th></tr>{rows}</table></div></section>\n'
    )


def _certificates(layers: list[Mapping[str, Any]]) -> str:
    heads = "".join(
        f"<th{' class=left' * (head == 'layer')}>{head}</th>"
        for head in (
            "",
            "layer",
            "fit",
            "interval",
            "rms",
            "largest",
            "rms slope",
            "largest slope",
            "largest outside",
            "condition",
            "mean",
            "mean square",
        )
    )
    rows = "".join(_certificate_row(number, layer) for number, layer in enumerate(layers))
    return (
        '<section><h2>Certificates</h2><p class="note">Root mean squares and moments are over the measured '
        "inputs, those outside the interval included. Largest errors are bounds: on the interval, and outside it as "
        "far as inputs were seen, or one more interval on each side. Moments: before → after.</p>"
        f'<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div></section>\n'
    )


def _name(layer: str) -> str:
    """May be broken after every dot."""
    return escape(layer).replace(".", ".<wbr>")


def _certificate_row(number: int, layer: Mapping[str, Any]) -> str:
    c = layer["certificate"]
    return (
        f'<tr><td>{number}</td><td class="left name">{_name(layer["name"])}</td>'
        f"<td>{escape(layer['target'])}<small>→ {escape(layer['family'])} {layer['degree']}</small></td>"
        f"<td>[{layer['interval'][0]:.2f}, {layer['interval'][1]:.2f}]</td><td>{c['rms']:.2e}</td>"
        f"<td>{c['maximum']:.2e}</td><td>{c['rms_derivative']:.2e}</td><td>{c['maximum_derivative']:.2e}</td>"
        f"<td>{c['maximum_outside']:.2e}</td><td>{c['condition']:.1e}</td>"
        f"<td>{c['target_mean']:.4f} → {c['fit_mean']:.4f}</td>"
        f"<td>{c['target_mean_square']:.4f} → {c['fit_mean_square']:.4f}</td></tr>"
    )
