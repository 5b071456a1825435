"""GPT-2 (Radford et al., 2019) with a configurable activation: training, evaluation, sampling with a key-value cache.

Parameter names and layouts are those of nanoGPT (`nn.Linear` everywhere); the published weights (`Conv1D`, transposed)
are read as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

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
    GPT2_PRESETS,
    NO_ACTIVATION,
    ActivationConfig,
    GPT2Config,
    activation_configs,
    changed_parts,
)
from polytrope.models.factors import restore_factors
from polytrope.models.foreign import read_activation_name, read_settings
from polytrope.models.losses import Loss, cross_entropy
from polytrope.models.modes import evaluation_mode
from polytrope.models.parts.attention import AttentionSizes, build_attention
from polytrope.models.parts.feedforward import FeedForwardSizes, LinearAtStart, build_feedforward
from polytrope.models.parts.mu import MuLayer
from polytrope.models.parts.norm import NormSizes, build_norm
from polytrope.models.parts.ranges import RangePenalty
from polytrope.models.parts.settings import Attention, FeedForward
from polytrope.models.weights import load_renamed


class Cache(NamedTuple):
    """What sampling remembers.

    Args:
        positions: that were read.
        layers: of each block, what its attention needs for the next position.
    """

    positions: int
    layers: list[Any]


class MLP(nn.Module):
    """A linear layer to a larger width, activation, linear back; or another of `polytrope.models.parts.feedforward`.

    `activation` is None where the configuration has `none` for this block.
    """

    def __init__(self, config: GPT2Config, activation: ActivationConfig, settings: FeedForward) -> None:
        super().__init__()
        layers = build_feedforward(settings, FeedForwardSizes(config.n_embd, config.bias, config.layer_norm_epsilon))
        self.c_fc = layers.inner
        self.activation = None if activation == NO_ACTIVATION else make_activation(activation)
        self.c_proj = layers.outer
        self.gated = layers.gated
        self.dropout = nn.Dropout(config.dropout)
        self.recomputes = False
        self.ranges: RangePenalty | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        if self.activation is None:
            projected = self.c_proj(hidden)
        else:
            if self.ranges is not None and self.training:
                self.ranges.inputs(hidden.chunk(2, dim=-1)[0] if self.gated else hidden)
            projected = project_activated(
                self.activation, self.c_proj, hidden, recomputes=self.recomputes, gated=self.gated
            )
        mixed: Tensor = self.dropout(projected)
        return mixed


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(
        self, config: GPT2Config, layer: int, activation: ActivationConfig, attention: Attention, settings: FeedForward
    ) -> None:
        super().__init__()
        scaled = config.scale_attn_weights and attention.heads
        scale = (config.n_embd // config.n_head) ** -0.5 if scaled else 1.0
        sizes = AttentionSizes(
            width=config.n_embd,
            heads=config.n_head,
            bias=config.bias,
            dropout=config.dropout,
            scale=scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale,
        )
        self.ln_1 = _norm(config, 2 * layer)
        self.attn = build_attention(attention, sizes)
        self.ln_2 = _norm(config, 2 * layer + 1)
        self.mlp = MLP(config, activation, settings)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]

    def forward_with_cache(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        """For positions that follow those of `past`; the second result is what the next ones need."""
        attended, present = self.attn.forward_with_cache(self.ln_1(x), past)  # type: ignore[operator]
        x = x + attended
        return x + self.mlp(self.ln_2(x)), present


def _norm(config: GPT2Config, number: int) -> nn.Module:
    sizes = NormSizes(config.n_embd, config.layer_norm_epsilon, bias=config.bias, number=number)
    return build_norm(config.norm_settings(), sizes)


class GPT2(nn.Module):
    """The language model. `forward` returns logits, or with targets the loss."""

    architecture: ClassVar[str] = "gpt2"

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.tied_weights = {"lm_head.weight": "transformer.wte.weight"} if config.tie_word_embeddings else {}
        self.activation_checkpointing: ActivationCheckpointing = "none"
        self.training_loss: Loss = cross_entropy  # set by the trainer
        self.ranges: RangePenalty | None = None  # set by the trainer
        blocks = zip(
            activation_configs(config.activation, config.n_layer),
            config.attention_settings(),
            config.feedforward_settings(),
            strict=True,
        )
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.sequence_length, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer, *parts) for layer, parts in enumerate(blocks)),
                "ln_f": _norm(config, 2 * config.n_layer),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(_initialise)
        # The residual stream sums 2 * n_layer branches: their last layers start smaller by its root (GPT-2, 2.3).
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
        for block in self.blocks:
            if isinstance(layer := block.mlp.c_fc, LinearAtStart):  # type: ignore[union-attr]
                standardize_inputs(layer, 0.02)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]
        restore_factors(self, config.factors)

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.transformer["h"]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def set_activation_checkpointing(self, mode: ActivationCheckpointing) -> None:
        """What backward computes again."""
        self.activation_checkpointing = mode
        for block in self.blocks:
            block.mlp.recomputes = mode == "mlp"  # type: ignore[union-attr]

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits `[batch, positions, vocab_size]`, or with `targets` the cross entropy in nats (in training mode:
        `training_loss`).

        Args:
            tokens: `[batch, positions]` int64, at most `sequence_length` positions.
            targets: `[batch, positions]` int64; -100 marks positions that do not count.
            reduction: of the loss: `mean`, `sum` or `none`.
        """
        if self.ranges is not None:
            self.ranges.start()
        x = self._embed(tokens, 0)
        for block in self.blocks:
            if self.activation_checkpointing == "block" and torch.is_grad_enabled():
                x = recompute(block, x, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x)
        logits: Tensor = self.lm_head(self.transformer["ln_f"](x))
        if targets is None:
            return logits
        return self.loss(logits, targets, reduction=reduction, training=self.training)

    def loss(self, logits: Tensor, targets: Tensor, *, reduction: str, training: bool) -> Tensor:
        """What `forward` returns with `targets`, of its logits; `training`: as in training mode."""
        measure = self.training_loss if training else cross_entropy
        loss = measure(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
        return loss if self.ranges is None or not training else self.ranges.added_to(loss, reduction)

    def forward_with_cache(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits of the last position `[batch, vocab_size]` and the extended cache, for sampling."""
        start = cache.positions if cache else 0
        x = self._embed(tokens, start)
        layers: list[Any] = []
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, present = block.forward_with_cache(x, cache.layers[index] if cache else None)
            layers.append(present)
        return self.lm_head(self.transformer["ln_f"](x[:, -1])), Cache(start + tokens.size(1), layers)

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        end = start + tokens.size(1)
        if end > self.config.sequence_length:
            raise ValueError(f"{end} positions, but the model has {self.config.sequence_length} (sequence_length)")
        positions = torch.arange(start, end, device=tokens.device)
        embedded: Tensor = self.transformer["drop"](
            self.transformer["wte"](tokens) + self.transformer["wpe"](positions)
        )
        return embedded

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        end: int | None = None,
    ) -> Tensor:
        """Continue `tokens` `[batch, positions]` by sampling; returns `[batch, positions + max_new_tokens]`.

        Args:
            temperature: divides the logits; 0 takes the most probable token.
            top_k: sample among the k most probable tokens only; None: among all.
            generator: makes the sample reproducible.
            end: stop, with fewer new tokens, when every row has produced this one.

        Raises:
            ValueError: no token to begin with, a negative number of new ones, a temperature below 0, a top_k below 1.
        """
        return sample_sequence(
            self,
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            generator=generator,
            end=end,
        )

    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward per token: 6 N + 12 L H Q T (PaLM, appendix B), L the
        number of blocks whose attention has a product for each pair of positions.

        N leaves out the embeddings (look-ups) and counts a tied token embedding once, for the head.
        """
        config = self.config
        looked_up = config.sequence_length + (0 if config.tie_word_embeddings else config.vocab_size)
        parameters = sum(parameter.numel() for parameter in self.parameters()) - looked_up * config.n_embd
        pairs = sum(part.pairs for part in config.attention_settings())
        return 6.0 * parameters + 12.0 * pairs * config.n_embd * config.sequence_length


@torch.no_grad()
def sample_sequence(
    model: Any,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    end: int | None = None,
) -> Tensor:
    """What `GPT2.generate` does, with any model that has its `config` and `forward_with_cache`.

    Past `sequence_length` the window slides by half of it, since learned absolute positions make the cache of a
    shifted window worthless.
    """
    for name, right, wanted, value in (
        ("tokens", tokens.size(1) >= 1, "at least one position to continue", list(tokens.shape)),
        ("max_new_tokens", max_new_tokens >= 0, "a number of at least 0", max_new_tokens),
        ("temperature", 0.0 <= temperature < math.inf, "a finite number of at least 0", temperature),
        ("top_k", top_k is None or top_k >= 1, "None or a number of at least 1", top_k),
    ):
        if not right:
            raise ValueError(f"{name}: expected {wanted}, got {value}")
    limit = model.config.sequence_length
    sequence = tokens
    pending, cache = tokens[:, -limit:], None
    with evaluation_mode(model):
        for _ in range(max_new_tokens):
            if (cache.positions if cache else 0) + pending.size(1) > limit:
                pending, cache = sequence[:, -max(1, limit // 2) :], None
            logits, cache = model.forward_with_cache(pending, cache)
            pending = sample_token(logits.float(), temperature, top_k, generator)
            sequence = torch.cat((sequence, pending), dim=1)
            if end is not None and bool((sequence[:, tokens.size(1) :] == end).any(dim=1).all()):
                break
    return sequence


def sample_token(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row of `logits` `[batch, vocab_size]`; returns `[batch, 1]`.

    Towards temperature 0 it becomes the most probable token, without overflow on the way.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, MuLayer):
        module.reset_parameters()  # after those of its layers, which are drawn first
    if isinstance(module, LinearAtStart | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, LinearAtStart) and module.bias is not None:
        nn.init.zeros_(module.bias)


_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # `Conv1D` in transformers


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of nanoGPT, of HF `GPT2LMHeadModel` or `GPT2Model`, or of OpenAI's release, by this module's names.

    `Conv1D` weights (input × output) are told from `nn.Linear` ones by the shape of `c_attn`; the buffers of the causal
    mask are left out. Where one of two tied weights was stored, it stands for the other.

    Raises:
        ValueError: a mask that is not the causal one.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".attn.bias") and tensor.dim() == 4:
            if not torch.equal(tensor != 0, torch.ones_like(tensor, dtype=torch.bool).tril()):
                raise ValueError(f"{name} is not the causal mask")
        elif not name.endswith(".attn.masked_bias"):
            whole = re.match(r"(transformer|lm_head)\.", name) or not re.match(r"(wte|wpe|h|ln_f)\.", name)
            tensors[name if whole else f"transformer.{name}"] = tensor
    if _EMBEDDING not in tensors and _HEAD in tensors:
        tensors[_EMBEDDING] = tensors[_HEAD]
    first = tensors.get("transformer.h.0.attn.c_attn.weight")
    if first is not None and first.dim() == 2 and first.shape[1] == 3 * first.shape[0]:
        for name in list(tensors):
            if name.endswith(_TRANSPOSED):
                tensors[name] = tensors[name].t()
    return tensors


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What weights by own names tell of the configuration.

    Raises:
        ValueError: no embeddings.
    """
    for name in (_EMBEDDING, "transformer.wpe.weight"):
        if name not in state:
            raise ValueError(f"not the weights of a GPT-2: missing {name}")
    layers = [int(match[1]) for name in state if (match := re.match(r"transformer\.h\.(\d+)\.", name))]
    return {
        "vocab_size": state[_EMBEDDING].shape[0],
        "sequence_length": state["transformer.wpe.weight"].shape[0],
        "n_layer": 1 + max(layers),
        "n_embd": state[_EMBEDDING].shape[1],
        "bias": "transformer.ln_f.bias" in state,
        "tie_word_embeddings": _HEAD not in state or torch.equal(state[_HEAD], state[_EMBEDDING]),
    }


def load(model: GPT2, state: Mapping[str, Tensor]) -> None:
    """Copy weights by own names into the model.

    Raises:
        ValueError: names or shapes that do not belong to a GPT-2 of this size, listed; a head that is not the embedding
            it is tied to.
    """
    if model.tied_weights and _HEAD in state and not torch.equal(state[_HEAD], state[_EMBEDDING]):
        raise ValueError(
            f"{_HEAD} differs from {_EMBEDDING}, but tie_word_embeddings = true; false reads the head as it is"
        )
    tensors = {name: tensor for name, tensor in state.items() if name not in model.tied_weights}
    load_renamed(model, tensors, tied=model.tied_weights, what="GPT-2")


_MODEL_ARGS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "sequence_length",
               "bias": "bias", "vocab_size": "vocab_size", "dropout": "dropout"}  # fmt: skip


def settings_from_nanogpt(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's fields in a nanoGPT checkpoint's `model_args`.

    Raises:
        ValueError: a field that nanoGPT does not have, as forks write.
    """
    unknown = {name: value for name, value in model_args.items() if name not in _MODEL_ARGS}
    if unknown:
        raise ValueError(
            f"model_args: {', '.join(f'{name} = {value!r}' for name, value in unknown.items())}: nanoGPT has no such "
            f"field; there are: {', '.join(_MODEL_ARGS)}"
        )
    return {_MODEL_ARGS[name]: value for name, value in model_args.items() if value is not None}


# Defaults and second names of transformers' GPT2Config, as far as they change the function.
HUGGINGFACE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
HUGGINGFACE_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_OWN_FIELDS = {
    "vocab_size": "vocab_size",
    "n_positions": "sequence_length",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "scale_attn_weights": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings": "tie_word_embeddings",
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def config_from_huggingface(content: Mapping[str, Any]) -> GPT2Config:
    """The configuration of a `config.json` of HF's GPT-2.

    Raises:
        ValueError: a field with a value that this GPT-2 does not have.
    """
    width = content.get("n_embd", content.get("hidden_size", HUGGINGFACE_DEFAULTS["n_embd"]))
    supported = {
        "n_inner": (None, 4 * width if isinstance(width, int) else None),
        "add_cross_attention": (False, None),
        "is_causal": (True, None),
    }
    found = read_settings(content, HUGGINGFACE_DEFAULTS, HUGGINGFACE_ALIASES, supported)
    if len({found[name] for name in _DROPOUTS}) > 1:
        said = ", ".join(f"{name} = {found[name]}" for name in _DROPOUTS)
        raise ValueError(
            f"config.json: {said} is not supported: this GPT-2 has one dropout for all; with 0 for all three the "
            "outputs are the same"
        )
    return GPT2Config(
        activation=read_activation_name(found["activation_function"], "activation_function"),
        dropout=found["resid_pdrop"],
        **{own: found[name] for name, own in _OWN_FIELDS.items()},
    )


def to_huggingface(
    config: GPT2Config, activation: str, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and the weights as transformers names them.

    Raises:
        ValueError: a GPT-2 without biases, or with other parts.
    """
    if parts := changed_parts(config):
        said = ", ".join(f"{name}: {part}" for name, part in parts.items())
        raise ValueError(f"transformers' GPT-2 has no {said}; write the own format instead")
    if not config.bias:
        raise ValueError("transformers' GPT-2 has biases; this one has none: write the own format instead")
    described = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new" if activation == "gelu_tanh" else activation,
        **dict.fromkeys(_DROPOUTS, config.dropout),
        **{name: getattr(config, own) for name, own in _OWN_FIELDS.items()},
    }
    return described, {name: tensor.t() if name.endswith(_TRANSPOSED) else tensor for name, tensor in state.items()}


ARCHITECTURE = PublishedArchitecture(
    name="gpt2",
    title="GPT-2",
    config=GPT2Config,
    build=GPT2,
    data="text",
    task="language_modelling",
    presets=GPT2_PRESETS,
    activation="activation",
    activation_widths=GPT2Config.activation_widths,
    prepare=lambda tokens: tokens,
    example=lambda config: (torch.arange(min(8, config.sequence_length))[None] * 7 + 1) % config.vocab_size,
    landmark=r"((?:[^.]+\.)*?)(?:transformer\.)?h\.0\.attn\.c_attn\.weight",
    own_names=own_names,
    sizes=sizes,
    told={"model_args": settings_from_nanogpt},
    asked=lambda _state: {
        "n_head": "12 for the published GPT-2 of 124M parameters",
        "activation": "gelu_tanh for the published GPT-2 and nanoGPT before July 2023, gelu for nanoGPT since",
    },
    load=load,
    huggingface=HuggingFace(
        model_type="gpt2",
        classes=("GPT2LMHeadModel", "GPT2Model"),
        config_class="GPT2Config",
        auto_classes={"AutoModel": "GPT2Model", "AutoModelForCausalLM": "GPT2LMHeadModel"},
        tokenizer_class="GPT2Tokenizer",
        activation_name=lambda name: name.removesuffix("activation") + "act",
        tokens={"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": None},
        read=config_from_huggingface,
        write=to_huggingface,
    ),
)
