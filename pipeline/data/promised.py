"""What a built-in stage promises of its result before anything starts, so that the stages after it can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from polytrope.pipeline.errors import UserError


@dataclass(frozen=True)
class PromisedText:
    """Tokens.

    Args:
        sequence_length: tokens per sample.
        tokens: of the vocabulary; a BPE finds fewer in very little text; None where only its file tells.
        tokenizer: its kind.
        task: what the lines of a symbolic source ask for; None: they are other text.
    """

    kind: ClassVar[Literal["text"]] = "text"
    sequence_length: int
    tokens: int | None
    tokenizer: str
    task: Literal["derivative", "integral"] | None = None


@dataclass(frozen=True)
class PromisedImages:
    """Labelled images of one size; `classes` is None where only the images tell."""

    kind: ClassVar[Literal["images"]] = "images"
    size: int
    channels: int
    classes: int | None


@dataclass(frozen=True)
class PromisedNumbers:
    """Rows of numbers with classes, or with numbers to predict (`classes` is None); None where only the file tells."""

    kind: ClassVar[Literal["numbers"]] = "numbers"
    inputs: int | None
    targets: int | None
    classes: int | None

    def settings(self) -> dict[str, Any]:
        """What this decides of a model."""
        known: dict[str, Any] = {"inputs": self.inputs, "outputs": self.classes or self.targets}
        known["loss"] = "mse" if self.classes is None else "cross_entropy"
        return {name: value for name, value in known.items() if value is not None}


PromisedData = PromisedText | PromisedImages | PromisedNumbers


@dataclass(frozen=True)
class PromisedModel:
    """A model of this package.

    Args:
        architecture: its name.
        settings: fields of its configuration, as far as they are known.
        tokenizer: kind of the tokenizer of its training data; None: not known, or none.
        figures: names of those that its `training.json` may have; none where the model was not trained here.
        blocks_before: of the model that it was; the record of its conversion, beside it, says which are left. None:
            none were dropped, or it is not known.
    """

    architecture: str
    settings: Mapping[str, Any]
    tokenizer: str | None = None
    figures: tuple[str, ...] = ()
    blocks_before: int | None = None

    def trained_on(self, data: PromisedData) -> PromisedModel:
        """With what the data set decides where the settings say nothing."""
        if isinstance(data, PromisedText):
            found = {"sequence_length": data.sequence_length}
            if data.tokens is not None:
                found["vocab_size"] = -(-data.tokens // 64) * 64
            return replace(self, settings={**found, **self.settings}, tokenizer=data.tokenizer)
        if isinstance(data, PromisedNumbers):
            return replace(self, settings={**data.settings(), **self.settings})
        known = {"num_classes": data.classes, "in_channels": data.channels}
        return replace(self, settings={name: value for name, value in known.items() if value} | dict(self.settings))


@dataclass(frozen=True)
class PromisedForeignModel:
    """A model of transformers, which this package converts but neither trains nor evaluates.

    Args:
        model_type: transformers' name of its architecture.
    """

    model_type: str


@dataclass(frozen=True)
class PromisedBuiltModel:
    """A model that a function of the project builds; what it is, only its call tells.

    Args:
        factory: `package.module:function`.
    """

    factory: str


@dataclass(frozen=True)
class PromisedTangent:
    """A tangent model, which no weights alone compute: what takes models does not take it unless it says so.

    Args:
        of: as of an ordinary model.
    """

    of: PromisedModel


AnyPromisedModel = PromisedModel | PromisedForeignModel | PromisedBuiltModel


@dataclass(frozen=True)
class PromisedEvaluation:
    """Figures of the models with these labels, on data of this kind (None: not known). `predicts_numbers`:
    the models have no classes to be right about."""

    labels: tuple[str, ...]
    kind: Literal["text", "images", "numbers"] | None
    predicts_numbers: bool = False


@dataclass(frozen=True)
class PromisedSpeed:
    """Times of the models with these labels."""

    labels: tuple[str, ...]


@dataclass(frozen=True)
class PromisedAnalysis:
    """What these analyses say of the models with these labels."""

    labels: tuple[str, ...]
    analyses: tuple[str, ...]


_TITLES: dict[type[Any], str] = {
    PromisedText: "a data set",
    PromisedImages: "a data set",
    PromisedNumbers: "a data set",
    PromisedModel: "a model",
    PromisedForeignModel: "a model of transformers, for the stage `convert` alone",
    PromisedTangent: "a tangent model (`linearize: true`), for `evaluate`, `measure_speed` and `report` alone",
    PromisedEvaluation: "an evaluation",
    PromisedSpeed: "a measurement of speed",
    PromisedAnalysis: "an analysis",
}
_MAKERS: dict[type[Any], str] = {
    PromisedText: "a `shard`, `shard_images` or `shard_numbers` stage",
    PromisedImages: "a `shard`, `shard_images` or `shard_numbers` stage",
    PromisedNumbers: "a `shard`, `shard_images` or `shard_numbers` stage",
    PromisedModel: "a `train`, `convert` or `import_model` stage of a GPT-2, ConvNeXt or MLP",
    PromisedForeignModel: "an `import_model` stage",
    PromisedEvaluation: "an `evaluate` stage",
    PromisedSpeed: "a `measure_speed` stage",
    PromisedAnalysis: "an `analyze` stage",
}
_Promise = TypeVar("_Promise")


def expect(field: str, promise: Any, kind: type[_Promise]) -> _Promise | None:
    """The promise of an input, None where nothing is known of it.

    Raises:
        UserError: it will be something else.
    """
    if isinstance(promise, kind):
        return promise
    if type(promise) in _TITLES:
        raise UserError(
            f"{field}: this input takes {_TITLES[kind]}, and the stage makes {_TITLES[type(promise)]}",
            f"name {_MAKERS[kind]}",
        )
    return None


def expect_evaluable(field: str, promise: Any) -> PromisedModel | None:
    """The same for a model of this package, or what a tangent model has of one.

    Raises:
        UserError: it will be something else.
    """
    return expect(field, promise.of if isinstance(promise, PromisedTangent) else promise, PromisedModel)


def expect_data(field: str, promise: Any) -> PromisedData | None:
    """The same for a data set of any kind."""
    return promise if isinstance(promise, PromisedImages | PromisedNumbers) else expect(field, promise, PromisedText)


def expect_model(field: str, promise: Any) -> AnyPromisedModel | None:
    """The same for a model, those of transformers and of the project too."""
    known = isinstance(promise, PromisedForeignModel | PromisedBuiltModel)
    return promise if known else expect(field, promise, PromisedModel)
