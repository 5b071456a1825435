"""What the rest of the package knows of a model: one record per model, listed in `polytrope.models.ARCHITECTURES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]


@dataclass(frozen=True)
class HuggingFace:
    """How transformers describes and names the model.

    Args:
        model_type: in `config.json`.
        classes: the entries of `architectures` in `config.json` that are this model.
        config_class: transformers' configuration of it.
        auto_classes: its classes, by the `AutoModel…` that finds them.
        tokenizer_class: its tokenizer there, where the directory names none.
        activation_name: the name of an activation module to transformers' name of it.
        tokens: ids of tokens that transformers takes where `config.json` says none.
        read: the content of `config.json` to the configuration. Raises ValueError for what it cannot take over.
        write: a model's configuration, the name of its classical activations and its weights by its own names, to
            `config.json` and the weights as transformers names them. Raises ValueError for what that cannot say.
    """

    model_type: str
    classes: tuple[str, ...]
    config_class: str
    auto_classes: Mapping[str, str]
    tokenizer_class: str | None
    activation_name: Callable[[str], str]
    tokens: Mapping[str, int | None]
    read: Callable[[Mapping[str, Any]], Any]
    write: Callable[[Any, str, State], tuple[dict[str, Any], State]]


@dataclass(frozen=True)
class Architecture:
    """One model.

    Args:
        name: in workflow files and `model.json`.
        title: in messages.
        config: dataclass of its sizes; its checks are in `__post_init__`.
        build: makes the module of a configuration, freshly initialised.
        data: what it takes: token ids `[batch, positions]`, images `[batch, channels, height, width]`, or rows of
            numbers `[batch, inputs]`.
        presets: published sizes, by name.
        activation: the last part of the names of its activation modules.
        activation_widths: numbers of channels its activations see, in the order of the blocks.
        prepare: inputs as a data set gives them (token ids, or pixels in [0, 1]) to what `forward` takes.
        example: small inputs for a configuration.
    """

    name: str
    title: str
    config: type[Any]
    build: Callable[[Any], nn.Module]
    data: Literal["text", "images", "numbers"]
    presets: Mapping[str, Mapping[str, Any]]
    activation: str
    activation_widths: Callable[[Any], list[int]]
    prepare: Callable[[Tensor], Tensor]
    example: Callable[[Any], Tensor]


@dataclass(frozen=True)
class PublishedArchitecture(Architecture):
    """A model whose weights others publish, in layouts of their own.

    Args:
        task: what it is evaluated by.
        landmark: pattern of a weight's name that every layout of the published weights has; its first group is what
            wrappers have put before the names.
        own_names: weights by names of any of those layouts, without wrappers' prefixes, to the module's own names.
        sizes: what weights by own names tell of the configuration.
        told: reads what trainers write beside the weights: by the key it stands under, to fields of the configuration.
        asked: fields that these weights (by any layout's names) do not tell, with what to give for published ones.
        load: copies weights by own names into the module. Raises ValueError with the names that do not fit.
        huggingface: the format of transformers.
    """

    task: Literal["language_modelling", "classification"]
    landmark: str
    own_names: Callable[[Mapping[str, Tensor]], State]
    sizes: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    told: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]
    asked: Callable[[Mapping[str, Tensor]], Mapping[str, str]]
    load: Callable[[Any, Mapping[str, Tensor]], None]
    huggingface: HuggingFace
