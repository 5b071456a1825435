"""A multilayer perceptron on rows of numbers, with configurable layers and activations."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from polytrope.models.activations import ActivationCheckpointing, make_activation
from polytrope.models.architecture import Architecture
from polytrope.models.configurations import ActivationConfig, MLPConfig, activation_configs
from polytrope.models.factors import restore_factors, saved_products
from polytrope.models.losses import Loss, cross_entropy, mse
from polytrope.models.parts.feedforward import LinearAtStart, QuadraticLinear, build_layer
from polytrope.models.parts.norm import NormSizes, build_norm
from polytrope.models.parts.pi import PiLinear
from polytrope.models.parts.ranges import RangePenalty
from polytrope.models.parts.settings import FeedForward, Norm
from polytrope.ops.initialization import SIREN_FREQUENCY

EPSILON = 1e-5  # added to variances in norms
LOSSES: dict[str, Loss] = {"mse": mse, "cross_entropy": cross_entropy}


class Block(nn.Module):
    """A layer, a norm and an activation, `[batch, inputs]` to `[batch, outputs]`."""

    def __init__(
        self, inputs: int, outputs: int, settings: FeedForward, norm: Norm, activation: ActivationConfig, residual: bool
    ) -> None:
        super().__init__()
        self.layer = build_layer(settings, inputs, outputs)
        self.norm = build_norm(norm, NormSizes(outputs, EPSILON))
        self.act = make_activation(activation)
        self.residual = residual
        self.ranges: RangePenalty | None = None

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm(self.layer(x))
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
            Block(inputs, outputs, settings, config.norm_settings(), activation, config.residual and number > 0)
            for number, ((inputs, outputs), settings, activation) in enumerate(layers)
        )
        self.head = nn.Linear(config.widths[-1], config.outputs)
        self.apply(_initialise)
        for number, block in enumerate(self.blocks):
            if getattr(block.act, "init", None) == "siren":
                _start_siren(block.layer, first=number == 0)  # type: ignore[arg-type]
        restore_factors(self, config.factors)

    def start_for(self, mean_square: float) -> None:
        """Scale the freshly drawn weights of the first layer for inputs of this mean square instead of 1.

        One-hot vectors have one of 1/length. Functions of a KAN layer and sines of `init: siren` are not scaled: they
        are made for numbers of one size.

        Args:
            mean_square: of a number in a row, above 0.
        """
        first = self.blocks[0]
        if getattr(first.act, "init", None) == "siren":
            return
        with torch.no_grad():
            for kind, name in _LINEAR_WEIGHTS:
                if isinstance(first.layer, kind):
                    first.layer.get_parameter(name).mul_(mean_square**-0.5)

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

        In training the loss, not the penalties, is divided by the square of `output_scale`.

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
        if self.config.output_scale != 1.0:
            outputs = self.config.output_scale * outputs
        if targets is None:
            return outputs
        return self.loss(outputs, targets, reduction=reduction, training=self.training)

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: str, training: bool) -> Tensor:
        """What `forward` returns with `targets`, of its outputs; `training`: as in training mode."""
        if not training:
            return LOSSES[self.config.loss](outputs.float(), targets, reduction=reduction)
        loss = self.training_loss(outputs.float(), targets, reduction=reduction, label_smoothing=self.label_smoothing)
        if (scale := self.config.output_scale) != 1.0:
            loss = loss / scale**2
        return loss if self.ranges is None else self.ranges.added_to(loss, reduction)

    def flops_per_row(self) -> float:
        """Floating-point operations of forward and backward per row: 6 per multiply-add of the layers' matrices."""
        config = self.config
        sizes = pairwise([config.inputs, *config.widths])
        total = config.widths[-1] * config.outputs
        for (inputs, outputs), part in zip(sizes, config.feedforward_settings(), strict=True):
            total += part.layer_products(inputs, outputs)
        return 6.0 * (total - saved_products(self))


_LINEAR_WEIGHTS = ((LinearAtStart, "weight"), (PiLinear, "factors"))


def _initialise(module: nn.Module) -> None:
    """Inputs of variance 1 give outputs of variance 1, so that every activation sees what it starts for."""
    if isinstance(module, LinearAtStart):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _start_siren(layer: nn.Linear | QuadraticLinear, *, first: bool) -> None:
    """Weights for sines of frequency w: uniform in ±1/inputs in the first layer, in ±√(6/inputs)/w in the others.

    Sines of inputs that are spread over many periods have mean square 1/2, so that w times what the next layer gives
    has variance w² · inputs · (6 / (inputs · w²)) / 3 · 1/2 = 1. (Sitzmann et al., Implicit Neural Representations with
    Periodic Activation Functions, 2020.) Biases of the first layer are uniform in ±1/√inputs, so that its sines have
    all phases; the others are 0.
    """
    if first:
        nn.init.uniform_(layer.weight, -1.0 / layer.in_features, 1.0 / layer.in_features)
        nn.init.uniform_(layer.bias, -(layer.in_features**-0.5), layer.in_features**-0.5)
    else:
        bound = math.sqrt(6.0 / layer.in_features) / SIREN_FREQUENCY
        nn.init.uniform_(layer.weight, -bound, bound)


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
