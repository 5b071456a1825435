"""Causal self-attention, `[batch, positions, width]` to the same shape: how scores become weights is the part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.parts.polynomial_mixer import CausalPolynomialMixer
from polytrope.models.parts.ranges import RangePenalty
from polytrope.models.parts.settings import Attention, PolynomialMixerSettings, PowerSettings, SoftmaxSettings
from polytrope.models.per_layer import Entry

EPSILON = 1e-3  # added to the mean of powers that `power` divides by


@dataclass(frozen=True)
class AttentionSizes:
    """What the model says of an attention.

    Args:
        width: of the vectors.
        heads: how many; divides `width`.
        bias: whether its linear layers have one.
        dropout: probability of dropping a weight, and an output.
        scale: that products of queries and keys are multiplied by.
    """

    width: int
    heads: int
    bias: bool
    dropout: float
    scale: float


class KeysAndValues(NamedTuple):
    """What attention remembers of earlier positions: `[batch, heads, positions, head size]` each."""

    key: Tensor
    value: Tensor


class SoftmaxAttention(nn.Module):
    """softmax(q·k · scale): multi-head attention as usual, fused."""

    def __init__(self, settings: SoftmaxSettings, sizes: AttentionSizes) -> None:
        super().__init__()
        self.settings = settings
        self.c_attn = nn.Linear(sizes.width, 3 * sizes.width, bias=sizes.bias)
        self.c_proj = nn.Linear(sizes.width, sizes.width, bias=sizes.bias)
        self.residual_dropout = nn.Dropout(sizes.dropout)
        self.n_head = sizes.heads
        self.dropout = sizes.dropout
        self.scale = sizes.scale

    def config(self) -> Entry:
        """What builds it again."""
        return self.settings.config()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_cache(x, None)[0]

    def forward_with_cache(self, x: Tensor, past: KeysAndValues | None) -> tuple[Tensor, KeysAndValues]:
        """For positions that follow those of `past`; the second result is what the next ones need."""
        length = x.size(1)
        query, key, value = split_heads(self.c_attn(x), self.n_head)
        if past is not None:
            key, value = torch.cat((past.key, key), dim=2), torch.cat((past.value, value), dim=2)
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
            scale=self.scale,
        )
        return self.residual_dropout(self.c_proj(merge_heads(mixed))), KeysAndValues(key, value)


class Reciprocal(nn.Module):
    """1/d, as a module: whoever wants a polynomial in its place exchanges it."""

    def forward(self, d: Tensor) -> Tensor:
        return d.reciprocal()


class RecurrentState(NamedTuple):
    """What power attention remembers of earlier positions, however many.

    Args:
        sums: `[batch, heads, features, head size + 1]`: of products of two entries of a key (or of one, or none), times
            the value and 1.
        positions: how many.
    """

    sums: Tensor
    positions: int


class PowerAttention(nn.Module):
    """Weights u_ij / n_i / (m_i + ε), u = (α q·k · scale + β)^p, n_i visible positions, m_i = Σ_j u_ij / n_i.

    Sums and products, and one division by a number per row whose size does not grow with the number of positions. With
    `sinks` s, n_i has s positions more, whose u is 1 and whose value is 0: m_i = (s + Σ_j u_ij) / n_i, which is a mean
    of several numbers for the first positions too, and never below s / n_i.
    α and β are learned, one of each per head: without β, keys near q and near -q would weigh the same. Half precision
    is left for float32 between the two matrix products. (Zimerman et al., Power-Softmax: Towards Secure LLM Inference
    over Encrypted Data, 2024, has x^p / Σ x^p; α, β and n are ours.)
    """

    def __init__(self, settings: PowerSettings, sizes: AttentionSizes) -> None:
        super().__init__()
        self.settings = settings
        self.c_attn = nn.Linear(sizes.width, 3 * sizes.width, bias=sizes.bias)
        self.c_proj = nn.Linear(sizes.width, sizes.width, bias=sizes.bias)
        self.alpha = nn.Parameter(torch.full((sizes.heads,), 3.0))
        self.beta = nn.Parameter(torch.ones(sizes.heads))
        self.reciprocal: nn.Module = Reciprocal()
        if settings.reciprocal is not None:
            from polytrope.models.parts.reciprocal import RECIPROCAL, NewtonPolynomial

            self.reciprocal = NewtonPolynomial(settings.reciprocal, RECIPROCAL)
        self.n_head = sizes.heads
        self.scale = sizes.scale
        self.ranges: RangePenalty | None = None

    def config(self) -> Entry:
        """What builds it again."""
        return self.settings.config()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = split_heads(self.c_attn(x), self.n_head)
        return self._mixed(self._powers(query, key), value, x.dtype)

    def forward_with_cache(
        self, x: Tensor, past: KeysAndValues | RecurrentState | None
    ) -> tuple[Tensor, KeysAndValues | RecurrentState]:
        """For positions that follow those of `past`; the second result is what the next ones need."""
        query, key, value = split_heads(self.c_attn(x), self.n_head)
        if self.settings.recurrent:
            assert not isinstance(past, KeysAndValues)
            return self._step(query, key, value, past, x.dtype)
        if past is not None:
            assert isinstance(past, KeysAndValues)
            key, value = torch.cat((past.key, key), dim=2), torch.cat((past.value, value), dim=2)
        return self._mixed(self._powers(query, key), value, x.dtype), KeysAndValues(key, value)

    def _powers(self, query: Tensor, key: Tensor) -> Tensor:
        """u of all pairs, `[batch, heads, queries, keys]`; the queries are the last positions."""
        scores = _wide(query @ key.transpose(-1, -2))
        alpha, beta = (_wide(parameter)[:, None, None] for parameter in (self.alpha, self.beta))
        return even_power(scores * (alpha * self.scale) + beta, self.settings.power)

    def _mixed(self, powers: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
        means, denominator = causal_means(powers, sinks=self.settings.sinks)
        return self._finish(means @ value.to(means.dtype), denominator, dtype)

    def _finish(self, numerator: Tensor, denominator: Tensor, dtype: torch.dtype) -> Tensor:
        if self.ranges is not None and self.training:
            self.ranges.denominators(denominator)
        mixed: Tensor = self.c_proj(merge_heads((numerator * self.reciprocal(denominator)).to(dtype)))
        return mixed

    def _step(
        self, query: Tensor, key: Tensor, value: Tensor, past: RecurrentState | None, dtype: torch.dtype
    ) -> tuple[Tensor, RecurrentState]:
        """p = 2: (q'·k')² = φ(q')·φ(k') with q' = (α scale q, β), k' = (k, 1), so that sums over keys are enough."""
        length, earlier = query.size(2), past.positions if past is not None else 0
        powers = self._powers(query, key).tril()
        value = _wide(value)
        counted = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)
        sums = powers @ counted
        alpha, beta = (_wide(parameter)[:, None, None] for parameter in (self.alpha, self.beta))
        if past is not None:
            query = _wide(query) * (alpha * self.scale)
            query = torch.cat((query, beta.expand(*query.shape[:1], -1, length, 1)), dim=-1)
            sums = sums + pair_products(query, twice=True) @ past.sums
        key = _wide(key)
        features = pair_products(torch.cat((key, torch.ones_like(key[..., :1])), dim=-1))
        state = features.transpose(-1, -2) @ counted
        sinks = self.settings.sinks
        first = earlier + 1 + sinks
        counted_positions = torch.arange(first, first + length, device=sums.device, dtype=sums.dtype)[:, None]
        means = sums / counted_positions
        denominator = means[..., -1:] + (EPSILON + sinks / counted_positions)
        mixed = self._finish(means[..., :-1], denominator, dtype)
        return mixed, RecurrentState(state if past is None else past.sums + state, earlier + length)


def _wide(x: Tensor) -> Tensor:
    """float32 for half precision, else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def even_power(x: Tensor, power: int) -> Tensor:
    """x² or x⁴, by squaring."""
    return x.square() if power == 2 else x.square().square()


def causal_means(powers: Tensor, epsilon: float = EPSILON, sinks: int = 0) -> tuple[Tensor, Tensor]:
    """(u_ij / n_i, m_i + ε): the weights of attention are the first by the second.

    Args:
        powers: u `[..., queries, keys]`, not negative; the queries are the last of the positions.
        epsilon: ε.
        sinks: how many positions of power 1 come before the first; n_i has them too, the result does not.

    Returns:
        `[..., queries, keys]`, exactly 0 where a key comes later than the query, and `[..., queries, 1]`.
    """
    queries, keys = powers.shape[-2:]
    visible = torch.ones(queries, keys, dtype=powers.dtype, device=powers.device).tril(keys - queries)
    positions = visible.sum(-1, keepdim=True) + sinks
    means = powers * (visible / positions)
    return means, means.sum(-1, keepdim=True) + (epsilon + sinks / positions)


def pair_products(x: Tensor, *, twice: bool = False) -> Tensor:
    """φ(x): products x_i x_j, i ≤ j, `[..., n]` → `[..., n (n + 1) / 2]`.

    Args:
        twice: those of different entries twice, so that φ(x, twice)·φ(y) = (x·y)².
    """
    rows, columns = torch.triu_indices(x.size(-1), x.size(-1), device=x.device).unbind()
    products = x[..., rows] * x[..., columns]
    return products * torch.where(rows == columns, 1.0, 2.0).to(x.dtype) if twice else products


def split_heads(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[batch, heads, positions, head size]` of `[batch, positions, 3 width]`."""
    batch, length, width = x.size(0), x.size(1), x.size(2) // 3
    query, key, value = (
        part.view(batch, length, heads, width // heads).transpose(1, 2) for part in x.split(width, dim=2)
    )
    return query, key, value


def merge_heads(x: Tensor) -> Tensor:
    """`[batch, heads, positions, head size]` → `[batch, positions, width]`."""
    return x.transpose(1, 2).reshape(x.size(0), x.size(2), x.size(1) * x.size(3))


def _polynomial_mixer(settings: PolynomialMixerSettings, sizes: AttentionSizes) -> nn.Module:
    return CausalPolynomialMixer(settings, sizes.width, bias=sizes.bias)


ATTENTIONS: dict[str, Callable[[Any, AttentionSizes], nn.Module]] = {
    "softmax": SoftmaxAttention,
    "power": PowerAttention,
    "polynomial_mixer": _polynomial_mixer,
}


def build_attention(settings: Attention, sizes: AttentionSizes) -> nn.Module:
    """The attention of one block, freshly initialised.

    Args:
        settings: as `parts.settings.read_part("attention", …)` gives them.
    """
    return ATTENTIONS[settings.name](settings, sizes)
