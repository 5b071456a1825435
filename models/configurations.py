"""The sizes of every model, and how its settings are read: what can be checked without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

from polytrope.models.parts.settings import (
    PARTS,
    Attention,
    EvoNormSettings,
    FeedForward,
    Mixer,
    Norm,
    Part,
    RMSNormSettings,
    read_part,
    read_parts,
)
from polytrope.models.per_layer import Entry, layer_configs

ActivationConfig = Entry
NO_ACTIVATION = "none"  # of a block whose feed-forward layers have none inside, or whose norm has its own
CLASSICAL = ("gelu", "gelu_tanh", "relu", "silu", "tanh")  # activations without coefficients, none a polynomial
FIXED = (*CLASSICAL, "identity")  # all that have no coefficients

LEFT_OUT = {"left_out": True}  # metadata of a field that is written only where it is not the default


def activation_configs(activation: ActivationConfig | list[ActivationConfig], layers: int) -> list[ActivationConfig]:
    """One activation per layer; see `layer_configs`.

    Raises:
        ValueError: as there; a gated activation, which halves the width.
    """
    entries = layer_configs("activation", activation, layers)
    for entry in entries:
        if isinstance(entry, dict) and entry.get("glu"):
            raise ValueError(f"activation: {entry!r} is gated, which halves the width; use `feedforward: gated`")
    return entries


def _refuse_for_layers_alone(activation: ActivationConfig | list[ActivationConfig]) -> None:
    """Raise ValueError for what is made for the layers of an `mlp`: a block needs an activation between its two."""
    for entry in activation if isinstance(activation, list) else [activation]:
        if (entry.get("name") if isinstance(entry, dict) else entry) == "identity":
            raise ValueError("activation: identity is for layers of an mlp that are not linear themselves")
        if starts_as_siren(entry):
            raise ValueError("activation: init: siren needs weights that start to match; only an mlp has them")


def starts_as_siren(entry: ActivationConfig) -> bool:
    """Whether the weights before this activation follow its start."""
    return isinstance(entry, dict) and entry.get("init") == "siren"


def _used_activations(
    activation: ActivationConfig | list[ActivationConfig], parts: Sequence[FeedForward], norm: Norm
) -> ActivationConfig | list[ActivationConfig]:
    """What is said of the activations, with `none` for the blocks that have none, whatever is said for all.

    Raises:
        ValueError: as `activation_configs`; `none` for a block that needs one; a norm that takes the place of one in a
            block that has none.
    """
    entries = activation_configs(activation, len(parts))
    for number, (entry, part) in enumerate(zip(entries, parts, strict=True)):
        if norm.activates and not part.activated:
            raise ValueError(
                f"norm: {norm.name} takes the place of an activation, and layer {number} has feedforward: {part.name} "
                "without one"
            )
        if entry == NO_ACTIVATION and part.activated and not norm.activates:
            raise ValueError(f"activation: none, but layer {number} has feedforward: {part.name}, which needs one")
    if all(part.activated for part in parts):
        return activation
    entries = [entry if part.activated else NO_ACTIVATION for entry, part in zip(entries, parts, strict=True)]
    return NO_ACTIVATION if not any(part.activated for part in parts) else entries


def changed_parts(config: Any) -> dict[str, Any]:
    """The parts of a configuration, as they are written, that are not those a model has where nothing is said."""
    fields = type(config).__dataclass_fields__
    layers = len(config.activation_widths())
    return {
        name: getattr(config, name)
        for name in PARTS
        if name in fields
        and any(part.config() != fields[name].default for part in read_parts(name, getattr(config, name), layers))
    }


def all_parts(config: Any) -> list[Part]:
    """The settings of all parts of a configuration, those of blocks once for each."""
    fields = type(config).__dataclass_fields__
    layers = len(config.activation_widths())
    return [part for name in PARTS if name in fields for part in read_parts(name, getattr(config, name), layers)]


def _feedforwards(given: Entry | list[Entry], layers: int, names: tuple[str, ...]) -> list[FeedForward]:
    """One of these parts per layer. Raises ValueError for another one."""
    parts: list[FeedForward] = read_parts("feedforward", given, layers)
    for part in parts:
        if part.name not in names:
            raise ValueError(f"feedforward: this model has no {part.name}; it has {', '.join(names)}")
    return parts


def block_series(config: Any) -> list[int]:
    """How many blocks follow one another that each add to what they are given: all of a GPT-2, or those of each stage.

    Raises:
        ValueError: a model that has none, or whose blocks depend on their number.
    """
    if isinstance(config, ConvNeXtConfig):
        return list(config.depths)
    try:
        residual_blocks(config)
    except ValueError as error:
        raise ValueError(f"drop_blocks: {error}; leave it out") from error
    if config.scale_attn_by_inverse_layer_idx:
        raise ValueError(
            "drop_blocks: scale_attn_by_inverse_layer_idx divides by the number of a block, which would be another one "
            "behind a cut; leave it out"
        )
    return [config.n_layer]


def residual_blocks(config: Any) -> dict[str, int]:
    """The names of the blocks that each add to what they are given, in order, and the width of what they add to.

    Raises:
        ValueError: a model that has none.
    """
    if isinstance(config, GPT2Config):
        return {f"transformer.h.{number}": config.n_embd for number in range(config.n_layer)}
    if isinstance(config, ConvNeXtConfig):
        sizes = enumerate(zip(config.depths, config.dims, strict=True))
        return {f"stages.{stage}.{number}": width for stage, (depth, width) in sizes for number in range(depth)}
    name = next(name for name, kind in MODEL_KINDS.items() if isinstance(config, kind.config))
    raise ValueError(f"{name} has no blocks that add to what they are given")


def without_blocks(config: Any, gone: range) -> Any:
    """The configuration of a model with these blocks left out, which are counted over the whole model."""
    total = len(config.activation_widths())
    changed: dict[str, Any] = {}
    for name in ("activation", *PARTS):
        given = getattr(config, name, None)
        if isinstance(given, list):
            entries = layer_configs(name, given, total)
            changed[name] = [entry for number, entry in enumerate(entries) if number not in gone]
    if isinstance(config, ConvNeXtConfig):
        ends = list(accumulate(config.depths))
        starts = [0, *ends[:-1]]
        changed["depths"] = [
            sum(number not in gone for number in range(start, end)) for start, end in zip(starts, ends, strict=True)
        ]
    else:
        changed["n_layer"] = config.n_layer - len(gone)
        norm = config.norm_settings()
        if isinstance(norm, RMSNormSettings) and norm.root is not None:
            kept = tuple(ends for place, ends in enumerate(norm.root.domains) if place // 2 not in gone)
            changed["norm"] = replace(norm, root=replace(norm.root, domains=kept)).config()
    return replace(config, **changed)


def _norm(given: Entry, names: tuple[str, ...]) -> Norm:
    """One of these. Raises ValueError for another one."""
    norm: Norm = read_part("norm", given)
    if norm.name not in names:
        raise ValueError(f"norm: {norm.name} is for other models; this one has {', '.join(names)}")
    return norm


_OF_BLOCKS = ("mlp", "gated", "quadratic", "pade", "mu")
_OF_LAYERS = ("dense", "quadratic", "pade", "kan", "pi")


@dataclass
class GPT2Config:
    """Sizes of a GPT-2; the defaults are those of the 124M model.

    Args:
        vocab_size: rows of the token embedding.
        sequence_length: the longest context, in tokens (learned absolute positions).
        n_layer: number of blocks.
        n_head: attention heads; divides `n_embd` where a block's attention has heads.
        n_embd: width of the residual stream; the MLP is four times as wide.
        activation: one activation of `polytrope.ops.build_activation`, or a list with one per block.
        attention, feedforward: parts of every block (`polytrope.models.parts`), or lists with one per block.
        norm: part of the blocks and before the head.
        dropout: of embeddings, attention weights and both residual branches.
        bias: biases in linear layers and layer norms.
        layer_norm_epsilon: added to the variance in every layer norm.
        scale_attn_weights: divide attention's logits by the root of the head size.
        scale_attn_by_inverse_layer_idx: divide them by the number of the block as well, counting from 1.
        tie_word_embeddings: the head's weight is the token embedding.
        factors: rank of every linear layer that is in two factors, by its name (`polytrope.models.factors`).
    """

    vocab_size: int = 50257
    sequence_length: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    activation: ActivationConfig | list[ActivationConfig] = "gelu_tanh"
    attention: Entry | list[Entry] = "softmax"
    norm: Entry = "layer_norm"
    feedforward: Entry | list[Entry] = "mlp"
    dropout: float = 0.0
    bias: bool = True
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    factors: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "sequence_length", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        attention = self.attention_settings()
        if self.n_embd % self.n_head and any(part.heads for part in attention):
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0.0 < self.layer_norm_epsilon < math.inf:
            raise ValueError(f"layer_norm_epsilon must be above 0 and finite, got {self.layer_norm_epsilon}")
        _refuse_for_layers_alone(self.activation)
        self.activation = _used_activations(self.activation, self.feedforward_settings(), self.norm_settings())
        self.norm_settings()
        for part in attention:
            if self.dropout and part.fixed_weights:
                raise ValueError(
                    f"dropout: {self.dropout}, but attention: {part.name} drops no weights; leave dropout out"
                )

    def attention_settings(self) -> list[Attention]:
        """Of each block."""
        return read_parts("attention", self.attention, self.n_layer)

    def norm_settings(self) -> Norm:
        """Of all norms."""
        norm = _norm(self.norm, ("layer_norm", "batch", "rms"))
        if isinstance(norm, RMSNormSettings) and norm.root is not None:
            found, wanted = len(norm.root.domains), 2 * self.n_layer + 1
            if found != wanted:
                raise ValueError(f"norm.root.domains: expected one for each of the {wanted} norms, got {found}")
        return norm

    def feedforward_settings(self) -> list[FeedForward]:
        """Of each block."""
        parts = _feedforwards(self.feedforward, self.n_layer, _OF_BLOCKS)
        if any(part.over_space for part in parts):
            raise ValueError("feedforward.shift: moves pixels of images, and a GPT-2 has tokens; leave it out")
        return parts

    def activation_widths(self) -> list[int]:
        """Channels inside of each block, which its activation sees."""
        return [part.hidden(self.n_embd) for part in self.feedforward_settings()]

    def layer_numbers(self) -> int:
        """How many values the first number in the names of its activation modules has."""
        return self.n_layer


GPT2_PRESETS: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1.5B
}


@dataclass
class ConvNeXtConfig:
    """Sizes of a ConvNeXt; the defaults are those of ConvNeXt-Tiny for ImageNet-1k.

    Args:
        depths, dims: blocks and channels of each stage.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        patch_size: kernel and stride of the stem; each later stage halves the resolution.
        activation: one activation of `polytrope.ops.build_activation`, or a list with one per block. Left out: `gelu`,
            or `none` with `norm: evonorm`, which has one of its own.
        norm: part of the blocks, before each stage and before the classifier (`polytrope.models.parts`); `evonorm` of
            the blocks alone.
        feedforward, mixer: parts of every block, or lists with one per block.
        drop_path: probability of skipping the last block's branch; it grows linearly from 0 at the first.
        layer_scale: initial value of the per-channel scale of each branch; 0 for no scale.
        final_norm_epsilon: added to the variance in the layer norm before the classifier; the others have 1e-6.
        factors: rank of every linear layer that is in two factors, by its name (`polytrope.models.factors`).
    """

    depths: list[int] = field(default_factory=lambda: [3, 3, 9, 3])
    dims: list[int] = field(default_factory=lambda: [96, 192, 384, 768])
    num_classes: int = 1000
    in_channels: int = 3
    patch_size: int = 4
    activation: ActivationConfig | list[ActivationConfig] = None  # type: ignore[assignment]  # until it is known
    norm: Entry = "layer_norm"
    feedforward: Entry | list[Entry] = "mlp"
    mixer: Entry | list[Entry] = "depthwise"
    drop_path: float = 0.0
    layer_scale: float = 1e-6
    final_norm_epsilon: float = 1e-6
    factors: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.depths, self.dims = list(self.depths), list(self.dims)
        if not self.depths or len(self.depths) != len(self.dims) or min(self.depths + self.dims) < 1:
            raise ValueError(
                f"depths: {self.depths} and dims {self.dims} must be equally long lists of positive numbers"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
        for name in ("num_classes", "in_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.final_norm_epsilon < math.inf:
            raise ValueError(f"final_norm_epsilon must be above 0 and finite, got {self.final_norm_epsilon}")
        _refuse_for_layers_alone(self.activation)
        norm = self.norm_settings()
        if self.activation is None:
            self.activation = NO_ACTIVATION if norm.activates else "gelu"
        self.activation = _used_activations(self.activation, self.feedforward_settings(), norm)
        if isinstance(norm, EvoNormSettings):
            for number, width in enumerate(self.activation_widths()):
                if width % norm.groups:
                    raise ValueError(
                        f"norm.groups: {norm.groups} groups do not divide the {width} channels that the activation of "
                        f"layer {number} sees"
                    )
        self.mixer_settings()

    def block_widths(self) -> list[int]:
        """Channels of each block."""
        return [width for depth, width in zip(self.depths, self.dims, strict=True) for _ in range(depth)]

    def norm_settings(self) -> Norm:
        """Of the blocks, and of all other norms but with `evonorm`, beside which these are layer norms."""
        return _norm(self.norm, ("layer_norm", "batch", "evonorm"))

    def feedforward_settings(self) -> list[FeedForward]:
        """Of each block."""
        return _feedforwards(self.feedforward, sum(self.depths), _OF_BLOCKS)

    def mixer_settings(self) -> list[Mixer]:
        """Of each block."""
        return read_parts("mixer", self.mixer, sum(self.depths))

    def activation_widths(self) -> list[int]:
        """Channels inside of each block, which its activation sees."""
        return [
            part.hidden(width) for part, width in zip(self.feedforward_settings(), self.block_widths(), strict=True)
        ]

    def layer_numbers(self) -> int:
        """How many values the first number in the names of its activation modules has: the stages."""
        return len(self.depths)


CONVNEXT_PRESETS: dict[str, dict[str, list[int]]] = {
    "convnext-atto": {"depths": [2, 2, 6, 2], "dims": [40, 80, 160, 320]},
    "convnext-femto": {"depths": [2, 2, 6, 2], "dims": [48, 96, 192, 384]},
    "convnext-pico": {"depths": [2, 2, 6, 2], "dims": [64, 128, 256, 512]},
    "convnext-nano": {"depths": [2, 2, 8, 2], "dims": [80, 160, 320, 640]},
    "convnext-tiny": {"depths": [3, 3, 9, 3], "dims": [96, 192, 384, 768]},
    "convnext-small": {"depths": [3, 3, 27, 3], "dims": [96, 192, 384, 768]},
    "convnext-base": {"depths": [3, 3, 27, 3], "dims": [128, 256, 512, 1024]},
    "convnext-large": {"depths": [3, 3, 27, 3], "dims": [192, 384, 768, 1536]},
}


@dataclass
class MLPConfig:
    """Sizes of a multilayer perceptron on rows of numbers.

    Args:
        inputs: numbers in a row.
        outputs: numbers that are predicted, or classes.
        widths: outputs of each layer before the last.
        activation: one activation of `polytrope.ops.build_activation`, or a list with one per width.
        feedforward: what each of these layers is: `dense`, `quadratic`, `pade`, `kan` or `pi`; or a list with one per
            width.
        norm: of what each of these layers gives, before its activation: `none`, `layer_norm` or `batch`.
        residual: every layer but the first adds to what it is given; all widths are equal.
        loss: `mse` of predicted numbers, or `cross_entropy` of classes.
        output_scale: α, which multiplies the outputs; the training loss is divided by α², so that a large one leaves
            the weights near their start (Chizat, Oyallon, Bach, On Lazy Training in Differentiable Programming, 2019).
        factors: rank of every linear layer that is in two factors, by its name (`polytrope.models.factors`).
    """

    inputs: int = 1
    outputs: int = 1
    widths: list[int] = field(default_factory=lambda: [64, 64])
    activation: ActivationConfig | list[ActivationConfig] = "gelu"
    feedforward: Entry | list[Entry] = "dense"
    norm: Entry = "none"
    residual: bool = False
    loss: str = "mse"
    output_scale: float = field(default=1.0, metadata=LEFT_OUT)
    factors: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.widths = list(self.widths)
        for name in ("inputs", "outputs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths: expected a list of positive numbers, got {self.widths}")
        if self.residual and (len(self.widths) < 2 or len(set(self.widths)) > 1):
            raise ValueError(f"residual: needs two widths or more that are equal, got widths {self.widths}")
        if self.loss not in ("mse", "cross_entropy"):
            raise ValueError(f"loss: expected mse or cross_entropy, got {self.loss!r}")
        if not 0.0 < self.output_scale < math.inf:
            raise ValueError(f"output_scale: expected a number above 0, got {self.output_scale}")
        self.activation = _used_activations(self.activation, self.feedforward_settings(), self.norm_settings())
        norm = self.norm_settings().name
        activations = activation_configs(self.activation, len(self.widths))
        for entry, part in zip(activations, self.feedforward_settings(), strict=True):
            if not starts_as_siren(entry):
                continue
            if part.name not in ("dense", "quadratic"):
                raise ValueError(f"activation: init: siren is for dense and quadratic layers, this is {part.name}")
            if norm != "none":
                raise ValueError(f"activation: init: siren is for what its layer gives, and norm: {norm} changes it")

    def norm_settings(self) -> Norm:
        """Of all norms."""
        return _norm(self.norm, ("none", "layer_norm", "batch"))

    def feedforward_settings(self) -> list[FeedForward]:
        """Of each layer before the last."""
        return _feedforwards(self.feedforward, len(self.widths), _OF_LAYERS)

    def activation_widths(self) -> list[int]:
        """Channels that each activation sees."""
        return self.widths

    def layer_numbers(self) -> int:
        """How many values the first number in the names of its activation modules has."""
        return len(self.widths)


@dataclass(frozen=True)
class ModelKind:
    """What is known of a model without building it.

    Args:
        config: dataclass of its sizes; its checks are in `__post_init__`.
        data: what it is trained on.
        presets: published sizes, by name.
        groups: patterns of the names of parameters that are called by one word in `trainable`.
    """

    config: type[Any]
    data: Literal["text", "images", "numbers"]
    presets: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, tuple[str, ...]]


# Every model of `polytrope.models.ARCHITECTURES`.
MODEL_KINDS: dict[str, ModelKind] = {
    "gpt2": ModelKind(GPT2Config, "text", GPT2_PRESETS, {"norms": ("*.ln_*", "*.norms.*"), "head": ("lm_head.*",)}),
    "convnext": ModelKind(
        ConvNeXtConfig,
        "images",
        CONVNEXT_PRESETS,
        {
            "norms": ("norm.*", "*.norm.*", "*.norms.*", "downsample_layers.0.1.*", "downsample_layers.[1-9]*.0.*"),
            "head": ("head.*",),
        },
    ),
    "mlp": ModelKind(MLPConfig, "numbers", {}, {"norms": ("blocks.*.norm.*",), "head": ("head.*",)}),
}
