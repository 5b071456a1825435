"""Levenberg-Marquardt for the few parameters that enter a fit nonlinearly: frequencies, breakpoints, denominators."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Residuals = Callable[[Array], tuple[Array, Array]]  # parameters → residuals [m], Jacobian [m, parameters]


def refine(residuals: Residuals, start: Array, steps: int = 60, tolerance: float = 1e-12) -> tuple[Array, float]:
    """The best parameters found from `start`, and their sum of squares; never worse than the start."""
    parameters = start.astype(np.float64)
    residual, jacobian = residuals(parameters)
    cost, damping = float(residual @ residual), 1e-3
    for _ in range(steps):
        scale = np.linalg.norm(jacobian, axis=0)
        scale[scale < 1e-12] = 1.0
        scaled = jacobian / scale
        improved = False
        while damping < 1e10:
            stacked = np.concatenate([scaled, np.sqrt(damping) * np.eye(len(parameters))])
            step = np.linalg.lstsq(stacked, np.concatenate([-residual, np.zeros(len(parameters))]), rcond=None)[0]
            candidate = parameters + step / scale
            new_residual, new_jacobian = residuals(candidate)
            new_cost = float(new_residual @ new_residual)
            if np.isfinite(new_cost) and np.isfinite(new_jacobian).all() and new_cost < cost:
                improved = True
                break
            damping *= 4.0
        if not improved:
            break
        gain = (cost - new_cost) / max(cost, 1e-300)
        parameters, residual, jacobian, cost = candidate, new_residual, new_jacobian, new_cost
        damping = max(damping / 6.0, 1e-12)
        if gain < tolerance:
            break
    return parameters, cost
