"""Weights of linear layers rounded to few bits, on a grid whose power is chosen by what comes out of each layer.

(Yvinec, Dapogny, Bailly, NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search, 2023: that powers are
maps that keep products, and the search; that it goes by the error of the outputs is ours.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.models.changes import Quantization, QuantizedLayer, UnchangedLayer
from polytrope.models.convert_options import Quantize
from polytrope.models.equalize import equalize_layers
from polytrope.models.factorize import Forward, choose_linear_layers, in_order, measure_inputs, weight_and_inputs
from polytrope.models.surgery import Choice, is_activation

EXPONENTS = tuple(round(0.2 + 0.05 * step, 2) for step in range(17))  # 0.2 to 1
SCALE_BYTES = 4  # of the largest weight of a row, or of a layer


def round_weight(weight: Tensor, bits: int, exponent: float, per: str) -> Tensor:
    """sign(w) (round(|w|ᵃ / s · n) · s / n)^(1/a) with n = 2^(bits - 1) - 1 and s the largest |w|ᵃ.

    Args:
        weight: `[outputs, inputs]`.
        bits: of a weight, its sign among them.
        exponent: a; 1 gives the uniform grid.
        per: `row`: s of each row; `tensor`: of the whole matrix.
    """
    levels = 2 ** (bits - 1) - 1
    powers = weight.abs().pow_(exponent)
    largest = powers.amax(dim=1, keepdim=True) if per == "row" else powers.amax()
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    steps = powers.div_(largest).mul_(levels).round_()  # in place: a search spends half its time on new memory
    return steps.mul_(largest / levels).pow_(1 / exponent).copysign_(weight)


def output_error(error: Tensor, gram: Tensor) -> float:
    """Σ |E x|² over the inputs.

    Args:
        error: E `[outputs, inputs]` float64, of the weights.
        gram: XᵀX `[inputs, inputs]` float64.
    """
    return max(0.0, float((error @ gram).mul_(error).sum()))


def parameter_bytes(model: nn.Module) -> int:
    """What all parameters take as they are; one that modules share counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def quantize_layers(
    model: nn.Module,
    batches: Sequence[Any],
    options: Quantize,
    choice: Choice,
    forward: Forward,
    *,
    walk: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Quantization:
    """Round the weights of linear layers of `model`, in place; measured and rounded in float64.

    Args:
        batches: calibration data; positions that an `attention_mask` hides do not count.
        choice: which layers, by the patterns and numbers in their names; heads, poolers and weights that modules share
            stay.
        walk: gives the batches, and may say how far it is.

    Raises:
        ValueError: no layer is rounded, or with `equalize` no activation takes up a scale.
    """
    linears, left = choose_linear_layers(model, choice, inside_factors=True)
    for name, module in model.named_modules():
        if name in linears or name in left or is_activation(module):
            continue
        if any(parameter is not None and parameter.dim() > 1 for parameter in module._parameters.values()):
            left[name] = f"weights of linear layers alone are rounded, not of {type(module).__name__}"
    equalized, unequalized = equalize_layers(model, linears, batches, forward) if options.equalize else ((), ())
    grams = measure_inputs(model, linears, batches, forward, walk)
    before = parameter_bytes(model)
    after = before
    layers = []
    for name, linear in linears.items():
        made = _rounded(name, linear, grams.pop(name, None), options)
        if isinstance(made, str):
            left[name] = made
            continue
        described, weight = made
        scales = len(weight) if options.per == "row" else 1
        after += (weight.numel() * options.bits + 7) // 8 + scales * SCALE_BYTES
        after -= weight.numel() * linear.weight.element_size()
        linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        layers.append(described)
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:4])
        said = reasons or "it has none"
        raise ValueError(f"quantize: no linear layer of {type(model).__name__} is rounded ({said})")
    rest = tuple(UnchangedLayer(name, reason) for name, reason in in_order(model, left))
    return Quantization(options.bits, options.per, tuple(layers), rest, equalized, unequalized, before, after)


def _rounded(
    name: str, linear: nn.Linear, gram: Tensor | None, options: Quantize
) -> tuple[QuantizedLayer, Tensor] | str:
    """The rounded weights in the dtype of the layer, or why there are none."""
    figures = weight_and_inputs(linear, gram)
    if isinstance(figures, str):
        return figures
    weight, gram = figures
    whole = output_error(weight, gram)
    if not whole > 0:
        return "its outputs are all 0 on the calibration data"

    def attempt(exponent: float) -> tuple[float, float, Tensor]:
        found = round_weight(weight, options.bits, exponent, options.per).to(linear.weight.dtype)
        return output_error(found.double() - weight, gram), -exponent, found

    uniform = attempt(1.0)
    if options.exponent == "search":
        best = min((uniform, *map(attempt, EXPONENTS[:-1])), key=lambda entry: entry[:2])
    else:
        best = attempt(float(options.exponent))
    lost, negative, found = best
    outputs, inputs = weight.shape
    described = QuantizedLayer(name, inputs, outputs, -negative, (lost / whole) ** 0.5, (uniform[0] / whole) ** 0.5)
    return described, found.to(linear.weight.device)
