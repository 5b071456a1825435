"""The activations of a model as they are used: shape, learned settings, and distribution of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.activations import describe_activation
from polytrope.models.checkpoint import activation_modules

POINTS = 121  # of each curve
BINS = 60  # of each density
_SUBSAMPLE = 200_000  # values per layer and pass from which quantiles are taken


def named_activations(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the activation of each block, first block first."""
    return [(f"block {number + 1}", module) for number, module in activation_modules(model).items()]


@torch.no_grad()
def measure_activations(model: nn.Module, forward: Callable[[], Any]) -> list[dict[str, Any]]:
    """Run `forward` once and describe every activation.

    Returns:
        Per block: `x`, `y` (mean over channels), `low`, `high` (over channels, where they differ), `density` of the
        inputs on the bins `edges`, their `mean`, `std`, `minimum`, `maximum`, and `output_mean_square`.
    """
    records: dict[str, dict[str, Any]] = {}
    handles = []
    for name, module in named_activations(model):

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            if name not in records:  # a module shared by several blocks is met more than once
                records[name] = _describe(name, module, inputs[0].detach(), output.detach())

        handles.append(module.register_forward_hook(hook))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    names = dict(named_activations(model))
    for name, record in records.items():
        record.update(_curve(names[name], record.pop("channels"), record["edges"], next(model.parameters())))
    return list(records.values())


def _describe(name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> dict[str, Any]:
    values = inputs.float().flatten().cpu().numpy()
    part = values[:: max(1, values.size // _SUBSAMPLE)]
    low, high = (float(value) for value in np.quantile(part, [0.0005, 0.9995]))
    margin = 0.08 * max(high - low, 1e-3)
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    counts = np.histogram(values, edges)[0]
    density = counts / max(1, values.size) / (edges[1] - edges[0])
    config = getattr(module, "config", None)
    return {
        "name": name,
        "activation": describe_activation(config() if callable(config) else type(module).__name__),
        "channels": inputs.size(-1),
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
        "minimum": float(values.min()),
        "maximum": float(values.max()),
        "output_mean_square": float(output.double().square().mean()),
        "edges": [float(edges[0]), float(edges[-1])],
        "density": _shorten(density),
    }


def _curve(module: nn.Module, channels: int, edges: list[float], like: Tensor) -> dict[str, Any]:
    x = torch.linspace(edges[0], edges[1], POINTS, dtype=torch.float32)
    values = module(x[:, None].expand(-1, channels).contiguous().to(like.device, like.dtype)).double().cpu()
    curve = {"x": _shorten(x.double().numpy()), "y": _shorten(values.mean(dim=1).numpy())}
    low, high = values.amin(dim=1), values.amax(dim=1)
    if float((high - low).max()) > 1e-6:
        curve |= {"low": _shorten(low.numpy()), "high": _shorten(high.numpy())}
    return curve


def _shorten(values: np.ndarray) -> list[float]:
    """Six significant digits are more than a plot shows."""
    return [float(f"{value:.6g}") for value in values]
