"""The graph of a workflow as Mermaid text, SVG or PNG: layers from left to right, own layout, no external program."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.workflow.graph import StageNode

COLOURS = {
    "": "#eef2ff",
    "pending": "#f4f4f5",
    "running": "#dbeafe",
    "retrying": "#fef3c7",
    "succeeded": "#dcfce7",
    "cached": "#ecfccb",
    "failed": "#fee2e2",
    "skipped": "#e4e4e7",
    "cancelled": "#ffedd5",
    "interrupted": "#fde68a",
}
_BOX_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 46.0, 56.0, 22.0, 16.0
_CHARACTER_WIDTH = 7.6  # of 13 px text, generous


@dataclass(frozen=True)
class Box:
    """A placed stage, in pixels; x, y is the upper left corner."""

    name: str
    caption: str
    x: float
    y: float
    width: float
    height: float
    state: str = ""


Point = tuple[float, float]


@dataclass(frozen=True)
class Drawing:
    """Boxes by node name, edges as (from, to) with the points they pass, and the size of the whole."""

    boxes: dict[str, Box]
    edges: dict[tuple[str, str], list[Point]]
    width: float
    height: float


def mermaid(graph: Mapping[str, StageNode], states: Mapping[str, str] | None = None) -> str:
    """Mermaid flowchart text; dashed arrows are order only, `states` colours the stages."""
    identifiers = {name: f"n{index}" for index, name in enumerate(graph)}
    lines = ["flowchart LR"]
    for name, node in graph.items():
        label = name.replace('"', "#quot;")
        caption = "" if node.definition.uses == node.spec_name else f"<br/><small>{html.escape(_caption(node))}</small>"
        lines.append(f'  {identifiers[name]}["{label}{caption}"]')
    for name, node in graph.items():
        for source in node.dependencies:
            arrow = "-->" if source in node.input_nodes else "-.->"
            lines.append(f"  {identifiers[source]} {arrow} {identifiers[name]}")
    for state in sorted(set((states or {}).values())):
        members = ",".join(
            identifiers[name] for name, value in (states or {}).items() if value == state and name in graph
        )
        if members:
            lines += [f"  classDef {state} fill:{COLOURS.get(state, COLOURS[''])}", f"  class {members} {state}"]
    return "\n".join(lines) + "\n"


def _caption(node: StageNode) -> str:
    return node.definition.uses if node.definition.uses != node.name else ""


def layout(graph: Mapping[str, StageNode], states: Mapping[str, str] | None = None) -> Drawing:
    """Layer = longest path from a source; order within a layer by the mean position of the neighbours.

    An edge that a longer path implies is left out (`a → c` beside `a → b → c`); one that spans several layers passes
    through a free row of each, so that it crosses no box.
    """
    layer: dict[str, int] = {}
    for name, node in graph.items():
        layer[name] = 1 + max((layer[source] for source in node.dependencies), default=-1)
    rows: list[list[str]] = [[] for _ in range(1 + max(layer.values(), default=-1))]
    for name in graph:
        rows[layer[name]].append(name)
    edges = _necessary_edges(graph)
    routes: dict[tuple[str, str], list[str]] = {}
    links: list[tuple[str, str]] = []
    for source, target in edges:
        passed = [f"{source} → {target} @ {number}" for number in range(layer[source] + 1, layer[target])]
        for number, name in enumerate(passed, start=layer[source] + 1):
            rows[number].append(name)
        routes[(source, target)] = passed
        chain = [source, *passed, target]
        links += list(pairwise(chain))
    _untangle(rows, links)
    return _place(graph, rows, routes, states or {})


def _necessary_edges(graph: Mapping[str, StageNode]) -> list[tuple[str, str]]:
    """The transitive reduction; of graphs too large to look at, all edges."""
    if len(graph) > 500:
        return [(source, name) for name, node in graph.items() for source in node.dependencies]
    ancestors: dict[str, set[str]] = {}
    edges = []
    for name, node in graph.items():
        implied: set[str] = set().union(*(ancestors[source] for source in node.dependencies))
        edges += [(source, name) for source in node.dependencies if source not in implied]
        ancestors[name] = implied | set(node.dependencies)
    return edges


def _place(
    graph: Mapping[str, StageNode],
    rows: list[list[str]],
    routes: Mapping[tuple[str, str], list[str]],
    states: Mapping[str, str],
) -> Drawing:
    """Pixels for every box and every point where a long edge passes a layer."""
    tallest = max((len(names) for names in rows), default=0)
    total = tallest * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y
    boxes: dict[str, Box] = {}
    passages: dict[str, list[Point]] = {}
    x = _MARGIN
    for names in rows:
        width = max(_width(graph[name]) for name in names if name in graph)
        y = _MARGIN + (total - len(names) * (_BOX_HEIGHT + _GAP_Y) + _GAP_Y) / 2
        for name in names:
            if name in graph:
                boxes[name] = Box(name, _caption(graph[name]), x, y, width, _BOX_HEIGHT, states.get(name, ""))
            else:
                middle = y + _BOX_HEIGHT / 2
                passages[name] = [(x, middle), (x + width, middle)]
            y += _BOX_HEIGHT + _GAP_Y
        x += width + _GAP_X
    edges: dict[tuple[str, str], list[Point]] = {}
    for (source, target), passed in routes.items():
        start, end = boxes[source], boxes[target]
        points = [(start.x + start.width, start.y + start.height / 2)]
        for name in passed:
            points += passages[name]
        edges[(source, target)] = [*points, (end.x - 5, end.y + end.height / 2)]
    return Drawing(boxes, edges, x - _GAP_X + _MARGIN, total + 2 * _MARGIN)


def _width(node: StageNode) -> float:
    return max(len(node.name) * _CHARACTER_WIDTH, len(_caption(node)) * 6.2) + 24


def _untangle(layers: list[list[str]], edges: list[tuple[str, str]]) -> None:
    """Barycentre sweeps, forwards and backwards; fewer crossings, stable."""
    before: dict[str, list[str]] = {}
    after: dict[str, list[str]] = {}
    for source, target in edges:
        before.setdefault(target, []).append(source)
        after.setdefault(source, []).append(target)
    for neighbours, order in [(before, layers), (after, layers[::-1])] * 4:
        position = {name: (index + 0.5) / len(names) for names in layers for index, name in enumerate(names)}
        for names in order:
            weights = {
                name: sum(position[item] for item in neighbours[name]) / len(neighbours[name])
                if neighbours.get(name)
                else position[name]
                for name in names
            }
            names.sort(key=lambda name: weights[name])
            position.update({name: (index + 0.5) / len(names) for index, name in enumerate(names)})


def _curve(points: list[Point]) -> list[Point]:
    """Points of a path of cubic Béziers (1 + 3 per piece), horizontal at each given point."""
    path = [points[0]]
    for (x0, y0), (x1, y1) in pairwise(points):
        bend = max(0.0, (x1 - x0) / 2)
        path += [(x0 + bend, y0), (x1 - bend, y1), (x1, y1)]
    return path


def svg(drawing: Drawing) -> str:
    """A self-contained SVG document."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{drawing.width:.0f}" height="{drawing.height:.0f}" '
        f'viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}" font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="3" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#64748b"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for points in drawing.edges.values():
        (x0, y0), *rest = _curve(points)
        text = " ".join(f"{x:.1f} {y:.1f}" for x, y in rest)
        parts.append(
            f'<path d="M{x0:.1f} {y0:.1f} C{text}" fill="none" stroke="#64748b" stroke-width="1.4" '
            'marker-end="url(#tip)"/>'
        )
    for box in drawing.boxes.values():
        middle = box.x + box.width / 2
        parts.append(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="7" '
            f'fill="{COLOURS.get(box.state, COLOURS[""])}" stroke="#475569"/>'
        )
        name_y = box.y + (20 if box.caption else 28)
        parts.append(
            f'<text x="{middle:.1f}" y="{name_y:.1f}" text-anchor="middle" font-size="13" fill="#0f172a">'
            f"{html.escape(box.name)}</text>"
        )
        if box.caption:
            parts.append(
                f'<text x="{middle:.1f}" y="{box.y + 36:.1f}" text-anchor="middle" font-size="10.5" fill="#64748b">'
                f"{html.escape(box.caption)}</text>"
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def save(drawing: Drawing, path: Path) -> None:
    """Write `.svg` or `.png` (by matplotlib).

    Raises:
        UserError: another ending, or a place that cannot be written.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"--output {path}: the name must end in .svg or .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".svg":
            path.write_text(svg(drawing), encoding="utf-8")
        else:
            _save_png(drawing, path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written: {error.strerror or error}") from None


def _save_png(drawing: Drawing, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Outline

    figure = Figure(figsize=(drawing.width / 100, drawing.height / 100), dpi=200)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.axis("off")
    for points in drawing.edges.values():
        curve = _curve(points)
        outline = Outline(curve, [Outline.MOVETO, *[Outline.CURVE4] * (len(curve) - 1)])
        axes.add_patch(
            FancyArrowPatch(path=outline, arrowstyle="-|>", mutation_scale=7, color="#64748b", linewidth=0.9)
        )
    for box in drawing.boxes.values():
        axes.add_patch(
            FancyBboxPatch(
                (box.x + 4, box.y + 4),
                box.width - 8,
                box.height - 8,
                boxstyle="round,pad=4",
                facecolor=COLOURS.get(box.state, COLOURS[""]),
                edgecolor="#475569",
                linewidth=0.7,
            )
        )
        middle = box.x + box.width / 2
        axes.text(
            middle, box.y + (16 if box.caption else 23), box.name, ha="center", va="center", fontsize=8, color="#0f172a"
        )
        if box.caption:
            axes.text(middle, box.y + 33, box.caption, ha="center", va="center", fontsize=6.4, color="#64748b")
    FigureCanvasAgg(figure).print_png(str(path))
