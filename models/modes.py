"""A model as it is for a measurement, and as it was afterwards: training flags, gradients, compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; every submodule's own flag comes back, such as that of a frozen batch norm."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients, and without code compiled before: that calls no hook added since."""
    with evaluation_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
