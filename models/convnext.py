"""ConvNeXt (Liu et al., 2022) with a configurable activation, in plain torch; parameter names of the original code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from polytrope.models.activations import (
    ActivationCheckpointing,
    ActivationConfig,
    activation_configs,
    current_activations,
    make_activation,
    project_activated,
    standardize_inputs,
)
from polytrope.models.weights import load_renamed


@dataclass
class ConvNeXtConfig:
    """Sizes of a ConvNeXt; the defaults are those of ConvNeXt-Tiny for ImageNet-1k.

    Args:
        depths, dims: blocks and channels of each stage.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        patch_size: kernel and stride of the stem; each later stage halves the resolution.
        activation: one activation of `polytrope.ops.build_activation`, or a list with one per block.
        drop_path: probability of skipping the last block's branch; it grows linearly from 0 at the first.
        layer_scale: initial value of the per-channel scale of each branch; 0 for no scale.
    """

    depths: list[int] = field(default_factory=lambda: [3, 3, 9, 3])
    dims: list[int] = field(default_factory=lambda: [96, 192, 384, 768])
    num_classes: int = 1000
    in_channels: int = 3
    patch_size: int = 4
    activation: ActivationConfig | list[ActivationConfig] = "gelu"
    drop_path: float = 0.0
    layer_scale: float = 1e-6

    def __post_init__(self) -> None:
        self.depths, self.dims = list(self.depths), list(self.dims)
        if not self.depths or len(self.depths) != len(self.dims) or min(self.depths + self.dims) < 1:
            raise ValueError(
                f"depths {self.depths} and dims {self.dims} must be equally long lists of positive numbers"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
        activation_configs(self.activation, sum(self.depths))


PRESETS: dict[str, dict[str, list[int]]] = {
    "convnext-atto": {"depths": [2, 2, 6, 2], "dims": [40, 80, 160, 320]},
    "convnext-femto": {"depths": [2, 2, 6, 2], "dims": [48, 96, 192, 384]},
    "convnext-pico": {"depths": [2, 2, 6, 2], "dims": [64, 128, 256, 512]},
    "convnext-nano": {"depths": [2, 2, 8, 2], "dims": [80, 160, 320, 640]},
    "convnext-tiny": {"depths": [3, 3, 9, 3], "dims": [96, 192, 384, 768]},
    "convnext-small": {"depths": [3, 3, 27, 3], "dims": [96, 192, 384, 768]},
    "convnext-base": {"depths": [3, 3, 27, 3], "dims": [128, 256, 512, 1024]},
    "convnext-large": {"depths": [3, 3, 27, 3], "dims": [192, 384, 768, 1536]},
}


class ChannelsFirstLayerNorm(nn.Module):
    """Layer norm over the channels of `[batch, channels, height, width]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return normalised.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7×7 convolution, layer norm, and a pointwise MLP of four times the width, on a residual branch."""

    def __init__(self, channels: int, activation: ActivationConfig, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = make_activation(activation)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), layer_scale)) if layer_scale > 0 else None
        self.drop_path = drop_path
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        branch = self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1)))
        branch = project_activated(self.act, self.pwconv2, branch, recomputes=self.recomputes)
        if self.gamma is not None:
            branch = self.gamma * branch
        return x + drop_samples(branch.permute(0, 3, 1, 2), self.drop_path, self.training)


def drop_samples(branch: Tensor, probability: float, training: bool) -> Tensor:
    """Stochastic depth (Huang et al., 2016): zero a sample's branch, scaled so that its expectation stays."""
    if not training or probability == 0.0:
        return branch
    keep = 1.0 - probability
    mask = torch.rand(branch.size(0), *([1] * (branch.dim() - 1)), device=branch.device) < keep
    return branch * (mask / keep).to(branch.dtype)


class ConvNeXt(nn.Module):
    """The classifier. `forward` returns logits, or with targets the loss."""

    architecture: ClassVar[str] = "convnext"
    tied_weights: ClassVar[dict[str, str]] = {}

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.label_smoothing = 0.0  # of the training loss; set by the trainer
        dims, depths = config.dims, config.depths
        stem = nn.Sequential(
            nn.Conv2d(config.in_channels, dims[0], config.patch_size, config.patch_size),
            ChannelsFirstLayerNorm(dims[0]),
        )
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(ChannelsFirstLayerNorm(before), nn.Conv2d(before, after, kernel_size=2, stride=2))
            )
        total = sum(depths)
        activations = iter(activation_configs(config.activation, total))
        rates = iter(config.drop_path * index / max(1, total - 1) for index in range(total))
        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(width, next(activations), next(rates), config.layer_scale) for _ in range(depth)])
            for depth, width in zip(depths, dims, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], config.num_classes)
        self.apply(_initialise)
        for block in self.blocks:
            standardize_inputs(block.pwconv1, 0.02)

    @property
    def blocks(self) -> list[Block]:
        return [block for stage in self.stages for block in stage]  # type: ignore[union-attr, attr-defined, misc]

    def set_activation_checkpointing(self, mode: ActivationCheckpointing) -> None:
        """What backward computes again."""
        self.activation_checkpointing = mode
        for block in self.blocks:
            block.recomputes = mode == "mlp"

    def current_activations(self) -> ActivationConfig | list[ActivationConfig]:
        """The `activation` setting that describes the blocks as they are now."""
        configured = activation_configs(self.config.activation, len(self.blocks))
        return current_activations([block.act for block in self.blocks], configured)

    def forward(self, images: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits `[batch, classes]`, or with `targets` the cross entropy in nats.

        Args:
            images: `[batch, channels, height, width]`, normalised.
            targets: `[batch]` int64 classes (-100: does not count), or `[batch, classes]` probabilities (mixup).
            reduction: of the loss: `mean`, `sum` or `none`.
        """
        x = images
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            for block in stage:  # type: ignore[attr-defined]
                if self.activation_checkpointing == "block" and torch.is_grad_enabled():
                    x = recompute(block, x, use_reentrant=False)  # type: ignore[assignment]
                else:
                    x = block(x)
        logits: Tensor = self.head(self.norm(x.mean((-2, -1))))
        if targets is None:
            return logits
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits.float(), targets, reduction=reduction, label_smoothing=smoothing)

    def flops_per_image(self, height: int, width: int) -> float:
        """Floating-point operations of forward and backward per image: 6 per multiply-add of convolutions and linears.

        Norms, activations and other elementwise operations do not count, as is usual for MFU.
        """
        config = self.config
        height, width = height // config.patch_size, width // config.patch_size
        total = height * width * config.patch_size**2 * config.in_channels * config.dims[0]
        for index, (depth, channels) in enumerate(zip(config.depths, config.dims, strict=True)):
            if index:
                height, width = height // 2, width // 2
                total += height * width * 4 * config.dims[index - 1] * channels
            total += depth * height * width * (49 * channels + 8 * channels**2)
        return 6.0 * (total + config.dims[-1] * config.num_classes)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def load_convnext_state_dict(model: ConvNeXt, state: Mapping[str, Tensor]) -> None:
    """Load published weights: the original code's names, or those of HF `ConvNextForImageClassification`.

    Raises:
        ValueError: names or shapes that do not belong to a ConvNeXt of this size, listed.
    """
    tensors = {_original_name(name): tensor for name, tensor in state.items()}
    load_renamed(model, tensors, optional=".act.", tied=(), what="ConvNeXt")


def _original_name(name: str) -> str:
    """The original code's name of a parameter that may carry HF's."""
    if not name.startswith(("convnext.", "classifier.")):
        return name.removeprefix("model.")
    name = name.removeprefix("convnext.")
    for theirs, ours in (
        ("embeddings.patch_embeddings.", "downsample_layers.0.0."),
        ("embeddings.layernorm.", "downsample_layers.0.1."),
        ("classifier.", "head."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if name.startswith("layernorm."):
        return "norm." + name.removeprefix("layernorm.")
    name = name.removeprefix("encoder.")
    parts = name.split(".")  # stages.1.downsampling_layer.0.weight, stages.1.layers.0.layernorm.weight
    if parts[2] == "downsampling_layer":
        return ".".join(["downsample_layers", parts[1], *parts[3:]])
    leaf = ".".join(parts[4:])
    leaf = leaf.replace("layer_scale_parameter", "gamma").replace("layernorm", "norm")
    return ".".join(["stages", parts[1], parts[3], leaf])


def convnext_config_from_huggingface(config: Mapping[str, Any]) -> ConvNeXtConfig:
    """The configuration of a `config.json` of HF's ConvNeXt."""
    return ConvNeXtConfig(
        depths=list(config["depths"]),
        dims=list(config["hidden_sizes"]),
        num_classes=len(config["id2label"]) if "id2label" in config else int(config.get("num_labels", 1000)),
        in_channels=int(config.get("num_channels", 3)),
        patch_size=int(config.get("patch_size", 4)),
        activation=str(config.get("hidden_act", "gelu")),
        layer_scale=float(config.get("layer_scale_init_value", 1e-6)),
    )


def normalise_images(images: Tensor) -> Tensor:
    """Pixels in [0, 1] to what the model expects: ImageNet's channel statistics, or mean and deviation 0.5 if grey.

    Args:
        images: `[batch, channels, height, width]` float.
    """
    three = images.size(-3) == 3
    mean = torch.tensor([0.485, 0.456, 0.406] if three else [0.5], dtype=images.dtype, device=images.device)
    deviation = torch.tensor([0.229, 0.224, 0.225] if three else [0.5], dtype=images.dtype, device=images.device)
    return (images - mean[:, None, None]) / deviation[:, None, None]
