"""`model.activation_options`: one set of options for the learnable activations of a model, for sweeps and ablations."""

from __future__ import annotations

from typing import Any

from polytrope.models import find_architecture, make_config
from polytrope.models.configurations import NO_ACTIVATION, ActivationConfig, activation_configs
from polytrope.ops.modules import LEARNABLE, LearnableActivation, read_activation


def apply_activation_options(architecture: str, model: dict[str, Any]) -> dict[str, Any]:
    """The model's settings with its `activation_options` written into each block's activation.

    An option goes to the families that have it: classical activations take none, tropical ones no interval, `stable` is
    for polynomials and `torchortho` for the published families. What an activation says itself comes first.

    Args:
        architecture: a name in `ARCHITECTURES`.
        model: what `build_model` takes, and maybe `activation_options`.

    Raises:
        ValueError: whatever the model's own configuration refuses.
    """
    model = dict(model)
    given = model.pop("activation_options", None) or {}
    if not any(value not in (None, False) for value in given.values()):
        return model
    record = find_architecture(architecture)
    config = make_config(record.config, model)
    widths = record.activation_widths(config)
    entries = [
        _with_options(activation, given, width)
        for activation, width in zip(activation_configs(config.activation, len(widths)), widths, strict=True)
    ]
    return {**model, "activation": entries[0] if all(entry == entries[0] for entry in entries) else entries}


def _with_options(config: ActivationConfig, given: dict[str, Any], width: int) -> ActivationConfig:
    if config == NO_ACTIVATION:
        return config
    name, own = read_activation(config)
    if name not in LEARNABLE:
        return config
    family: type[LearnableActivation] = LEARNABLE[name]
    options: dict[str, Any] = {}
    if given.get("init") is not None and _starts_from(family, given["init"]):
        options["init"] = given["init"]
    if given.get("interval") is not None and family.accepts_interval:
        options["interval"] = list(given["interval"])
    if given.get("per_channel") and family.accepts_groups:
        options["num_parameters"] = width
    return {"name": name, **options, **own} if options else config


def _starts_from(family: type[LearnableActivation], init: str) -> bool:
    """Whether the family has this start; every family can imitate a function."""
    if init == "torchortho":
        return family.published
    return init in family.starts or not any(init in other.starts for other in LEARNABLE.values())
