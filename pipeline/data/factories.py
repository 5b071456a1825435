"""Models that a function of the project builds: the function is imported as part of a stage's key, and called."""

from __future__ import annotations

import inspect
from typing import Any

from polytrope.models.formats.module import Factory
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import StageContext


def build_module(context: StageContext, factory: Factory) -> Any:
    """A fresh `torch.nn.Module`.

    Raises:
        UserError: a factory that is not there, does not take its options, or gives something else.
    """
    function = context.import_function(factory.function)
    try:
        inspect.signature(function).bind(**factory.options)
    except TypeError as error:
        raise UserError(
            f"options: {factory.function} does not take them: {error}",
            f"it is {factory.function}{inspect.signature(function)}",
        ) from None
    model = function(**factory.options)
    from torch import nn

    if not isinstance(model, nn.Module):
        raise UserError(f"factory: {factory.function} gives a {type(model).__name__}", "return a torch.nn.Module")
    return model
