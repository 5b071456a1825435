"""One HTML page about a conversion: every layer's target, fit, error and inputs, the certificates, and the advice."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.conversion_file import ConversionRecord
from polytrope.pipeline.support.figures import THEMES, draw_conversion, render
from polytrope.pipeline.support.pages import render_page

_LAYERS_PER_PLOT = 8
_TEMPLATE = Path(__file__).with_name("conversion_page.html")


def write_page(directory: Path, conversion: ConversionRecord, title: str) -> Path:
    """Write `conversion.html` and the plots in `plots/` below `directory`; equal content gives equal bytes."""
    plots = directory / "plots"
    if conversion.layers:
        plots.mkdir(parents=True, exist_ok=True)
    layers = [layer.model_dump() for layer in conversion.layers]
    advice = [entry.model_dump(exclude_unset=True) for entry in conversion.advice or []]
    numbered = [{**layer, "name": f"layer {number}"} for number, layer in enumerate(layers)]
    pictures = []
    for number, start in enumerate(range(0, len(layers), _LAYERS_PER_PLOT)):
        draw = partial(draw_conversion, layers=numbered[start : start + _LAYERS_PER_PLOT])
        shown = {theme: render(draw, theme) for theme in THEMES}
        (plots / f"conversion-{number}.png").write_bytes(shown["light"])
        pictures.append((f"layers {start} to {min(len(layers), start + _LAYERS_PER_PLOT) - 1}", shown))
    parts = ("polynomial", "quadratic", "size", "dropped", "factorization", "quantization")
    content: dict[str, Any] = {name: getattr(conversion, name) for name in parts}
    page = render_page(_TEMPLATE, title=title, layers=layers, pictures=pictures, advice=advice, **content)
    path = directory / "conversion.html"
    path.write_text(page, encoding="utf-8")
    return path
