"""Importing this lets any configuration of transformers name an activation of this package.

    import polytrope.integrations.transformers
    config = transformers.BertConfig(hidden_act="hermite3")

`hermite3` and `rational5` are a family with its degree, `hermite` has the family's own, and `rational5:gelu` starts as
an imitation of a function. They join `transformers.activations.ACT2FN`; nothing else of transformers changes. In a
checkpoint of a model with another activation the coefficients are missing, and begin as in a new model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import ACT2FN

from polytrope.ops.families import largest_degree
from polytrope.ops.fitting.targets import NAMED
from polytrope.ops.modules import LEARNABLE

__all__ = ["names"]


class _TakesWeights:
    """An activation that transformers may build without memory for its parameters, to load weights into them later."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.without_memory = any(parameter.is_meta for parameter in self.parameters())  # type: ignore[attr-defined]

    @property
    def _is_hf_initialized(self) -> bool:
        return bool(self.__dict__.get("is_initialized", False))

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        # transformers says so of each module at the end, and has said it before of every parameter that was in the
        # checkpoint. The others have memory by now, but no values.
        self.__dict__["is_initialized"] = value
        if not (value and self.without_memory):
            return
        parameters: dict[str, torch.nn.Parameter] = dict(self.named_parameters())  # type: ignore[attr-defined]
        loaded = {
            name: parameter.detach().clone()
            for name, parameter in parameters.items()
            if getattr(parameter, "_is_hf_initialized", False)
        }
        if len(loaded) == len(parameters) or any(parameter.is_meta for parameter in parameters.values()):
            return
        self.reset_parameters()  # type: ignore[attr-defined]
        with torch.no_grad():
            for name, tensor in loaded.items():
                parameters[name].copy_(tensor)


def _classes() -> dict[str, type[Any]]:
    """Every family as transformers needs it; by this module's names, so that models can be pickled."""
    made = {}
    for family, kind in LEARNABLE.items():
        made[family] = type(kind.__name__, (_TakesWeights, kind), {"__module__": __name__, "__doc__": kind.__doc__})
    return made


_CLASSES = _classes()
globals().update({kind.__name__: kind for kind in _CLASSES.values()})


def names() -> dict[str, tuple[type[Any], dict[str, Any]]]:
    """The class and its arguments for every name, in the form of `ACT2FN`."""
    found = {}
    for family, kind in _CLASSES.items():
        largest = largest_degree(family)
        degrees = range(1, largest + 1) if kind.has_degree else []
        sizes: dict[str, dict[str, Any]] = {family: {}} | {
            f"{family}{degree}": {"degree": degree} for degree in degrees
        }
        for name, options in sizes.items():
            found[name] = (kind, options)
            found |= {f"{name}:{start}": (kind, options | {"init": start}) for start in NAMED}
    return found


ACT2FN.update(names())
