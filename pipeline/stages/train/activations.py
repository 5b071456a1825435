"""`model.activation_options`: one set of options for the learnable activations of a model, for sweeps and ablations."""

from __future__ import annotations

from typing import Any

from polytrope.models.activations import ActivationConfig, activation_configs
from polytrope.models.convnext import ConvNeXtConfig
from polytrope.models.gpt2 import GPT2Config
from polytrope.ops.modules import LEARNABLE, LearnableActivation, read_activation

_NO_INTERVAL = ("tropical", "tropical_rational")  # they end in straight lines already
_NO_OPTIONS = (
    "polynorm",
)  # not elementwise: it has neither an interval, groups of channels, nor a function to imitate


def apply_activation_options(architecture: str, model: dict[str, Any]) -> dict[str, Any]:
    """The model's settings with its `activation_options` written into each block's activation.

    An option goes to the families that have it: classical activations take none, tropical ones no interval, and
    `init: torchortho` is for the published families. What an activation says itself comes first.

    Args:
        architecture: `gpt2` or `convnext`.
        model: what `build_model` takes, and maybe `activation_options`.

    Raises:
        ValueError, TypeError: whatever the model's own configuration refuses.
    """
    model = dict(model)
    given = model.pop("activation_options", None) or {}
    if not any(value not in (None, False) for value in given.values()):
        return model
    if architecture == "gpt2":
        gpt2 = GPT2Config(**model)
        configured, widths = gpt2.activation, [4 * gpt2.n_embd] * gpt2.n_layer
    else:
        convnext = ConvNeXtConfig(**model)
        configured = convnext.activation
        widths = [4 * dim for depth, dim in zip(convnext.depths, convnext.dims, strict=True) for _ in range(depth)]
    entries = [
        _with_options(config, given, width)
        for config, width in zip(activation_configs(configured, len(widths)), widths, strict=True)
    ]
    return {**model, "activation": entries[0] if all(entry == entries[0] for entry in entries) else entries}


def _with_options(config: ActivationConfig, given: dict[str, Any], width: int) -> ActivationConfig:
    name, own = read_activation(config)
    if name not in LEARNABLE or name in _NO_OPTIONS:
        return config
    options: dict[str, Any] = {}
    init = given.get("init")
    if init is not None and (init != "torchortho" or _is_published(name)):
        options["init"] = init
    if given.get("interval") is not None and name not in _NO_INTERVAL:
        options["interval"] = list(given["interval"])
    if given.get("per_channel"):
        options["num_parameters"] = width
    return {"name": name, **options, **own}


def _is_published(name: str) -> bool:
    module = LEARNABLE[name]()
    assert isinstance(module, LearnableActivation)
    return module.published
