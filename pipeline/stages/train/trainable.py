"""`trainable`: which parameters learn. The others have no gradient and no optimizer state, and stay bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from polytrope.models.configurations import MODEL_KINDS
from polytrope.models.parts.settings import PARTS
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import suggest

if TYPE_CHECKING:
    from torch import nn

# Found by the modules they belong to.
ADAPTERS = "adapters"
COEFFICIENTS = "coefficients"
MULTIPLICATIVE = "multiplicative"
MULTIPLICATIVE_PARTS = " or ".join(
    f"{place}: {name}" for place, kinds in PARTS.items() for name, kind in kinds.items() if kind.multiplicative
)
GROUPS = (
    ADAPTERS,
    COEFFICIENTS,
    MULTIPLICATIVE,
    *sorted({name for kind in MODEL_KINDS.values() for name in kind.groups}),
)

# Groups with a learning rate of their own, and the parameter that has it.
RATES = {COEFFICIENTS: "coefficient_learning_rate", MULTIPLICATIVE: "multiplicative_learning_rate"}

# Why a model may have none of a group.
_WITHOUT = {
    COEFFICIENTS: "its activations have no coefficients",
    MULTIPLICATIVE: f"models with {MULTIPLICATIVE_PARTS} have them",
}


def check_entry(entry: str) -> str:
    """An entry of `trainable`, if it can be one.

    Raises:
        ValueError: neither a group's name nor a pattern of parameters' names.
    """
    if entry not in GROUPS and not set(".*") & set(entry):
        raise ValueError(
            f"expected a group ({', '.join(GROUPS)}) or a pattern of parameters' names, such as transformer.h.*.mlp.*"
        )
    return entry


def freeze(model: nn.Module, architecture: str, trainable: Sequence[str]) -> None:
    """Make the parameters that an entry names the only ones with gradients; those that never learn have none.

    Args:
        trainable: groups, and patterns of parameters' names (`*` stands for anything). A tensor with two names (a tied
            head) learns if one of them is meant.

    Raises:
        UserError: an entry that names no parameter of this model.
    """
    from polytrope.models.parts.reciprocal import certified_modules

    names = dict(model.named_parameters(remove_duplicate=False))
    fixed = {id(parameter) for module in certified_modules(model) for parameter in module.parameters()}
    learns: set[int] = set()
    for entry in trainable:
        found = _parameters_of(entry, model, architecture) - fixed
        if not found:
            raise UserError(
                f"trainable: `{entry}` names no parameter of this {architecture}",
                suggest(entry, names) if entry not in GROUPS else _WITHOUT.get(entry, f"it has no {entry}"),
            )
        learns |= found
    for parameter in names.values():
        parameter.requires_grad_(id(parameter) in learns)


def learns_of(group: str, model: nn.Module, architecture: str) -> bool:
    """Whether any parameter of a group learns: it has a gradient, or in a tangent model a tangent."""
    from polytrope.models.linearized import LinearizedModel

    if isinstance(model, LinearizedModel):
        learning = {id(weight) for _, weight, _ in model.pairs()}
    else:
        learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return bool(_parameters_of(group, model, architecture) & learning)


def _parameters_of(entry: str, model: nn.Module, architecture: str) -> set[int]:
    from polytrope.models.adapters import adapter_parameters
    from polytrope.models.parts.feedforward import multiplicative_parameters
    from polytrope.ops import is_learnable_activation

    if entry == ADAPTERS:
        return {id(parameter) for parameter in adapter_parameters(model)}
    if entry == MULTIPLICATIVE:
        return {id(parameter) for parameter in multiplicative_parameters(model)}
    if entry == COEFFICIENTS:
        activations = (module for module in model.modules() if is_learnable_activation(module))
        return {id(parameter) for module in activations for parameter in module.parameters()}
    patterns = MODEL_KINDS[architecture].groups.get(entry, ()) if entry in GROUPS else (entry,)
    return {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
