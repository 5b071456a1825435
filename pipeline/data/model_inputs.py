"""Samples of a data set as a model takes them, and whether a model and a data set belong together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytrope.pipeline.data.described import dataset_promise
from polytrope.pipeline.data.description import Dataset
from polytrope.pipeline.data.misfits import misfit
from polytrope.pipeline.data.promised import PromisedModel
from polytrope.pipeline.data.reader import Reader
from polytrope.pipeline.data.tokenization import same_tokenizer
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact


def read_tensors(reader: Reader, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the samples at `indices` `[n]`.

    Returns:
        Tokens `[n, length]` int64 and those that follow, or pixels in [0, 1] `[n, channels, height, width]` float32 and
        classes `[n]` int64, or rows `[n, inputs]` float32 and their targets `[n, targets]` float32 or classes.
    """
    if "inputs" in reader.fields:
        rows, wanted = reader.numbers(indices)
        return torch.from_numpy(rows), torch.from_numpy(wanted)
    if "pixels" in reader.fields:
        pixels, labels = reader.images(indices)
        return torch.from_numpy(pixels).float() / 255.0, torch.from_numpy(np.asarray(labels, dtype=np.int64))
    blocks = torch.from_numpy(np.asarray(reader.samples(indices), dtype=np.int64))
    return blocks[:, :-1].contiguous(), blocks[:, 1:].contiguous()


def refuse_other_data(
    label: str, model: Path, about: Mapping[str, Any], description: Dataset, dataset: Artifact
) -> str | None:
    """Raise `UserError` where a model is for data of another kind or size, or of another tokenizer.

    Args:
        about: the content of the model's `model.json`.
        description: of the data set.

    Returns:
        What is taken for granted where the model does not say; None: nothing.
    """
    found = misfit(PromisedModel(about["architecture"], about["config"]), dataset_promise(description))
    if found is not None:
        raise UserError(f"`{label}`: {found.text} (`{dataset.stage}`)", found.hint)
    if description.kind != "text":
        return None
    own = model / "tokenizer.json"
    if not own.exists():
        return f"{label}: holds no tokenizer, so its tokens are taken to be those of the dataset"
    if not same_tokenizer(own, dataset.path / "tokenizer.json"):
        raise UserError(
            f"the tokenizer of `{label}` is not the one of `{dataset.stage}`",
            "use a dataset that was sharded with the model's tokenizer",
        )
    return None
