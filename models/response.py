"""How far an activation moves when its coefficients do: what a learning rate means in its coordinates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polytrope.ops import Composition, LearnableActivation

_POINTS = 65


def response(activation: LearnableActivation, inputs: Tensor | None = None) -> float:
    """R: the root mean square of |∂F/∂coefficients| with the present ones, over groups of channels and over x.

    Args:
        inputs: the values of x `[n]`; default: evenly over the interval, the domain, or [-4, 4].
    """
    low, high = activation.domain if isinstance(activation, Composition) else activation.interval or (-4.0, 4.0)
    definition = activation.definition()
    numbers = [activation.get_parameter(name).detach().double().cpu().requires_grad_() for name in definition.initial]
    grid = torch.linspace(low, high, _POINTS, dtype=torch.float64) if inputs is None else inputs.double().cpu()
    if activation.accepts_groups:
        grid = grid[:, None].expand(-1, activation.num_parameters).contiguous()
    options = {**definition.options, **({"dim": -1, "glu": False} if activation.accepts_groups else {})}
    values = definition.function(grid, *numbers, **options)
    squares: list[Tensor] = []
    for value in values:
        gradients = torch.autograd.grad(value.sum(), numbers, retain_graph=True)
        squares.append(torch.stack([gradient.square().sum() for gradient in gradients]).sum())
    return math.sqrt(float(torch.stack(squares).mean()) / activation.num_parameters)
