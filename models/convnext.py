"""ConvNeXt (Liu et al., 2022) with a configurable activation, in plain torch; parameter names of the original code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from polytrope.models.activations import (
    ActivationCheckpointing,
    make_activation,
    project_activated,
    standardize_inputs,
)
from polytrope.models.architecture import HuggingFace, PublishedArchitecture
from polytrope.models.configurations import (
    CONVNEXT_PRESETS,
    NO_ACTIVATION,
    ActivationConfig,
    ConvNeXtConfig,
    activation_configs,
    changed_parts,
)
from polytrope.models.factors import restore_factors, saved_products
from polytrope.models.foreign import read_activation_name, read_settings
from polytrope.models.losses import Loss, cross_entropy
from polytrope.models.parts.evonorm import EvoNorm
from polytrope.models.parts.feedforward import FeedForwardSizes, LinearAtStart, build_feedforward
from polytrope.models.parts.mixer import build_mixer
from polytrope.models.parts.mu import MuLayer
from polytrope.models.parts.norm import NormSizes, build_norm
from polytrope.models.parts.ranges import RangePenalty
from polytrope.models.parts.settings import FeedForward, LayerNormSettings, Mixer
from polytrope.models.weights import load_renamed


class Block(nn.Module):
    """Depthwise 7×7 convolution, norm, and a pointwise MLP of four times the width, on a residual branch; or others of
    `polytrope.models.parts`. `act` is None where the configuration has `none` for this block. An `EvoNorm` stands where
    the activation does, around it if there is one.
    """

    def __init__(
        self,
        config: ConvNeXtConfig,
        channels: int,
        activation: ActivationConfig,
        settings: FeedForward,
        mixer: Mixer,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.dwconv = build_mixer(mixer, channels)
        layers = build_feedforward(settings, FeedForwardSizes(channels, bias=True, epsilon=1e-6))
        norm = config.norm_settings()
        width = settings.hidden(channels) if norm.activates else channels
        self.norm = build_norm(norm, NormSizes(width, 1e-6, activated=activation != NO_ACTIVATION))
        self.pwconv1 = layers.inner
        self.act = None if activation == NO_ACTIVATION else make_activation(activation)
        self.pwconv2 = layers.outer
        scale = config.layer_scale
        self.gamma = nn.Parameter(torch.full((channels,), scale)) if scale > 0 else None
        self.gated = layers.gated
        self.drop_path = drop_path
        self.recomputes = False
        self.ranges: RangePenalty | None = None

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.dwconv(x).permute(0, 2, 3, 1)
        branch = self.pwconv1(mixed if isinstance(self.norm, EvoNorm) else self.norm(mixed))
        if self.act is not None and self.ranges is not None and self.training:
            self.ranges.inputs(branch.chunk(2, dim=-1)[0] if self.gated else branch)
        activation = self._activated if isinstance(self.norm, EvoNorm) else self.act
        if activation is None:
            branch = self.pwconv2(branch)
        else:
            branch = project_activated(activation, self.pwconv2, branch, recomputes=self.recomputes, gated=self.gated)
        if self.gamma is not None:
            branch = self.gamma * branch
        return x + drop_samples(branch.permute(0, 3, 1, 2), self.drop_path, self.training)

    def _activated(self, x: Tensor) -> Tensor:
        """With an `EvoNorm`."""
        result: Tensor = self.norm(x, None if self.act is None else self.act(x))
        return result


def drop_path_rates(config: ConvNeXtConfig) -> list[float]:
    """Probability that the branch of each block is left out."""
    total = sum(config.depths)
    return [config.drop_path * index / max(1, total - 1) for index in range(total)]


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

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.training_loss: Loss = cross_entropy  # it and its smoothing are set by the trainer
        self.label_smoothing = 0.0
        self.ranges: RangePenalty | None = None  # set by the trainer
        dims, depths = config.dims, config.depths
        norm = LayerNormSettings() if config.norm_settings().activates else config.norm_settings()
        stem = nn.Sequential(
            nn.Conv2d(config.in_channels, dims[0], config.patch_size, config.patch_size),
            build_norm(norm, NormSizes(dims[0], 1e-6, channels_first=True)),
        )
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(
                    build_norm(norm, NormSizes(before, 1e-6, channels_first=True)),
                    nn.Conv2d(before, after, kernel_size=2, stride=2),
                )
            )
        total = sum(depths)
        activations = iter(activation_configs(config.activation, total))
        layers = iter(config.feedforward_settings())
        mixers = iter(config.mixer_settings())
        rates = iter(drop_path_rates(config))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *[
                    Block(config, width, next(activations), next(layers), next(mixers), next(rates))
                    for _ in range(depth)
                ]
            )
            for depth, width in zip(depths, dims, strict=True)
        )
        self.norm = build_norm(norm, NormSizes(dims[-1], config.final_norm_epsilon))
        self.head = nn.Linear(dims[-1], config.num_classes)
        self.apply(_initialise)
        for block in self.blocks:
            if isinstance(block.pwconv1, LinearAtStart):
                standardize_inputs(block.pwconv1, 0.02)
                if isinstance(block.norm, EvoNorm) and isinstance(block.dwconv, nn.Conv2d):
                    standardize_inputs(block.dwconv, 0.02)
        restore_factors(self, config.factors)

    @property
    def blocks(self) -> list[Block]:
        return [block for stage in self.stages for block in stage]  # type: ignore[union-attr, attr-defined, misc]

    def set_activation_checkpointing(self, mode: ActivationCheckpointing) -> None:
        """What backward computes again."""
        self.activation_checkpointing = mode
        for block in self.blocks:
            block.recomputes = mode == "mlp"

    def forward(self, images: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits `[batch, classes]`, or with `targets` the cross entropy in nats (in training mode: `training_loss`,
        and penalties of ranges).

        Args:
            images: `[batch, channels, height, width]`, normalised; any floating dtype (a data set has float32).
            targets: `[batch]` int64 classes (-100: does not count), or `[batch, classes]` probabilities (mixup).
            reduction: of the loss: `mean`, `sum` or `none`.
        """
        if self.ranges is not None:
            self.ranges.start()
        x = images.to(self.head.weight.dtype)
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
        return self.loss(logits, targets, reduction=reduction, training=self.training)

    def loss(self, logits: Tensor, targets: Tensor, *, reduction: str, training: bool) -> Tensor:
        """What `forward` returns with `targets`, of its logits; `training`: as in training mode."""
        if not training:
            return cross_entropy(logits.float(), targets, reduction=reduction)
        loss = self.training_loss(logits.float(), targets, reduction=reduction, label_smoothing=self.label_smoothing)
        return loss if self.ranges is None else self.ranges.added_to(loss, reduction)

    def flops_per_image(self, height: int, width: int) -> float:
        """Floating-point operations of forward and backward per image: 6 per multiply-add of convolutions and linears.

        Norms, activations and other elementwise operations do not count, as is usual for MFU; nor do maxima and sums of
        `mixer: max_plus`.
        """
        config = self.config
        height, width = height // config.patch_size, width // config.patch_size
        total = height * width * config.patch_size**2 * config.in_channels * config.dims[0]
        parts = iter(zip(config.feedforward_settings(), config.mixer_settings(), strict=True))
        for index, (stage, channels) in enumerate(zip(self.stages, config.dims, strict=True)):
            if index:
                height, width = height // 2, width // 2
                total += height * width * 4 * config.dims[index - 1] * channels
            for block in stage:  # type: ignore[attr-defined]
                feedforward, mixer = next(parts)
                products = mixer.products(channels) + feedforward.products(channels) - saved_products(block)
                total += height * width * products
        return 6.0 * (total + config.dims[-1] * config.num_classes - saved_products(self.head))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, MuLayer):
        module.reset_parameters()  # after those of its layers, which are drawn first
    if isinstance(module, LinearAtStart | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def normalise_images(images: Tensor) -> Tensor:
    """Pixels in [0, 1] to what the model expects: ImageNet's channel statistics, or mean and deviation 0.5 if grey.

    Args:
        images: `[batch, channels, height, width]` float.
    """
    three = images.size(-3) == 3
    mean = torch.tensor([0.485, 0.456, 0.406] if three else [0.5], dtype=images.dtype, device=images.device)
    deviation = torch.tensor([0.229, 0.224, 0.225] if three else [0.5], dtype=images.dtype, device=images.device)
    return (images - mean[:, None, None]) / deviation[:, None, None]


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ConvNeXt weights under the original code's names, from those of timm, torchvision or HF.

    timm: `stem.0`, `stages.1.blocks.0.conv_dw`, `mlp.fc1`, `head.fc`. torchvision: `features.1.0.block.0`,
    `layer_scale`, `classifier.2`; its odd `features` are the stages, its even ones the downsampling.
    """
    rename: Callable[[str], str] = str
    if "stages.0.blocks.0.conv_dw.weight" in state:
        rename = _from_timm
    elif "features.1.0.block.0.weight" in state:
        rename = _from_torchvision
    elif any(name.startswith(_HUGGINGFACE_NAMES) for name in state):
        rename = _from_huggingface
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = rename(name)
        if ours.endswith(("pwconv1.weight", "pwconv2.weight")) and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]  # written as a 1×1 convolution
        result[ours] = tensor.flatten() if ours.endswith(".gamma") else tensor
    return result


def _from_timm(name: str) -> str:
    for pattern, ours in (
        (r"^stem\.(.*)", r"downsample_layers.0.\1"),
        (r"^stages\.(\d+)\.downsample\.(.*)", r"downsample_layers.\1.\2"),
        (r"^stages\.(\d+)\.blocks\.(.*)", r"stages.\1.\2"),
        (r"^head\.norm\.(.*)", r"norm.\1"),
        (r"^head\.fc\.(.*)", r"head.\1"),
    ):
        if re.match(pattern, name):
            name = re.sub(pattern, ours, name)
            break
    return name.replace(".conv_dw.", ".dwconv.").replace(".mlp.fc1.", ".pwconv1.").replace(".mlp.fc2.", ".pwconv2.")


def _from_torchvision(name: str) -> str:
    head = {"classifier.0": "norm", "classifier.2": "head"}
    for theirs, ours in head.items():
        if name.startswith(theirs + "."):
            return ours + name.removeprefix(theirs)
    match = re.match(r"^features\.(\d+)\.(.*)", name)
    if not match:
        return name
    number, rest = int(match.group(1)), match.group(2)
    if number % 2 == 0:
        return f"downsample_layers.{number // 2}.{rest}"
    layers = {"block.0": "dwconv", "block.2": "norm", "block.3": "pwconv1", "block.5": "pwconv2"}
    rest = rest.replace("layer_scale", "gamma")
    for theirs, ours in layers.items():
        rest = rest.replace(f".{theirs}.", f".{ours}.")
    return f"stages.{number // 2}.{rest}"


_HUGGINGFACE_NAMES = ("convnext.", "embeddings.", "encoder.")


def _from_huggingface(name: str) -> str:
    name = name.removeprefix("convnext.").removeprefix("encoder.")
    for theirs, ours in (
        ("embeddings.patch_embeddings.", "downsample_layers.0.0."),
        ("embeddings.layernorm.", "downsample_layers.0.1."),
        ("classifier.", "head."),
        ("layernorm.", "norm."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if match := re.match(r"stages\.(\d+)\.downsampling_layer\.(.*)", name):
        return f"downsample_layers.{match[1]}.{match[2]}"
    if match := re.match(r"stages\.(\d+)\.layers\.(\d+)\.(.*)", name):
        leaf = match[3].replace("layer_scale_parameter", "gamma").replace("layernorm", "norm")
        return f"stages.{match[1]}.{match[2]}.{leaf}"
    return name


def _huggingface_name(name: str) -> str:
    """HF's name of a parameter with the original code's name."""
    parts = name.split(".")
    if parts[0] == "head":
        return name.replace("head.", "classifier.", 1)
    if parts[0] == "norm":
        return "convnext.layernorm." + parts[1]
    if parts[0] == "downsample_layers":
        if parts[1] == "0":
            part = {"0": "patch_embeddings", "1": "layernorm"}[parts[2]]
            return ".".join(["convnext.embeddings", part, *parts[3:]])
        return ".".join(["convnext.encoder.stages", parts[1], "downsampling_layer", *parts[2:]])
    leaf = ".".join(parts[3:]).replace("gamma", "layer_scale_parameter").replace("norm.", "layernorm.")
    return ".".join(["convnext.encoder.stages", parts[1], "layers", parts[2], leaf])


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What weights by own names tell of the configuration.

    Raises:
        ValueError: no stem, no classifier, or a block missing.
    """
    for name, part in (("downsample_layers.0.0.weight", "stem"), ("head.weight", "classifier")):
        if name not in state:
            raise ValueError(f"not the weights of a ConvNeXt with a classifier: missing {name}, the {part}")
    blocks = sorted(
        (int(match[1]), int(match[2]))
        for name in state
        if (match := re.fullmatch(r"stages\.(\d+)\.(\d+)\.dwconv\.weight", name))
    )
    stages = sorted({stage for stage, _ in blocks})
    depths = [sum(1 for stage, _ in blocks if stage == wanted) for wanted in stages]
    if blocks != [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]:
        raise ValueError("not the weights of a ConvNeXt: blocks are missing between those that are there")
    return {
        "depths": depths,
        "dims": [state[f"stages.{stage}.0.dwconv.weight"].shape[0] for stage in stages],
        "num_classes": state["head.weight"].shape[0],
        "in_channels": state["downsample_layers.0.0.weight"].shape[1],
        "patch_size": state["downsample_layers.0.0.weight"].shape[2],
        "layer_scale": 1e-6 if "stages.0.0.gamma" in state else 0.0,
    }


def _asked(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The original code, timm and torchvision have GELU and one epsilon; transformers writes them in `config.json`."""
    asked = {}
    if any(name.startswith(_HUGGINGFACE_NAMES) for name in state):
        asked["activation"] = "what config.json says, gelu if nothing"
        asked["final_norm_epsilon"] = "layer_norm_eps in config.json, 1e-12 if nothing"
    elif learned := [name for name in state if re.search(r"\.act\.\w+$", name)]:
        asked["activation"] = (
            f"the configuration of the learned activations, whose coefficients are there ({learned[0]})"
        )
    return asked


def load(model: ConvNeXt, state: Mapping[str, Tensor]) -> None:
    """Copy weights by own names into the model.

    Raises:
        ValueError: names or shapes that do not belong to a ConvNeXt of this size, listed.
    """
    load_renamed(model, state, tied=(), what="ConvNeXt")


# Defaults and second names of transformers' ConvNextConfig, as far as they change the function.
HUGGINGFACE_DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "patch_size": 4,
    "hidden_sizes": [96, 192, 384, 768],
    "depths": [3, 3, 9, 3],
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "layer_scale_init_value": 1e-6,
    "drop_path_rate": 0.0,
}
HUGGINGFACE_ALIASES = {"num_hidden_layers": "num_stages"}
_OWN_FIELDS = {
    "num_channels": "in_channels",
    "patch_size": "patch_size",
    "hidden_sizes": "dims",
    "depths": "depths",
    "layer_norm_eps": "final_norm_epsilon",
    "layer_scale_init_value": "layer_scale",
    "drop_path_rate": "drop_path",
}
_CLASSES = 2  # transformers leaves `id2label` out where it is its default


def config_from_huggingface(content: Mapping[str, Any]) -> ConvNeXtConfig:
    """The configuration of a `config.json` of HF's ConvNeXt.

    Raises:
        ValueError: a field with a value that this ConvNeXt does not have.
    """
    size = content.get("patch_size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        content = {**content, "patch_size": size[0]}
    depths = content.get("depths") or HUGGINGFACE_DEFAULTS["depths"]
    supported = {
        "num_stages": (len(depths),),  # transformers builds that many, and ignores the rest
        "problem_type": (None, "single_label_classification"),
    }
    if len(depths) != 4 and "num_stages" not in content and "num_hidden_layers" not in content:
        raise ValueError(f"config.json: num_stages is missing (4 if nothing is said), but depths lists {len(depths)}")
    found = read_settings(content, HUGGINGFACE_DEFAULTS, HUGGINGFACE_ALIASES, supported)
    labels = content.get("id2label")
    classes = content.get("num_labels", _CLASSES if labels is None else len(labels))
    if labels is not None and len(labels) != classes:
        raise ValueError(f"config.json: num_labels = {classes}, but id2label lists {len(labels)}")
    return ConvNeXtConfig(
        num_classes=classes,
        activation=read_activation_name(found["hidden_act"], "hidden_act"),
        **{own: found[name] for name, own in _OWN_FIELDS.items()},
    )


def to_huggingface(
    config: ConvNeXtConfig, activation: str, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and the weights as transformers names them.

    Raises:
        ValueError: a ConvNeXt with other parts.
    """
    if parts := changed_parts(config):
        said = ", ".join(f"{name}: {part}" for name, part in parts.items())
        raise ValueError(f"transformers' ConvNeXt has no {said}; write the own format instead")
    described = {
        "model_type": "convnext",
        "architectures": ["ConvNextForImageClassification"],
        "num_stages": len(config.depths),
        "hidden_act": "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation,
        "id2label": {str(index): f"LABEL_{index}" for index in range(config.num_classes)},
        "label2id": {f"LABEL_{index}": index for index in range(config.num_classes)},
        **{name: getattr(config, own) for name, own in _OWN_FIELDS.items()},
    }
    return described, {_huggingface_name(name): tensor for name, tensor in state.items()}


def _example(config: ConvNeXtConfig) -> Tensor:
    side = config.patch_size * 2 ** (len(config.dims) - 1)
    numbers = config.in_channels * side * side
    return torch.linspace(-2.0, 2.0, numbers).sin().reshape(1, config.in_channels, side, side)


ARCHITECTURE = PublishedArchitecture(
    name="convnext",
    title="ConvNeXt",
    config=ConvNeXtConfig,
    build=ConvNeXt,
    data="images",
    task="classification",
    presets=CONVNEXT_PRESETS,
    activation="act",
    activation_widths=ConvNeXtConfig.activation_widths,
    prepare=normalise_images,
    example=_example,
    landmark=r"((?:[^.]+\.)*?)(?:stages\.0\.0\.dwconv|stages\.0\.blocks\.0\.conv_dw|features\.1\.0\.block\.0"
    r"|(?:convnext\.)?encoder\.stages\.0\.layers\.0\.dwconv)\.weight",
    own_names=own_names,
    sizes=sizes,
    told={},
    asked=_asked,
    load=load,
    huggingface=HuggingFace(
        model_type="convnext",
        classes=("ConvNextForImageClassification",),
        config_class="ConvNextConfig",
        auto_classes={
            "AutoModel": "ConvNextModel",
            "AutoModelForImageClassification": "ConvNextForImageClassification",
        },
        tokenizer_class=None,
        activation_name=_huggingface_name,
        tokens={},
        read=config_from_huggingface,
        write=to_huggingface,
    ),
)
