"""A GPT-2 of sums and products as a circuit: what a server computes from embedded tokens, norms and scales folded in.

Looking up embeddings and taking the largest logit stay with whoever has the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.factors import describe_factors
from polytrope.models.gpt2 import GPT2
from polytrope.models.parts.attention import EPSILON, PowerAttention, Reciprocal
from polytrope.models.parts.feedforward import QuadraticLinear
from polytrope.models.parts.mu import MuLayer
from polytrope.models.parts.norm import BatchNorm, InverseRoot, RMSNorm, fold_into_linear
from polytrope.models.parts.reciprocal import INVERSE_ROOT, RECIPROCAL, NewtonPolynomial
from polytrope.models.parts.settings import InverseRootSettings, ReciprocalSettings
from polytrope.models.per_layer import Entry
from polytrope.ops import Composition, LearnableActivation
from polytrope.ops.circuit import Circuit, make_circuit
from polytrope.ops.moments import curve_of


class CircuitForm(nn.Module):
    """`[1, positions, width]` embedded tokens → `[1, positions, vocabulary]` logits, float32, by sums and products.

    Args:
        model: in which every part is a polynomial; its norms are as in evaluation mode.
        ranges: (lo, hi) of the inputs of each activation, by the number of its block: polynomials are written in
            Chebyshev form there, which changes nothing but rounding and depth.
        positions: of every input; each has its own count of visible positions.

    Raises:
        ValueError: a part that is no polynomial, with its name and what to use instead.
    """

    def __init__(self, model: GPT2, ranges: Mapping[int, tuple[float, float]], positions: int) -> None:
        super().__init__()
        refuse_other_parts(model)
        self.blocks = len(model.blocks)
        for number, block in enumerate(model.blocks):
            reach = None if activation_of(block) is None else ranges[number]
            self.add_module(f"block_{number}", _Block(block, reach, positions))
        last: Any = model.transformer["ln_f"]
        self.last_norm = _normalisation(last)
        self.head = fold_into_linear(last, model.lm_head)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.blocks):
            x = getattr(self, f"block_{number}")(x)
        logits: Tensor = self.head(self.last_norm(x))
        return logits


def embed(model: GPT2, tokens: Tensor) -> Tensor:
    """What goes into the circuit: `[batch, positions]` token ids → `[batch, positions, width]`."""
    return model._embed(tokens, 0)


def activation_of(block: nn.Module) -> nn.Module | None:
    """The activation of the block's MLP, where it has one."""
    mlp: Any = block.mlp
    activation: nn.Module | None = mlp.activation
    return activation


def reciprocal_of(block: nn.Module) -> nn.Module:
    """What stands for the division in the block's attention."""
    attention = block.attn
    assert isinstance(attention, PowerAttention)
    return attention.reciprocal


def refuse_other_parts(model: GPT2, *, divisions: bool = False) -> None:
    """Raise `ValueError` for the first part of the model, in the order of its computation, that is no polynomial.

    Args:
        divisions: those of attention, and roots in norms, are let pass.
    """
    for name in describe_factors(model):
        raise ValueError(f"{name}: two factors in a row are not folded; merge them first (merge_factors)")
    for number, block in enumerate(model.blocks):
        name = f"transformer.h.{number}"
        _refuse_norm(f"{name}.ln_1", block.ln_1, divisions)
        attention = block.attn
        if not isinstance(attention, PowerAttention):
            raise ValueError(
                f"{name}.attn: {type(attention).__name__} is no polynomial; train with attention: "
                "{name: power, power: 2}"
            )
        if not (divisions or isinstance(attention.reciprocal, NewtonPolynomial)):
            raise ValueError(f"{name}.attn.reciprocal: {type(attention.reciprocal).__name__} divides")
        _refuse_norm(f"{name}.ln_2", block.ln_2, divisions)
        mlp: Any = block.mlp
        _refuse_layer(f"{name}.mlp.c_fc", mlp.c_fc)
        if (activation := activation_of(block)) is not None:
            _refuse_activation(f"{name}.mlp.activation", activation)
        _refuse_layer(f"{name}.mlp.c_proj", mlp.c_proj)
    _refuse_norm("transformer.ln_f", model.transformer["ln_f"], divisions)


def _refuse_norm(name: str, norm: Any, divisions: bool) -> None:
    if isinstance(norm, RMSNorm):
        if not (divisions or isinstance(norm.inverse_root, NewtonPolynomial)):
            raise ValueError(f"{name}.inverse_root: {type(norm.inverse_root).__name__} divides by a root")
    elif not isinstance(norm, BatchNorm):
        raise ValueError(f"{name}: {type(norm).__name__} divides by a root; train with norm: batch or norm: rms")


def _refuse_layer(name: str, layer: Any) -> None:
    if isinstance(layer, MuLayer):
        for number, norm in enumerate(layer.norms):
            if not isinstance(norm, BatchNorm):
                raise ValueError(
                    f"{name}.norms.{number}: {type(norm).__name__} divides by a root; train with feedforward: mu or "
                    "{name: mu, norm: batch}"
                )
    elif not isinstance(layer, nn.Linear | QuadraticLinear):
        raise ValueError(f"{name}: {type(layer).__name__} divides; train with feedforward: mlp, gated, quadratic or mu")


def _refuse_activation(name: str, activation: Any) -> None:
    degree = activation.polynomial_degree() if isinstance(activation, LearnableActivation) else None
    if degree is None or activation.interval is not None:
        what = type(activation).__name__ + (" with tangents" if degree is not None else "")
        raise ValueError(
            f"{name}: {what} is no polynomial; train with activation: {{name: hermite, degree: 3, init: stable}}, or "
            "convert with polynomial_only"
        )
    if activation.num_parameters > 1:
        raise ValueError(f"{name}: coefficients per channel are not written as a circuit; use num_parameters: 1")


class _Block(nn.Module):
    def __init__(self, block: Any, reach: tuple[float, float] | None, positions: int) -> None:
        super().__init__()
        self.attention = _Attention(block.ln_1, block.attn, positions)
        self.mlp = _MLP(block.ln_2, block.mlp, reach)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Power attention; what its scores are multiplied by is in the queries' weights."""

    share: Tensor
    rest: Tensor
    shift: Tensor
    ones: Tensor

    def __init__(self, norm: BatchNorm | RMSNorm, attention: PowerAttention, positions: int) -> None:
        super().__init__()
        self.normalised = _normalisation(norm)
        self.heads = attention.n_head
        self.power = attention.settings.power
        self.c_attn = fold_into_linear(norm, attention.c_attn)
        width = self.c_attn.in_features
        with torch.no_grad():
            gain = (attention.alpha.double() * attention.scale).repeat_interleave(width // self.heads)
            for part in (self.c_attn.weight, self.c_attn.bias):
                queries = part[:width]
                queries.copy_(queries.double() * gain.reshape(-1, *[1] * (queries.dim() - 1)))
        self.c_proj = attention.c_proj
        visible = torch.ones(positions, positions, dtype=torch.float64).tril()
        counted = visible.sum(-1, keepdim=True) + attention.settings.sinks
        self.register_buffer("share", (visible / counted).float())
        self.register_buffer("rest", (EPSILON + attention.settings.sinks / counted).float())
        self.register_buffer("shift", attention.beta.detach().float()[:, None, None].clone())
        self.register_buffer("ones", torch.ones(positions, 1))
        reciprocal = attention.reciprocal
        assert isinstance(reciprocal, NewtonPolynomial)
        self.reciprocal = _Newton(reciprocal)

    def forward(self, x: Tensor) -> Tensor:
        length, width = x.shape[1:]
        split = [self._by_head(part, length, width) for part in _thirds(self.c_attn(self.normalised(x)), width)]
        query, key, value = split
        powers = query @ key.transpose(-1, -2) + self.shift
        for _ in range(self.power // 2):
            powers = powers * powers
        means = powers * self.share
        mixed = (means @ value) * self.reciprocal(means @ self.ones + self.rest)
        merged: Tensor = self.c_proj(mixed.transpose(1, 2).reshape(1, length, width))
        return merged

    def _by_head(self, x: Tensor, length: int, width: int) -> Tensor:
        return x.reshape(1, length, self.heads, width // self.heads).transpose(1, 2)


def _thirds(x: Tensor, width: int) -> list[Tensor]:
    """Slices; the exporter would make a `Split` of `split`."""
    return [x[..., start : start + width] for start in (0, width, 2 * width)]


class _Newton(nn.Module):
    def __init__(self, polynomial: NewtonPolynomial) -> None:
        super().__init__()
        self.circuit = polynomial.polynomial.circuit()
        self.newton = polynomial.settings.newton
        self.step = polynomial.form.step

    def forward(self, d: Tensor) -> Tensor:
        r: Tensor = self.circuit.run(d)
        for _ in range(self.newton):
            r = self.step(d, r)
        return r


class _RootMeanSquare(nn.Module):
    """x / √m of `RMSNorm`; its weight is folded into what follows."""

    shares: Tensor

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        width = norm.weight.numel()
        self.register_buffer("shares", torch.full((width, 1), 1.0 / width))
        self.epsilon = norm.epsilon
        assert isinstance(norm.inverse_root, NewtonPolynomial)
        self.inverse_root = _Newton(norm.inverse_root)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x * self.inverse_root((x * x) @ self.shares + self.epsilon)
        return result


def _normalisation(norm: BatchNorm | RMSNorm) -> nn.Module:
    """What stands before the linear layer that the norm is folded into."""
    return _RootMeanSquare(norm) if isinstance(norm, RMSNorm) else nn.Identity()


class _MLP(nn.Module):
    def __init__(self, norm: BatchNorm | RMSNorm, mlp: Any, reach: tuple[float, float] | None) -> None:
        super().__init__()
        self.normalised = _normalisation(norm)
        self.gated = mlp.gated
        self.inner: nn.Module
        if isinstance(mlp.c_fc, nn.Linear):
            self.inner = fold_into_linear(norm, mlp.c_fc)
        elif isinstance(mlp.c_fc, MuLayer):
            self.inner = _Mu(norm, mlp.c_fc)
        else:
            self.inner = nn.Sequential(_Affine(norm), _Quadratic(mlp.c_fc))
        self.circuit = None if reach is None else activation_circuit(mlp.activation, *reach)
        self.outer = mlp.c_proj if isinstance(mlp.c_proj, nn.Linear) else _Quadratic(mlp.c_proj)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(self.normalised(x))
        if self.circuit is None:
            pass
        elif self.gated:
            half = hidden.shape[-1] // 2
            hidden = self.circuit.run(hidden[..., :half]) * hidden[..., half:]
        else:
            hidden = self.circuit.run(hidden)
        projected: Tensor = self.outer(hidden)
        return projected


class _Affine(nn.Module):
    """A norm in front of a layer that it cannot be folded into."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: BatchNorm | RMSNorm) -> None:
        super().__init__()
        for name, value in zip(("scale", "shift"), norm.affine(), strict=True):
            self.register_buffer(name, value.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _Mu(nn.Module):
    """`MuLayer` as one product of two linear maps: a + α · a ⊙ b = a ⊙ (1 + α b), where norms are affine."""

    def __init__(self, norm: BatchNorm | RMSNorm, layer: MuLayer) -> None:
        super().__init__()
        self.first = fold_into_linear(norm, layer.linear)
        self.reduce = fold_into_linear(norm, layer.reduce)
        self.second = nn.Linear(layer.expand.in_features, layer.expand.out_features)
        with torch.no_grad():
            bias = layer.expand.bias
            self.second.weight.copy_(layer.expand.weight)
            self.second.bias.copy_(torch.zeros_like(self.second.bias) if bias is None else bias)
            if layer.norms:
                _apply_behind(self.first, *layer.norms[0].affine())  # type: ignore[operator]
                _apply_behind(self.second, *layer.norms[1].affine())  # type: ignore[operator]
            _apply_behind(self.second, layer.alpha.double(), torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.first(x) * self.second(self.reduce(x))
        return product


def _apply_behind(linear: nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Make it what it was times `scale` plus `shift`, which are float64 `[outputs]` or `[1]`."""
    linear.weight.copy_(linear.weight.double() * scale[:, None])
    linear.bias.copy_(linear.bias.double() * scale + shift)


class _Quadratic(nn.Module):
    """`QuadraticLinear` with products for its square."""

    def __init__(self, layer: QuadraticLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        result = nn.functional.linear(x, layer.weight, layer.bias) * nn.functional.linear(
            x, layer.gate_weight, layer.gate_bias
        )
        if layer.square_weight is not None:
            result = result + nn.functional.linear(x * x, layer.square_weight, layer.constant)
        elif layer.constant is not None:
            result = result + layer.constant
        return result


def activation_circuit(activation: Any, low: float, high: float) -> Circuit:
    """A polynomial activation as a circuit of logarithmic depth; its numbers are written for inputs in [low, high], or
    around the one input that there is.

    Raises:
        ValueError: of a polynomial that has no plain coefficients.
    """
    if isinstance(activation, Composition):
        return activation.circuit()
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # it is a range of nothing but rounding
        low, high = low - 0.5, high + 0.5
    curve, _ = curve_of(activation)
    series = np.polynomial.Chebyshev.interpolate(
        lambda x: curve(x)[0], activation.polynomial_degree(), domain=[low, high]
    )
    return make_circuit([series.coef.tolist()], (low + high) / 2, (high - low) / 2, gated=False)


def with_divisions(model: GPT2) -> None:
    """Put divisions and roots back where polynomials stand for them, as in a model that was exported before."""
    for block in model.blocks:
        attention = block.attn
        assert isinstance(attention, PowerAttention)
        attention.reciprocal = Reciprocal()
    for norm in rms_norms(model).values():
        norm.inverse_root = InverseRoot()


def rms_norms(model: GPT2) -> dict[str, RMSNorm]:
    """Those of a model, by name, in the order of their computation."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RMSNorm)}


def with_inverse_roots(model: GPT2, domains: Sequence[tuple[float, float]], degree: int, newton: int) -> None:
    """Put a polynomial in the place of every root in a norm, in the model and in its configuration.

    Args:
        domains: (low, high) of the mean squares of each norm, as of `rms_norms`.
    """
    root = InverseRootSettings(degree=degree, newton=newton, domains=tuple(domains))
    settings = dataclasses.replace(model.config.norm_settings(), root=root)  # type: ignore[call-arg]
    for number, norm in enumerate(rms_norms(model).values()):
        norm.settings = settings  # type: ignore[assignment]
        norm.inverse_root = NewtonPolynomial(root.of(number), INVERSE_ROOT).to(norm.weight.device).eval()
    model.config = dataclasses.replace(model.config, norm=settings.config())


def with_reciprocals(model: GPT2, domains: Mapping[int, tuple[float, float]], degree: int, newton: int) -> None:
    """Put a polynomial in the place of every division of attention, in the model and in its configuration.

    Args:
        domains: (low, high) of what is divided by, by the number of the block.
    """
    entries: list[Entry] = []
    for number, block in enumerate(model.blocks):
        attention = block.attn
        assert isinstance(attention, PowerAttention)
        settings = ReciprocalSettings(degree=degree, newton=newton, domain=domains[number])
        attention.settings = dataclasses.replace(attention.settings, reciprocal=settings)
        attention.reciprocal = NewtonPolynomial(settings, RECIPROCAL).to(attention.alpha.device).eval()
        entries.append(attention.settings.config())
    model.config = dataclasses.replace(model.config, attention=entries)
