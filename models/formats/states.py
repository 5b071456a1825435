"""State dicts in files, and the GPT-2 or ConvNeXt of this package that fits one: sizes are read off the shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

State = dict[str, Tensor]
_NESTED = ("model", "state_dict", "model_state_dict", "module", "model_ema")


def load_tensors(path: Path, safe_globals: list[Any] | None = None) -> Any:
    """The content of a torch file, unpickled with `weights_only=True`.

    Args:
        safe_globals: further classes the file may name, as of `torch.serialization.safe_globals`.

    Raises:
        ValueError: a file that is missing, truncated, or holds more than tensors and plain containers.
    """
    try:
        with torch.serialization.safe_globals(safe_globals or []):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "nsupported" in line), "it is no torch file")
        raise ValueError(
            f"{path} is not loaded: it holds more than tensors ({reason.strip()}), and unpickling that could run any "
            "code; save its state_dict() alone, or convert it to .safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {str(error).splitlines()[0]}") from error


def load_safetensors(path: Path) -> State:
    """The content of a `.safetensors` file.

    Raises:
        ValueError: a file that is missing or truncated.
    """
    try:
        tensors: State = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    return tensors


def read_state(path: Path) -> State:
    """The state dict in a file, also below `model`, `state_dict`, … as trainers write it.

    Raises:
        ValueError: a file that cannot be read or holds no tensors.
    """
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    content = load_tensors(path)
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected tensors by name")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def build_from_state(state: State, config: Mapping[str, Any], source: str) -> nn.Module:
    """The GPT-2 or ConvNeXt these weights belong to, loaded.

    Args:
        state: names of nanoGPT, HF, the original ConvNeXt, timm or torchvision.
        config: what the shapes do not tell, over what they tell.
        source: for messages.

    Raises:
        ValueError: neither of the two, a field that is missing or contradicts the shapes.
    """
    from polytrope.models import build_model
    from polytrope.models.convnext import ConvNeXt, load_convnext_state_dict
    from polytrope.models.gpt2 import GPT2, load_gpt2_state_dict

    names = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        if any(re.search(r"(^|\.)h\.0\.attn\.c_attn\.weight$", name) for name in names):
            model = build_model("gpt2", _gpt2_config(state, config))
            assert isinstance(model, GPT2)
            load_gpt2_state_dict(model, state)
            return model
        renamed = convnext_names(state)
        if "downsample_layers.0.0.weight" in renamed:
            model = build_model("convnext", _convnext_config(renamed, config))
            assert isinstance(model, ConvNeXt)
            load_convnext_state_dict(model, renamed)
            return model
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    raise ValueError(
        f"{source}: the weights are neither those of a GPT-2 (h.0.attn.c_attn.weight) nor of a ConvNeXt; they begin "
        f"with {', '.join(list(names)[:4])}. Give a directory with a config.json instead"
    )


def _gpt2_config(state: State, config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {re.sub(r"^(_orig_mod\.|module\.|transformer\.)+", "", name): t.shape for name, t in state.items()}
    width = sizes["wte.weight"][1] if "wte.weight" in sizes else None
    if width is None or "wpe.weight" not in sizes:
        raise ValueError("a GPT-2 needs wte.weight and wpe.weight")
    found: dict[str, Any] = {
        "vocab_size": sizes["wte.weight"][0],
        "sequence_length": sizes["wpe.weight"][0],
        "n_layer": 1 + max(int(m.group(1)) for name in sizes if (m := re.match(r"h\.(\d+)\.", name))),
        "n_embd": width,
        "bias": "ln_f.bias" in sizes,
    }
    if width % 64 == 0:
        found["n_head"] = width // 64  # the head size of all published GPT-2s
    found |= config
    if "n_head" not in found:
        raise ValueError(
            f"n_head: the weights do not tell it, and a width of {width} is no multiple of 64; give n_head"
        )
    _require_activation(state, config)
    return found


def _convnext_config(state: State, config: Mapping[str, Any]) -> dict[str, Any]:
    depths: dict[int, int] = {}
    for name in state:
        match = re.match(r"stages\.(\d+)\.(\d+)\.", name)
        if match:
            stage, block = int(match.group(1)), int(match.group(2))
            depths[stage] = max(depths.get(stage, 0), block + 1)
    stem = state["downsample_layers.0.0.weight"]
    _require_activation(state, config)
    return {
        "depths": [depths[stage] for stage in sorted(depths)],
        "dims": [state[f"stages.{stage}.0.dwconv.weight"].shape[0] for stage in sorted(depths)],
        "num_classes": state["head.weight"].shape[0],
        "in_channels": stem.shape[1],
        "patch_size": stem.shape[2],
        "layer_scale": 1e-6 if "stages.0.0.gamma" in state else 0.0,
    } | dict(config)


def _require_activation(state: State, config: Mapping[str, Any]) -> None:
    learned = [name for name in state if re.search(r"\.(activation|act)\.\w+$", name)]
    if learned and "activation" not in config:
        raise ValueError(f"activation: the model has learned activations ({learned[0]}); give their configuration")


def convnext_names(state: Mapping[str, Tensor]) -> State:
    """ConvNeXt weights under the original code's names, from those of timm, torchvision or HF.

    timm: `stem.0`, `stages.1.blocks.0.conv_dw`, `mlp.fc1`, `head.fc`. torchvision: `features.1.0.block.0`,
    `layer_scale`, `classifier.2`; its odd `features` are the stages, its even ones the downsampling.
    """
    from polytrope.models.convnext import _original_name

    if "stem.0.weight" in state:
        rename = _from_timm
    elif "features.0.0.weight" in state:
        rename = _from_torchvision
    else:
        rename = _original_name
    result: State = {}
    for name, tensor in state.items():
        ours = rename(name)
        if ours.endswith(("pwconv1.weight", "pwconv2.weight")) and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]  # written as a 1×1 convolution
        result[ours] = tensor.flatten() if ours.endswith(".gamma") else tensor
    return result


def _from_timm(name: str) -> str:
    for pattern, ours in (
        (r"^stem\.(.*)", r"downsample_layers.0.\1"),
        (r"^stages\.(\d+)\.downsample\.(.*)", r"downsample_layers.\1.\2"),
        (r"^stages\.(\d+)\.blocks\.(.*)", r"stages.\1.\2"),
        (r"^head\.norm\.(.*)", r"norm.\1"),
        (r"^head\.fc\.(.*)", r"head.\1"),
    ):
        if re.match(pattern, name):
            name = re.sub(pattern, ours, name)
            break
    return name.replace(".conv_dw.", ".dwconv.").replace(".mlp.fc1.", ".pwconv1.").replace(".mlp.fc2.", ".pwconv2.")


def _from_torchvision(name: str) -> str:
    head = {"classifier.0": "norm", "classifier.2": "head"}
    for theirs, ours in head.items():
        if name.startswith(theirs + "."):
            return ours + name.removeprefix(theirs)
    match = re.match(r"^features\.(\d+)\.(.*)", name)
    if not match:
        return name
    number, rest = int(match.group(1)), match.group(2)
    if number % 2 == 0:
        return f"downsample_layers.{number // 2}.{rest}"
    layers = {"block.0": "dwconv", "block.2": "norm", "block.3": "pwconv1", "block.5": "pwconv2"}
    rest = rest.replace("layer_scale", "gamma")
    for theirs, ours in layers.items():
        rest = rest.replace(f".{theirs}.", f".{ours}.")
    return f"stages.{number // 2}.{rest}"
