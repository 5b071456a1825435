"""Tall least-squares problems in as many rows as they have columns."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from polytrope.ops.fitting.curves import Array

_BLOCK = 64


def triangle_of(matrix: Array, right: Array) -> tuple[Array, Array, float]:
    """The same least-squares problem by QR in as many rows as columns, and the sum of squares no solution can lower.

    Decomposed in blocks of rows, then once more (Demmel et al., Communication-avoiding QR, 2012): one large call would
    wake the threads of the BLAS, which on a busy machine wait for each other ten times as long as the work takes.
    """
    rows = np.concatenate([matrix, right[:, None]], axis=1)
    columns = rows.shape[1]
    padded = np.concatenate([rows, np.zeros((-len(rows) % _BLOCK, columns))])
    decompose: Any = partial(np.linalg.qr, mode="r")  # numpy's types do not know that this is an array
    triangle = decompose(decompose(padded.reshape(-1, _BLOCK, columns)).reshape(-1, columns))
    return triangle[:-1, :-1], triangle[:-1, -1], float(triangle[-1, -1]) ** 2
