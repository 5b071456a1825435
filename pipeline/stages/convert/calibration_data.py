"""Calibration data for any kind of model, from texts, arrays and data sets."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from polytrope.models import find_architecture, is_own
from polytrope.models.convnext import normalise_images
from polytrope.models.formats import of_transformers
from polytrope.models.inputs import Batch
from polytrope.models.rewriting import original_class
from polytrope.pipeline.data.description import read_dataset
from polytrope.pipeline.data.order import sample_indices
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.tokenization import same_tokenizer
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.convert.parameters import ConvertParameters

_LONGEST = 256  # tokens of a text, or of a row where texts run on, that are calibrated on
Tell = Callable[[str], None]


def documentation_sentences() -> list[str]:
    """English sentences of the documentation that comes with CPython: text that every machine has."""
    from pydoc_data import topics

    found: list[str] = []
    for name in sorted(topics.topics):
        for paragraph in re.split(r"\n\s*\n", topics.topics[name]):
            if not paragraph.lstrip().startswith((">>>", "*", "+", "|")):
                flat = " ".join(paragraph.split())
                found += [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", flat) if 40 <= len(part) <= 300]
    return [text for text in dict.fromkeys(found) if text[0].isupper() and text[-1] in ".!?"]


def read_texts(paths: Sequence[Path]) -> list[str]:
    """One text per line of the files.

    Raises:
        UserError: a file that cannot be read, or no text at all.
    """
    texts: list[str] = []
    for path in paths:
        try:
            texts += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text: {error}", "give UTF-8 text files") from error
    if not texts:
        raise UserError(f"{', '.join(map(str, paths))}: no text in it", "give UTF-8 text files with one text per line")
    return texts


def tokenizer_of(directory: Path) -> Any:
    """The `tokenizer.json` of a model directory, None if it has none."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more special
        raise UserError(f"{path} cannot be read as a tokenizer: {error}", "copy it again from the model") from error


def text_batches(tokenizer: Any, texts: Sequence[str], batch_size: int, longest: int, keywords: bool) -> list[Batch]:
    """Texts of similar length together, padded to the longest of the batch.

    Args:
        longest: tokens after which a text is cut.
        keywords: with an attention mask, for models of transformers; otherwise `input_ids` alone, without padding: the
            texts run on into each other, as in the training of language models.
    """
    if keywords:
        tokenizer.enable_truncation(longest)
        tokenizer.enable_padding()
        ordered = sorted(texts, key=len)
        batches = []
        for start in range(0, len(ordered), batch_size):
            encoded = tokenizer.encode_batch(ordered[start : start + batch_size])
            batches.append(
                {
                    "input_ids": torch.tensor([entry.ids for entry in encoded]),
                    "attention_mask": torch.tensor([entry.attention_mask for entry in encoded]),
                }
            )
        return batches
    tokenizer.no_truncation()
    tokenizer.no_padding()
    stream = [token for entry in tokenizer.encode_batch(list(texts)) for token in entry.ids]
    length = min(longest, len(stream))
    rows = torch.tensor(stream[: len(stream) // length * length]).reshape(-1, length)
    return [{"input_ids": part} for part in rows.split(batch_size)]  # type: ignore[no-untyped-call]


def array_batches(model: nn.Module, path: Path, batch_size: int, limit: int) -> list[Batch]:
    """Rows of arrays.

    A `.npy` has images `[n, channels, height, width]` float, token ids `[n, length]` integer, or what else the model
    takes first (`input_values [n, samples]`, `input_features [n, bands, frames]`); a `.npz` the inputs of its names.

    Raises:
        UserError: none of these kinds, names that the model does not take, or columns of different lengths.
    """
    columns = _read_columns(model, path)
    lengths = {name: len(array) for name, array in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"{path}: columns of different lengths: {told}", "give as many rows of each")
    for array in columns.values():
        if not array.size:
            raise UserError(f"{path}: an array of shape {list(array.shape)} holds nothing", "give at least one row")
    dtypes = {"f": "float32", "i": "int64", "u": "int64", "b": "bool"}
    rows = {name: np.array(array[:limit], dtype=dtypes[array.dtype.kind]) for name, array in columns.items()}  # copies
    parts = -(-min(limit, *lengths.values()) // batch_size)
    split = {name: np.array_split(array, parts) for name, array in rows.items()}
    return [{name: torch.from_numpy(split[name][number]) for name in split} for number in range(parts)]


def _read_columns(model: nn.Module, path: Path) -> dict[str, np.ndarray]:
    """Arrays by the name of the model's input."""
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        columns = {path.name: content} if isinstance(content, np.ndarray) else {name: content[name] for name in content}
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an array: {error}", "save it with numpy.save or savez") from error
    for name, array in columns.items():
        if array.ndim == 0 or array.dtype.kind not in "fiub":
            raise UserError(
                f"{path}: {name} has shape {list(array.shape)} and type {array.dtype}", "give rows of numbers"
            )
    if isinstance(content, np.ndarray):
        return {_input_of(model, path, content): content}
    if is_own(model) and len(columns) != 1:
        raise UserError(f"{path}: {len(columns)} arrays, and a {type(model).__name__} has one input", "give a .npy")
    known = list(inspect.signature(original_class(model).forward).parameters)[1:]
    unknown = [name for name in columns if name not in known]
    if unknown and not is_own(model):
        raise UserError(f"{path}: {unknown[0]} is no input of {type(model).__name__}", f"it takes {', '.join(known)}")
    if not columns:
        raise UserError(f"{path}: there is no array in it", f"{type(model).__name__} takes {', '.join(known)}")
    return columns


def _input_of(model: nn.Module, path: Path, array: np.ndarray) -> str:
    """The name of the input that an array without a name is."""
    if not (is_own(model) or of_transformers(model)):
        return input_name(model, "")
    if array.ndim == 4 and array.dtype.kind == "f":
        return "pixel_values"
    if array.ndim == 2 and array.dtype.kind in "iu":
        return "input_ids"
    first = getattr(model, "main_input_name", "")
    if array.dtype.kind == "f" and array.ndim > 1 and first in ("input_values", "input_features"):
        return str(first)
    raise UserError(
        f"{path}: an array of shape {list(array.shape)} and type {array.dtype}",
        "expected images [n, channels, height, width] as float, or token ids [n, length] as integers; other inputs by "
        "name: numpy.savez",
    )


def input_name(model: nn.Module, usual: str) -> str:
    """How a model calls its only input: `usual`, or in a module of the project's own what `forward` takes first."""
    if is_own(model) or of_transformers(model):
        return usual
    return next(iter(list(inspect.signature(original_class(model).forward).parameters)[1:]), usual)


def dataset_batches(
    model: nn.Module, directory: Path, dataset: Path, parameters: ConvertParameters, tell: Tell
) -> list[Batch]:
    """Batches of training samples of a data set, or of `calibration.npz`, `.npy` or `.txt` in its directory.

    Args:
        directory: of the model.
        tell: is told what is done to the data.

    Raises:
        UserError: a data set that cannot be read, or whose tokens are other words to the model.
    """
    for name in ("calibration.npz", "calibration.npy"):
        if (dataset / name).exists():
            batches = array_batches(model, dataset / name, parameters.batch_size, parameters.calibration_samples)
            return _with_decoder_inputs(model, batches, tell)
    if (dataset / "calibration.txt").exists():
        texts = read_texts([dataset / "calibration.txt"])[: parameters.calibration_samples]
        return _encoded(model, directory, texts, parameters, tell)
    reader: Any = open_split(dataset, "train")
    indices = sample_indices(0, 0, min(parameters.calibration_samples, len(reader)), len(reader))
    parts = np.array_split(indices, -(-len(indices) // parameters.batch_size))
    kind = read_dataset(dataset).kind
    if kind == "numbers":
        return [{input_name(model, "rows"): torch.from_numpy(reader.numbers(part)[0])} for part in parts]
    if kind == "images":
        # of foreign models nothing is known here; most published ones take this normalisation
        ours = str(model.architecture) if is_own(model) else None
        prepare = normalise_images if ours is None else find_architecture(ours).prepare
        pixels = (torch.from_numpy(reader.images(part)[0]).float() / 255.0 for part in parts)
        name = input_name(model, "pixel_values")
        return [{name: prepare(images)} for images in pixels]
    own, other = directory / "tokenizer.json", dataset / "tokenizer.json"
    if own.exists() and other.exists() and not same_tokenizer(own, other):
        raise UserError(
            "convert: the model's tokenizer is not the one of the dataset, so its tokens would be other words to it",
            "calibrate on a dataset that was sharded with the model's tokenizer",
        )
    name = input_name(model, "input_ids")
    rows = [{name: torch.from_numpy(reader.samples(part)[:, :-1].astype(np.int64))} for part in parts]
    return _with_decoder_inputs(model, rows, tell)


def file_batches(
    model: nn.Module, directory: Path, files: Sequence[Path], parameters: ConvertParameters, tell: Tell
) -> list[Batch]:
    """Batches of arrays (`.npy`, `.npz`), or of texts from all over the files; of CPython's documentation where there
    are none.

    Args:
        directory: of the model.
        tell: is told what is done to the data.

    Raises:
        UserError: a file that cannot be read, texts for a model without tokenizer.
    """
    size, limit = parameters.batch_size, parameters.calibration_samples
    arrays = [path for path in files if path.suffix in (".npy", ".npz")]
    if arrays and len(arrays) < len(files):
        other = next(path for path in files if path not in arrays)
        raise UserError(f"convert: {other} is a text beside arrays ({arrays[0]})", "give either texts or arrays")
    if arrays:
        rows = [batch for path in arrays for batch in array_batches(model, path, size, limit)]
        return _with_decoder_inputs(model, rows, tell)
    texts = read_texts(files) if files else documentation_sentences()
    return _encoded(model, directory, texts[:: max(1, len(texts) // limit)][:limit], parameters, tell)


def _encoded(
    model: nn.Module, directory: Path, texts: Sequence[str], parameters: ConvertParameters, tell: Tell
) -> list[Batch]:
    tokenizer = tokenizer_of(directory)
    if tokenizer is None:
        raise UserError(
            f"convert: {directory} has no tokenizer.json, so the calibration data must be numbers",
            "give them with `--data FILE.npy`: token ids [n, length], or images [n, channels, height, width] as float",
        )
    keywords, longest = not is_own(model), longest_input(model, directory)
    length = _LONGEST if longest is None else min(longest, _LONGEST)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    counts = [len(entry.ids) for entry in tokenizer.encode_batch(list(texts))]
    takes = "" if longest is None else f" (the model takes {longest})"
    if keywords and max(counts) > length:
        cut = sum(count > length for count in counts)
        tell(f"calibration: {cut} of {len(counts)} texts are cut after {length} tokens{takes}")
    if not keywords and sum(counts) > length and longest != length:
        tell(f"calibration: the texts run on in rows of {length} tokens{takes}")
    batches = text_batches(tokenizer, texts, parameters.batch_size, length, keywords)
    return _with_decoder_inputs(model, batches, tell)


def _with_decoder_inputs(model: nn.Module, batches: list[Batch], tell: Tell) -> list[Batch]:
    """What the decoder of an encoder-decoder reads, where the data has tokens for the encoder alone: the same tokens,
    shifted by one, as in a training to say the input again.

    Raises:
        UserError: an encoder that reads no tokens, or a model that does not say what its decoder begins with.
    """
    config = getattr(model, "config", None)
    names = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
    if not getattr(config, "is_encoder_decoder", False) or any(name in batches[0] for name in names):
        return batches
    start = getattr(config, "decoder_start_token_id", None)
    if "input_ids" not in batches[0] or not isinstance(start, int):
        raise UserError(
            f"convert: {type(model).__name__} has a decoder, and the data has nothing for it",
            "give a file .npz with arrays by name (numpy.savez), decoder_input_ids [n, length] among them",
        )
    tell("calibration: the decoder reads the encoder's tokens, shifted by one")
    takes_mask = "decoder_attention_mask" in inspect.signature(original_class(model).forward).parameters
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
        read = {"decoder_input_ids": shifted}
        if "attention_mask" in batch and takes_mask:
            mask = batch["attention_mask"]
            read["decoder_attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
        found.append({**batch, **read})
    return found


def longest_input(model: nn.Module, directory: Path) -> int | None:
    """Tokens that a model has positions for, and its tokenizer gives at most; None: neither says."""
    config = getattr(model, "config", None)
    named = (getattr(config, name, None) for name in ("sequence_length", "n_positions", "max_position_embeddings"))
    found = [value - _reserved_positions(model) for value in named if isinstance(value, int)][:1]
    if (directory / "tokenizer_config.json").exists():
        value = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")).get("model_max_length")
        if isinstance(value, int) and 0 < value < 1 << 20:
            found.append(value)
    return min(found, default=None)


def _reserved_positions(model: nn.Module) -> int:
    """Rows of the table of positions that no token has: up to the padding's, after which RoBERTa begins to count."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else int(module.padding_idx) + 1
    return 0
