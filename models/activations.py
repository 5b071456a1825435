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

    Raises:
        ValueError: a list of another length than `layers`.
    """
    if isinstance(activation, list):
        if len(activation) != layers:
            raise ValueError(
                f"activation lists {len(activation)} entries for {layers} layers; give one per layer or one"
            )
        return activation
    return [activation] * layers


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

    A module with a `config()` method describes itself; another one is still what the configuration says. One entry
    stands for all if they are equal.
    """
    entries: list[ActivationConfig] = [
        module.config() if callable(getattr(module, "config", None)) else config  # type: ignore[operator]
        for module, config in zip(modules, configured, strict=True)
    ]
    return entries[0] if all(entry == entries[0] for entry in entries) else entries
