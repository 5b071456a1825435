"""Drawings of a graph: every stage and edge is there, nothing overlaps, files open."""

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, describe_stage
from polytrope.pipeline.workflow.code import Code
from polytrope.pipeline.workflow.draw import layout, mermaid, save, svg
from polytrope.pipeline.workflow.graph import StageNode, node_name


def example(context: StageContext, sources: dict[str, Artifact]) -> None:
    """A stage."""


def graph(edges: dict[str, list[str]]) -> dict[str, StageNode]:
    definition = describe_stage("module:example", example)
    return {
        name: StageNode(
            name, name, {}, definition, definition.parameters_model(), {"sources": {item: item for item in sources}},
            Resources(), 0, None, None, {}, code=Code({}, {}),
        )
        for name, sources in edges.items()
    }  # fmt: skip


DIAMOND = graph({"a": [], node_name("b", {"x": "1"}): ["a"], "c": ["a"], "d": ["b[x=1]", "c"], "e": ["a", "d"]})


def test_mermaid_holds_every_stage_and_edge_and_colours_states() -> None:
    text = mermaid(DIAMOND, {"a": "cached", "d": "failed"})
    assert text.startswith("flowchart LR\n")
    assert all(f'["{name}<br/>' in text for name in DIAMOND)
    assert text.count(" --> ") == 6
    assert "class n3 failed" in text


def test_layers_go_from_left_to_right_and_boxes_do_not_overlap() -> None:
    drawing = layout(DIAMOND)
    for source, target in drawing.edges:
        assert drawing.boxes[source].x + drawing.boxes[source].width < drawing.boxes[target].x
    for one, other in itertools.combinations(drawing.boxes.values(), 2):
        apart_x = one.x + one.width <= other.x or other.x + other.width <= one.x
        apart_y = one.y + one.height <= other.y or other.y + other.height <= one.y
        assert apart_x or apart_y
    assert all(box.x >= 0 and box.x + box.width <= drawing.width for box in drawing.boxes.values())


def test_edges_that_a_longer_path_implies_are_left_out_and_long_ones_cross_no_box() -> None:
    drawing = layout(
        graph({"a": [], "b": ["a"], "c": ["a", "b"], "d": ["c"], "long": ["a"], "end": ["d", "long", "a"]})
    )
    assert ("a", "c") not in drawing.edges
    assert ("a", "end") not in drawing.edges
    points = drawing.edges[("long", "end")]
    assert len(points) == 6  # start, in and out of two layers between, end
    for x, y in points[1:-1]:
        inside = [
            box
            for box in drawing.boxes.values()
            if box.x <= x <= box.x + box.width and box.y <= y <= box.y + box.height
        ]
        assert not inside


def test_the_order_within_a_layer_avoids_crossings() -> None:
    drawing = layout(graph({"a": [], "b": [], "x": ["b"], "y": ["a"]}))
    assert (drawing.boxes["a"].y < drawing.boxes["b"].y) == (drawing.boxes["y"].y < drawing.boxes["x"].y)


def test_svg_is_well_formed_and_escapes_names() -> None:
    root = ElementTree.fromstring(svg(layout(DIAMOND)))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert set(DIAMOND) <= set(texts)


def test_png_and_svg_files_are_written_and_other_endings_refused(tmp_path: Path) -> None:
    save(layout(DIAMOND), tmp_path / "sub" / "g.png")
    assert (tmp_path / "sub" / "g.png").read_bytes().startswith(b"\x89PNG")
    save(layout(DIAMOND), tmp_path / "g.svg")
    assert (tmp_path / "g.svg").read_text().startswith("<svg")
    with pytest.raises(UserError, match=r"must end in \.svg or \.png"):
        save(layout(DIAMOND), tmp_path / "g.pdf")
