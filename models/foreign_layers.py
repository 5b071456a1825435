"""What a configuration of transformers says of single layers, when some of them go."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from polytrope.models.surgery import class_names

# Fields by what their lists hold: one entry per layer, or numbers of layers, counted from 0.
_PER_LAYER = frozenset(
    {"layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta"}
    | {"num_attention_heads_per_layer", "num_key_value_heads_per_layer"}
)
_NUMBERS = frozenset(
    {"mlp_only_layers", "moe_layers", "attn_layer_indices", "cross_attention_layers", "local_layer_ids"}
    | {"rope_scaling_layers"}
)
_Plain = bool | int | float | str | None


def config_without_blocks(config: Any, gone: range) -> Any:
    """A copy that says `num_hidden_layers` fewer layers, and of each one that stays what it said.

    Args:
        config: of transformers.
        gone: numbers of the layers, counted from 0.

    Raises:
        ValueError: a list of layers that is not known, or is not what its name says.
    """
    layers = config.num_hidden_layers
    new = copy.deepcopy(config)
    new.num_hidden_layers = layers - len(gone)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple | set | dict) and value and ("layer" in name or "block" in name):
            setattr(new, name, _without(name, value, layers, gone))
    return new


def _without(name: str, value: Any, layers: int, gone: range) -> Any:
    listed = isinstance(value, list | tuple)
    if name in _PER_LAYER and listed and len(value) == layers:
        return type(value)(entry for number, entry in enumerate(value) if number not in gone)
    if name in _NUMBERS and listed and all(type(entry) is int and 0 <= entry < layers for entry in value):
        return type(value)(entry - sum(other < entry for other in gone) for entry in value if entry not in gone)
    known = ", one entry per layer" if name in _PER_LAYER else ", numbers of layers" if name in _NUMBERS else ""
    raise ValueError(
        f"drop_blocks: the configuration has {name} = {_shown(value)}"
        + (f", and it should be{known[1:]}" if known else ", and nothing says what that becomes with fewer layers")
        + "; leave drop_blocks out"
    )


def refuse_other_blocks(model: Any, name: str, gone: range) -> None:
    """See that a model that is built with fewer layers has the blocks that stay: some settings count layers.

    Args:
        model: of transformers.
        name: of the list of its blocks.
        gone: numbers of those that go.

    Raises:
        ValueError: another block, with the first thing that is not as it was.
    """
    config = config_without_blocks(model.config, gone)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            built = type(model)(type(config).from_dict(config.to_dict()))
        blocks = list(built.get_submodule(name).children())
    except Exception as error:  # whatever its code does with what was changed
        raise ValueError(
            f"drop_blocks: {type(model).__name__} cannot be built with {config.num_hidden_layers} layers: {error}"
        ) from error
    kept = [(number, block) for number, block in enumerate(model.get_submodule(name).children()) if number not in gone]
    for (number, block), other in zip(kept, blocks, strict=True):
        difference = _difference(block, other)
        if difference is not None:
            raise ValueError(
                f"drop_blocks: `{name}.{number}` of {type(model).__name__} would be built otherwise with fewer layers: "
                f"{difference}. Its class decides that by the layer's number, or by how many there are; drop others"
            )


def _difference(block: nn.Module, built: nn.Module) -> str | None:
    """The first module of a fresh block that is not as in the block that stays; what was put in by this package is."""
    for name, fresh in built.named_modules():
        where = f"`{name}`" if name else "the block"
        try:
            old = block.get_submodule(name)
        except AttributeError:
            return f"{where} would be added, a {type(fresh).__name__}"
        if type(old).__module__.startswith("polytrope."):
            continue
        if type(fresh).__name__ not in class_names(old):
            return f"{where} would be a {type(fresh).__name__}, and is a {type(old).__name__}"
        before, after = _settings(old), _settings(fresh)
        for key in after:
            if key in before and before[key] != after[key]:
                return f"{where} would have {key} = {_shown(after[key])}, and has {_shown(before[key])}"
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain numbers and texts of a module, and the shapes of its parameters."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _Plain) and not name.startswith("_") and name not in ("training", "layer_idx")
    }
    return plain | {name: list(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
