"""The same activations through plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from polytrope.ops import kernels


@contextmanager
def without_kernels() -> Iterator[None]:
    """As on a machine that has no compiled kernels."""
    original = kernels.has_kernel
    kernels.has_kernel = lambda *_: False
    try:
        yield
    finally:
        kernels.has_kernel = original
