"""Drop blocks of a network; a least-squares map, merged into the block before them, stands for them.

(Shopkhoev et al., ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization, 2025; that
the bias is mapped too, and what is done about layer scales, is ours.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.models import is_own
from polytrope.models.changes import DroppedBlocks
from polytrope.models.configurations import block_series, without_blocks
from polytrope.models.convert_options import DropBlocks, possible_cuts
from polytrope.models.convnext import ConvNeXt, drop_path_rates
from polytrope.models.factors import FactoredLinear, describe_factors
from polytrope.models.foreign_layers import config_without_blocks, refuse_other_blocks
from polytrope.models.formats import of_transformers
from polytrope.models.inputs import mask_of, tensors_of, vectors
from polytrope.models.modes import measuring
from polytrope.models.surgery import replace_module

RIDGE = 1e-6  # of the mean square of the outputs that are mapped
_FOREIGN_PROJECTION = "mlp.down_proj"  # Llama's name, and that of many after it
Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class _Series:
    """Blocks in a row that each add to what they are given.

    Args:
        name: of their container.
        first: number of its first block in the whole model.
        length: how many there are.
        projection: the last layer of a block's MLP, by its name in the block.
        channels_first: states are `[batch, channels, height, width]`, the projection's outputs have channels last.
    """

    name: str
    first: int
    length: int
    projection: str
    channels_first: bool = False

    def block(self, number: int) -> str:
        return f"{self.name}.{number}"


@dataclass(frozen=True)
class _Cut:
    """Behind block `after` of a series, `count` blocks go."""

    series: _Series
    after: int
    count: int


def solve_map(gram: Tensor, cross: Tensor, ridge: float = RIDGE) -> Tensor:
    """T of the smallest |M T - R|² + α |T|²: (MᵀM + α I)⁻¹ MᵀR.

    Args:
        gram: MᵀM `[width, width]` float64.
        cross: MᵀR `[width, width]` float64.
        ridge: α relative to the mean of the diagonal of MᵀM.

    Raises:
        ValueError: M is zero, or has numbers that are not finite.
    """
    mean = float(gram.diagonal().mean())
    if not (mean > 0 and bool(gram.isfinite().all()) and bool(cross.isfinite().all())):
        raise ValueError("its outputs are all 0 or not finite on the calibration data, so that no map can be fitted")
    mapped: Tensor = torch.linalg.solve(gram + ridge * mean * torch.eye(len(gram), dtype=gram.dtype), cross)
    return mapped


def drop_and_map(
    model: nn.Module,
    batches: Sequence[Any],
    options: DropBlocks,
    forward: Forward,
    *,
    walk: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> DroppedBlocks:
    """Drop blocks of `model` in place; the map is measured and solved in float64.

    With M what the MLP of the block before the cut adds, and R by how much the dropped blocks and it changed the state
    together, T is the least-squares solution of M T = R, and that MLP's last layer becomes x ↦ T(x).

    Args:
        batches: calibration data; positions that an `attention_mask` hides do not count.
        walk: gives the batches, and may say how far it is.

    Raises:
        ValueError: a model that has no such blocks, a cut it does not have.
    """
    found = _find_series(model)
    cuts = _possible_cuts(model, found, options)
    distances = _measure_distances(model, cuts, batches, forward, walk)
    cut = min(cuts, key=lambda entry: distances[entry.series.block(entry.after)])
    if not is_own(model):
        refuse_other_blocks(model, cut.series.name, _gone(cut))
        _refuse_other_sums(model, cut, batches[0], forward)
    name = _projection(model, cut)
    try:
        mapped, error, without = _fit_map(model, cut, name, batches, forward, walk)
    except ValueError as refused:
        raise ValueError(f"drop_blocks: `{name}`: {refused}") from refused
    _merge(model, cut, name, mapped)
    dropped = tuple(cut.series.block(cut.after + 1 + number) for number in range(cut.count))
    _remove(model, cut)
    total = sum(series.length for series in found)
    return DroppedBlocks(dropped, name, total, distances, error, without)


def _find_series(model: nn.Module) -> list[_Series]:
    if is_own(model):
        lengths = block_series(model.config)
        if not isinstance(model, ConvNeXt):
            return [_Series("transformer.h", 0, lengths[0], "mlp.c_proj")]
        return [
            _Series(f"stages.{stage}", sum(lengths[:stage]), length, "pwconv2", channels_first=True)
            for stage, length in enumerate(lengths)
        ]
    kind = type(model).__name__
    if not of_transformers(model):
        raise ValueError(
            f"drop_blocks: a {kind} is neither a GPT-2 or ConvNeXt of this package nor a model of transformers, and "
            "nothing says how it is built with fewer blocks; leave it out"
        )
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_has_projection(block) for block in module)
    }
    if len(lists) != 1:
        raise ValueError(
            f"drop_blocks: {kind} has {len(lists)} lists of blocks that each have a linear `{_FOREIGN_PROJECTION}`, "
            "as those of Llama have, and one is needed; leave it out"
        )
    (name, blocks), *_ = lists.items()
    counted = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if counted != len(blocks):
        raise ValueError(
            f"drop_blocks: {kind} has {len(blocks)} blocks in `{name}`, and its configuration says num_hidden_layers = "
            f"{counted}: it would not be built again with fewer; leave it out"
        )
    return [_Series(name, 0, len(blocks), _FOREIGN_PROJECTION)]


def _has_projection(block: nn.Module) -> bool:
    try:
        return isinstance(block.get_submodule(_FOREIGN_PROJECTION), nn.Linear | FactoredLinear)
    except AttributeError:
        return False


def _projection(model: nn.Module, cut: _Cut) -> str:
    """The linear layer that takes in the map."""
    name = f"{cut.series.block(cut.after)}.{cut.series.projection}"
    return f"{name}.outer" if isinstance(model.get_submodule(name), FactoredLinear) else name


def _possible_cuts(model: nn.Module, found: Sequence[_Series], options: DropBlocks) -> list[_Cut]:
    """Those that the options allow, where the block before can take in a map.

    Raises:
        ValueError: there is none.
    """
    cuts = [
        _Cut(found[row], after, options.number)
        for row, after in possible_cuts([series.length for series in found], options)
    ]
    kinds = {cut: type(model.get_submodule(f"{cut.series.block(cut.after)}.{cut.series.projection}")) for cut in cuts}
    able = [cut for cut in cuts if kinds[cut] in (nn.Linear, FactoredLinear)]
    if not able:
        name = f"{cuts[0].series.block(cuts[0].after)}.{cuts[0].series.projection}"
        raise ValueError(f"drop_blocks: `{name}` is a {kinds[cuts[0]].__name__}; only a linear layer can take in a map")
    return able


def _measure_distances(
    model: nn.Module,
    cuts: Sequence[_Cut],
    batches: Sequence[Any],
    forward: Forward,
    walk: Callable[[Sequence[Any]], Iterable[Any]],
) -> dict[str, float]:
    """Mean over all vectors of 1 - cosine of the states before and after the dropped blocks, by the block before."""
    pairs = {cut.series.block(cut.after): (cut.series.block(cut.after + cut.count), cut.series) for cut in cuts}
    before = {behind: name for name, (behind, _) in pairs.items()}
    sums, counts = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0)
    held: dict[str, Tensor] = {}

    def see(batch: Any, name: str, series: _Series, state: Tensor) -> None:
        rows = _rows(state, mask_of(model, batch), series)
        if name in before:
            first = held.pop(before[name])
            sums[before[name]] += float((1.0 - nn.functional.cosine_similarity(first, rows, dim=-1)).sum())
            counts[before[name]] += len(rows)
        if name in pairs:
            held[name] = rows

    watched = {name: series for name, (_, series) in pairs.items()}
    watched |= dict(pairs.values())
    with measuring(model):
        for batch in walk(batches):
            with _watching(model, {name: partial(see, batch, name, series) for name, series in watched.items()}):
                forward(model, batch)
    return {name: sums[name] / max(1, counts[name]) for name in pairs}


def _refuse_other_sums(model: nn.Module, cut: _Cut, batch: Any, forward: Forward) -> None:
    """See that what is added to the projection's output is added to the block's output, and nothing else happens.

    Raises:
        ValueError: another sum, as where a norm follows.
    """
    block = cut.series.block(cut.after)
    states: list[Tensor] = []
    added: list[Tensor] = []

    def nudge(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        added.append(noise * output.std())
        return output + added[-1]

    with measuring(model), _watching(model, {block: states.append}):
        forward(model, batch)
        handle = model.get_submodule(f"{block}.{cut.series.projection}").register_forward_hook(nudge)
        try:
            forward(model, batch)
        finally:
            handle.remove()
    plain, nudged = states
    rounding = 16 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    off = float((nudged - plain - added[0]).abs().max())
    if off > rounding + 1e-3 * float(added[0].abs().max()):
        raise ValueError(
            f"drop_blocks: `{block}` of {type(model).__name__} does something else to the output of its "
            f"`{cut.series.projection}` than to add it to its input (a norm or a scale behind it), so no map can be "
            "merged into it; leave drop_blocks out"
        )


def _fit_map(
    model: nn.Module,
    cut: _Cut,
    name: str,
    batches: Sequence[Any],
    forward: Forward,
    walk: Callable[[Sequence[Any]], Iterable[Any]],
) -> tuple[Tensor, float, float]:
    """T `[width, width]` float64, and the relative errors of the state behind the cut with it and without."""
    series = cut.series
    first, last = series.block(cut.after), series.block(cut.after + cut.count)
    scale = _layer_scale(model, cut)
    width = scale.numel() if scale is not None else int(model.get_submodule(name).out_features)  # type: ignore[arg-type]
    gram, cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    wanted = size = 0.0
    with measuring(model):
        for batch in walk(batches):
            seen: dict[str, Tensor] = {}
            with _watching(model, {part: partial(seen.__setitem__, part) for part in (first, last, name)}):
                forward(model, batch)
            mask = mask_of(model, batch)
            mapped = vectors(seen[name], mask)
            if scale is not None:
                mapped = mapped * scale
            before, behind = (_rows(seen[part], mask, series) for part in (first, last))
            rest = behind - (before - mapped)
            gram += (mapped.T @ mapped).cpu()
            cross += (mapped.T @ rest).cpu()
            wanted += float(rest.square().sum())
            size += float(behind.square().sum())
    found = solve_map(gram, cross)

    def error(square: float) -> float:
        return (max(0.0, square) / size) ** 0.5 if size else 0.0

    fitted = wanted - 2 * float((found * cross).sum()) + float((found * (gram @ found)).sum())
    without = wanted - 2 * float(cross.diagonal().sum()) + float(gram.diagonal().sum())
    return found, error(fitted), error(without)


def _layer_scale(model: nn.Module, cut: _Cut) -> Tensor | None:
    """Of the block before the cut, `[width]` float64; None where it has none."""
    gamma = getattr(model.get_submodule(cut.series.block(cut.after)), "gamma", None) if is_own(model) else None
    return gamma.detach().double() if isinstance(gamma, Tensor) else None


def _merge(model: nn.Module, cut: _Cut, name: str, mapped: Tensor) -> None:
    """Tᵀ W and Tᵀ b in place of W and b; a layer scale goes in as well, and is 1 afterwards."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    scale = _layer_scale(model, cut)
    transposed = mapped.T.to(old.weight.device)
    if scale is not None:
        transposed = transposed * scale
        block = model.get_submodule(cut.series.block(cut.after))
        assert isinstance(block.gamma, nn.Parameter)
        block.gamma = nn.Parameter(torch.ones_like(block.gamma))
    new = nn.Linear(
        old.in_features, old.out_features, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )
    with torch.no_grad():
        new.weight.copy_(transposed @ old.weight.double())
        if old.bias is not None:
            new.bias.copy_(transposed @ old.bias.double())
    replace_module(model, name, new.train(old.training))


def _remove(model: nn.Module, cut: _Cut) -> None:
    """Take the blocks out of their container, and let the configuration say so."""
    blocks = model.get_submodule(cut.series.name)
    parts = enumerate(blocks.children())
    kept = [block for number, block in parts if not cut.after < number <= cut.after + cut.count]
    owner, _, child = cut.series.name.rpartition(".")
    new = nn.ModuleList(kept) if isinstance(blocks, nn.ModuleList) else nn.Sequential(*kept)
    new.training = blocks.training  # its own alone: parts may be frozen
    model.get_submodule(owner).add_module(child, new)
    gone = _gone(cut)
    if is_own(model):
        _cut_own(model, gone)
    else:
        _cut_foreign(model, new, gone)


def _gone(cut: _Cut) -> range:
    """Numbers in the whole model."""
    first = cut.series.first + cut.after + 1
    return range(first, first + cut.count)


def _cut_own(model: Any, gone: range) -> None:
    model.config = dataclasses.replace(without_blocks(model.config, gone), factors=describe_factors(model))
    if isinstance(model, ConvNeXt):
        for block, rate in zip(model.blocks, drop_path_rates(model.config), strict=True):
            block.drop_path = rate


def _cut_foreign(model: Any, blocks: nn.Module, gone: range) -> None:
    """Modules have the configuration, and know their number, for the cache of their attention."""
    old, new = model.config, config_without_blocks(model.config, gone)
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = new
    for number, block in enumerate(blocks.children()):
        for module in block.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                module.layer_idx = number  # type: ignore[assignment]


def _rows(state: Tensor, mask: Tensor | None, series: _Series) -> Tensor:
    return vectors(state.permute(0, 2, 3, 1) if series.channels_first else state, mask)


@contextmanager
def _watching(model: nn.Module, hooks: Mapping[str, Callable[[Tensor], Any]]) -> Any:
    """Each function is told the first tensor that its module returns, in the order of the forward pass."""

    def hook(function: Callable[[Tensor], Any]) -> Callable[..., None]:
        def seen(_module: nn.Module, _inputs: Any, output: Any) -> None:
            function(next(tensors_of(output)).detach())

        return seen

    handles = [model.get_submodule(name).register_forward_hook(hook(function)) for name, function in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
