"""`model.activation_options`: one set of options for the learnable activations of a model, for sweeps and ablations.

Without torch: what a model will have is promised before anything starts.
"""

from __future__ import annotations

from typing import Any

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS, NO_ACTIVATION, ActivationConfig, activation_configs
from polytrope.pipeline.stages.train.activation_parameters import LEARNABLE_SETTINGS, named_starts, spelled_out


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
    given = _given(model.pop("activation_options", None))
    if not given:
        return model
    entries = [_with_options(activation, given, width) for activation, width in _activations(architecture, model)]
    return {**model, "activation": entries[0] if all(entry == entries[0] for entry in entries) else entries}


def options_without_effect(architecture: str, model: dict[str, Any]) -> str:
    """Which of a model's `activation_options` which of its activations do not have, for people; empty: none.

    Args:
        architecture, model: as of `apply_activation_options`.
    """
    model = dict(model)
    given = _given(model.pop("activation_options", None))
    unused: dict[str, list[str]] = {}
    for activation, width in _activations(architecture, model) if given else ():
        if activation != NO_ACTIVATION:
            name = spelled_out(activation)["name"]
            unused[name] = [option for option in given if not _settings(name, {option: given[option]}, width)]
    return "; ".join(f"{name} has no {', '.join(options)}" for name, options in unused.items() if options)


def _given(options: dict[str, Any] | None) -> dict[str, Any]:
    """Those that say something."""
    return {name: value for name, value in (options or {}).items() if value not in (None, False)}


def _activations(architecture: str, model: dict[str, Any]) -> list[tuple[ActivationConfig, int]]:
    """The activation of each block and the channels that it sees."""
    config: Any = make_config(MODEL_KINDS[architecture].config, model)
    widths = config.activation_widths()
    return list(zip(activation_configs(config.activation, len(widths)), widths, strict=True))


def _with_options(config: ActivationConfig, given: dict[str, Any], width: int) -> ActivationConfig:
    if config == NO_ACTIVATION:
        return config
    own = spelled_out(config)
    options = _settings(own["name"], given, width)
    return {"name": own["name"], **options, **own} if options else config


def _settings(name: str, given: dict[str, Any], width: int) -> dict[str, Any]:
    """The options that an activation has, as its own settings."""
    if name not in LEARNABLE_SETTINGS:
        return {}
    has = LEARNABLE_SETTINGS[name].model_fields
    options: dict[str, Any] = {}
    if given.get("init") in named_starts(name):
        options["init"] = given["init"]
    if "interval" in given and "interval" in has:
        options["interval"] = list(given["interval"])
    if "per_channel" in given and "num_parameters" in has:
        options["num_parameters"] = width
    return options
