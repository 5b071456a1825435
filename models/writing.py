"""Directories that appear whole: written aside, read back, compared, and only then put in their place."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.models.modes import measuring

_TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}
    | {"vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
    | {"preprocessor_config.json", "generation_config.json"}
)
# Written anew, or what a conversion before has written about another model.
_NOT_CARRIED = frozenset(
    {"config.json", "modeling_polytrope.py", "activations.json", "conversion.json", "conversion.html", "tables"}
    | {"latest", "zero_to_fp32.py", "__pycache__"}
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".pkl", ".index.json")
_EXPORTS = (".onnx", ".onnx_data", ".onnx.data", ".gguf", ".tflite", ".mlmodel")
_OF_TRAINERS = ("optimizer.", "scheduler.", "rng_state", "trainer_state", "training_args")


@contextmanager
def appearing(directory: Path, description: str) -> Iterator[Path]:
    """A folder that becomes `directory` if all went well, and vanishes otherwise.

    Args:
        directory: where it is there already, the files go into it one by one, those of folders too, and what else it
            holds stays.
        description: the file that makes it a model directory. An older one goes first and the new one comes last, so
            that no moment shows a description beside weights of another model.
    """
    within = directory if directory.exists() else directory.parent
    within.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=within))
    try:
        yield aside
        for path in aside.glob("*.safetensors"):
            path.chmod(0o644)  # which the library writes for its owner alone
        if within == directory:
            (directory / description).unlink(missing_ok=True)
            for path in sorted(aside.rglob("*"), key=lambda path: (path == aside / description, path)):
                target = directory / path.relative_to(aside)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    path.replace(target)
        else:
            aside.chmod(0o755)
            aside.replace(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def carry_over(source: Path, target: Path) -> None:
    """Copy what a directory of Hugging Face holds beside the model: tokenizer, processors, texts, licence, modules.

    File modes are kept. A directory inside is copied where `modules.json` names it (sentence-transformers: `1_Pooling`,
    with weights of its own), or where no file in it holds weights, which would be those of the model before. Of any
    other source (this package's, a checkpoint), the tokenizer's files.
    """
    if not (source / "config.json").exists():
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name in _TOKENIZER_FILES:
                shutil.copy(path, target / path.name)
        return
    parts = _module_directories(source)
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in _NOT_CARRIED or _holds_weights(path, inside=parts):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copy(path, target / path.name)


def _module_directories(source: Path) -> set[str]:
    """The first part of the paths in `modules.json` of sentence-transformers."""
    path = source / "modules.json"
    if not path.exists():
        return set()
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        return {str(module["path"]).partition("/")[0] for module in modules if module["path"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error


def _holds_weights(path: Path, inside: set[str]) -> bool:
    if path.is_dir():
        return path.name not in inside and any(_holds_weights(part, set()) for part in path.iterdir())
    return path.name.endswith(_WEIGHTS + _EXPORTS) or path.name.startswith(_OF_TRAINERS)


def compare_weights(written: Mapping[str, Tensor], meant: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not, number by number, those that were meant.

    Raises:
        ValueError: a name that only one of them has, or other numbers.
    """
    if missing := sorted(set(written) ^ set(meant)):
        raise ValueError(f"{what}: {missing[0]} is in the model or in what was written, but not in both")
    for name, tensor in meant.items():
        there, here = written[name].detach().cpu(), tensor.detach().cpu()
        wide = torch.promote_types(there.dtype, here.dtype)
        there, here = there.to(wide), here.to(wide)
        if there.shape != here.shape or not bool(((there == here) | (there.isnan() & here.isnan())).all()):
            raise ValueError(f"{what}: {name} does not come back as it was ({tensor.dtype} → {written[name].dtype})")


def compare_outputs(written: nn.Module, meant: nn.Module, inputs: Mapping[str, Tensor] | Tensor, what: str) -> None:
    """Refuse a model that computes something else than the one that was meant, on its device and in its dtype.

    A model that draws random numbers (ViTMAE's masks) draws the same ones in both.

    Raises:
        ValueError: how far they are apart.
    """
    first = next(meant.parameters())
    written = written.to(first.device, first.dtype).eval()
    with measuring(meant), torch.random.fork_rng(devices=[first.device] if first.is_cuda else []):
        torch.manual_seed(0)
        there = _output(written, inputs, first)
        torch.manual_seed(0)
        here = _output(meant, inputs, first)
    scale = max(1.0, float(here.nan_to_num().abs().max()))
    tolerance = 64 * torch.finfo(first.dtype).eps * scale  # a thousandth of a percent in float32
    if not torch.allclose(there, here, rtol=0, atol=tolerance, equal_nan=True):
        off = float((there - here).abs().max())
        raise ValueError(f"{what}: the model that was written computes something else: off by {off:.3g} of {scale:.3g}")


def _output(model: nn.Module, inputs: Mapping[str, Tensor] | Tensor, like: Tensor) -> Tensor:
    def placed(x: Tensor) -> Tensor:
        return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)

    result: Any = (
        model(placed(inputs))
        if isinstance(inputs, Tensor)
        else model(**{name: placed(x) for name, x in inputs.items()})
    )
    tensor = result if isinstance(result, Tensor) else result[0]
    return tensor.float()
