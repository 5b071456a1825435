"""Why a model cannot take a data set, by what both promise.

Apart from `promised`, which all stages import, because it looks at the models: they are part of the code that decides a
result, and a data set is not made anew when a model changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polytrope.models.configurations import MODEL_KINDS
from polytrope.pipeline.data.promised import (
    PromisedData,
    PromisedImages,
    PromisedModel,
    PromisedNumbers,
    PromisedText,
    expect,
    expect_data,
    expect_evaluable,
)
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.text import count


def architectures_for(kind: str) -> list[str]:
    """The models that take such data: `text`, `images` or `numbers`."""
    return [name for name, record in MODEL_KINDS.items() if record.data == kind]


@dataclass(frozen=True)
class Misfit:
    """Why a model cannot take a data set: the setting it depends on ("" for the data's kind), a text, a way out."""

    setting: str
    text: str
    hint: str


def misfit(model: PromisedModel, data: PromisedData) -> Misfit | None:
    """What keeps a model from taking this data; None: nothing that is known already."""
    if model.architecture not in architectures_for(data.kind):
        return Misfit(
            "",
            f"a {model.architecture} cannot take {data.kind}, and this dataset holds {data.kind}",
            f"use `architecture: {' or '.join(architectures_for(data.kind))}`, or another dataset",
        )
    if isinstance(data, PromisedText):
        return _misfit_text(model.settings, data.tokens, data.sequence_length) or _misfit_tokenizer(model, data)
    if isinstance(data, PromisedNumbers):
        return _misfit_numbers(model.settings, data)
    return _misfit_images(model, data)


def _misfit_tokenizer(model: PromisedModel, data: PromisedText) -> Misfit | None:
    if model.tokenizer in (None, data.tokenizer):
        return None
    return Misfit(
        "",
        f"the model was trained with a {model.tokenizer} tokenizer, the dataset was made with a {data.tokenizer} one",
        "use a dataset that was sharded with the model's tokenizer",
    )


def _misfit_text(settings: Mapping[str, Any], tokens: int | None, length: int) -> Misfit | None:
    rows, positions = settings.get("vocab_size"), settings.get("sequence_length")
    if rows is not None and tokens is not None and tokens > rows:
        return Misfit(
            "vocab_size",
            f"the dataset's vocabulary ({tokens} tokens) is larger than the model's embedding (`vocab_size`: {rows})",
            f"set the model's vocab_size to at least {tokens}, or leave it out",
        )
    if positions is not None and length > positions:
        return Misfit(
            "sequence_length",
            f"the dataset's sequences ({length} tokens) are longer than the model's context "
            f"(`sequence_length`: {positions})",
            f"shard with a shorter sequence_length, or set the model's to at least {length}",
        )
    return None


def _misfit_images(model: PromisedModel, data: PromisedImages) -> Misfit | None:
    settings, usual = model.settings, MODEL_KINDS[model.architecture].config()
    outputs, taken = settings.get("num_classes"), settings.get("in_channels")
    if data.classes is not None and outputs is not None and outputs < data.classes:
        return Misfit(
            "num_classes",
            f"the dataset has {data.classes} classes, the model {outputs} outputs (`num_classes`)",
            f"set the model's num_classes to {data.classes}, or leave it out",
        )
    if taken is not None and taken != data.channels:
        return Misfit(
            "in_channels",
            f"the dataset's images have {count(data.channels, 'channel')} (`channels`), the model takes {taken} "
            "(`in_channels`)",
            f"set the model's in_channels to {data.channels}, or leave it out",
        )
    patch, stages = settings.get("patch_size", usual.patch_size), len(settings.get("depths", usual.depths))
    smallest = patch * 2 ** (stages - 1)
    if data.size < smallest:
        return Misfit(
            "patch_size",
            f"images of {data.size} × {data.size} (`image_size`) are too small for a stem of {patch} (`patch_size`) "
            f"and {stages} stages (`depths`), which take at least {smallest} × {smallest}",
            f"shard larger images, or use a smaller patch_size or fewer stages (for example patch_size: 1, "
            f"{max(1, data.size.bit_length() - 1)} stages)",
        )
    return None


def _misfit_numbers(settings: Mapping[str, Any], data: PromisedNumbers) -> Misfit | None:
    """Outputs beyond the classes are possible, those beyond the targets have nothing to predict."""
    known = data.settings()
    what = "classes" if data.classes else "numbers to predict"
    for name, text in (
        ("inputs", f"the dataset's rows have {data.inputs} numbers, the model takes {settings.get('inputs')}"),
        ("loss", f"the dataset has {what}, and the model's loss is {settings.get('loss')}"),
        ("outputs", f"the dataset has {known.get('outputs')} {what}, the model {settings.get('outputs')} outputs"),
    ):
        own = settings.get(name)
        enough = name == "outputs" and data.classes and own is not None and own >= data.classes
        if own is not None and name in known and own != known[name] and not enough:
            return Misfit(name, f"{text} (`{name}`)", f"set the model's {name} to {known[name]}, or leave it out")
    return None


def refuse_misfit(field: str, model: PromisedModel | None, data: PromisedData | None) -> None:
    """Raise `UserError`, beginning with the field, where a model cannot take a data set."""
    found = None if model is None or data is None else misfit(model, data)
    if found is not None:
        raise UserError(f"{field}: {found.text}", found.hint)


def refuse_misfits(upstream: Mapping[str, Any], *, tangents: bool = False) -> PromisedData | None:
    """What is known of the data set of a stage with the inputs `dataset` and `models`.

    Args:
        tangents: the stage takes tangent models too.

    Raises:
        UserError: an input of another kind, or a model that cannot take the data.
    """
    data = expect_data("inputs.dataset", upstream["dataset"])
    for label, promise in upstream["models"].items():
        field = f"inputs.models.{label}"
        model = expect_evaluable(field, promise) if tangents else expect(field, promise, PromisedModel)
        refuse_misfit(field, model, data)
    return data
