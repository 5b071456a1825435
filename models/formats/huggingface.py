"""Directories of Hugging Face: `config.json` and safetensors, read and written, with or without converted activations.

GPT-2 and ConvNeXt become the models of this package; every other architecture (BERT, ViT, …) is built by the installed
`transformers`. Converted activations are described in `activations.json`, their weights in `activations.safetensors`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from polytrope.models.formats.states import State, load_safetensors, read_state
from polytrope.models.surgery import restore_activations
from polytrope.ops import is_learnable_activation

ACTIVATIONS_FILE = "activations.json"
ACTIVATION_WEIGHTS = "activations.safetensors"
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def read_weights(directory: Path) -> State:
    """The tensors of a directory: one safetensors file, several with an index, or `pytorch_model.bin`.

    Raises:
        ValueError: no weights there, or a file that cannot be read.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} cannot be read, it may be truncated: {error}") from error
        return {name: tensor for file in names for name, tensor in load_safetensors(directory / file).items()}
    if (directory / "model.safetensors").exists():
        return load_safetensors(directory / "model.safetensors")
    if (directory / "pytorch_model.bin").exists():
        return read_state(directory / "pytorch_model.bin")
    raise ValueError(f"{directory}: no weights: neither model.safetensors nor pytorch_model.bin")


def read_config(directory: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        ValueError: missing or not JSON.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{directory / 'config.json'}: expected an object with a model_type")
    return config


def load_huggingface(directory: Path) -> nn.Module:
    """The model of the directory, in evaluation mode, its converted activations in their places.

    Raises:
        ValueError: a file that cannot be read, an architecture that cannot be built, weights that do not fit.
    """
    config = read_config(directory)
    activations = _read_activations(directory)
    weights = read_weights(directory)
    own = config["model_type"] in ("gpt2", "convnext")
    model = _own_model(config, weights, directory) if own else _foreign_model(config, directory)
    _load_activations(model, activations, directory)
    return model.eval()


def _read_activations(directory: Path) -> dict[str, Any]:
    path = directory / ACTIVATIONS_FILE
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        return dict(content["activations"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _own_model(config: dict[str, Any], weights: State, directory: Path) -> nn.Module:
    from polytrope.models import convnext, gpt2

    try:
        if config["model_type"] == "gpt2":
            language = gpt2.GPT2(gpt2.gpt2_config_from_huggingface(config))
            gpt2.load_gpt2_state_dict(language, weights)
            return language
        vision = convnext.ConvNeXt(convnext.convnext_config_from_huggingface(config))
        convnext.load_convnext_state_dict(vision, weights)
        return vision
    except (ValueError, KeyError) as error:
        raise ValueError(f"{directory}: {error}") from error


def _foreign_model(config: dict[str, Any], directory: Path) -> nn.Module:
    """Built and loaded by transformers, which knows the names that older versions wrote."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the directory
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{directory}: architecture {config['model_type']} is built by transformers, which is not installed: "
            "pip install transformers"
        ) from error
    named = (config.get("architectures") or [None])[0]
    kind = getattr(transformers, str(named), None)
    if kind is None:
        raise ValueError(f"{directory / 'config.json'}: architectures: transformers has no {named}")
    try:
        with _without_progress_bars():
            model, report = kind.from_pretrained(
                directory, local_files_only=True, weights_only=True, output_loading_info=True
            )
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{directory}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:8])
        raise ValueError(f"{directory}: the weights do not fit {named}: missing {missing}")
    network: nn.Module = model
    for tensor in (*network.parameters(), *network.buffers()):
        # They lie in the file as it was mapped. From odd addresses oneDNN may add in another order, so the same weights
        # would not give the same bits.
        tensor.data = tensor.data.clone()
    return network


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Those of transformers, which go to stderr whatever it is."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_activations(model: nn.Module, activations: Mapping[str, Any], directory: Path) -> None:
    restore_activations(model, activations)
    if not activations:
        return
    tensors = load_safetensors(directory / ACTIVATION_WEIGHTS)
    own = model.state_dict()
    wanted = [name for name in own if _owner(name) in activations]
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise ValueError(f"{directory / ACTIVATION_WEIGHTS}: missing {', '.join(missing[:8])}")
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)


def save_huggingface(directory: Path, model: nn.Module, activations: Mapping[str, Any], source: Path | None) -> None:
    """Write `config.json`, `model.safetensors`, the tokenizer's files, and the activations; equal weights, equal bytes.

    Args:
        model: built by transformers, or a GPT-2 or ConvNeXt of this package.
        activations: configuration of every converted activation, by module name; empty: transformers reads the
            directory as it is.
        source: a directory whose tokenizer is copied.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    learned = {name: state[name].detach().cpu().contiguous() for name in sorted(state) if _owner(name) in activations}
    if hasattr(model, "architecture"):
        config, weights = _exported(model, learned)
        tensors = {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    else:
        # A module that is used at several places is in the state under each name, in `activations` under the first.
        learnable = {
            name for name, module in model.named_modules(remove_duplicate=False) if is_learnable_activation(module)
        }
        kept = {name: tensor for name, tensor in state.items() if _owner(name) not in learnable}
        with _without_progress_bars():
            model.save_pretrained(directory, state_dict=kept)  # type: ignore[operator]
    if activations:
        content = {"format": 1, "activations": dict(activations)}
        (directory / ACTIVATIONS_FILE).write_text(json.dumps(content, indent=1) + "\n")
        save_file(learned, directory / ACTIVATION_WEIGHTS, metadata={"format": "pt"})
    for name in _COPIED:
        if source is not None and (source / name).exists():
            shutil.copyfile(source / name, directory / name)


def _owner(name: str) -> str:
    """The module a parameter belongs to."""
    return name.rpartition(".")[0]


def _exported(model: Any, learned: Mapping[str, Tensor]) -> tuple[dict[str, Any], State]:
    """Configuration and weights of a model of this package, as transformers names them."""
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in model.tied_weights and name not in learned
    }
    config = model.config
    if model.architecture == "gpt2":
        transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        weights = {name: tensor.t() if name.endswith(transposed) else tensor for name, tensor in state.items()}
        described = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.vocab_size,
            "n_positions": config.sequence_length,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "activation_function": _classical(config.activation, {"gelu_tanh": "gelu_new"}, "gelu_new"),
            "tie_word_embeddings": True,
        }
        if not config.bias:
            raise ValueError("transformers' GPT-2 has biases; this one has none: write the own format instead")
        return described, weights
    described = {
        "model_type": "convnext",
        "architectures": ["ConvNextForImageClassification"],
        "depths": config.depths,
        "hidden_sizes": config.dims,
        "num_channels": config.in_channels,
        "patch_size": config.patch_size,
        "num_stages": len(config.depths),
        "layer_scale_init_value": config.layer_scale,
        "hidden_act": _classical(config.activation, {"gelu_tanh": "gelu_pytorch_tanh"}, "gelu"),
        "id2label": {str(index): f"LABEL_{index}" for index in range(config.num_classes)},
        "label2id": {f"LABEL_{index}": index for index in range(config.num_classes)},
    }
    return described, {_convnext_name(name): tensor for name, tensor in state.items()}


def _classical(activation: Any, names: Mapping[str, str], default: str) -> str:
    return names.get(activation, activation) if isinstance(activation, str) else default


def _convnext_name(name: str) -> str:
    """HF's name of a parameter with the original code's name."""
    parts = name.split(".")
    if parts[0] == "head":
        return name.replace("head.", "classifier.", 1)
    if parts[0] == "norm":
        return "convnext.layernorm." + parts[1]
    if parts[0] == "downsample_layers":
        if parts[1] == "0":
            part = {"0": "patch_embeddings", "1": "layernorm"}[parts[2]]
            return ".".join(["convnext.embeddings", part, *parts[3:]])
        return ".".join(["convnext.encoder.stages", parts[1], "downsampling_layer", *parts[2:]])
    leaf = ".".join(parts[3:]).replace("gamma", "layer_scale_parameter").replace("norm.", "layernorm.")
    return ".".join(["convnext.encoder.stages", parts[1], "layers", parts[2], leaf])
