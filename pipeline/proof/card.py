"""A model card from the record of a run: data, model, activation, training, results, environment, how to reproduce."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.conversion_file import read_conversion
from polytrope.pipeline.data.converted_layers import CONVERSION_FILE
from polytrope.pipeline.data.evaluation_file import EVALUATION_FILE, Evaluation, read_evaluation
from polytrope.pipeline.data.lineage import read_lineage
from polytrope.pipeline.data.training_file import read_history
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.store.manifest import StoredArtifact
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.pages import render_page, seen
from polytrope.pipeline.support.text import metric_text, suggest, uncommitted
from polytrope.pipeline.tracking.names import flatten
from polytrope.pipeline.tracking.overview import markdown_table
from polytrope.pipeline.workflow.encoding import readable

_TEMPLATE = Path(__file__).with_name("card.html")
_PACKAGES = ("polytrope", "torch", "deepspeed", "ray", "numpy", "tokenizers", "datasets", "safetensors")
_FIGURES = ("loss", "perplexity", "bits_per_byte", "r2", "top1", "top5", "calibration_error")  # of an evaluation
_CURVES = 12  # of the activation plot

Artifacts = Mapping[str, StoredArtifact]  # stage → its artifact


@dataclass
class Section:
    """A heading, text, rows of a table (the first is its head), and a picture (PNG)."""

    title: str
    text: str = ""
    table: list[list[str]] = field(default_factory=list)
    code: str = ""
    picture: bytes | None = None


def write_card(
    store: Store, directory: Path, output: Path, stage: str | None = None, license: str | None = None
) -> None:
    """Write the card of a run's model to `output`: .md, with front matter as Hugging Face reads it and the picture
    beside it, or self-contained .html.

    Args:
        store: that holds the run. directory: of the run.
        output: the file.
        stage: that made the model; by default the last one that made one.
        license: of the model, as Hugging Face writes it: `apache-2.0`. None: nobody has said.

    Raises:
        UserError: no such model, or a place that cannot be written.
    """
    if output.suffix not in (".md", ".html"):
        raise UserError(f"--output {output}: the name must end in .md or .html")
    state = fold(read(directory))
    artifacts = _artifacts(store, state)
    name, model = _model(artifacts, directory.name, stage)
    record = json.loads((directory / "workflow.json").read_bytes())
    sections = [
        _data(store, artifacts, model),
        _architecture(store, model),
        _activation(store, model),
        _conversion(store, model),
        _training(store, model),
        _lineage(store, model),
        _results(store, artifacts, model),
        _use(),
        _environment(store, model, record),
        _reproduce(directory.name, name, model, record),
    ]
    title = f"{record['workflow']['name']}: {name}"
    summary = str(record["workflow"].get("description") or "")
    shown = [section for section in sections if section is not None]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".html":
            page = render_page(_TEMPLATE, title=title, summary=summary, sections=shown)
            output.write_text(page, encoding="utf-8")
        else:
            front = _front_matter(store, artifacts, model, title, license)
            output.write_text(front + _markdown(title, summary, shown, output), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None


def _artifacts(store: Store, state: RunState) -> Artifacts:
    """Stage → artifact, for those that are stored."""
    found = {name: store.load(stage.key) for name, stage in state.stages.items() if stage.key and stage.digest}
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def _model(artifacts: Artifacts, run_id: str, stage: str | None) -> tuple[str, StoredArtifact]:
    models = {
        name: artifact
        for name, artifact in artifacts.items()
        if {"model.json", "model.safetensors"} <= {entry["path"] for entry in artifact.files}
    }
    if not models:
        raise UserError(f"run {run_id} made no model", "name a run with a finished `train` or `convert` stage")
    if stage is not None and stage not in models:
        raise UserError(f"--stage {stage}: made no model in run {run_id}", suggest(stage, list(models)))
    name = stage or list(models)[-1]
    return name, models[name]


def _inputs(artifact: StoredArtifact) -> dict[str, Any]:
    return dict(readable(artifact.components.get("inputs") or {}))


def _holds(artifact: StoredArtifact, name: str) -> bool:
    return any(entry["path"] == name for entry in artifact.files)


def _read(store: Store, artifact: StoredArtifact, name: str) -> Any:
    if not _holds(artifact, name):
        return None
    return json.loads((store.materialize(artifact.key) / name).read_bytes())


def _rows(values: Mapping[str, Any]) -> list[list[str]]:
    flat = {key: value for key, value in flatten(values).items() if value not in ("", "null", "{}", "[]")}
    return [["", ""], *([key, value] for key, value in flat.items())]


def _dataset(artifacts: Artifacts, model: StoredArtifact) -> StoredArtifact | None:
    """What the model was trained or calibrated on."""
    digest = _inputs(model).get("dataset")
    return next((item for item in artifacts.values() if item.digest == digest), None)


def _source(dataset: StoredArtifact | None) -> dict[str, Any]:
    """Where the data came from: the `source` parameter of the stage that made the data set."""
    found = None if dataset is None else dataset.parameters.get("source")
    return dict(found) if isinstance(found, Mapping) else {}


def _data(store: Store, artifacts: Artifacts, model: StoredArtifact) -> Section | None:
    dataset = _dataset(artifacts, model)
    if dataset is None:
        return None
    description = _read(store, dataset, "dataset.json") or {}
    columns = ("documents", "bytes", "tokens", "samples", "images")
    used = [column for column in columns if any(column in part for part in description.get("splits", {}).values())]
    table = [["split", *used]]
    for split, part in description.get("splits", {}).items():
        table.append([split, *(f"{part[column]:,}" if column in part else "" for column in used)])
    source = _source(dataset)
    tokenizer = description.get("tokenizer") or {}
    text = f"`{description.get('name', dataset.stage)}`"
    if source:
        text += f", from {', '.join(f'{key} {value}' for key, value in flatten(source).items() if value != 'null')}"
    if tokenizer:
        text += f"; tokenizer {tokenizer.get('kind')} with {tokenizer.get('vocab_size'):,} tokens"
    return Section("Data", f"{text}. Digest `{dataset.digest}`.", table)


def _architecture(store: Store, model: StoredArtifact) -> Section:
    from polytrope.models.checkpoint import TANGENT_FILE

    description = _read(store, model, "model.json")
    config = {key: value for key, value in description["config"].items() if key not in ("activation", "factors")}
    tangent = "a tangent model of " if _holds(model, TANGENT_FILE) else ""
    text = f"{tangent}{description['architecture']} with {description.get('parameters', 0):,} parameters."
    return Section("Model", text, _rows(config))


def _activation(store: Store, model: StoredArtifact) -> Section:
    """What the activations of the blocks are now, drawn from the stored weights."""
    from polytrope.models.activations import describe_activation

    config = _read(store, model, "model.json")["config"].get("activation")
    picture = _draw_activations(store.materialize(model.key))
    return Section("Activation", f"{describe_activation(config)}.", picture=picture)


def _conversion(store: Store, model: StoredArtifact) -> Section | None:
    """What the stage `convert` did to blocks, linear layers and weights."""
    if not _holds(model, CONVERSION_FILE):
        return None
    made = read_conversion(store.materialize(model.key))
    said, table = [], []
    if made.dropped is not None:
        gone = made.dropped
        said.append(
            f"{len(gone.blocks)} of {gone.total} blocks are gone ({', '.join(gone.blocks)}); a least-squares map in "
            f"{gone.into} stands for them."
        )
    if made.factorization is not None:
        layers = made.factorization.layers
        said.append(f"{len(layers)} linear layers are in two factors.")
        table = [["layer", "size", "utilised rank", "rank"]]
        table += [
            [layer.name, f"{layer.inputs} → {layer.outputs}", str(layer.utilised_rank), str(layer.rank)]
            for layer in layers
        ]
    if made.quantization is not None:
        rounded = made.quantization
        said.append(
            f"Weights of {len(rounded.layers)} linear layers have {rounded.bits} bits, with a scale for each "
            f"{'row' if rounded.per == 'row' else 'layer'}: {rounded.bytes_after:,} bytes with these packed, "
            f"{rounded.bytes_before:,} before."
        )
    if made.quadratic is not None:
        said.append(f"{len(made.quadratic)} linear layers are quadratic, with the same function.")
    if made.size is not None:
        said.append(
            f"{made.size.before:,} parameters before, {made.size.after:,} now; on calibration samples the output moved "
            f"by {made.size.difference:.2e} of its size, all that was converted together."
        )
    return Section("Conversion", " ".join(said), table) if said else None


def _draw_activations(directory: Path) -> bytes | None:
    """PNG of the curves of some blocks' activations; None: there are none."""
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from polytrope.models.checkpoint import load_model
    from polytrope.pipeline.stages.evaluate.shapes import named_activations

    modules = named_activations(load_model(directory))
    if not modules:
        return None
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
    parameters = {key: value for key, value in model.parameters.items() if key not in ("model",)}
    text = f"Stage `{model.stage}` (`uses: {model.components.get('uses')}`), {model.duration:.0f} s."
    history = [entry for entry in read_history(store.materialize(model.key)) if entry.get("val/loss") is not None]
    if history:
        points = dict.fromkeys(
            f"{entry['val/loss']:.4f} at step {entry['step']}" for entry in (history[0], history[-1])
        )
        text += f" Validation loss {', '.join(points)}."
    return Section("Training", text, _rows(parameters))


def _lineage(store: Store, model: StoredArtifact) -> Section:
    """What it was made from, and what all of that was trained on."""
    lineage = read_lineage(store.materialize(model.key))
    own = seen(lineage.samples, lineage.tokens)
    text = f"Trained on {own} in all, those of the models it was made from included."
    if lineage.unknown:
        text = f"Made from a model from elsewhere; {own} are what it was trained on here."
    for teacher in lineage.teachers:
        of_it = "more than is known here" if teacher.unknown else seen(teacher.samples, teacher.tokens)
        text += f" Trained to be like `{teacher.stage}` ({teacher.digest[:12]}), which has seen {of_it}."
    rows = [["made from", "digest"], *([ancestor.stage, ancestor.digest] for ancestor in lineage.ancestors)]
    return Section("Lineage", text, rows if lineage.ancestors else [])


def _front_matter(store: Store, artifacts: Artifacts, model: StoredArtifact, title: str, license: str | None) -> str:
    """YAML that Hugging Face's hub reads: only what is known, and only names that the hub knows."""
    from huggingface_hub import EvalResult, ModelCardData

    description = _read(store, model, "model.json")
    dataset = _dataset(artifacts, model)
    source = _source(dataset)
    hub = str(source["dataset"]) if source.get("kind") == "hub" else None
    evaluation = _evaluation(store, artifacts, model)
    numbers = "tabular-regression" if description["config"].get("loss") == "mse" else "tabular-classification"
    tasks = {"text": "text-generation", "images": "image-classification", "numbers": numbers}
    results = []
    if evaluation is not None:
        content, label = evaluation
        same = dataset is not None and content.dataset.digest == dataset.digest  # evaluated on what it was trained on
        for figure in _FIGURES:
            value = getattr(content.models[label], figure)
            if value is not None:
                results.append(
                    EvalResult(
                        task_type=tasks[content.kind],
                        dataset_type=hub if hub and same else content.dataset.name,
                        dataset_name=content.dataset.name,
                        dataset_split="validation",
                        metric_type=figure,
                        metric_value=value,
                    )
                )
    data = ModelCardData(
        license=license or "unknown",
        base_model=read_lineage(store.materialize(model.key)).base_model,
        datasets=[hub] if hub else None,
        library_name="polytrope",
        tags=["polytrope", description["architecture"]],
        pipeline_tag=None if evaluation is None else tasks[evaluation[0].kind],
        model_name=title if results else None,
        eval_results=results or None,
        ignore_metadata_errors=False,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _use() -> Section:
    """How to load it, and what it is not for."""
    text = (
        "A research model: it says what its training data says, and was checked for nothing but the results above. "
        "It was trained at one size on one data set; what holds here need not hold elsewhere."
    )
    code = (
        "from polytrope.models.checkpoint import load_model\n"
        'model = load_model("files")  # the directory of the artifact: polytrope export, or the store\n'
        "outputs = model(inputs)"
    )
    return Section("Use and limits", text, code=code)


def _evaluation(store: Store, artifacts: Artifacts, model: StoredArtifact) -> tuple[Evaluation, str] | None:
    """The first evaluation that read this model and the model's label there."""
    for artifact in artifacts.values():
        labels = _inputs(artifact).get("models")
        if not isinstance(labels, dict) or model.digest not in labels.values():
            continue
        if not _holds(artifact, EVALUATION_FILE):
            continue
        evaluation = read_evaluation(store.materialize(artifact.key))
        return evaluation, next(label for label, digest in labels.items() if digest == model.digest)
    return None


def _results(store: Store, artifacts: Artifacts, model: StoredArtifact) -> Section | None:
    """Of an evaluation that read this model, with the other models beside it."""
    found = _evaluation(store, artifacts, model)
    if found is None:
        return None
    evaluation, own = found
    figures_of = {label: result.model_dump(include=set(_FIGURES)) for label, result in evaluation.models.items()}
    shown = [key for key in _FIGURES if any(figures[key] is not None for figures in figures_of.values())]
    table = [["", *shown]]
    for label, figures in figures_of.items():
        mark = " (this model)" if evaluation.models[label].digest == evaluation.models[own].digest else ""
        table.append([label + mark, *(metric_text(figures[key]) if figures[key] is not None else "" for key in shown)])
    protocol = ", ".join(f"{key} {value}" for key, value in dict(evaluation.protocol).items())
    return Section("Results", f"On validation data that no training read: {protocol}.", table)


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
        rows["git commit"] = git["commit"] + uncommitted(git["dirty"])
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
            parts.append(markdown_table(head, rows))
        if section.code:
            parts.append(f"```python\n{section.code}\n```")
        if section.picture is not None:
            picture = output.with_name(f"{output.stem}-{section.title.lower()}.png")
            picture.write_bytes(section.picture)
            parts.append(f"![{section.title}]({picture.name})")
    return "\n\n".join(part for part in parts if part) + "\n"
