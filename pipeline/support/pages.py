"""HTML pages from templates: one look, plots inside, text escaped. They need no network and run no scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

Picture = Mapping[str, bytes]  # theme (light, dark) → PNG
_TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: Path, **values: Any) -> str:
    """The page that a template makes of values; every value it names must be there.

    Templates may extend `base.html` and import `macros.html` of this room, and use the filters below: `count`, `png`,
    `optional` (a number in a layout, – for None), `p_value`, `mean` (mean ± half-width in a layout), `breakable`
    (dotted names), `code` (with `…` as code).

    Args:
        template: file of the template, in any room.
        values: what it is given; `title` is the page's.
    """
    loader = jinja2.FileSystemLoader([template.parent, _TEMPLATES])
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": count,
        "png": _data_address,
        "optional": _optional,
        "mean": _mean,
        "breakable": _breakable,
        "code": _code,
        "p_value": _p_value,
    }
    style = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(template.name).render(style=style, **values)


def count(number: float) -> str:
    """`1.23 M`, `124 M`, `45.6 k`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"


def seen(samples: int, tokens: int | None) -> str:
    """What a model was trained on: `1.23 M tokens`; without tokens, of images and rows, `45.6 k samples`."""
    return f"{count(samples)} samples" if tokens is None else f"{count(tokens)} tokens"


def _data_address(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _optional(value: float | None, layout: str) -> str:
    return "–" if value is None else format(value, layout)


def _mean(entry: Mapping[str, Any], layout: str) -> str:
    """`4.1060 ± .0420`; `entry` has `mean` and maybe `half_width`."""
    half = entry.get("half_width")
    return format(entry["mean"], layout) + (f" ± {format(half, layout.lstrip('+'))}" if half is not None else "")


def _p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _breakable(name: str) -> str:
    """A dotted name that may be broken after every dot."""
    return Markup("<wbr>").join(part for part in name.replace(".", ".\0").split("\0"))


def _code(text: str) -> str:
    """With `…` as code."""
    pieces = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if i % 2 else piece for i, piece in enumerate(pieces)
    )
