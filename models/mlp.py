"""A multilayer perceptron on rows of numbers, with configurable layers and activations."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from polytrope.models.activations import ActivationCheckpointing, make_activation
from polytrope.models.architecture import Architecture
from polytrope.models.configurations import ActivationConfig, MLPConfig, activation_configs
from polytrope.models.losses import Loss, cross_entropy, mse
from polytrope.models.parts.feedforward import LinearAtStart, build_layer
from polytrope.models.parts.ranges import RangePenalty
from polytrope.models.parts.settings import FeedForward

LOSSES: dict[str, Loss] = {"mse": mse, "cross_entropy": cross_entropy}


class Block(nn.Module):
    """A layer and its activation, `[batch, inputs]` to `[batch, outputs]`."""

    def __init__(
        self, inputs: int, outputs: int, settings: FeedForward, activation: ActivationConfig, residual: bool
    ) -> None:
        super().__init__()
        self.layer = build_layer(settings, inputs, outputs)
        self.act = make_activation(activation)
        self.residual = residual
        self.ranges: RangePenalty | None = None

    def forward(self, x: Tensor) -> Tensor:
        before = self.layer(x)
        if self.ranges is not None and self.training:
            self.ranges.inputs(before)
        branch: Tensor = self.act(before)
        return x + branch if self.residual else branch


class MLP(nn.Module):
    """Layers with activations, and a linear one. `forward` returns its outputs, or with targets the loss."""

    architecture: ClassVar[str] = "mlp"

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.training_loss: Loss = LOSSES[config.loss]  # that of classes may be changed by the trainer
        self.label_smoothing = 0.0
        self.ranges: RangePenalty | None = None  # set by the trainer
        layers = zip(
            pairwise([config.inputs, *config.widths]),
            config.feedforward_settings(),
            activation_configs(config.activation, len(config.widths)),
            strict=True,
        )
        self.blocks = nn.ModuleList(
            Block(inputs, outputs, settings, activation, config.residual and number > 0)
            for number, ((inputs, outputs), settings, activation) in enumerate(layers)
        )
        self.head = nn.Linear(config.widths[-1], config.outputs)
        self.apply(_initialise)

    def set_activation_checkpointing(self, mode: ActivationCheckpointing) -> None:
        """What backward computes again: nothing, or whole blocks.

        Raises:
            ValueError: `mlp`, which is about two layers around an activation.
        """
        if mode == "mlp":
            raise ValueError("activation_checkpointing: an mlp has none or block")
        self.activation_checkpointing = mode

    def forward(self, rows: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Outputs `[batch, outputs]`, or with `targets` the configuration's loss (and penalties of ranges).

        Args:
            rows: `[batch, inputs]`, any floating dtype.
            targets: `[batch, outputs]` float for `mse`; `[batch]` int64 classes for `cross_entropy`, in nats.
            reduction: of the loss: `mean`, `sum` or `none`.
        """
        if self.ranges is not None:
            self.ranges.start()
        x = rows.to(self.head.weight.dtype)
        for block in self.blocks:
            if self.activation_checkpointing == "block" and torch.is_grad_enabled():
                x = recompute(block, x, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x)
        outputs: Tensor = self.head(x)
        if targets is None:
            return outputs
        if not self.training:
            return LOSSES[self.config.loss](outputs.float(), targets, reduction=reduction)
        loss = self.training_loss(outputs.float(), targets, reduction=reduction, label_smoothing=self.label_smoothing)
        return loss if self.ranges is None else self.ranges.added_to(loss, reduction)

    def flops_per_row(self) -> float:
        """Floating-point operations of forward and backward per row: 6 per multiply-add of the layers' matrices."""
        config = self.config
        sizes = pairwise([config.inputs, *config.widths])
        total = config.widths[-1] * config.outputs
        for (inputs, outputs), part in zip(sizes, config.feedforward_settings(), strict=True):
            total += part.layer_products(inputs, outputs)
        return 6.0 * total


def _initialise(module: nn.Module) -> None:
    """Inputs of variance 1 give outputs of variance 1, so that every activation sees what it starts for."""
    if isinstance(module, LinearAtStart):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


def _example(config: MLPConfig) -> Tensor:
    return torch.linspace(-2.0, 2.0, config.inputs).sin()[None]


ARCHITECTURE = Architecture(
    name="mlp",
    title="MLP",
    config=MLPConfig,
    build=MLP,
    data="numbers",
    presets={},
    activation="act",
    activation_widths=MLPConfig.activation_widths,
    prepare=_as_they_are,
    example=_example,
)
