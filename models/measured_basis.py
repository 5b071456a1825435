"""The polynomials of a model in the basis that is orthonormal on the inputs they get: the same functions.

(OptBasis of Guo, Wei, Graph Neural Networks with Learnable and Optimal Polynomial Bases, 2023, for activations; the
procedure and its source are in `ops.fitting.measured_basis`.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from polytrope.models.calibration import calibrate
from polytrope.models.inputs import forward
from polytrope.models.parts.reciprocal import certified_modules
from polytrope.models.surgery import Activation, replace_module
from polytrope.ops.fitting.measured_basis import in_measured_basis
from polytrope.ops.interpolate import built_module
from polytrope.ops.modules import OrthogonalPolynomial


def write_in_measured_basis(model: nn.Module, batches: Iterable[Any]) -> list[str]:
    """Give each polynomial of `model` with one set of coefficients and a recurrence that does not learn the recurrence
    that is orthonormal on its inputs inside its interval; it computes the same, to rounding. In place.

    Args:
        batches: as of `inputs.forward`; positions in them all count.

    Returns:
        The names of the activations that were rewritten, in the order of the modules.

    Raises:
        ValueError: there is no such polynomial, or one gets fewer different inputs than its degree needs.
    """
    fixed = certified_modules(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, OrthogonalPolynomial)
        and module not in fixed
        and not module.learnable_recurrence
        and module.num_parameters == 1
    }
    if not found:
        raise ValueError(
            "no activation is a polynomial (hermite, chebyshev, legendre) in its family's basis, with one set of "
            "coefficients"
        )
    seen = calibrate(model, [Activation(name, module) for name, module in found.items()], batches, forward)
    for name, module in found.items():
        coefficients = module.coefficients.detach().double().cpu().numpy().reshape(-1)
        dtype = module.coefficients.dtype
        try:
            parameters: dict[str, np.ndarray] = in_measured_basis(
                coefficients, module.name, seen[name].measure(), module.interval, module.variable, dtype
            )
        except ValueError as error:
            raise ValueError(f"activation `{name}`: {error}") from error
        made = built_module({**module.config(), "learnable_recurrence": True}, parameters, dtype)
        replace_module(model, name, made.to(module.coefficients.device).train(module.training))
    return list(found)
