"""Models in other formats: what is read, what is written, and how a path is told to hold which.

| format | read | write |
|---|---|---|
| own directory (`model.json`) | `polytrope.models.checkpoint` | same |
| Hugging Face directory (`config.json`) | `huggingface` | `huggingface` |
| DeepSpeed ZeRO checkpoint, stages 0 to 3 | `deepspeed` | - |
| state dict of nanoGPT, HF, ConvNeXt, timm, torchvision (a file; `_STATE_SUFFIXES`) | `states` | - |
| any other module (`module.json`): weights and activations for a fresh one | `module` | `module` |
| ONNX | - | `onnx` |

No file is ever unpickled into anything but tensors and plain containers (`torch.load(weights_only=True)`). What changes
the function is taken over or refused by name; what a file does not say is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from polytrope.models import ARCHITECTURES, find_architecture, is_own
from polytrope.models.linearized import refuse_tangent

if TYPE_CHECKING:
    from polytrope.models.formats.module import Factory

__all__ = ["detect_format", "of_transformers", "read_model", "write_model"]

_STATE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WEIGHTS_OF_DIRECTORIES = ("model.safetensors", "pytorch_model.bin")


def detect_format(path: str | Path) -> str:
    """`own`, `huggingface`, `module`, `deepspeed` or `state`.

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
    if (path / "module.json").exists():
        return "module"
    from polytrope.models.formats.deepspeed import checkpoint_directory

    if checkpoint_directory(path) is not None:
        return "deepspeed"
    raise ValueError(
        f"{path}: no model directory: it has neither model.json (ours), config.json (Hugging Face) nor "
        "*_model_states.pt (DeepSpeed)"
    )


def read_model(path: str | Path, config: Mapping[str, Any] | None = None, model: nn.Module | None = None) -> nn.Module:
    """The model at `path`, in evaluation mode, float32 whatever it is stored in.

    Args:
        path: a directory or file of any format above.
        config: fields of the model's configuration that the weights alone do not tell (`n_head`, `activation`), for
            DeepSpeed checkpoints and state dicts.
        model: a fresh module of the class whose weights they are, which gets them, in its own types: for state dicts
            and DeepSpeed checkpoints of anybody's own module, and for `module.json`.

    Raises:
        ValueError: a file that is missing, truncated or of an unknown format; names the file and what is wrong.
    """
    path = Path(path)
    kind = detect_format(path)
    if model is not None:
        return _into(model, path, kind)
    if kind == "module":
        raise ValueError(
            f"{path} holds the weights of a module of somebody's own, whose class it does not have: "
            "Conversion.load(directory, model) and read_model(directory, model=model) put them into a fresh one"
        )
    if config and kind not in ("deepspeed", "state"):
        raise ValueError(f"{path}: its configuration is in the directory; leave out {', '.join(config)}")
    if kind == "own":
        from polytrope.models.checkpoint import load_model, read_description

        read_description(path)  # refuses what is no model of weights alone
        return load_model(path)
    if kind == "huggingface":
        from polytrope.models.formats.huggingface import load_huggingface

        return load_huggingface(path)
    from polytrope.models.formats.states import build_from_weights, find_weights

    return build_from_weights(find_weights(_state(path, kind), str(path)), config or {}).eval()


def _state(path: Path, kind: str) -> Any:
    from polytrope.models.formats import deepspeed, states

    return deepspeed.read_state(path) if kind == "deepspeed" else states.load_content(path)


def _into(model: nn.Module, path: Path, kind: str) -> nn.Module:
    if kind in ("own", "huggingface"):
        raise ValueError(f"{path} says itself how its model is built; leave out what builds it")
    if kind == "module":
        from polytrope.models.formats.module import load_module

        return load_module(path, model)
    from polytrope.models.formats.states import load_into

    return load_into(model, _state(path, kind), str(path))


def write_model(
    directory: str | Path,
    model: nn.Module,
    *,
    format: Literal["own", "huggingface"] | None = None,
    source: str | Path | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    factory: Factory | None = None,
) -> None:
    """Write a model with its learned activations; read back and compared before it appears.

    Args:
        format: default: `own` for models of this package, `huggingface` for those of transformers; any other module as
            its weights and a description of its activations (`module`), of which the weights alone are compared.
        source: a directory whose tokenizer and other files belong to the model.
        inputs: what a model of transformers takes, by name, to compare its outputs; default: where they are known.
        factory: what builds any other module; written beside its weights.

    Raises:
        ValueError: what the format cannot say, or a model that does not come back from it.
    """
    directory, source = Path(directory), None if source is None else Path(source)
    ours = is_own(model)
    if format == "huggingface":
        refuse_tangent(model, "transformers has none")
    if format == "own" and not ours:
        titles = ", ".join(find_architecture(name).title for name in ARCHITECTURES)
        raise ValueError(f"format: own is for {titles}; this architecture is written as huggingface")
    foreign = of_transformers(model)
    if format == "huggingface" and not (ours or foreign):
        raise ValueError(
            f"format: huggingface is for models that transformers has, and a {type(model).__name__} is none; it is "
            "written as its weights and activations"
        )
    if ours and format != "huggingface":
        from polytrope.models.checkpoint import save_model

        save_model(directory, model, tokenizer=source)
    elif ours or foreign:
        from polytrope.models.formats.huggingface import save_huggingface
        from polytrope.models.surgery import describe_activations

        save_huggingface(directory, model, describe_activations(model), source, inputs)
    else:
        from polytrope.models.formats.module import save_module

        save_module(directory, model, factory)


def of_transformers(model: nn.Module) -> bool:
    """Whether it is of a class that transformers itself has, whatever calls in it became modules."""
    from polytrope.models.rewriting import original_class

    kind = original_class(model)
    return kind.__module__.startswith("transformers.models.")
