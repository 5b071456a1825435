"""Models in other formats: what is read, what is written, and how a path is told to hold which.

| format | read | write |
|---|---|---|
| own directory (`model.json`) | `polytrope.models.checkpoint` | same |
| Hugging Face directory (`config.json`) | `huggingface` | `huggingface` |
| DeepSpeed ZeRO checkpoint, stages 1 to 3 | `deepspeed` | - |
| state dict of nanoGPT, HF, ConvNeXt, timm, torchvision (`.safetensors`, `.pt`, `.pth`, `.bin`) | `states` | - |
| ONNX | - | `onnx` |

No file is ever unpickled into anything but tensors and plain containers (`torch.load(weights_only=True)`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["detect_format", "read_model"]

_STATE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def detect_format(path: Path) -> str:
    """`own`, `huggingface`, `deepspeed` or `state`.

    Raises:
        ValueError: nothing there, or nothing that is known.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or directory")
    if path.is_file():
        if path.suffix in _STATE_SUFFIXES:
            return "state"
        raise ValueError(f"{path}: expected a file that ends in {', '.join(_STATE_SUFFIXES)}, or a model directory")
    if (path / "model.json").exists():
        return "own"
    if (path / "config.json").exists():
        return "huggingface"
    from polytrope.models.formats.deepspeed import checkpoint_directory

    if checkpoint_directory(path) is not None:
        return "deepspeed"
    raise ValueError(
        f"{path}: no model directory: it has neither model.json (ours), config.json (Hugging Face) nor "
        "*_model_states.pt (DeepSpeed)"
    )


def read_model(path: Path, config: Mapping[str, Any] | None = None) -> nn.Module:
    """The model at `path`, in evaluation mode, float32 unless it is stored otherwise.

    Args:
        path: a directory or file of any format above.
        config: fields of the model's configuration that the weights alone do not tell (`n_head`, `activation`), for
            DeepSpeed checkpoints and state dicts.

    Raises:
        ValueError: a file that is missing, truncated or of an unknown format; names the file and what is wrong.
    """
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

    state = deepspeed.read_state(path) if kind == "deepspeed" else states.read_state(path)
    return states.build_from_state(state, config or {}, str(path)).eval()
