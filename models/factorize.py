"""Linear layers in two factors where that makes them smaller, chosen by what comes out of them on calibration data.

(Garg et al., Revealing the Utilized Rank of Subspaces of Learning in Neural Networks, 2024; ratios as in Guo et al.,
PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, 2023.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.models.changes import FactoredLayer, Factorization, UnchangedLayer
from polytrope.models.convert_options import ENERGY, Factorize
from polytrope.models.factors import FactoredLinear, largest_change
from polytrope.models.inputs import head, masks, tensors_of, vectors
from polytrope.models.modes import measuring
from polytrope.models.surgery import Choice, is_of_a_head, replace_module

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class MeasuredLayer:
    """What the data make use of in one layer.

    Args:
        name: of its module.
        inputs, outputs: numbers of channels.
        input_rank, output_rank: directions that hold the share `energy` of the squares of its inputs, of its outputs.
    """

    name: str
    inputs: int
    outputs: int
    input_rank: int
    output_rank: int

    @property
    def utilised_rank(self) -> int:
        """As many directions as the data make use of."""
        return min(self.input_rank, self.output_rank)


def utilised_rank(squares: Tensor, energy: float) -> int:
    """The smallest number of directions that holds a share of the energy.

    Args:
        squares: of the singular values, ascending `[n]` float64.
    """
    largest = squares.flip(0).clamp(min=0.0).cumsum(0)
    if not float(largest[-1]) > 0:
        return 0
    return min(len(squares), 1 + int((largest < energy * largest[-1]).sum()))


def saved_numbers(inputs: int, outputs: int, rank: int) -> int:
    """How many numbers two factors of this rank have less than the whole matrix; below 1: they are no smaller."""
    return inputs * outputs - rank * (inputs + outputs)


def ratio_rank(inputs: int, outputs: int, ratio: float) -> int:
    """The largest rank whose factors have at most 1 / ratio of the numbers of the whole matrix."""
    return int(inputs * outputs / (ratio * (inputs + outputs)))


@dataclass(frozen=True)
class Spectra:
    """What goes through a layer: squares of singular values, ascending, float64.

    Args:
        inputs: `[inputs]`.
        outputs: `[min(inputs, outputs)]`.
        directions: of the outputs, `[outputs, min(inputs, outputs)]`, in the order of their squares.
    """

    inputs: Tensor
    outputs: Tensor
    directions: Tensor


def measure_spectra(weight: Tensor, gram: Tensor) -> Spectra:
    """Of inputs X and outputs X Wᵀ; the smaller of the two sides decides the cost.

    Args:
        weight: W `[outputs, inputs]` float64.
        gram: XᵀX `[inputs, inputs]` float64.
    """
    if weight.shape[0] <= weight.shape[1]:
        squares, directions = torch.linalg.eigh(weight @ gram @ weight.T)
        return Spectra(torch.linalg.eigvalsh(gram), squares.clamp(min=0.0), directions)
    seen, axes = torch.linalg.eigh(gram)
    directions, values, _ = torch.linalg.svd(weight @ (axes * seen.clamp(min=0.0).sqrt()), full_matrices=False)
    return Spectra(seen, values.square().flip(0), directions.flip(1))


def utilised_ranks(
    model: nn.Module, batches: Sequence[Any], energy: float, forward: Forward
) -> tuple[tuple[MeasuredLayer, ...], tuple[UnchangedLayer, ...]]:
    """What the data make use of in the linear layers that `factor_layers` would look at; measured in float64.

    Args:
        batches, forward: as of `factor_layers`.
        energy: the share of the squares that counts.

    Returns:
        The layers in the order of the model, and those without figures with the reason.
    """
    linears, left = choose_linear_layers(model, Choice())
    grams = measure_inputs(model, linears, batches, forward, iter)
    layers = []
    for name, linear in linears.items():
        found = _measured(name, linear, grams.pop(name, None), energy)
        if isinstance(found, str):
            left[name] = found
        else:
            layers.append(found[0])
    return tuple(layers), _unfactored(model, left)


def factor_layers(
    model: nn.Module,
    batches: Sequence[Any],
    options: Factorize,
    choice: Choice,
    forward: Forward,
    *,
    walk: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Factorization:
    """Put two factors in the places of linear layers of `model`, in place; measured and solved in float64.

    Args:
        batches: calibration data; positions that an `attention_mask` hides do not count.
        choice: which layers, by the patterns and numbers in their names; heads, poolers and weights that modules share
            stay.
        walk: gives the batches, and may say how far it is.

    Raises:
        ValueError: no layer becomes smaller.
    """
    linears, left = choose_linear_layers(model, choice)
    few = head(batches, 8)
    calls = _count_calls(model, linears, few, forward)
    grams = measure_inputs(model, linears, batches, forward, walk)
    layers = []
    for name, linear in linears.items():
        made = _factored(name, linear, grams.pop(name, None), options)
        if isinstance(made, str):
            left[name] = made
            continue
        described, factored = made
        replace_module(model, name, factored)
        layers.append(described)
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:4])
        said = reasons or "it has none"
        raise ValueError(f"factorize: no linear layer of {type(model).__name__} becomes smaller ({said})")
    _check_calls(model, calls, [layer.name for layer in layers], few, forward)
    return Factorization(_energy(options), tuple(layers), _unfactored(model, left))


def in_order(model: nn.Module, left: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names and reasons in the order of `named_modules`."""
    return [(name, left[name]) for name, _ in model.named_modules() if name in left]


def _unfactored(model: nn.Module, left: Mapping[str, str]) -> tuple[UnchangedLayer, ...]:
    return tuple(UnchangedLayer(name, reason) for name, reason in in_order(model, left))


def _energy(options: Factorize) -> float:
    return ENERGY if options.energy is None else options.energy


def choose_linear_layers(
    model: nn.Module, choice: Choice, *, inside_factors: bool = False
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers that are meant, by name, and why the others stay.

    Args:
        choice: by the patterns and numbers in their names.
        inside_factors: both factors of a `FactoredLinear` are meant as well.
    """
    choice = replace(choice, types=())
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    linears: dict[str, nn.Linear] = {}
    left: dict[str, str] = {}
    factored: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear) and not inside_factors:
            factored.append(f"{name}.")
            left[name] = f"in two factors of rank {module.rank} already"
        if not isinstance(module, nn.Linear) or name.startswith(tuple(factored)):
            continue
        if "weight" not in module._parameters:
            left[name] = "its weight is computed from other parameters"
            continue
        if type(module) is not nn.Linear:
            left[name] = f"a {type(module).__name__}, which may compute something else than a Linear"
            continue
        reason = choice.reason_to_stay(name, [], "part of a pooler or a head" if is_of_a_head(name) else None)
        if reason is None and holders[id(module.weight)] > 1:
            reason = "another module has the same weight"
        if reason is None:
            linears[name] = module
        else:
            left[name] = reason
    return linears, left


def measure_inputs(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    batches: Sequence[Any],
    forward: Forward,
    walk: Callable[[Sequence[Any]], Iterable[Any]],
) -> dict[str, Tensor]:
    """XᵀX of the inputs of every layer that is called, `[inputs, inputs]` float64."""
    grams: dict[str, Tensor] = {}
    last: tuple[Tensor, int, Tensor] | None = None  # queries, keys and values have the same inputs

    def hook(name: str, batch: Any) -> Callable[..., None]:
        def seen(module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
            nonlocal last
            x = next(tensors_of((*inputs, *keywords.values())))
            if last is None or last[0] is not x or last[1] != x._version:
                rows = vectors(x, mask_at(batch, module, x))
                last = (x, x._version, (rows.T @ rows).cpu())
            grams[name] = grams[name] + last[2] if name in grams else last[2]

        return seen

    with measuring(model), masks(model) as mask_at:
        for batch in walk(batches):
            handles = [
                linear.register_forward_pre_hook(hook(name, batch), with_kwargs=True)
                for name, linear in linears.items()
            ]
            try:
                forward(model, batch)
            finally:
                last = None
                for handle in handles:
                    handle.remove()
    return grams


def _count_calls(model: nn.Module, names: Iterable[str], batch: Any, forward: Forward) -> dict[str, int]:
    """How often a forward pass calls each module."""
    counts = dict.fromkeys(names, 0)

    def hook(name: str) -> Callable[..., None]:
        def seen(*_arguments: Any) -> None:
            counts[name] += 1

        return seen

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in counts]
    try:
        with measuring(model):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _check_calls(
    model: nn.Module, before: Mapping[str, int], names: Sequence[str], batch: Any, forward: Forward
) -> None:
    """Refuse factors that the model does not use, or not as often as the layers before.

    Raises:
        ValueError: the first of them.
    """
    try:
        after = _count_calls(model, names, batch, forward)
    except AttributeError as error:
        raise ValueError(
            f"factorize: {type(model).__name__} reaches into its linear layers instead of calling them ({error}); "
            "leave those out by name: exclude"
        ) from error
    for name in names:
        if after[name] != before[name]:
            raise ValueError(
                f"factorize: `{name}` was called {before[name]} times, its factors are called {after[name]} times; "
                "something else computes the old layer. Leave it out by name: exclude"
            )


def weight_and_inputs(linear: nn.Linear, gram: Tensor | None) -> tuple[Tensor, Tensor] | str:
    """W `[outputs, inputs]` float64 and XᵀX `[inputs, inputs]` float64, or why nothing can be said of the layer."""
    if gram is None:
        return "the calibration data never reaches it"
    weight = linear.weight.detach().double().cpu()
    if not bool(weight.isfinite().all()):
        return "it has weights that are not finite"
    if not bool(gram.isfinite().all()):
        return "it receives numbers that are not finite"
    return weight, gram


def _measured(name: str, linear: nn.Linear, gram: Tensor | None, energy: float) -> tuple[MeasuredLayer, Spectra] | str:
    """What the data make use of, or why that cannot be said."""
    figures = weight_and_inputs(linear, gram)
    if isinstance(figures, str):
        return figures
    weight, gram = figures
    outputs, inputs = weight.shape
    spectra = measure_spectra(weight, gram)
    input_rank, output_rank = (utilised_rank(part, energy) for part in (spectra.inputs, spectra.outputs))
    if min(input_rank, output_rank) == 0:
        return "its outputs are all 0 on the calibration data"
    return MeasuredLayer(name, inputs, outputs, input_rank, output_rank), spectra


def _factored(
    name: str, linear: nn.Linear, gram: Tensor | None, options: Factorize
) -> tuple[FactoredLayer, FactoredLinear] | str:
    """The factors, or why there are none."""
    found = _measured(name, linear, gram, _energy(options))
    if isinstance(found, str):
        return found
    measured, spectra = found
    inputs, outputs = measured.inputs, measured.outputs
    rank = measured.utilised_rank
    if options.rank is not None:
        rank = options.rank
    elif options.ratio is not None:
        rank = ratio_rank(inputs, outputs, options.ratio)
    if rank < 1 or saved_numbers(inputs, outputs, rank) <= 0:
        return f"{inputs} → {outputs} of rank {rank} would be no smaller"
    # U Uᵀ W with the first directions U of the outputs is, of all matrices of this rank, the one whose outputs are the
    # nearest to W's (Eckart & Young, 1936). A projection of the inputs as well could only take more away.
    directions = spectra.directions[:, -rank:]
    factored = FactoredLinear(inputs, outputs, rank, bias=linear.bias is not None)
    factored.to(linear.weight.device, linear.weight.dtype)
    with torch.no_grad():
        factored.inner.weight.copy_(directions.T @ linear.weight.detach().double().cpu())
        factored.outer.weight.copy_(directions)
        if linear.bias is not None:
            factored.outer.bias.copy_(linear.bias)
    lost = float(spectra.outputs[:-rank].sum() / spectra.outputs.sum())
    with torch.no_grad():
        change = float(largest_change(factored, linear.weight))
    described = FactoredLayer(name, inputs, outputs, measured.input_rank, measured.output_rank, rank, lost**0.5, change)
    return described, factored.train(linear.training)
