"""GPT-2 (Radford et al., 2019) with a configurable activation: training, evaluation, sampling with a key-value cache.

Parameter names and layouts are those of nanoGPT (`nn.Linear` everywhere); `load_gpt2_state_dict` also takes the layout
of the published weights (`Conv1D`, transposed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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

Cache = list[tuple[Tensor, Tensor]]  # per layer: keys and values [batch, heads, positions, head size]


@dataclass
class GPT2Config:
    """Sizes of a GPT-2; the defaults are those of the 124M model.

    Args:
        vocab_size: rows of the token embedding.
        sequence_length: the longest context, in tokens (learned absolute positions).
        n_layer: number of blocks.
        n_head: attention heads; divides `n_embd`.
        n_embd: width of the residual stream; the MLP is four times as wide.
        activation: one activation of `polytrope.ops.build_activation`, or a list with one per block.
        dropout: of embeddings, attention weights and both residual branches.
        bias: biases in linear layers and layer norms.
    """

    vocab_size: int = 50257
    sequence_length: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    activation: ActivationConfig | list[ActivationConfig] = "gelu_tanh"
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "sequence_length", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        activation_configs(self.activation, self.n_layer)


PRESETS: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1.5B
}


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention; `[batch, positions, n_embd]` to the same shape."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        if past is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        # With a cache the new positions come last: the causal mask is the lower right corner of the full one.
        earlier = key.size(2) - length
        mask = None
        if earlier and length > 1:
            mask = torch.ones(length, key.size(2), dtype=torch.bool, device=x.device).tril(earlier)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=bool(earlier == 0 and length > 1),  # sizes are tensors while tracing
        )
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        return self.residual_dropout(self.c_proj(mixed)), (key, value)


class MLP(nn.Module):
    """Linear to four times the width, activation, linear back."""

    def __init__(self, config: GPT2Config, activation: ActivationConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = make_activation(activation)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        projected = project_activated(self.activation, self.c_proj, self.c_fc(x), recomputes=self.recomputes)
        mixed: Tensor = self.dropout(projected)
        return mixed


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: GPT2Config, activation: ActivationConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, activation)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.attn(self.ln_1(x), past)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), present

    def forward_without_cache(self, x: Tensor) -> Tensor:
        output: Tensor = self(x)[0]
        return output


class GPT2(nn.Module):
    """The language model. `forward` returns logits, or with targets the loss."""

    architecture: ClassVar[str] = "gpt2"
    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: ActivationCheckpointing = "none"
        activations = activation_configs(config.activation, config.n_layer)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.sequence_length, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, activation) for activation in activations),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(_initialise)
        # The residual stream sums 2 * n_layer branches: their last layers start smaller by its root (GPT-2, 2.3).
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
        for block in self.blocks:
            standardize_inputs(block.mlp.c_fc, 0.02)  # type: ignore[union-attr, arg-type]
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]

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

    def current_activations(self) -> ActivationConfig | list[ActivationConfig]:
        """The `activation` setting that describes the blocks as they are now."""
        modules = [block.mlp.activation for block in self.blocks]  # type: ignore[union-attr]
        return current_activations(modules, activation_configs(self.config.activation, self.config.n_layer))  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits `[batch, positions, vocab_size]`, or with `targets` the cross entropy in nats.

        Args:
            tokens: `[batch, positions]` int64, at most `sequence_length` positions.
            targets: `[batch, positions]` int64; -100 marks positions that do not count.
            reduction: of the loss: `mean`, `sum` or `none`.
        """
        x = self._embed(tokens, 0)
        for block in self.blocks:
            assert isinstance(block, Block)
            if self.activation_checkpointing == "block" and torch.is_grad_enabled():
                x = recompute(block.forward_without_cache, x, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x)[0]
        logits: Tensor = self.lm_head(self.transformer["ln_f"](x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction=reduction)

    def forward_with_cache(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits of the last position `[batch, vocab_size]` and the extended cache, for sampling."""
        x = self._embed(tokens, cache[0][0].size(2) if cache else 0)
        extended: Cache = []
        for index, block in enumerate(self.blocks):
            x, present = block(x, cache[index] if cache else None)
            extended.append(present)
        return self.lm_head(self.transformer["ln_f"](x[:, -1])), extended

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        end = start + tokens.size(1)
        if end > self.config.sequence_length:
            raise ValueError(f"{end} positions, but the model has {self.config.sequence_length} (sequence_length)")
        positions = torch.arange(start, end, device=tokens.device)
        embedded: Tensor = self.transformer["drop"](
            self.transformer["wte"](tokens) + self.transformer["wpe"](positions)
        )
        return embedded

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `tokens` `[batch, positions]` by sampling; returns `[batch, positions + max_new_tokens]`.

        Args:
            temperature: divides the logits; 0 takes the most probable token.
            top_k: sample among the k most probable tokens only.
            generator: makes the sample reproducible.

        Past `sequence_length` the window slides by half of it, since learned absolute positions make the cache of a
        shifted window worthless.
        """
        was_training = self.training
        self.eval()
        limit = self.config.sequence_length
        sequence = tokens
        pending, cache = tokens[:, -limit:], None
        for _ in range(max_new_tokens):
            if (cache[0][0].size(2) if cache else 0) + pending.size(1) > limit:
                pending, cache = sequence[:, -max(1, limit // 2) :], None
            logits, cache = self.forward_with_cache(pending, cache)
            pending = sample_token(logits.float(), temperature, top_k, generator)
            sequence = torch.cat((sequence, pending), dim=1)
        self.train(was_training)
        return sequence

    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward per token: 6 N + 12 L H Q T (PaLM, appendix B).

        N leaves out the position embedding (a look-up) and counts the tied token embedding once, for the head.
        """
        config = self.config
        parameters = sum(parameter.numel() for parameter in self.parameters()) - config.sequence_length * config.n_embd
        return 6.0 * parameters + 12.0 * config.n_layer * config.n_embd * config.sequence_length


def sample_token(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row of `logits` `[batch, vocab_size]`; returns `[batch, 1]`."""
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def load_gpt2_state_dict(model: GPT2, state: Mapping[str, Tensor]) -> None:
    """Load weights of nanoGPT, of HF `GPT2LMHeadModel` / `GPT2Model` or of OpenAI's release into `model`.

    `Conv1D` weights (input × output) are told from `nn.Linear` ones by the shape of `c_attn`; causal-mask buffers and
    prefixes of wrappers (`module.`, `_orig_mod.`) are dropped.

    Raises:
        ValueError: names or shapes that do not belong to a GPT-2 of this size, listed.
    """
    tensors: dict[str, Tensor] = {}
    for original, tensor in state.items():
        name = original
        for prefix in ("_orig_mod.", "module."):
            name = name.removeprefix(prefix)
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue
        tensors[name if name.startswith("transformer.") else f"transformer.{name}"] = tensor
    width = model.config.n_embd
    first = tensors.get("transformer.h.0.attn.c_attn.weight")
    if first is not None and tuple(first.shape) == (width, 3 * width):
        for name in list(tensors):
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                tensors[name] = tensors[name].t()
    load_renamed(model, tensors, optional=".activation.", tied=model.tied_weights, what="GPT-2")


def gpt2_config_from_huggingface(config: Mapping[str, Any]) -> GPT2Config:
    """The configuration of a `config.json` of HF's GPT-2."""
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
    name = str(config.get("activation_function", "gelu_new"))
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ValueError(f"n_inner = {config['n_inner']}: only 4 * n_embd is supported")
    return GPT2Config(
        vocab_size=config["vocab_size"],
        sequence_length=config.get("n_positions", 1024),
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        n_embd=config["n_embd"],
        activation=activations.get(name, name),
        dropout=config.get("resid_pdrop", 0.0),
    )
