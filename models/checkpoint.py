"""A model on disk: `model.json` (architecture and configuration), `model.safetensors` (weights), `tokenizer.json`.

A tangent model is that of the model it is a tangent of, in a format of its own, and `tangent.safetensors` (v).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polytrope.models import build_model, find_architecture
from polytrope.models.activations import current_activations, normalised_activations
from polytrope.models.configurations import LEFT_OUT, NO_ACTIVATION, activation_configs, changed_parts
from polytrope.models.factors import describe_factors
from polytrope.models.linearized import LinearizedModel
from polytrope.models.parts.settings import PARTS
from polytrope.models.special_tokens import kept_fields, read_tokenizer_entry
from polytrope.models.weights import check_dtypes
from polytrope.models.writing import appearing, compare_outputs, compare_weights

FORMAT = 1
TANGENT_FORMAT = 2  # which readers that know none refuse: `model.safetensors` alone would be the model before training
TANGENT_FILE = "tangent.safetensors"


def save_model(
    directory: str | Path,
    model: nn.Module,
    *,
    tokenizer: str | Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `model` below `directory`, read back and compared before it appears; equal weights give equal bytes.

    Args:
        directory: created if need be.
        model: a model of this package (it has `architecture`, `config` and maybe `tied_weights`).
        tokenizer: a dataset or model directory whose tokenizer belongs to this model; it is copied.
        weights: the weights to write instead of the model's own (gathered from shards, or averaged), by name.

    Raises:
        ValueError: what was written is not the model: weights in a dtype that is not kept, an activation that the
            configuration cannot describe.
    """
    directory, tokenizer = Path(directory), None if tokenizer is None else Path(tokenizer)
    state = model.state_dict() if weights is None else dict(weights)
    files = {name: _stored(tensors) for name, tensors in _files(model, state).items()}
    description: dict[str, Any] = {
        "format": FORMAT if TANGENT_FILE not in files else TANGENT_FORMAT,
        "architecture": model.architecture,
        "config": model_config(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters())
        if weights is None
        else sum(state[name].numel() for name, _ in model.named_parameters() if name in state),
    }
    with appearing(directory, "model.json") as aside:
        if tokenizer is not None:
            description["tokenizer"] = read_tokenizer_entry(tokenizer)
            if kept := kept_fields(tokenizer):
                description["huggingface"] = kept
            if (tokenizer / "tokenizer.json").exists():
                shutil.copyfile(tokenizer / "tokenizer.json", aside / "tokenizer.json")
        for name, tensors in files.items():
            save_file(tensors, aside / name, metadata={"format": "pt"})
        (aside / "model.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        with torch.random.fork_rng(devices=[]):  # a training goes on with the same random numbers
            written = load_model(aside)
        what = f"{directory} is not written"
        compare_configs(written, model, what)
        back = _files(written, written.state_dict())
        for name, tensors in files.items():
            compare_weights(back[name], tensors, what)
        if weights is None:
            compare_outputs(written, model, find_architecture(str(model.architecture)).example(model.config), what)


def _files(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What goes into each file of weights, by the name there; tied weights once."""
    tied = getattr(model, "tied_weights", {})
    own = {name: tensor for name, tensor in state.items() if name not in tied}
    if not isinstance(model, LinearizedModel):
        return {"model.safetensors": own}
    frozen, tangents = model.separated(own)
    return {"model.safetensors": frozen, TANGENT_FILE: tangents}


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}


def load_model(directory: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model that `save_model` wrote, in evaluation mode; of a tangent model a `LinearizedModel`.

    Raises:
        ValueError: no model there, a newer format, or weights that do not fit the configuration.
    """
    directory = Path(directory)
    description = read_description(directory, tangents=True)
    try:
        model = build_model(description["architecture"], description["config"])
    except ValueError as error:
        raise ValueError(f"{directory / 'model.json'}: {error}") from error
    load_weights(model, _read(directory / "model.safetensors"))
    if description["format"] == TANGENT_FORMAT:
        model = _with_tangents(model, directory / TANGENT_FILE)
    return model.to(device).eval()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _with_tangents(model: nn.Module, path: Path) -> LinearizedModel:
    """The tangent of `model` with the v of a file, of those weights alone that have one there."""
    stored = _read(path)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stored)
    try:
        linearized = LinearizedModel(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if unknown := sorted(stored.keys() - set(linearized.names)):
        raise ValueError(f"{path}: `{unknown[0]}` is no weight of this model that has a tangent")
    check_dtypes({name: (stored[name].dtype, weight.dtype) for name, weight, _ in linearized.pairs()})
    with torch.no_grad():
        for name, _, tangent in linearized.pairs():
            if stored[name].shape != tangent.shape:
                raise ValueError(f"{path}: {name} is {list(stored[name].shape)}, the weight {list(tangent.shape)}")
            tangent.copy_(stored[name])
    return linearized


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the content of a `model.safetensors`, where tied weights are stored once.

    Raises:
        ValueError: missing or unexpected names, other shapes, numbers that the model's dtypes do not hold exactly.
    """
    tied = getattr(model, "tied_weights", {})
    complete = dict(tensors) | {name: tensors[source] for name, source in tied.items() if source in tensors}
    own = model.state_dict()
    check_dtypes({name: (tensor.dtype, own[name].dtype) for name, tensor in complete.items() if name in own})
    try:
        model.load_state_dict(complete, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the model: {error}") from error


def read_description(directory: str | Path, *, tangents: bool = False) -> dict[str, Any]:
    """The content of `model.json`.

    Args:
        tangents: the caller knows tangent models, which are not what their configuration and weights alone compute.

    Raises:
        ValueError: not a model directory, a format of a newer version, or a tangent model and not `tangents`.
    """
    path = Path(directory) / "model.json"
    if not path.exists() and path.with_name("config.json").exists():
        raise ValueError(
            f"{directory} holds a model of transformers (config.json), not one of this package (model.json); GPT-2 and "
            "ConvNeXt become one by the stage `import_model`, other architectures are for the stage `convert` alone"
        )
    if not path.exists() and path.with_name("module.json").exists():
        raise ValueError(
            f"{directory} holds a module of somebody's own (module.json), not a model of this package (model.json): it "
            "is for the stage `convert` alone; a factory that returns a GPT-2 or ConvNeXt of "
            "`polytrope.models.build_model` gives one that can be trained and evaluated"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} is no model directory: {path} cannot be read: {error}") from error
    found = description.get("format") if isinstance(description, dict) else description
    if found == TANGENT_FORMAT and not tangents:
        raise ValueError(
            f"{path}: a tangent model (`train` with `linearize: true`), which no weights alone compute: it is "
            "evaluated, measured, averaged and served, and nothing else"
        )
    if not isinstance(description, dict) or found not in (FORMAT, TANGENT_FORMAT):
        raise ValueError(f"{path}: format {found!r}, this version reads {FORMAT} and {TANGENT_FORMAT}")
    if missing := [name for name in ("architecture", "config") if name not in description]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    return description


def model_config(model: nn.Module) -> dict[str, Any]:
    """The model's configuration as JSON, with its activations and factors as they are now (after conversion).

    Parts, and fields that say so (`configurations.LEFT_OUT`), are left out where they are the usual ones, and so are
    factors where there are none.

    Raises:
        ValueError: an activation that no configuration describes.
    """
    model = model.initial if isinstance(model, LinearizedModel) else model
    config: dict[str, Any] = dataclasses.asdict(model.config)  # type: ignore[call-overload]
    for part in PARTS.keys() & config.keys() - changed_parts(model.config).keys():
        del config[part]
    for field in dataclasses.fields(model.config):  # type: ignore[arg-type]
        if field.metadata == LEFT_OUT and config[field.name] == field.default:
            del config[field.name]
    config["factors"] = describe_factors(model)
    if not config["factors"]:
        del config["factors"]
    entries = activation_configs(config["activation"], _layers(model))
    config["activation"] = current_activations(activation_modules(model), entries)
    return config


def activation_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The activations of a model of this package by the number of their block, from 0, in order; some have none."""
    config: Any = model.config
    entries = activation_configs(config.activation, _layers(model))
    blocks = [number for number, entry in enumerate(entries) if entry != NO_ACTIVATION]
    last = find_architecture(str(model.architecture)).activation
    named = model.named_modules(remove_duplicate=False)
    return dict(zip(blocks, (module for name, module in named if name.rpartition(".")[2] == last), strict=True))


def _layers(model: nn.Module) -> int:
    """How many blocks it has."""
    config: Any = model.config
    return len(config.activation_widths())


def compare_configs(written: nn.Module, meant: nn.Module, what: str) -> None:
    """Refuse a model whose configuration is another one than was meant.

    Raises:
        ValueError: the first field that differs.
    """
    there, here = model_config(written), model_config(meant)
    for config, model in ((there, written), (here, meant)):
        config["activation"] = normalised_activations(config["activation"], _layers(model))
    for field in sorted(here.keys() | there.keys()):
        if there.get(field) != here.get(field):
            raise ValueError(f"{what}: {field} comes back as {there.get(field)!r} instead of {here.get(field)!r}")
