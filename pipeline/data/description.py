"""What a data set says of itself: `dataset.json` beside its splits, and each split's `manifest.json`. Written and read
here alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from polytrope.pipeline.errors import UserError

DATASET_FILE = "dataset.json"
MANIFEST_FILE = "manifest.json"

UNITS: dict[str, Literal["tokens", "images", "rows"]] = {"text": "tokens", "images": "images", "numbers": "rows"}
"""By the kind of a data set: what is counted and scored."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Shard(_Record):
    """A tar file of a split, as its manifest lists it."""

    path: str
    bytes: int
    sha256: str
    samples: int


class TokensSample(_Record):
    """A sample of text: `tokens` ids (one more than the sequence length) of the unsigned integer type `dtype`."""

    tokens: int
    dtype: Literal["uint16", "uint32"]


class ImageSample(_Record):
    """A sample of images: uint8 `[channels, height, width]`, and its class in `label_digits` decimal digits."""

    image: tuple[int, int, int]
    label_digits: int


class NumbersSample(_Record):
    """A row of numbers: float32 `[inputs]`, and float32 `[targets]`, or its class in `label_digits` decimal digits."""

    inputs: int
    targets: int | None = None
    label_digits: int | None = None


Sample = TokensSample | ImageSample | NumbersSample


class TextSplit(_Record):
    """A split of a text data set. `bytes`: of the text behind its tokens."""

    manifest: str
    documents: int
    bytes: int
    tokens: int
    samples: int


class ImageSplit(_Record):
    """A split of an image data set. `smallest_class`: images of the class that has the fewest."""

    manifest: str
    samples: int
    smallest_class: int


class NumbersSplit(_Record):
    """A split of a data set of numbers."""

    manifest: str
    samples: int


class TokenizerDescription(_Record):
    """Which tokenizer made the tokens; the tokenizer itself is `tokenizer.json`.

    `end_of_text`: id of the token behind every document; None: that of `<|endoftext|>`, as in older data sets.
    """

    kind: str
    vocab_size: int
    end_of_text: int | None = None


class ImageShape(_Record):
    """Size of every image."""

    channels: int
    height: int
    width: int


class TextDataset(_Record):
    """A text data set. `digest`: sha256 over its shards' digests. `unigram_entropy`: nats per validation token under
    the token counts of the training split. `left_out`: what of the source was not taken, and how often. `task`: what
    each document, a line `question ; answer`, asks for; None: they are other text."""

    format: Literal[1] = 1
    kind: Literal["text"] = "text"
    name: str
    tokenizer: TokenizerDescription
    sequence_length: int
    splits: dict[str, TextSplit]
    unigram_entropy: float
    digest: str
    left_out: dict[str, int] = {}
    task: Literal["derivative", "integral"] | None = None


class ImageDataset(_Record):
    """A data set of labelled images. `digest`: sha256 over its shards' digests. `left_out`: what of the source was not
    taken, and how often."""

    format: Literal[1] = 1
    kind: Literal["images"] = "images"
    name: str
    classes: int
    class_names: list[str]
    image: ImageShape
    splits: dict[str, ImageSplit]
    digest: str
    left_out: dict[str, int] = {}


class PowerTransform(_Record):
    """A column x is read as (ψ(x) - mean) / deviation, with the ψ of Yeo and Johnson whose λ is `power`."""

    power: float
    mean: float
    deviation: float


class NumbersTransform(_Record):
    """What the reader makes of the numbers in the shards, one entry per column; `targets` may stay as they are."""

    kind: Literal["yeo_johnson"]
    inputs: list[PowerTransform]
    targets: list[PowerTransform] | None = None


class NumbersDataset(_Record):
    """A data set of rows of `inputs` numbers, each with `targets` numbers, or with one of `classes`. `digest`: sha256
    over its shards' digests and `transform`."""

    format: Literal[1] = 1
    kind: Literal["numbers"] = "numbers"
    name: str
    inputs: int
    targets: int | None = None
    classes: int | None = None
    splits: dict[str, NumbersSplit]
    digest: str
    transform: NumbersTransform | None = None

    @model_validator(mode="after")
    def one_kind(self) -> NumbersDataset:
        if (self.targets is None) == (self.classes is None):
            raise ValueError("either targets or classes must be given")
        for field in ("inputs", "targets"):
            columns = None if self.transform is None else getattr(self.transform, field)
            if columns is not None and len(columns) != getattr(self, field):
                raise ValueError(f"transform.{field}: {len(columns)} columns, and {field} is {getattr(self, field)}")
        return self


Dataset = TextDataset | ImageDataset | NumbersDataset
_DATASET: TypeAdapter[Dataset] = TypeAdapter(Annotated[Dataset, Field(discriminator="kind")])


def write_dataset(directory: Path, dataset: Dataset) -> None:
    """Write `dataset.json`."""
    content = dataset.model_dump(mode="json")
    if content.get("task") is None:  # few texts have one, and the files of the others are as they were
        content.pop("task", None)
    (directory / DATASET_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_dataset(directory: Path) -> Dataset:
    """Read `dataset.json`.

    Raises:
        UserError: not there, damaged, or of another version.
    """
    path = Path(directory) / DATASET_FILE
    hint = "`dataset` must name a `shard`, `shard_images` or `shard_numbers` stage"
    try:
        return _DATASET.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{directory} is no data set: {path} cannot be read: {error.strerror}", hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][1:])) or DATASET_FILE
        raise UserError(f"{path} is not what a data set says of itself: {place}: {first['msg']}", hint) from error


# By the field that only it has.
_SAMPLES: dict[str, type[Sample]] = {"tokens": TokensSample, "image": ImageSample, "inputs": NumbersSample}


def write_manifest(directory: Path, sample: Sample, shards: Sequence[Shard]) -> None:
    """Write a split's `manifest.json`."""
    content = {"format": 1, "sample": sample.model_dump(mode="json"), "shards": [dict(shard) for shard in shards]}
    (directory / MANIFEST_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_manifest(directory: Path) -> tuple[Sample, list[dict[str, Any]]]:
    """A split's `manifest.json`: what a sample is, and the shards as mappings with the fields of `Shard`.

    A data set may have a million shards, too many for objects.

    Raises:
        UserError: not there, damaged, or of another version.
    """
    path = directory / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
        sample = content["sample"]
        shards: list[dict[str, Any]] = content["shards"]
        kind = next(kind for field, kind in _SAMPLES.items() if field in sample)
        return kind.model_validate(sample), shards
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        StopIteration,
    ) as error:  # pydantic's ValidationError is a ValueError
        raise UserError(f"cannot read {path}: {error}", "run the shard stage again") from error
