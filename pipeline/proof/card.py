"""A model card from the record of a run: data, model, activation, training, results, environment, how to reproduce."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.store.manifest import StoredArtifact
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.text import metric_text, suggest
from polytrope.pipeline.tracking.names import flatten

_PACKAGES = ("polytrope", "torch", "deepspeed", "ray", "numpy", "tokenizers", "datasets", "safetensors")
_CURVES = 12  # of the activation plot


@dataclass
class Section:
    """A heading, text, rows of a table (the first is its head), and a picture (PNG)."""

    title: str
    text: str = ""
    table: list[list[str]] = field(default_factory=list)
    picture: bytes | None = None


def write_card(store: Store, directory: Path, output: Path, stage: str | None = None) -> None:
    """Write the card of a run's model to `output` (.md with the picture beside it, or self-contained .html).

    Args:
        store: that holds the run. directory: of the run.
        output: the file.
        stage: that made the model; by default the last one that made one.

    Raises:
        UserError: no such model, or a place that cannot be written.
    """
    if output.suffix not in (".md", ".html"):
        raise UserError(f"--output {output}: the name must end in .md or .html")
    state = fold(read(directory))
    name, model = _model(store, state, directory.name, stage)
    record = json.loads((directory / "workflow.json").read_bytes())
    sections = [
        _data(store, state, model),
        _architecture(store, model),
        _activation(store, model),
        _training(store, model),
        _results(store, state, model),
        _environment(store, model, record),
        _reproduce(directory.name, name, model, record),
    ]
    title = f"{record['workflow']['name']}: {name}"
    summary = str(record["workflow"].get("description") or "")
    shown = [section for section in sections if section is not None]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".html":
            output.write_text(_html(title, summary, shown), encoding="utf-8")
        else:
            output.write_text(_markdown(title, summary, shown, output), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None


def _artifacts(store: Store, state: RunState) -> dict[str, StoredArtifact]:
    """Stage → artifact, for those that are stored."""
    found = {name: store.load(stage.key) for name, stage in state.stages.items() if stage.key and stage.digest}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def _model(store: Store, state: RunState, run_id: str, stage: str | None) -> tuple[str, StoredArtifact]:
    models = {
        name: artifact
        for name, artifact in _artifacts(store, state).items()
        if {"model.json", "model.safetensors"} <= {entry["path"] for entry in artifact.files}
    }
    if not models:
        raise UserError(f"run {run_id} made no model", "name a run with a finished `train` or `convert` stage")
    if stage is not None and stage not in models:
        raise UserError(f"--stage {stage}: made no model in run {run_id}", suggest(stage, list(models)))
    name = stage or list(models)[-1]
    return name, models[name]


def _inputs(artifact: StoredArtifact) -> dict[str, Any]:
    return dict(artifact.components.get("inputs") or {})


def _by_digest(store: Store, state: RunState, digest: Any) -> StoredArtifact | None:
    return next((item for item in _artifacts(store, state).values() if item.digest == digest), None)


def _read(store: Store, artifact: StoredArtifact, name: str) -> Any:
    if all(entry["path"] != name for entry in artifact.files):
        return None
    return json.loads((store.materialize(artifact.key) / name).read_bytes())


def _rows(values: Mapping[str, Any]) -> list[list[str]]:
    flat = {key: value for key, value in flatten(values).items() if value not in ("", "null", "{}", "[]")}
    return [["", ""], *([key, value] for key, value in flat.items())]


def _data(store: Store, state: RunState, model: StoredArtifact) -> Section | None:
    dataset = _by_digest(store, state, _inputs(model).get("dataset"))
    if dataset is None:
        return None
    description = _read(store, dataset, "dataset.json") or {}
    columns = ("documents", "bytes", "tokens", "samples", "images")
    used = [column for column in columns if any(column in part for part in description.get("splits", {}).values())]
    table = [["split", *used]]
    for split, part in description.get("splits", {}).items():
        table.append([split, *(f"{part[column]:,}" if column in part else "" for column in used)])
    source = dataset.components.get("parameters", {}).get("source")
    tokenizer = description.get("tokenizer") or {}
    text = f"`{description.get('name', dataset.stage)}`"
    if source:
        text += f", from {', '.join(f'{key} {value}' for key, value in flatten(source).items() if value != 'null')}"
    if tokenizer:
        text += f"; tokenizer {tokenizer.get('kind')} with {tokenizer.get('vocab_size'):,} tokens"
    return Section("Data", f"{text}. Digest `{dataset.digest}`.", table)


def _architecture(store: Store, model: StoredArtifact) -> Section:
    description = _read(store, model, "model.json")
    config = {key: value for key, value in description["config"].items() if key != "activation"}
    text = f"{description['architecture']} with {description.get('parameters', 0):,} parameters."
    return Section("Model", text, _rows(config))


def _activation(store: Store, model: StoredArtifact) -> Section:
    """What the activations of the blocks are now, drawn from the stored weights."""
    from polytrope.pipeline.stages.evaluate.shapes import describe_activation

    config = _read(store, model, "model.json")["config"].get("activation")
    picture = _draw_activations(store.materialize(model.key))
    return Section("Activation", f"{describe_activation(config)}.", picture=picture)


def _draw_activations(directory: Path) -> bytes:
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from polytrope.models.checkpoint import load_model
    from polytrope.pipeline.stages.evaluate.shapes import activation_modules

    modules = activation_modules(load_model(directory))
    step = -(-len(modules) // _CURVES)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    x = torch.linspace(-4, 4, 161)
    for index, (name, module) in list(enumerate(modules))[::step]:
        channels = next((p.shape[0] for p in module.parameters() if p.dim() > 1), 1)  # coefficients per channel
        with torch.no_grad():
            y = module(x[:, None].expand(-1, channels)).mean(-1)
        axes.plot(x.numpy(), y.numpy(), label=name, color=(0.0, 0.2 + 0.6 * index / max(1, len(modules)), 0.7))
    axes.grid(color="#e4e8ee")
    axes.set_xlabel("input")
    axes.set_ylabel("output")
    axes.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _training(store: Store, model: StoredArtifact) -> Section:
    parameters = {
        key: value for key, value in (model.components.get("parameters") or {}).items() if key not in ("model",)
    }
    text = f"Stage `{model.stage}` (`uses: {model.components.get('uses')}`), {model.duration:.0f} s."
    history = [entry for entry in _read(store, model, "history.json") or [] if entry.get("val/loss") is not None]
    if history:
        points = dict.fromkeys(
            f"{entry['val/loss']:.4f} at step {entry['step']}" for entry in (history[0], history[-1])
        )
        text += f" Validation loss {', '.join(points)}."
    return Section("Training", text, _rows(parameters))


def _results(store: Store, state: RunState, model: StoredArtifact) -> Section | None:
    """Of every evaluation that read this model, with the other models beside it."""
    for artifact in _artifacts(store, state).values():
        labels = _inputs(artifact).get("models")
        if not isinstance(labels, dict) or model.digest not in labels.values():
            continue
        if (evaluation := _read(store, artifact, "evaluation.json")) is None:
            continue
        shown = [
            key
            for key in ("loss", "perplexity", "bits_per_byte", "top1", "top5", "calibration_error")
            if any(result.get(key) is not None for result in evaluation["models"].values())
        ]
        table = [["", *shown]]
        for label, result in evaluation["models"].items():
            mark = " (this model)" if labels.get(label) == model.digest else ""
            table.append([label + mark, *(metric_text(result[key]) if key in result else "" for key in shown)])
        protocol = ", ".join(f"{key} {value}" for key, value in evaluation.get("protocol", {}).items())
        return Section("Results", f"On validation data that no training read: {protocol}.", table)
    return None


def _environment(store: Store, model: StoredArtifact, record: Mapping[str, Any]) -> Section:
    """Of the run that computed the model."""
    with contextlib.suppress(OSError):  # that run may be gone; the one at hand used the same bytes
        record = json.loads((store.run_directory(model.run_id) / "workflow.json").read_bytes())
    environment = record.get("environment") or {}
    packages, git = environment.get("packages") or {}, environment.get("git") or {}
    rows = {name: packages[name] for name in _PACKAGES if name in packages}
    rows |= {key: str(environment[key]) for key in ("python", "platform", "processor") if environment.get(key)}
    rows |= {"usable cores": str(environment.get("usable_cores", "")), **(environment.get("threads") or {})}
    if git:
        rows["git commit"] = git["commit"] + (" with uncommitted changes" if git["dirty"] else "")
    return Section("Environment", "", _rows(rows))


def _reproduce(run_id: str, name: str, model: StoredArtifact, record: Mapping[str, Any]) -> Section:
    arguments = " ".join(Path(part).name if index == 0 else part for index, part in enumerate(record.get("argv") or []))
    lines = [
        "",
        f"- made by: `{arguments}`",
        f"- compute it again and compare: `polytrope reproduce {run_id} --stage '{name}'`",
        f"- hash its files again: `polytrope verify {run_id}`",
        f"- digest of the model: `{model.digest}`, stage key `{model.key}`",
    ]
    return Section("How to reproduce", "\n".join(lines))


def _markdown(title: str, summary: str, sections: Sequence[Section], output: Path) -> str:
    parts = [f"# {title}", summary]
    for section in sections:
        parts.append(f"## {section.title}")
        parts.append(section.text.strip())
        if section.table:
            head, *rows = section.table
            lines = [head, ["---"] * len(head), *rows]
            parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines))
        if section.picture is not None:
            picture = output.with_name(f"{output.stem}-{section.title.lower()}.png")
            picture.write_bytes(section.picture)
            parts.append(f"![{section.title}]({picture.name})")
    return "\n\n".join(part for part in parts if part) + "\n"


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1c2430}"
    "table{border-collapse:collapse;margin:.6rem 0}td,th{border:1px solid #e4e8ee;padding:.2rem .6rem;text-align:left}"
    "code{background:#f4f6f9;padding:.1rem .25rem;overflow-wrap:anywhere}img{max-width:100%}"
)


def _html(title: str, summary: str, sections: Sequence[Section]) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(summary)}</p>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        lines = section.text.strip().splitlines()
        if lines and lines[0].startswith("- "):
            parts.append("<ul>" + "".join(f"<li>{_code(line[2:])}</li>" for line in lines) + "</ul>")
        elif lines:
            parts.append(f"<p>{_code(' '.join(lines))}</p>")
        if section.table:
            head, *rows = section.table
            parts.append("<table>")
            if any(head):
                parts.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
            for row in rows:
                parts.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
            parts.append("</table>")
        if section.picture is not None:
            data = base64.b64encode(section.picture).decode()
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
    body = "\n".join(parts)
    preamble = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{preamble}</head><body>\n{body}\n</body></html>\n'


def _code(text: str) -> str:
    """Escaped, with `…` as code."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
