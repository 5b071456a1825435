"""The size of the rows that a model of numbers will see, for the weights that it starts with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from polytrope.pipeline.data.reader import open_split

ROWS = 4096  # the first ones, which every worker reads


def start_for_rows(model: Any, dataset: Path) -> None:
    """Scale the first layer of a fresh model so that its outputs start with variance 1 on the training rows.

    Args:
        model: with `start_for`.
        dataset: of numbers.

    Raises:
        UserError: a shard that is missing, truncated or altered.
    """
    reader = open_split(dataset, "train")
    rows, _ = reader.numbers(np.arange(min(ROWS, len(reader))))
    # the exact sum: the same weights on any machine
    mean_square = math.fsum(np.square(rows, dtype=np.float64).ravel()) / rows.size
    if mean_square > 0.0:
        model.start_for(mean_square)
