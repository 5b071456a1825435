"""`model.activation` of the `train` stage: a pydantic model per activation, told apart by `name`, without torch.

A test compares them with the modules of `polytrope.ops`, which import it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from polytrope.models.configurations import FIXED
from polytrope.pipeline.stages.train.entries import per_layer
from polytrope.pipeline.support.short_form import ShortForm

# What a learnable activation may start as: functions to imitate, and what its family has beside them.
IMITATED = (
    "gelu", "gelu_tanh", "relu", "relu6", "relu_squared", "silu", "tanh", "sigmoid", "mish", "elu", "softplus",
    "hardswish", "leaky_relu",
)  # fmt: skip
_STARTS = ("variance_preserving", *IMITATED)

if TYPE_CHECKING:
    AnyStart = str
    Imitated = str
    Start = str
    PolynomialStart = str
    PublishedStart = str
    FourierStart = str
    SplineStart = str
    PublishedPolynomialStart = str
    ClassicalName = str
else:
    ClassicalName = Literal[FIXED]
    AnyStart = Literal["variance_preserving", "stable", "torchortho", "identity", *IMITATED]
    Imitated = Literal[IMITATED]
    Start = Literal[_STARTS]
    PolynomialStart = Literal["variance_preserving", "stable", *IMITATED]
    PublishedStart = Literal["variance_preserving", "torchortho", *IMITATED]
    SplineStart = Literal["variance_preserving", "identity", *IMITATED]
    FourierStart = Literal["variance_preserving", "siren", "torchortho", *IMITATED]
    PublishedPolynomialStart = Literal["variance_preserving", "stable", "torchortho", *IMITATED]

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_End = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
_ComposedDegree = Annotated[int, Field(ge=1, le=128)]


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] >= value[1]:
        raise ValueError(f"the first end must be below the second: {list(value)}")
    return value


def _not_gated(value: bool) -> bool:
    if value:
        raise ValueError("a gated activation halves the width; leave it out and use `feedforward: gated`")
    return value


Interval = Annotated[tuple[_End, _End], Field(strict=False), AfterValidator(_rising)]
Gate = Annotated[bool, AfterValidator(_not_gated)]


class _Named(BaseModel):
    model_config = _STRICT
    layers: str | int | None = Field(None, description="in a list: the blocks that have it, such as 3, 0-5 or 6-")


class _Classical(_Named):
    name: ClassicalName


class _Grouped(_Named):
    """What all elementwise activations have."""

    num_parameters: int = Field(1, ge=1, description="groups of channels that have coefficients of their own")
    dim: int = Field(-1, description="the dimension whose channels are grouped")
    glu: Gate = Field(False, description="gated; `feedforward: gated` does that")


class _Elementwise(_Grouped):
    degree: int = Field(3, ge=1, le=16, description="1…16")


class _Tailed(_Elementwise):
    """What goes on by its formula, or along its tangents."""

    interval: Interval | None = Field(None, description="beyond it the function goes on along its tangents")


class _Polynomial(_Tailed):
    interval: Interval | None = Field(
        None,
        description="beyond it the function goes on along its tangents; null: its formula everywhere; default: [-2, 2] "
        "where it starts as a function, otherwise null",
    )
    learnable_recurrence: bool = Field(False, description="learn the recurrence of the basis as well")
    variable: Annotated[tuple[_End, _Positive], Field(strict=False)] | None = Field(
        None,
        description="[shift, scale]: polynomials of (x - shift) / scale; default: of x, for chebyshev and legendre "
        "what takes the interval to [-1, 1]",
    )


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


# Any: without a default of its own, for `train` decides (default_start.py).
_POLYNOMIAL_START: Any = Field(
    None,
    description="how it starts; default: gelu, with `interval: null` stable",
    json_schema_extra=_without_default,
)


class _Hermite(_Polynomial):
    name: Literal["hermite"]
    init: PublishedPolynomialStart = _POLYNOMIAL_START


class _Chebyshev(_Polynomial):
    name: Literal["chebyshev"]
    init: PolynomialStart = _POLYNOMIAL_START


class _Legendre(_Polynomial):
    name: Literal["legendre"]
    init: PolynomialStart = _POLYNOMIAL_START


class _Fourier(_Tailed):
    name: Literal["fourier"]
    degree: int = Field(5, ge=1, le=16, description="1…16")
    harmonic: bool = Field(False, description="one learnable frequency and its multiples")
    init: FourierStart = Field(
        "variance_preserving", description="how it starts; siren: as sin(30 x), with the weights of an mlp to match"
    )

    @model_validator(mode="after")
    def _one_sine(self) -> _Fourier:
        if self.init == "siren" and (self.degree != 1 or self.harmonic or self.interval is not None):
            raise ValueError("init: siren is one sine: degree: 1, without harmonic and interval")
        return self


class _Tropical(_Elementwise):
    name: Literal["tropical"]
    degree: int = Field(5, ge=1, le=16, description="1…16")
    init: PublishedStart = Field("variance_preserving", description="how it starts")


class _TropicalRational(_Elementwise):
    name: Literal["tropical_rational"]
    degree: int = Field(6, ge=1, le=16, description="1…16")
    init: Start = Field("variance_preserving", description="how it starts")


class _Rational(_Tailed):
    name: Literal["rational"]
    degree: int = Field(5, ge=1, le=16, description="of the numerator, 1…16")
    denominator_degree: int | None = Field(None, ge=0, le=16, description="default: one less")
    init: Start = Field("variance_preserving", description="how it starts")


class _PolyReLU(_Tailed):
    name: Literal["polyrelu"]
    init: Start = Field("variance_preserving", description="how it starts")


class _PiecewiseLinear(_Elementwise):
    name: Literal["piecewise_linear"]
    degree: int = Field(8, ge=1, le=64, description="number of pieces, 1…64")
    interval: Interval = Field((-4.0, 4.0), description="the first and the last knot")
    init: Start = Field("variance_preserving", description="how it starts")


class _RationalSpline(_Elementwise):
    name: Literal["rational_spline"]
    degree: int = Field(8, ge=1, le=64, description="number of pieces, 1…64")
    interval: Interval = Field((-4.0, 4.0), description="the first and the last knot")
    init: SplineStart = Field("variance_preserving", description="how it starts")


class _PolyNorm(_Named):
    name: Literal["polynorm"]
    degree: int = Field(3, ge=1, le=16, description="1…16")
    epsilon: float = Field(1e-6, gt=0, description="added to mean squares")
    init: Start = Field("variance_preserving", description="how it starts")


class _Affine(_Grouped):
    name: Literal["affine"]
    base: Imitated | None = Field(None, description="the fixed function; default: the one that init names, or gelu")
    init: Start = Field("variance_preserving", description="how it starts: variance_preserving, or as its base")

    @model_validator(mode="after")
    def _starts_as_its_base(self) -> _Affine:
        if self.base is not None and self.init not in ("variance_preserving", self.base):
            raise ValueError(f"init: expected variance_preserving or {self.base}, its base, got {self.init}")
        return self


class _Composition(_Grouped):
    name: Literal["composition"]
    degree: _ComposedDegree | Annotated[list[_ComposedDegree], Field(min_length=1)] = Field(
        8, description="of the polynomials, innermost first, each 1…128; a number: of a single one"
    )
    domain: Interval = Field((-4.0, 4.0), description="the inputs it is made for; nothing is promised outside")
    center: _End | None = Field(None, description="default: the middle of the domain")
    gate: bool = Field(False, description="multiplied by x, as GELU is")
    init: Start = Field("variance_preserving", description="how it starts")


_Settings = Annotated[
    _Classical | _Hermite | _Chebyshev | _Legendre | _Fourier | _Tropical | _TropicalRational | _Rational | _PolyReLU
    | _PiecewiseLinear | _PolyNorm | _RationalSpline | _Affine | _Composition,
    Field(discriminator="name"),
]  # fmt: skip
LEARNABLE_SETTINGS: dict[str, type[BaseModel]] = {
    "hermite": _Hermite,
    "chebyshev": _Chebyshev,
    "legendre": _Legendre,
    "fourier": _Fourier,
    "tropical": _Tropical,
    "tropical_rational": _TropicalRational,
    "rational": _Rational,
    "polyrelu": _PolyReLU,
    "polynorm": _PolyNorm,
    "piecewise_linear": _PiecewiseLinear,
    "rational_spline": _RationalSpline,
    "affine": _Affine,
    "composition": _Composition,
}


def named_starts(name: str) -> tuple[str, ...]:
    """What a learnable activation takes for `init`."""
    return get_args(LEARNABLE_SETTINGS[name].model_fields["init"].annotation)


def spelled_out(value: Any) -> Any:
    """`gelu` as `{name: gelu}`, `hermite3` as `{name: hermite, degree: 3}`; anything else as it is."""
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or not isinstance(options.get("name"), str) or "degree" in options:
        return options
    short = re.fullmatch(r"([a-z_]+?)(\d+)", options["name"])
    if short is None or short[1] in FIXED:
        return options
    return {**options, "name": short[1], "degree": int(short[2])}


if TYPE_CHECKING:
    Activation = str | dict[str, Any] | list[str | dict[str, Any]]
else:
    _NAMES = {"enum": [*FIXED, *LEARNABLE_SETTINGS]}
    Activation = per_layer(_Settings, spelled_out, ShortForm(_NAMES, {"type": "string", "pattern": r"^[a-z_]+\d+$"}))
