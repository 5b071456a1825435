"""The tangent kernel of a model as it is: what a step of gradient descent on one sample does to another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def tangent_kernel(model: nn.Module, rows: Tensor, weights: Mapping[str, float] | None = None) -> Tensor:
    """Σ_c ∇f_c(x)·∇f_c(x') over the outputs c, `[samples, samples]` in the dtype of the model's parameters.

    (Jacot, Gabriel, Hongler, Neural Tangent Kernel, 2018)

    Args:
        model: `[samples, inputs]` to `[samples, outputs]`, each sample on its own.
        rows: `[samples, inputs]`.
        weights: by the name of a parameter, what its share is multiplied by; those that are not in it have none.
            None: all parameters count alike.
    """
    parameters = [
        (parameter, 1.0 if weights is None else weights[name])
        for name, parameter in model.named_parameters()
        if weights is None or name in weights
    ]
    outputs = model(rows)
    kernel = torch.zeros(len(rows), len(rows), dtype=outputs.dtype)
    for column in outputs.unbind(dim=1):
        gradients = [
            torch.autograd.grad(value, [parameter for parameter, _ in parameters], retain_graph=True)
            for value in column
        ]
        for (_, weight), of_parameter in zip(parameters, zip(*gradients, strict=True), strict=True):
            flat = torch.stack(of_parameter).flatten(1)
            kernel += weight * (flat @ flat.T)
    return kernel
