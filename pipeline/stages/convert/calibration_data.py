"""Calibration data for any kind of model, from texts, arrays and data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from polytrope.models import find_architecture
from polytrope.models.convnext import normalise_images
from polytrope.models.inputs import Batch
from polytrope.pipeline.data.description import read_dataset
from polytrope.pipeline.data.order import sample_indices
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.tokenization import same_tokenizer
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.convert.parameters import ConvertParameters

_LONGEST = 256


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
        tokenizer.enable_truncation(min(longest, _LONGEST))
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
    length = min(longest, _LONGEST, len(stream))
    rows = torch.tensor(stream[: len(stream) // length * length]).reshape(-1, length)
    return [{"input_ids": part} for part in rows.split(batch_size)]  # type: ignore[no-untyped-call]


def array_batches(path: Path, batch_size: int, limit: int) -> list[Batch]:
    """Rows of a `.npy` array: images `[n, channels, height, width]` float, or token ids `[n, length]` integer.

    Raises:
        UserError: not an array of one of these kinds.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an array: {error}", "save it with numpy.save") from error
    if array.ndim == 4 and array.dtype.kind == "f":
        name, dtype = "pixel_values", "float32"
    elif array.ndim == 2 and array.dtype.kind in "iu":
        name, dtype = "input_ids", "int64"
    else:
        raise UserError(
            f"{path}: an array of shape {list(array.shape)} and type {array.dtype}",
            "expected images [n, channels, height, width] as float, or token ids [n, length] as integers",
        )
    if not array.size:
        raise UserError(f"{path}: an array of shape {list(array.shape)} holds nothing", "give at least one row")
    rows = np.array(array[:limit], dtype=dtype)  # a copy: the file is mapped read-only
    return [{name: torch.from_numpy(part)} for part in np.array_split(rows, -(-len(rows) // batch_size))]


def dataset_batches(model: nn.Module, directory: Path, dataset: Path, parameters: ConvertParameters) -> list[Batch]:
    """Batches of training samples of a data set, or of `calibration.npy` or `calibration.txt` in its directory.

    Args:
        directory: of the model.

    Raises:
        UserError: a data set that cannot be read, or whose tokens are other words to the model.
    """
    if (dataset / "calibration.npy").exists():
        return array_batches(dataset / "calibration.npy", parameters.batch_size, parameters.calibration_samples)
    if (dataset / "calibration.txt").exists():
        texts = read_texts([dataset / "calibration.txt"])[: parameters.calibration_samples]
        return _encoded(model, directory, texts, parameters)
    reader: Any = open_split(dataset, "train")
    indices = sample_indices(0, 0, min(parameters.calibration_samples, len(reader)), len(reader))
    parts = np.array_split(indices, -(-len(indices) // parameters.batch_size))
    if read_dataset(dataset).kind == "images":
        # of foreign models nothing is known here; most published ones take this normalisation
        ours = getattr(model, "architecture", None)
        prepare = normalise_images if ours is None else find_architecture(ours).prepare
        pixels = (torch.from_numpy(reader.images(part)[0]).float() / 255.0 for part in parts)
        return [{"pixel_values": prepare(images)} for images in pixels]
    own, other = directory / "tokenizer.json", dataset / "tokenizer.json"
    if own.exists() and other.exists() and not same_tokenizer(own, other):
        raise UserError(
            "convert: the model's tokenizer is not the one of the dataset, so its tokens would be other words to it",
            "calibrate on a dataset that was sharded with the model's tokenizer",
        )
    return [{"input_ids": torch.from_numpy(reader.samples(part)[:, :-1].astype(np.int64))} for part in parts]


def file_batches(
    model: nn.Module, directory: Path, files: Sequence[Path], parameters: ConvertParameters
) -> list[Batch]:
    """Batches of arrays (`.npy`), or of texts from all over the files; of CPython's documentation where there are none.

    Args:
        directory: of the model.

    Raises:
        UserError: a file that cannot be read, texts for a model without tokenizer.
    """
    size, limit = parameters.batch_size, parameters.calibration_samples
    arrays = [path for path in files if path.suffix == ".npy"]
    if arrays:
        return [batch for path in arrays for batch in array_batches(path, size, limit)]
    texts = read_texts(files) if files else documentation_sentences()
    return _encoded(model, directory, texts[:: max(1, len(texts) // limit)][:limit], parameters)


def _encoded(model: nn.Module, directory: Path, texts: Sequence[str], parameters: ConvertParameters) -> list[Batch]:
    tokenizer = tokenizer_of(directory)
    if tokenizer is None:
        raise UserError(
            f"convert: {directory} has no tokenizer.json, so the calibration data must be numbers",
            "give a file .npy: images [n, channels, height, width] as float, or token ids [n, length]",
        )
    longest, keywords = longest_input(model, directory), not hasattr(model, "architecture")
    return text_batches(tokenizer, texts, parameters.batch_size, longest, keywords)


def longest_input(model: nn.Module, directory: Path) -> int:
    """Positions the model has."""
    config = getattr(model, "config", None)
    for name in ("sequence_length", "n_positions", "max_position_embeddings"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value - 2 if name == "max_position_embeddings" else value  # RoBERTa's positions begin at 2
    if (directory / "tokenizer_config.json").exists():
        value = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")).get("model_max_length")
        if isinstance(value, int) and value < 1 << 20:
            return value
    return _LONGEST
