"""The `import_model` stage: start a workflow from a checkpoint on disk.

pretrained:
  uses: import_model
  with: {path: checkpoints/bert}

A state dict of a module of one's own comes with the function that builds it:

  with: {path: weights.safetensors, factory: my_models:classifier, options: {width: 64}}
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.described import read_model_promise
from polytrope.pipeline.data.lineage import read_origin, write_lineage
from polytrope.pipeline.data.promised import (
    AnyPromisedModel,
    PromisedBuiltModel,
    PromisedForeignModel,
    PromisedModel,
)
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
    if parameters.factory is not None:
        if own or huggingface:
            described = "model.json" if own else "config.json"
            raise UserError(f"factory: {path / described} says how the model is built", "leave factory and options out")
        return PromisedBuiltModel(parameters.factory)
    if own == huggingface:  # neither: a state dict, DeepSpeed, nothing; both: refused when it is read
        return None
    try:
        if own:  # what is written has no record of a conversion beside it
            return replace(read_model_promise(path), blocks_before=None)
        return _of_transformers(path)
    except ValueError as error:
        raise UserError(f"path: {error}", "docs/conversion.md lists what is read") from error


def _of_transformers(path: Path) -> AnyPromisedModel:
    from polytrope.models.formats.huggingface import own_settings

    name, settings = own_settings(path)
    return PromisedForeignModel(name) if settings is None else PromisedModel(name, settings)


def imports(parameters: ImportModelParameters, _upstream: Mapping[str, Any]) -> dict[str, str]:
    """The factory, whose code belongs to the key."""
    return {} if parameters.factory is None else {"factory": parameters.factory}


@stage(cpu_only=True, promise=promise, fingerprint=fingerprint, imports=imports)
def import_model(context: StageContext, parameters: ImportModelParameters) -> dict[str, float]:
    """Read a checkpoint whole, or refuse it by name, and write the model as the other stages read it.

    GPT-2 and ConvNeXt, from any format, become directories of polytrope, which `train` (`initial`), `convert` (`model`)
    and `evaluate` (`models`) take. Every other architecture stays one of Hugging Face, and a module of the project is
    written with its factory: `convert` takes both.
    """
    from polytrope.models.formats import detect_format, read_model, write_model
    from polytrope.models.formats.module import Factory
    from polytrope.pipeline.data.factories import build_module

    path = Path(parameters.path)  # a stage runs in the workflow file's directory
    factory = None if parameters.factory is None else Factory(parameters.factory, parameters.options)
    fresh = None if factory is None else build_module(context, factory)
    try:
        kind = detect_format(path)
        context.progress(0, 2, f"reading {path} ({kind})")
        model = read_model(path, parameters.config or None, fresh)
        context.progress(1, 2, "writing it, and reading it back")
        write_model(context.output, model, source=path if path.is_dir() else None, factory=factory)
    except ValueError as error:
        raise UserError(f"import_model: path: {error}", "docs/conversion.md lists what is read") from error
    lineage = read_origin(path)
    write_lineage(context.output, lineage.model_copy(update={"base_model": lineage.base_model or hub_name(path)}))
    parameters_total = sum(parameter.numel() for parameter in model.parameters())
    context.log_params({"source": str(path), "format": kind, "class": type(model).__name__})
    return {"parameters": float(parameters_total)}


def hub_name(path: Path) -> str | None:
    """`owner/name` of a checkpoint in the local cache of Hugging Face's hub; None elsewhere: files tell of no hub.

    (`_name_or_path` in `config.json` is what a training began with, and stays there when another model is saved.)
    """
    parts = path.resolve().parts
    for directory, inside in itertools.pairwise(parts):
        if directory.startswith("models--") and inside in ("snapshots", "blobs"):
            return directory.removeprefix("models--").replace("--", "/")
    return None
