"""Models in other formats: what is read, what is written, and how a path is told to hold which.

| format | read | write |
|---|---|---|
| own directory (`model.json`) | `polytrope.models.checkpoint` | same |
| Hugging Face directory (`config.json`) | `huggingface` | `huggingface` |
| DeepSpeed ZeRO checkpoint, stages 0 to 3 | `deepspeed` | - |
| state dict of nanoGPT, HF, ConvNeXt, timm, torchvision (a file; `_STATE_SUFFIXES`) | `states` | - |
| ONNX | - | `onnx` |

No file is ever unpickled into anything but tensors and plain containers (`torch.load(weights_only=True)`). What changes
the function is taken over or refused by name; what a file does not say is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["detect_format", "read_model"]

_STATE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WEIGHTS_OF_DIRECTORIES = ("model.safetensors", "pytorch_model.bin")


def detect_format(path: str | Path) -> str:
    """`own`, `huggingface`, `deepspeed` or `state`.

    Raises:
        ValueError: nothing there, or nothing that is known.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or directory")
    if path.is_file():
        for description in ("config.json", "model.json"):
            if path.name in _WEIGHTS_OF_DIRECTORIES and (path.parent / description).exists():
                raise ValueError(f"{path}: give the directory, whose {description} says what the weights do not")
        if re.search(r"-\d+-of-\d+$", path.stem):
            raise ValueError(f"{path} is one part of the weights; give the directory with all of them and config.json")
        if path.suffix in _STATE_SUFFIXES:
            return "state"
        raise ValueError(f"{path}: expected a file that ends in {', '.join(_STATE_SUFFIXES)}, or a model directory")
    own, huggingface = (path / "model.json").exists(), (path / "config.json").exists()
    if own and huggingface:
        raise ValueError(f"{path} holds two models: model.json (ours) and config.json (Hugging Face); move one away")
    if own:
        return "own"
    if huggingface:
        return "huggingface"
    from polytrope.models.formats.deepspeed import checkpoint_directory

    if checkpoint_directory(path) is not None:
        return "deepspeed"
    raise ValueError(
        f"{path}: no model directory: it has neither model.json (ours), config.json (Hugging Face) nor "
        "*_model_states.pt (DeepSpeed)"
    )


def read_model(path: str | Path, config: Mapping[str, Any] | None = None) -> nn.Module:
    """The model at `path`, in evaluation mode, float32 whatever it is stored in.

    Args:
        path: a directory or file of any format above.
        config: fields of the model's configuration that the weights alone do not tell (`n_head`, `activation`), for
            DeepSpeed checkpoints and state dicts.

    Raises:
        ValueError: a file that is missing, truncated or of an unknown format; names the file and what is wrong.
    """
    path = Path(path)
    kind = detect_format(path)
    if config and kind not in ("deepspeed", "state"):
        raise ValueError(f"{path}: its configuration is in the directory; leave out {', '.join(config)}")
    if kind == "own":
        from polytrope.models.checkpoint import load_model

        return load_model(path)
    if kind == "huggingface":
        from polytrope.models.formats.huggingface import load_huggingface

        return load_huggingface(path)
    from polytrope.models.formats import deepspeed, states

    content = deepspeed.read_state(path) if kind == "deepspeed" else states.load_content(path)
    return states.build_from_weights(states.find_weights(content, str(path)), config or {}).eval()
