"""What MLflow shows of a workflow as a whole: a description with the results, and comparisons of matrix branches."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytrope.pipeline.runs.journal import RunState
from polytrope.pipeline.support.text import format_duration, metric_text, uncommitted
from polytrope.pipeline.tracking.names import parent_folder

TRAINING_VIEW = "?workflowType=machine_learning"  # without it MLflow shows its pages for language-model applications
_COLUMNS, _ROWS, _PANELS = 8, 24, 12


@dataclass(frozen=True)
class Comparison:
    """The branches of a stage with a matrix: axis labels of each branch, and its metrics."""

    stage: str
    axes: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], Mapping[str, float]], ...]

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for _, values in self.rows for name in values))

    def csv(self) -> str:
        """A row per branch; MLflow shows it as a table."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*self.axes, *self.metrics])
        for labels, values in self.rows:
            writer.writerow([*labels, *(values.get(name, "") for name in self.metrics)])
        return text.getvalue()


def comparisons(state: RunState) -> dict[str, Comparison]:
    """Stage → its branches, for every stage with at least two branches that returned metrics."""
    branches: dict[str, list[tuple[dict[str, str], Mapping[str, float]]]] = {}
    for name, stage in state.stages.items():
        spec_name, bracket, inside = name.partition("[")
        if bracket and stage.summary:
            axes = dict(part.partition("=")[::2] for part in inside.removesuffix("]").split(","))
            branches.setdefault(spec_name, []).append((axes, stage.summary))
    return {name: _comparison(name, found) for name, found in branches.items() if len(found) > 1}


def _comparison(stage: str, found: Sequence[tuple[Mapping[str, str], Mapping[str, float]]]) -> Comparison:
    """Branches that `include` made may lack an axis or have one more: an empty text stands in its place."""
    axes = tuple(dict.fromkeys(axis for labels, _ in found for axis in labels))
    return Comparison(stage, axes, tuple((tuple(labels.get(axis, "") for axis in axes), row) for labels, row in found))


def draw(comparison: Comparison) -> bytes:
    """PNG: a panel per metric; a line per value of the first axis, a dot per branch, a bar at their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = comparison.metrics[:_PANELS]
    groups = list(dict.fromkeys(labels[0] for labels, _ in comparison.rows))
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.8, lines * (0.9 + 0.24 * len(groups))), layout="constrained")
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(lines, columns, index + 1)
        for place, group in enumerate(groups):
            values = [row[metric] for labels, row in comparison.rows if labels[0] == group and metric in row]
            axes.plot(values, [place] * len(values), "o", color="#0072B2", markersize=4, alpha=0.8)
            if len(values) > 1:
                axes.plot([sum(values) / len(values)], [place], "|", color="#D55E00", markersize=13, markeredgewidth=2)
        axes.set_yticks(range(len(groups)), groups if index % columns == 0 else [""] * len(groups), fontsize=8)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_title(metric, fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="x", color="#e4e8ee")
    figure.supylabel(comparison.axes[0], fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def address(experiment: str, run_id: str, artifact: str = "") -> str:
    """Of an MLflow run, or of a file that belongs to it, within MLflow's web page: in its pages for training."""
    return f"#/experiments/{experiment}/runs/{run_id}" + (f"/artifacts/{artifact}" if artifact else "") + TRAINING_VIEW


def source_name(record: Mapping[str, Any]) -> str:
    """The workflow's file from the top of its git repository, else its bare name: no path of one machine."""
    if not record.get("source"):
        return str(record["workflow"]["name"])
    source = Path(record["source"])
    top = next((directory for directory in source.parents if (directory / ".git").exists()), source.parent)
    return source.relative_to(top).as_posix()


def describe(
    state: RunState,
    record: Mapping[str, Any],
    status: str,
    experiment: str,
    parent: str,
    children: Mapping[str, str],
    limit: int,
) -> str:
    """The parent run's description in Markdown: what was run, the result table, comparisons, stages.

    Args:
        state: of the ended run.
        record: its `workflow.json`.
        status: succeeded, failed or cancelled.
        experiment: MLflow's id of it; parent and children: MLflow run ids (by stage).
        limit: characters; what does not fit is left out, from the end.
    """
    workflow = record["workflow"]
    git = (record.get("environment") or {}).get("git") or {}
    took = "" if state.duration is None else f" in {format_duration(state.duration)}"
    facts = [f"**{status}**{took}", f"run `{state.run_id or parent}`", f"workflow `{workflow['name']}`"]
    if git:
        facts.append(f"commit `{git['commit'][:10]}`" + uncommitted(git["dirty"]))
    sections = [" · ".join(facts)]
    if workflow.get("description"):
        sections.insert(0, str(workflow["description"]))
    for stage in state.stages.values():
        if stage.state == "failed":
            sections.append(f"`{stage.name}` failed: {(stage.error or {}).get('message', '')}")
    links = [f"[graph]({address(experiment, parent, 'graph.svg')})"]
    for name, stage in state.stages.items():
        if name.startswith("report") and stage.digest:
            page = "/".join(part for part in (parent_folder(name), "report.html") if part)
            links.insert(-1, f"[{page}]({address(experiment, parent, page)})")
    sections.append(" · ".join(links))
    table = result_table(state)
    if table is not None:
        stage_name, header, rows = table
        sections.append(f"### Results of `{stage_name}`\n\n{markdown_table(header, rows)}")
    for name, comparison in comparisons(state).items():
        link = address(experiment, parent, f"comparison/{name}.png")
        shown = comparison.metrics[:_COLUMNS]
        body = [
            [" · ".join(labels), *(_figure(values.get(metric)) for metric in shown)]
            for labels, values in comparison.rows[:_ROWS]
        ]
        heading = f"### Branches of `{name}`\n\n[plot]({link})"
        sections.append(f"{heading}\n\n{markdown_table([' · '.join(comparison.axes), *shown], body)}")
    lines = []
    for name, stage in list(state.stages.items())[: 2 * _ROWS]:
        shown_name = f"[{name}]({address(experiment, children[name])})" if name in children else name
        lines.append([shown_name, stage.state, format_duration(stage.duration) if stage.duration else ""])
    sections.append(f"### Stages\n\n{markdown_table(['stage', 'state', 'took'], lines)}")
    kept: list[str] = []
    for section in sections:
        if sum(len(text) + 2 for text in [*kept, section]) <= limit:
            kept.append(section)
    return "\n\n".join(kept)


def result_table(state: RunState) -> tuple[str, list[str], list[list[str]]] | None:
    """(stage, header, rows) of the last stage that returned metrics, `label/metric` as a row per label."""
    for name, stage in reversed(state.stages.items()):
        if not stage.summary:
            continue
        pairs = [key.split("/", 1) for key in stage.summary if "/" in key]
        labels = list(dict.fromkeys(label for label, _ in pairs))[:_ROWS]
        if 2 * len(pairs) > len(stage.summary):
            columns = list(dict.fromkeys(metric for _, metric in pairs))[:_COLUMNS]
            rows = [
                [label, *(_figure(stage.summary.get(f"{label}/{metric}")) for metric in columns)] for label in labels
            ]
            single = [[key, _figure(value)] for key, value in stage.summary.items() if "/" not in key]
            return name, ["", *columns], rows + [[*row, *[""] * (len(columns) - 1)] for row in single]
        return name, ["metric", "value"], [[key, _figure(value)] for key, value in list(stage.summary.items())[:_ROWS]]
    return None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def _figure(value: float | None) -> str:
    return "" if value is None else metric_text(value)
