"""Rows of a linear layer brought to one size, exactly, where the activation behind it takes up their scales.

A polynomial on the whole line with coefficients per channel does: F(s x) is one again. ReLU does for s > 0, together
with the columns of the layer behind it (Nagel, van Baalen, Blankevoort, Welling, Data-Free Quantization Through Weight
Equalization and Bias Correction, 2019); GELU does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import comb, inf
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polytrope.models.changes import EqualizedLayer, UnchangedLayer
from polytrope.models.inputs import head, tensors_of
from polytrope.models.modes import measuring
from polytrope.models.surgery import is_activation, replace_module
from polytrope.ops import build_activation
from polytrope.ops.initialization import to_powers
from polytrope.ops.modules import OrthogonalPolynomial

LARGEST_POWER = 1e4  # of a scale, that goes into coefficients; they lose as many times the rounding of their dtype
Array = npt.NDArray[np.float64]


def scaled_polynomial(module: OrthogonalPolynomial, scales: Array) -> OrthogonalPolynomial:
    """G with coefficients per channel and G(s x) = F(x), s the scale of the channel.

    Args:
        module: F on the whole line, with one row of coefficients or one per channel.
        scales: `[channels]` float64, above 0.
    """
    degree, (shift, size) = module.degree, module.variable or (0.0, 1.0)
    basis = to_powers(module.name, degree)
    coefficients = module.coefficients.detach().double().cpu().numpy().reshape(-1, degree + 1)
    powers = np.broadcast_to(coefficients @ basis, (len(scales), degree + 1))
    # in the variable u = (x - shift) / size, x / s is a u + b
    slopes = 1 / scales
    offsets = shift * (slopes - 1) / size
    changed = np.zeros_like(powers)
    for power in range(degree + 1):
        for k in range(power + 1):
            changed[:, k] += powers[:, power] * comb(power, k) * slopes**k * offsets ** (power - k)
    config = module.config() | {"num_parameters": len(scales)}
    made = build_activation(config)
    assert isinstance(made, OrthogonalPolynomial)
    made.to(module.coefficients.device, module.coefficients.dtype)
    with torch.no_grad():
        made.coefficients.copy_(
            torch.from_numpy(np.linalg.solve(basis.T, changed.T).T).reshape(made.coefficients.shape)
        )
    return made.train(module.training)


def equalize_layers(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any],
) -> tuple[tuple[EqualizedLayer, ...], tuple[UnchangedLayer, ...]]:
    """Scale the rows of linear layers in place; but for rounding the model computes the same.

    Args:
        linears: those that may change, by name.
        batches: one forward pass on the first samples shows which activation follows which layer.

    Returns:
        The activations that took up scales, and the others.

    Raises:
        ValueError: no activation takes up a scale.
    """
    made, left = [], []
    few = head(batches, 8)
    wanted = _outputs(model, few, forward)
    before_all = _ranges(linears)
    for name, before, behind in _neighbours(model, few, forward):
        activation = model.get_submodule(name)
        reason = _reason_to_stay(activation, before, behind, linears)
        if reason is not None:
            left.append(UnchangedLayer(name, reason))
            continue
        assert before is not None
        first = linears[before]
        sizes = _largest(first.weight, 1)
        if isinstance(activation, OrthogonalPolynomial):
            largest = LARGEST_POWER ** (1 / activation.degree)
            scales = np.exp(np.log(sizes[sizes > 0]).mean()) / np.where(sizes > 0, sizes, np.inf)
            scales = np.where(sizes > 0, np.clip(scales, 1 / largest, largest), 1.0)
            replace_module(model, name, scaled_polynomial(activation, scales))
            columns = None
        else:
            assert behind is not None
            second, columns = linears[behind], behind
            others = _largest(second.weight, 0)
            both = (sizes > 0) & (others > 0)
            scales = np.sqrt(np.where(both, others, 1.0) / np.where(both, sizes, 1.0))
            _scale(second, "weight", 1 / scales)
        _scale(first, "weight", scales[:, None])
        if first.bias is not None:
            _scale(first, "bias", scales)
        made.append(EqualizedLayer(name, before, columns, float(scales.min()), float(scales.max())))
    if not made:
        said = (
            "; ".join(f"{entry.name}: {entry.reason}" for entry in left[:4])
            or "it has none that a forward pass calls once"
        )
        raise ValueError(f"quantize: equalize: no activation of {type(model).__name__} takes up a scale ({said})")
    scaled = {entry.rows for entry in made}
    for name, found in _outputs(model, few, forward).items():
        if name in scaled:
            continue
        was = wanted[name]
        moved = float((found - was).norm() / was.norm().clamp(min=1e-300))
        if not moved <= torch.finfo(next(model.parameters()).dtype).eps ** 0.5:
            place = f"`{name}`" if name else "the model"
            raise ValueError(
                f"quantize: equalize: {place} gives something else afterwards, off by {moved:.3g}: what "
                f"{', '.join(entry.rows for entry in made[:4])} gives is used elsewhere than by the activation too. "
                "Leave such layers out: exclude"
            )
    after_all = _ranges(linears)
    ranged = [
        replace(
            entry,
            rows_before=before_all[entry.rows],
            rows_after=after_all[entry.rows],
            columns_before=None if entry.columns is None else before_all[entry.columns],
            columns_after=None if entry.columns is None else after_all[entry.columns],
        )
        for entry in made
    ]
    return tuple(ranged), tuple(left)


def _ranges(linears: Mapping[str, nn.Linear]) -> dict[str, float]:
    """The largest size of a weight of each layer."""
    return {name: float(_largest(linear.weight, 1).max(initial=0.0)) for name, linear in linears.items()}


def _outputs(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any]) -> dict[str, Tensor]:
    """Of every linear layer by its name, and of the model under "", float64.

    Between them a layer scale may hide in the model's output what one of its blocks does.
    """
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def seen(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found[name] = output.detach().double()

        return seen

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(hook(name)) for name, module in layers]
    try:
        with measuring(model), torch.random.fork_rng():
            torch.manual_seed(0)
            found[""] = next(tensors_of(forward(model, batch))).double()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _reason_to_stay(
    activation: nn.Module, before: str | None, behind: str | None, linears: Mapping[str, nn.Linear]
) -> str | None:
    if before is None or before not in linears:
        return "what it receives, once, is not what a linear layer that is rounded gives to it alone"
    if not 0 < float(linears[before].weight.detach().abs().max()) < inf:
        return "the layer before it has weights that are all 0, or not finite"
    if isinstance(activation, OrthogonalPolynomial):
        if activation.interval is not None:
            return "its interval is one for all channels"
        if activation.learnable_recurrence:
            return "its recurrence is one for all channels"
        if activation.glu or activation.dim != -1:
            return "its channels are not those of the layer"
        if activation.num_parameters not in (1, linears[before].out_features):
            return "it has coefficients for groups of channels"
        return None
    if type(activation) is not nn.ReLU:
        return f"a {type(activation).__name__} is another function after its input is scaled"
    if behind is None or behind not in linears:
        return "what it gives goes elsewhere than to a linear layer that is rounded"
    return None


def _neighbours(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any]
) -> list[tuple[str, str | None, str | None]]:
    """Activations, each with the linear layer whose output it receives as it is, and the one that receives its output
    as it is, where nothing else does and all are called once."""
    calls: dict[str, int] = {}
    takers: dict[int, list[str]] = {}  # by the tensor
    givers: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def hook(name: str) -> Callable[..., None]:
        def seen(_module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any], output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            for tensor in tensors_of((*inputs, *keywords.values())):
                takers.setdefault(id(tensor), []).append(name)
                alive.append(tensor)
            if isinstance(output, Tensor):
                givers[id(output)] = name
                received[name], given[name] = next(tensors_of((*inputs, *keywords.values()))), output
                alive.append(output)

        return seen

    received: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    watched = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_activation(module)
    }
    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in watched.items()]
    try:
        with measuring(model):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found: list[tuple[str, str | None, str | None]] = []
    for name, module in watched.items():
        if isinstance(module, nn.Linear) or name not in received:
            continue
        if calls[name] != 1:
            found.append((name, None, None))
            continue
        before = givers.get(id(received[name]))
        after = takers.get(id(given[name]), [])
        alone = before is not None and calls[before] == 1 and takers[id(received[name])] == [name]
        single = len(after) == 1 and calls[after[0]] == 1
        found.append((name, before if alone else None, after[0] if single else None))
    return found


def _largest(weight: Tensor, dim: int) -> Array:
    found: Array = weight.detach().abs().amax(dim=dim).double().cpu().numpy()
    return found


def _scale(layer: nn.Linear, name: str, scales: Array) -> None:
    old = getattr(layer, name)
    new = (old.detach().double().cpu() * torch.from_numpy(scales)).to(old.device, old.dtype)
    setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
