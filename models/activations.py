"""How a model reads its `activation` setting: one for the whole model, or one per block."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ActivationConfig = str | dict[str, Any]
# What backward computes again instead of keeping it: nothing, the output of each activation, or whole blocks.
ActivationCheckpointing = Literal["none", "mlp", "block"]


def activation_configs(activation: ActivationConfig | list[ActivationConfig], layers: int) -> list[ActivationConfig]:
    """One activation per layer.

    Args:
        activation: one for all; a list with one per layer; or a list of `{layers: 0-5, name: gelu}` that covers every
            layer once (layers count from 0; `6-` goes to the last one).
        layers: how many there are.

    Raises:
        ValueError: a list of another length, or ranges that leave a layer out or name one twice.
    """
    if isinstance(activation, list) and any(isinstance(entry, dict) and "layers" in entry for entry in activation):
        return _by_range(activation, layers)
    if isinstance(activation, list):
        if len(activation) != layers:
            raise ValueError(
                f"activation lists {len(activation)} entries for {layers} layers; give one per layer or one"
            )
        return activation
    return [activation] * layers


def _by_range(entries: list[ActivationConfig], layers: int) -> list[ActivationConfig]:
    found: list[ActivationConfig | None] = [None] * layers
    for entry in entries:
        if not isinstance(entry, dict) or "layers" not in entry:
            raise ValueError(f"activation: {entry!r} does not say for which `layers` it is, as others do")
        config = {key: value for key, value in entry.items() if key != "layers"}
        for layer in _range(entry["layers"], layers):
            if found[layer] is not None:
                raise ValueError(f"activation: layer {layer} is in two ranges of `layers`")
            found[layer] = str(config["name"]) if set(config) == {"name"} else config
    missing = [str(layer) for layer, config in enumerate(found) if config is None]
    if missing:
        raise ValueError(f"activation: no range of `layers` has layer {', '.join(missing)} (of 0-{layers - 1})")
    return [config for config in found if config is not None]


def _range(text: Any, layers: int) -> range:
    first, dash, last = str(text).partition("-")
    try:
        start, end = int(first), int(last) if last else layers - 1 if dash else int(first)
    except ValueError:
        raise ValueError(f"activation: `layers: {text}` is no range; write 3, 0-5 or 6-") from None
    if not 0 <= start <= end < layers:
        raise ValueError(f"activation: `layers: {text}` is outside 0-{layers - 1}")
    return range(start, end + 1)


def make_activation(config: ActivationConfig) -> nn.Module:
    """Build one activation module. The configuration is copied: modules never share it."""
    from polytrope.ops import build_activation

    module: nn.Module = build_activation(copy.deepcopy(config))
    return module


def project_activated(activation: nn.Module, projection: nn.Module, x: Tensor, *, recomputes: bool) -> Tensor:
    """`projection(activation(x))`, the second half of an MLP.

    Args:
        recomputes: keep x only; backward computes `activation(x)` again for the gradient of the projection's weight,
            and nothing else. Halves what an MLP keeps at its full width, for one more pass of the activation.
    """
    if not (recomputes and torch.is_grad_enabled()):
        projected: Tensor = projection(activation(x))
        return projected
    # Nothing random in between; and recomputation stops as soon as the projection's input is there again.
    return checkpoint(  # type: ignore[no-any-return]
        lambda value: projection(activation(value)), x, use_reentrant=False, preserve_rng_state=False
    )


def standardize_inputs(linear: nn.Linear, std: float) -> None:
    """Scale freshly drawn weights so that the activation behind them sees inputs of variance 1.

    A normalised input and weights of deviation 1/√inputs give that; learnable activations start from it, and all learn
    faster. The usual 0.02 gives inputs of deviation 0.23 at a width of 128, where every activation is almost a straight
    line (validation loss after 240 steps of the quickstart: GELU 5.14, with this scale 4.78).

    Args:
        linear: the layer before the activation; its input is normalised.
        std: the deviation its weights were drawn with. They are scaled, not drawn again.
    """
    with torch.no_grad():
        linear.weight.mul_(linear.in_features**-0.5 / std)


def current_activations(
    modules: list[nn.Module], configured: list[ActivationConfig]
) -> ActivationConfig | list[ActivationConfig]:
    """What to save so that the same activations can be built again, after any conversion of the model.

    A learnable activation describes itself; another one is what the configuration says. One entry stands for all if
    they are equal.

    Raises:
        ValueError: a module that is neither.
    """
    entries: list[ActivationConfig] = []
    for layer, (module, config) in enumerate(zip(modules, configured, strict=True)):
        if callable(getattr(module, "config", None)):
            config = module.config()  # type: ignore[operator]
        elif repr(module) != repr(make_activation(config)):
            raise ValueError(
                f"the activation of layer {layer} is {module!r}, which is not `{config}` of the model's configuration "
                "and cannot be described; use one of polytrope.ops.build_activation"
            )
        entries.append(config)
    return entries[0] if all(entry == entries[0] for entry in entries) else entries


def normalised_activations(activation: ActivationConfig | list[ActivationConfig], layers: int) -> list[Any]:
    """(name, options) of each layer's activation: equal for settings that mean the same."""
    from polytrope.ops.modules import read_activation

    return [read_activation(config) for config in activation_configs(activation, layers)]
