"""The parameters of the `analyze` stage: which analyses, and the options of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from polytrope.models import make_config
from polytrope.models.configurations import MLPConfig
from polytrope.models.convert_options import ENERGY
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.short_form import ShortForm

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class SignalOptions(BaseModel):
    """Moments, map of variances, Lipschitz constants, symmetries."""

    model_config = _STRICT
    name: Literal["signal"]


class KernelOptions(BaseModel):
    """Spectrum of the tangent kernel."""

    model_config = _STRICT
    name: Literal["kernel"]
    frequencies: int = Field(16, ge=1, le=256, description="the highest frequency on the circle")
    inputs: Literal["measured", "standard"] = Field(
        "measured",
        description="the normal distribution of the activation's inputs: with the mean and deviation it was seen to "
        "receive, or N(0, 1)",
    )


class ModularOptions(BaseModel):
    """What a network that adds modulo p has learned; for data of `shard_numbers` with `kind: modular`."""

    model_config = _STRICT
    name: Literal["modular"]
    kernel_samples: int = Field(32, ge=1, description="pairs that the drift of the tangent kernel is measured on")


class WidthOptions(BaseModel):
    """How much the tangent kernel depends on the draw of the weights, by width; for an mlp."""

    model_config = _STRICT
    name: Literal["width"]
    widths: list[Annotated[int, Field(ge=1)]] = Field(
        [128, 256, 512], min_length=2, description="of all layers of the networks that are drawn"
    )
    draws: int = Field(200, ge=10, description="networks per width")

    @model_validator(mode="after")
    def _different(self) -> WidthOptions:
        if len(set(self.widths)) < 2:
            raise ValueError(f"widths: a slope needs two that differ, got {self.widths}")
        return self


def refuse_width(name: str, architecture: str, settings: Mapping[str, Any]) -> None:
    """Refuse a model of which `width` cannot draw networks.

    Args:
        name: of the model, in the error.
        settings: fields of its configuration, as far as they are known.

    Raises:
        UserError: no MLP, or one with layers that have functions instead of weights.
    """
    if architecture != "mlp":
        raise UserError(
            f"analyses: `width` draws networks of an mlp in other widths, and {name} is a {architecture}", _ELSEWHERE
        )
    for part in make_config(MLPConfig, settings).feedforward_settings():
        if part.name not in ("dense", "quadratic"):
            raise UserError(
                f"analyses: `width` draws layers with weights (dense, quadratic), and {name} has feedforward: "
                f"{part.name}",
                _ELSEWHERE,
            )


_ELSEWHERE = "leave it out, or analyse the others in a stage of their own"


class FeaturesOptions(BaseModel):
    """What the blocks give: dimension, rank, condition, and how much of the last block each of them has."""

    model_config = _STRICT
    name: Literal["features"]
    neighbours: int = Field(1000, ge=3, description="vectors per block whose distances tell the dimension")
    energy: float = Field(0.999, gt=0, lt=1, description="share of the squares that the utilised rank keeps")


class MergingOptions(BaseModel):
    """Units of the MLPs that compute nearly the same, and the loss when they are joined."""

    model_config = _STRICT
    name: Literal["merging"]
    distances: list[Annotated[float, Field(ge=0)]] = Field(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        min_length=1,
        description="units nearer than this are joined; 1 is the root mean square of their weights' norms",
    )


class ArithmeticOptions(BaseModel):
    """The loss where products by weights are piecewise affine: sums of the numbers' bits."""

    model_config = _STRICT
    name: Literal["arithmetic"]
    offset: float = Field(
        1.0552,
        gt=0,
        description="what every product is multiplied by, piecewise affinely too: 1.0552 makes the mean error 0, "
        "1 leaves it",
    )


class BilinearOptions(BaseModel):
    """Products of two linear functions of what the blocks give, which rebuild it."""

    model_config = _STRICT
    name: Literal["bilinear"]
    latents: int | None = Field(None, ge=1, description="per block; default: four times its width")
    sparsity: float = Field(0.1, ge=0, description="α: how much the density of the latents counts beside the error")
    steps: int = Field(200, ge=1, description="of Adam")
    learning_rate: float = Field(0.03, gt=0, description="of Adam")
    vectors: int = Field(2000, ge=4, description="per block; fitted to every second one, measured on the others")
    seed: int = Field(0, ge=0, lt=2**63, description="of the start")


class RankOptions(BaseModel):
    """How many directions of every linear layer the data make use of."""

    model_config = _STRICT
    name: Literal["rank"]
    energy: float = Field(ENERGY, gt=0, lt=1, description="share of the squares of inputs and outputs that counts")


AnalysisOptions = (
    SignalOptions
    | KernelOptions
    | ModularOptions
    | WidthOptions
    | FeaturesOptions
    | MergingOptions
    | ArithmeticOptions
    | BilinearOptions
    | RankOptions
)
NAMES = ("signal", "kernel", "modular", "width", "features", "merging", "arithmetic", "bilinear", "rank")


def _spelled_out(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


if TYPE_CHECKING:
    Entry = AnalysisOptions
else:
    Entry = Annotated[
        Annotated[AnalysisOptions, Field(discriminator="name")],
        BeforeValidator(_spelled_out),
        ShortForm({"enum": list(NAMES)}),
    ]


class AnalyzeParameters(BaseModel):
    """Which analyses, and on how much of the validation data."""

    model_config = _STRICT

    analyses: list[Entry] = Field(min_length=1, description="names, or `{name: …}` with the analysis's options")
    samples: int = Field(64, ge=1, description="validation samples that the inputs of the activations are measured on")
    batch_size: int = Field(16, ge=1, description="samples per forward pass")
    threads: int = Field(1, ge=1, description="CPU threads; part of the result's identity")

    @model_validator(mode="after")
    def _each_once(self) -> AnalyzeParameters:
        names = [entry.name for entry in self.analyses]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"analyses: `{twice}` stands there twice; name each analysis once")
        return self
