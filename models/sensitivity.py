"""How much an error of an activation moves the model's output, by the input at which the error is made.

A fit that counts all inputs alike may be wrong where few of them lie, and still all of a layer's effect may come from
there: a unit that is always far below 0 gives nothing through a GELU, so that no training has limited its weights. To
first order an error e(x) moves the output's square by the mean of (∂ output / ∂ activation)² e(x)², so that is what an
input counts (second derivatives of the loss as in LeCun, Denker and Solla, "Optimal Brain Damage", 1989). It is
measured by a backward pass of random numbers, whose squared gradients have that mean (Hutchinson, "A Stochastic
Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines", 1989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.calibration import Calibration, input_of
from polytrope.models.inputs import counted, mask_of, masks
from polytrope.models.modes import measuring, wrapped_forward
from polytrope.models.surgery import Activation

_PER_UNIT = 4  # bins per unit of asinh((x - mean) / deviation): a quarter of a deviation, wider far out
_ASSUMED = 16  # inputs of average effect that every bin is taken to have beside its own: few tell little
_STEPS = 4  # of a factor, per power of two: the last bits of a gradient decide nothing


@dataclass(frozen=True)
class Sensitivity:
    """How much more an error counts than one at an average input.

    Args:
        edges: between bins, `[bins - 1]`, ascending; the first and last bin are open.
        factors: of the bins, `[bins]`, 1 or more.
    """

    edges: np.ndarray
    factors: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The factors of inputs of any shape."""
        return np.asarray(self.factors[np.searchsorted(self.edges, x, side="right")])


def sensitivities(
    model: nn.Module,
    activations: Sequence[Activation],
    calibrations: Mapping[str, Calibration],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Sensitivity]:
    """Of every activation, measured on some samples; the model is as it was afterwards.

    No input counts less than an average one: what few samples say is no reason to fit it worse. Where no gradient
    reaches, as behind a `torch.no_grad()` of the model, all inputs count alike.

    Raises:
        ValueError: an operation of the model has no gradient.
    """
    bins = {activation.name: _Bins.of(calibrations[activation.name]) for activation in activations}
    modules = [(activation.name, activation.module) for activation in activations]
    generator = torch.Generator().manual_seed(0)
    current: Any = None  # batch

    def wrap(name: str, module: nn.Module) -> Callable[..., Any]:
        return _seen(bins[name], module, lambda x: mask_at(current, module, x))

    with measuring(model), _frozen(model), masks(model) as mask_at, wrapped_forward(modules, wrap):
        for batch in batches:
            current = batch
            try:
                with torch.enable_grad():
                    output = counted(forward(model, batch), mask_of(model, batch))
                if output.requires_grad:
                    vector = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
                    output.backward(vector)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise ValueError(
                    f"how the model's output depends on its activations cannot be measured: {error}; rated_samples=0 "
                    "(--rated-samples 0) lets all inputs count alike"
                ) from error
    return {name: entry.sensitivity() for name, entry in bins.items()}


@dataclass(frozen=True)
class _Bins:
    """Squared gradients by input: their sums, and how many."""

    edges: np.ndarray
    squares: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, calibration: Calibration) -> _Bins:
        points, counts = calibration.measure()
        weights = counts / counts.sum()
        mean = float(weights @ points)
        deviation = float(np.sqrt(weights @ (points - mean) ** 2)) or 1.0
        low, high = (_PER_UNIT * np.arcsinh((end - mean) / deviation) for end in (points[0], points[-1]))
        steps = np.arange(np.floor(low) + 1, np.ceil(high))
        edges = mean + deviation * np.sinh(steps / _PER_UNIT)
        return cls(edges, np.zeros(len(edges) + 1), np.zeros(len(edges) + 1))

    def add(self, bins: Tensor, gradient: Tensor) -> None:
        squares = gradient.detach().flatten().double().square()
        finite = torch.isfinite(squares)
        length = len(self.counts)
        self.squares[:] += torch.bincount(bins[finite], squares[finite], length).cpu().numpy()
        self.counts[:] += torch.bincount(bins[finite], minlength=length).cpu().numpy()

    def sensitivity(self) -> Sensitivity:
        total = self.squares.sum()
        if total <= 0.0:
            return Sensitivity(self.edges, np.ones(len(self.counts)))
        average = total / self.counts.sum()
        factors = (self.squares / average + _ASSUMED) / (self.counts + _ASSUMED)
        rounded = 2.0 ** (np.round(_STEPS * np.log2(np.maximum(factors, 1.0))) / _STEPS)
        return Sensitivity(self.edges, rounded)


def _seen(bins: _Bins, module: nn.Module, mask: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """The module's forward, that notes the gradient of what it gives by what it receives, but at padding."""
    function = module.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        given = input_of((*arguments, *keywords.values()))
        x = given.detach()
        edges = torch.from_numpy(bins.edges).to(x.device, torch.float32)
        hidden = mask(given)
        where = torch.bucketize(counted(x, hidden).float().contiguous(), edges, right=True)  # x may be written over
        output = function(*arguments, **keywords)
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(lambda gradient: bins.add(where.flatten(), counted(gradient, hidden)))
        return output.clone()  # what follows may write to it

    return forward


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of parameters: they would only take time and memory."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
