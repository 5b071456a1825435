"""The `import_model` stage: start a workflow from a checkpoint on disk.

pretrained:
  uses: import_model
  with: {path: checkpoints/bert}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS
from polytrope.pipeline.data.lineage import read_lineage, write_lineage
from polytrope.pipeline.data.promised import AnyPromisedModel, PromisedForeignModel, PromisedModel
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources, StageContext, stage
from polytrope.pipeline.stages.import_model.parameters import ImportModelParameters
from polytrope.pipeline.support.file_digests import combined_digest, file_digests


def fingerprint(parameters: ImportModelParameters, directory: Path) -> dict[str, str]:
    """A digest of all files of the checkpoint but hidden ones, by their names below it.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    path = directory / parameters.path
    if path.is_dir():
        found = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
        files = {name: file for name, file in found.items() if not any(part[0] == "." for part in name.split("/"))}
    else:
        files = {path.name: path} if path.is_file() else {}
    if not files:
        what = "the directory is empty" if path.is_dir() else "there is no such file or directory"
        raise UserError(f"path: {path}: {what}", "name a checkpoint, relative to the workflow file")
    return {"checkpoint": combined_digest(list(files), file_digests(list(files.values()), field="path"))}


def promise(
    parameters: ImportModelParameters, _upstream: Mapping[str, Any], _resources: Resources, directory: Path
) -> AnyPromisedModel | None:
    """What the checkpoint's own description says of the model; nothing where the weights alone decide, or are absent.

    Raises:
        UserError: a description that cannot be read, or a model that is not supported.
    """
    path = directory / parameters.path
    own, huggingface = (path / "model.json").is_file(), (path / "config.json").is_file()
    if own == huggingface:  # neither: a state dict, DeepSpeed, nothing; both: refused when it is read
        return None
    try:
        return _described(path) if own else _of_transformers(path)
    except ValueError as error:
        raise UserError(f"path: {error}", "docs/conversion.md lists what is read") from error


def _described(path: Path) -> PromisedModel:
    from polytrope.models.checkpoint import read_description

    content = read_description(path)
    architecture, tokenizer = str(content["architecture"]), content.get("tokenizer") or {}
    try:
        if architecture not in MODEL_KINDS:
            raise ValueError(f"unknown architecture `{architecture}`; there are: {', '.join(MODEL_KINDS)}")
        settings = asdict(make_config(MODEL_KINDS[architecture].config, content["config"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / 'model.json'}: {error}") from error
    return PromisedModel(architecture, settings, tokenizer.get("kind"))


def _of_transformers(path: Path) -> AnyPromisedModel:
    from polytrope.models.formats.huggingface import own_settings

    name, settings = own_settings(path)
    return PromisedForeignModel(name) if settings is None else PromisedModel(name, settings)


@stage(
    promise=promise,
    fingerprint=fingerprint,
)
def import_model(context: StageContext, parameters: ImportModelParameters) -> dict[str, float]:
    """Read a checkpoint whole, or refuse it by name, and write the model as the other stages read it.

    GPT-2 and ConvNeXt, from any format, become directories of polytrope, which `train` (`initial`), `convert` (`model`)
    and `evaluate` (`models`) take. Every other architecture stays one of Hugging Face, which `convert` takes.
    """
    from polytrope.models.formats import detect_format, read_model, write_model

    path = Path(parameters.path)  # a stage runs in the workflow file's directory
    try:
        kind = detect_format(path)
        context.progress(0, 2, f"reading {path} ({kind})")
        model = read_model(path, parameters.config or None)
        context.progress(1, 2, "writing it, and reading it back")
        write_model(context.output, model, source=path if path.is_dir() else None)
    except ValueError as error:
        raise UserError(f"import_model: path: {error}", "docs/conversion.md lists what is read") from error
    write_lineage(context.output, read_lineage(path))
    parameters_total = sum(parameter.numel() for parameter in model.parameters())
    context.log_params({"source": str(path), "format": kind, "class": type(model).__name__})
    return {"parameters": float(parameters_total)}
