"""The parameters of the `shard`, `shard_images` and `shard_numbers` stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.data.tokenization import (
    BpeTokenizer,
    TokenizerParameters,
)
from polytrope.pipeline.stages.shard.corpus import PythonSource, Source
from polytrope.pipeline.stages.shard.images import DigitsSource, ImageSource
from polytrope.pipeline.stages.shard.numbers import NumbersSource

ColourValue = Annotated[int, Field(ge=0, le=255)]


class ShardParameters(BaseModel):
    """A text data set."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field("text", description="name of the data set, shown in MLflow")
    source: Source = Field(default_factory=PythonSource, description="where the documents come from")
    tokenizer: TokenizerParameters = Field(default_factory=BpeTokenizer, description="text → tokens")
    sequence_length: int = Field(128, ge=2, description="tokens per sample (a model's context)")
    validation_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of the documents, chosen by hash of the text"
    )
    shard_bytes: int = Field(8_000_000, ge=1, description="text per shard, before tokenization")


class ShardImagesParameters(BaseModel):
    """An image data set."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field("images", description="name of the data set, shown in MLflow")
    source: ImageSource = Field(default_factory=DigitsSource, description="where the images come from")
    validation_source: ImageSource | None = Field(
        None, description="validation images, where they are separate; default: a part of `source`"
    )
    validation_fraction: float = Field(0.2, gt=0, lt=1, description="share of the images, chosen by hash of the name")
    image_size: int = Field(8, ge=1, description="pixels per side: shorter side resized, middle square taken")
    channels: Literal[1, 3] = Field(1, description="1: grey, 3: RGB")
    background: tuple[ColourValue, ColourValue, ColourValue] | None = Field(
        None, description="red, green, blue (0 to 255) behind transparent pixels; default: such images are refused"
    )
    shard_images: int = Field(4096, ge=1, description="images per shard")


class ShardNumbersParameters(BaseModel):
    """A data set of rows of numbers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field("numbers", description="name of the data set, shown in MLflow")
    source: NumbersSource = Field(description="where the rows come from")
    validation_fraction: float = Field(
        0.2, gt=0, lt=1, description="share of the rows, chosen by hash of their number, of the pair, or of the inputs"
    )
    shard_rows: int = Field(16384, ge=1, description="rows per shard")
