"""How a model reads its `activation` setting: one for the whole model, or one per block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polytrope.models.configurations import NO_ACTIVATION, ActivationConfig, activation_configs
from polytrope.models.parts.feedforward import LinearAtStart

# What backward computes again instead of keeping it: nothing, the output of each activation, or whole blocks.
ActivationCheckpointing = Literal["none", "mlp", "block"]


def make_activation(config: ActivationConfig) -> nn.Module:
    """Build one activation module. The configuration is copied: modules never share it."""
    from polytrope.ops import build_activation

    module: nn.Module = build_activation(copy.deepcopy(config))
    return module


def project_activated(
    activation: Callable[[Tensor], Tensor], projection: nn.Module, x: Tensor, *, recomputes: bool, gated: bool = False
) -> Tensor:
    """`projection(activation(x))`, the second half of an MLP.

    Args:
        gated: x holds two halves a, b in its last dimension: `projection(activation(a) * b)`.
        recomputes: keep x only; backward computes `activation(x)` again for the gradient of the projection's weight,
            and nothing else. Halves what an MLP keeps at its full width, for one more pass of the activation.
    """

    def project(value: Tensor) -> Tensor:
        if gated:
            value, factor = value.chunk(2, dim=-1)
            return projection(activation(value) * factor)  # type: ignore[no-any-return]
        return projection(activation(value))  # type: ignore[no-any-return]

    if not (recomputes and torch.is_grad_enabled()):
        return project(x)
    # Nothing random in between; and recomputation stops as soon as the projection's input is there again.
    return checkpoint(project, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def standardize_inputs(linear: LinearAtStart | nn.Conv2d, std: float) -> None:
    """Scale freshly drawn weights so that the activation behind them sees inputs of variance 1.

    A normalised input and weights of deviation 1/√inputs give that; learnable activations start from it, and all learn
    faster. The usual 0.02 gives inputs of deviation 0.23 at a width of 128, where every activation is almost a straight
    line (validation loss after 240 steps of the quickstart: GELU 5.14, with this scale 4.78).

    Args:
        linear: the layer before the activation; its input is normalised. Or a convolution before that layer, where no
            norm stands between them.
        std: the deviation its weights were drawn with. They are scaled, not drawn again.
    """
    with torch.no_grad():
        linear.weight.mul_(linear.weight[0].numel() ** -0.5 / std)


def current_activations(
    modules: Mapping[int, nn.Module], configured: list[ActivationConfig]
) -> ActivationConfig | list[ActivationConfig]:
    """What to save so that the same activations can be built again, after any conversion of the model.

    Args:
        modules: by the number of the layer, from 0; a layer may have none.
        configured: of every layer.

    A learnable activation describes itself; another one is what the configuration says. One entry stands for all if
    they are equal.

    Raises:
        ValueError: a module that is neither.
    """
    entries: list[ActivationConfig] = []
    for layer, config in enumerate(configured):
        module = modules.get(layer)
        if callable(getattr(module, "config", None)):
            config = module.config()  # type: ignore[operator, union-attr]
        elif module is not None and repr(module) != repr(make_activation(config)):
            raise ValueError(
                f"the activation of layer {layer} is {module!r}, which is not `{config}` of the model's configuration "
                "and cannot be described; use one of polytrope.ops.build_activation"
            )
        entries.append(config)
    return entries[0] if all(entry == entries[0] for entry in entries) else entries


def normalised_activations(activation: ActivationConfig | list[ActivationConfig], layers: int) -> list[Any]:
    """(name, options) of each layer's activation: equal for settings that mean the same."""
    from polytrope.ops.modules import read_activation

    return [
        (NO_ACTIVATION, {}) if config == NO_ACTIVATION else read_activation(config)
        for config in activation_configs(activation, layers)
    ]


def describe_activation(config: Any) -> str:
    """`gelu`, `hermite, degree 3`, or the settings of several layers where they differ."""
    if isinstance(config, list):
        texts = list(dict.fromkeys(describe_activation(entry) for entry in config))
        return texts[0] if len(texts) == 1 else "; ".join(texts)
    if isinstance(config, str):
        return config
    degree = config.get("degree")
    if isinstance(degree, list | tuple):
        degree = "/".join(map(str, degree))
    return str(config.get("name")) + (f", degree {degree}" if degree is not None else "")
