"""Which parts there are, and their options: what can be checked without torch.

A part is written as its name or as `{name: …, options}`. `PARTS` lists them by the field of the model's configuration;
what builds them stands beside, in one dict per field.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polytrope.models.per_layer import Entry, layer_configs


class Part(BaseModel):
    """What all parts have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    def config(self) -> Entry:
        """Its name, with the options that are not the usual ones."""
        options = self.model_dump(mode="json", exclude_defaults=True, exclude={"layers", "name"})
        name = str(self.name)  # type: ignore[attr-defined]
        return {"name": name, **options} if options else name


class LayerPart(Part):
    """A part that each block has of its own."""

    layers: str | int | None = Field(None, description="in a list: the blocks that have it, such as 3, 0-5 or 6-")


class Attention(LayerPart):
    """How a token's vector becomes a mixture of those up to it."""

    fixed_weights: ClassVar[bool] = False  # no dropout of attention weights


class SoftmaxSettings(Attention):
    """Weights are the softmax of the scores."""

    name: Literal["softmax"] = "softmax"


class ReciprocalSettings(BaseModel):
    """1/d as a polynomial: what `export_circuit` puts in the place of the division."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    degree: int = Field(ge=1, le=128, description="of the Chebyshev polynomial")
    newton: int = Field(ge=0, le=8, description="steps of Newton's iteration after it, which square the error")
    domain: Annotated[tuple[float, float], Field(strict=False)] = Field(description="[low, high] of what is divided by")

    @model_validator(mode="after")
    def _is_positive(self) -> ReciprocalSettings:
        if not 0.0 < self.domain[0] < self.domain[1]:
            raise ValueError(f"domain: expected 0 < low < high, got {list(self.domain)}")
        return self


class PowerSettings(Attention):
    """Weights are an even power of the scores, divided by their sum."""

    fixed_weights: ClassVar[bool] = True

    name: Literal["power"] = "power"
    power: Literal[2, 4] = Field(2, description="2 or 4")
    recurrent: bool = Field(
        False, description="sample with a state of fixed size instead of a cache that grows; power: 2 only"
    )

    reciprocal: ReciprocalSettings | None = Field(
        None, description="a polynomial instead of the division, on a range; default: the division"
    )

    @model_validator(mode="after")
    def _has_a_state(self) -> PowerSettings:
        if self.recurrent and self.power != 2:
            raise ValueError(f"recurrent: only power: 2 has a state of that form, this is power: {self.power}")
        return self


class Norm(Part):
    """What keeps the vectors of tokens or pixels at one scale; one for the whole model."""

    over_batch: ClassVar[bool] = False  # in training, a sample's result depends on the others


class LayerNormSettings(Norm):
    """Each vector by its own mean and variance."""

    name: Literal["layer_norm"] = "layer_norm"


class BatchNormSettings(Norm):
    """Each channel by its mean and variance over the batch; afterwards by running averages of these."""

    over_batch: ClassVar[bool] = True

    name: Literal["batch"] = "batch"


class FeedForward(LayerPart):
    """A linear layer, an activation, a linear layer back."""

    multiplicative: ClassVar[bool] = False  # it has parameters that learn at `multiplicative_learning_rate`

    def hidden(self, width: int) -> int:
        """Channels that the activation sees."""
        return 4 * width

    def products(self, width: int) -> int:
        """Multiply-adds of its matrices per vector."""
        return 8 * width**2


class MLPSettings(FeedForward):
    """Four times as wide inside."""

    name: Literal["mlp"] = "mlp"


class GatedSettings(FeedForward):
    """The activation of one half of the inner channels times the other half, with as many parameters as `mlp`."""

    name: Literal["gated"] = "gated"

    def hidden(self, width: int) -> int:
        """8/3 of the width, so that three matrices have the size of two of four times the width."""
        return max(1, 8 * width // 3)

    def products(self, width: int) -> int:
        """Of the inner layer with its two halves and of the outer one."""
        return 3 * width * self.hidden(width)


class QuadraticSettings(FeedForward):
    """`mlp` whose two layers are quadratic; they start as the linear ones."""

    multiplicative: ClassVar[bool] = True

    name: Literal["quadratic"] = "quadratic"
    square: bool = Field(True, description="with a term of squared inputs: three matrices per layer, not two")

    def products(self, width: int) -> int:
        """Two or three matrices for each of `mlp`."""
        return (3 if self.square else 2) * 8 * width**2


# By field of the configuration, then by name. The first is what a model has where nothing is said.
PARTS: dict[str, dict[str, type[Part]]] = {
    "attention": {"softmax": SoftmaxSettings, "power": PowerSettings},
    "norm": {"layer_norm": LayerNormSettings, "batch": BatchNormSettings},
    "feedforward": {"mlp": MLPSettings, "gated": GatedSettings, "quadratic": QuadraticSettings},
}


def read_part(field: str, given: Any) -> Any:
    """The settings of one part.

    Raises:
        ValueError: no such part, an unknown or impossible option; names the field.
    """
    kinds = PARTS[field]
    options = {"name": given} if isinstance(given, str) else given
    if not isinstance(options, dict) or options.get("name") not in kinds:
        raise ValueError(f"{field}: expected one of {', '.join(kinds)}, or {{name: …}} with its options, got {given!r}")
    try:
        return kinds[options["name"]].model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (field, *first["loc"])))
        raise ValueError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error


def read_parts(field: str, given: Entry | list[Entry], layers: int) -> list[Any]:
    """The settings of each layer's part.

    Raises:
        ValueError: as `read_part` and `layer_configs`.
    """
    return [read_part(field, entry) for entry in layer_configs(field, given, layers)]
