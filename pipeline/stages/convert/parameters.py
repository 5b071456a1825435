"""The parameters of the `convert` stage: what replaces the activations, and how it is fitted."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from polytrope.models.convert_options import (
    DropBlocks,
    Factorize,
    Quantize,
    check_basis,
    check_equalize,
    check_family_degree,
    check_keep,
    check_polynomial_only,
    check_structural,
    check_weight,
    fits_activations,
    read_drop_blocks,
    read_factorize,
    read_quantize,
    replacement,
)
from polytrope.pipeline.data.registered import RegisteredAlias, RegisteredName

MAX_DEPTH = 16  # of `polytrope.ops.polynomial_only`, which a plan does not import


def _read_layers(value: Any) -> Any:
    """`3`, `0-5` or `6-` as text; YAML makes a number of 3, and [0, 5] is another way to write 0-5."""
    if isinstance(value, list | tuple) and len(value) == 2:
        value = f"{value[0]}-{value[1]}"
    text = str(value).replace(" ", "")
    match = re.fullmatch(r"(\d+)(?:-(\d*))?", text)
    if isinstance(value, bool) or match is None or (match[2] and int(match[2]) < int(match[1])):
        raise ValueError("expected 3, 0-5 or 6- (layers count from 0; 6- goes to the last one)")
    return text


def _check_auto(value: float | None, info: ValidationInfo) -> float | None:
    if value is None and info.data.get("family") == "auto":
        raise ValueError("family auto chooses by it: give target_error (0.01 is 1 %), or name a family")
    return value


def _read_domain(value: Any) -> Any:
    """`-8,8` as text, or [-8, 8]."""
    parts = value.split(",") if isinstance(value, str) else value
    if value is None:
        return None
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError("expected LOW,HIGH: --domain=-8,8 or domain: [-8, 8]") from None
    if not -math.inf < low < high < math.inf:
        raise ValueError("expected LOW,HIGH with LOW < HIGH, both finite")
    return low, high


Family = Literal[
    "hermite",
    "chebyshev",
    "legendre",
    "fourier",
    "tropical",
    "tropical_rational",
    "rational",
    "polyrelu",
    "rational_spline",
    "auto",
]


def _check_degree(value: int | None, info: ValidationInfo) -> int | None:
    check_family_degree(value, info.data.get("family"))
    return value


def _check_weight(value: str, info: ValidationInfo) -> str:
    check_weight(value, info.data)
    return value


def _check_basis(value: str, info: ValidationInfo) -> str:
    check_basis(value, info.data.get("family"))
    return value


def _check_output_error(value: float | None, info: ValidationInfo) -> float | None:
    check_keep(info.data.get("keep"), value, info.data.get("rated_samples", 1))
    return value


def _check_polynomial_only(value: bool, info: ValidationInfo) -> bool:
    check_polynomial_only(value, info.data)
    return value


def _check_activations_stay(given: dict[str, Any], *, factors: bool) -> None:
    """Refuse what is for new activations alone where there are none.

    Args:
        factors: linear layers are chosen, as of `check_structural`.
    """
    if fits_activations(given.get("family"), bool(given.get("polynomial_only")), structural=True):
        return
    check_structural(given, factors=factors)
    for name in ("ray_tasks", "tables"):
        if given.get(name):
            raise ValueError(f"{name}: without family there are no new activations, which it is about; give family too")


def _check_linear(value: str | None, info: ValidationInfo) -> str | None:
    given = info.data
    if value is None:
        return value
    if given.get("format") == "huggingface":
        raise ValueError("transformers has no quadratic layers, and format is huggingface; leave format out")
    _check_activations_stay(given, factors=False)
    return value


def _read_pair(value: Any) -> Any:
    """`count=2` and `blocks=3,4` as on the command line, or a mapping."""
    if not isinstance(value, str):
        return value
    name, equals, text = value.partition("=")
    try:
        numbers = [json.loads(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not (equals and numbers):
        raise ValueError("expected NAME=NUMBER, such as count=2, blocks=3,4 or energy=0.999")
    return {name.strip(): numbers if name.strip() == "blocks" else numbers[0]}


class DropBlocksParameters(BaseModel):
    """Which blocks go."""

    model_config = ConfigDict(extra="forbid", strict=True)

    count: int | None = Field(None, description="so many in a row, where the states before and after them differ least")
    blocks: list[int] | None = Field(None, description="instead: numbers of the first and the last one, from 0")

    @model_validator(mode="after")
    def possible(self) -> DropBlocksParameters:
        self.options()
        return self

    def options(self) -> DropBlocks:
        """The same for the conversion."""
        try:
            found = read_drop_blocks(self.model_dump())
        except ValueError as error:
            raise ValueError(str(error).removeprefix("drop_blocks: ")) from error
        assert found is not None
        return found


class FactorizeParameters(BaseModel):
    """Which rank the factors of linear layers get."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    energy: float | None = Field(
        None, description="the utilised rank: what holds this share of the squares of a layer's inputs or its outputs"
    )
    ratio: float | None = Field(None, description="the rank that makes a layer so many times smaller")
    rank: int | None = Field(None, description="this rank in every layer")

    @model_validator(mode="after")
    def possible(self) -> FactorizeParameters:
        self.options()
        return self

    def options(self) -> Factorize:
        """The same for the conversion."""
        try:
            found = read_factorize(self.model_dump())
        except ValueError as error:
            raise ValueError(str(error).removeprefix("factorize: ")) from error
        assert found is not None
        return found


def _read_options(value: Any) -> Any:
    """`bits=4,exponent=0.5,per=tensor` as on the command line, or a mapping."""
    if not isinstance(value, str):
        return value
    options: dict[str, Any] = {}
    for part in value.split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if not (name and equals and text):
            raise ValueError("expected NAME=VALUE, such as bits=4 or bits=4,per=tensor,equalize=true")
        if name in options:
            raise ValueError(f"{name} is given twice")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


class QuantizeParameters(BaseModel):
    """How the weights of linear layers are rounded."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    bits: int = Field(description="of a weight, its sign among them: 2 to 16")
    exponent: float | Literal["search"] = Field(
        "search", description="of the power grid, 0.1 to 1 (uniform); search: each layer's best for its outputs"
    )
    per: Literal["row", "tensor"] = Field("row", description="what has a scale of its own")
    equalize: bool = Field(
        False,
        description="with per: tensor, before: rows of a layer to one size, where the activation behind it (a "
        "polynomial on the whole line, ReLU) takes up their scales",
    )

    @model_validator(mode="after")
    def possible(self) -> QuantizeParameters:
        self.options()
        return self

    def options(self) -> Quantize:
        """The same for the conversion."""
        try:
            found = read_quantize(self.model_dump())
        except ValueError as error:
            raise ValueError(str(error).removeprefix("quantize: ")) from error
        assert found is not None
        return found


def _check_structure(value: Any, info: ValidationInfo) -> Any:
    """Of a field behind all others: what does not go with it."""
    given = info.data
    if value is None:
        return value
    if given.get("linear") is not None:
        raise ValueError("linear changes the same layers; use two convert stages, one after the other")
    if given.get("ray_tasks"):
        raise ValueError("ray_tasks read the model as it was before; leave ray_tasks out")
    factors = info.field_name != "drop_blocks" or any(given.get(name) is not None for name in ("factorize", "quantize"))
    _check_activations_stay(given, factors=factors)
    return value


def _check_quantize(value: QuantizeParameters | None, info: ValidationInfo) -> QuantizeParameters | None:
    if value is not None and fits_activations(info.data.get("family"), bool(info.data.get("polynomial_only")), True):
        try:
            check_equalize(value.options())
        except ValueError as error:
            raise ValueError(str(error).removeprefix("quantize: ")) from error
    checked: QuantizeParameters | None = _check_structure(value, info)
    return checked


_DropBlocks = Annotated[DropBlocksParameters | None, BeforeValidator(_read_pair), AfterValidator(_check_structure)]
_Factorize = Annotated[FactorizeParameters | None, BeforeValidator(_read_pair), AfterValidator(_check_structure)]
_Quantize = Annotated[QuantizeParameters | None, BeforeValidator(_read_options), AfterValidator(_check_quantize)]


class ConvertParameters(BaseModel):
    """What replaces the activations, and how it is fitted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    family: Family | None = Field(
        None,
        description="family of the new activations, hermite if not given; with linear, drop_blocks, factorize or "
        "quantize, activations stay as they are if not given; auto: that of the fewest parameters that meets "
        "target_error",
    )
    degree: Annotated[int | None, AfterValidator(_check_degree)] = Field(
        None,
        ge=1,
        le=64,
        description="degree, at most 16, or the pieces of a rational_spline; 8 if not given; with target_error the "
        "highest one tried, 16 if not given",
    )
    target_error: Annotated[float | None, AfterValidator(_check_auto)] = Field(
        None,
        gt=0,
        validate_default=True,
        description="smallest degree per layer with at most this rms error, relative to the activation's rms",
    )
    coverage: float | None = Field(
        None,
        gt=0.5,
        le=1,
        description="share of a layer's inputs inside the fitted interval, tangent lines outside; "
        "null: the interval of the smallest error over all inputs",
    )
    derivative_weight: float = Field(
        0.01,
        ge=0,
        description="weight of the slope's error against the value's, inputs in units of their standard deviation",
    )
    constraints: list[Literal["ends", "end_values", "origin"]] = Field(
        default_factory=list, description="what holds exactly: value and slope at the ends, values there, F(0) = f(0)"
    )
    weight: Annotated[Literal["measured", "normal"], AfterValidator(_check_weight)] = Field(
        "measured",
        description="what a fit is close on: the measured inputs, or the normal distribution of their mean and "
        "deviation, on which polynomials without tangents are a projection in closed form",
    )
    basis: Annotated[Literal["family", "measured"], AfterValidator(_check_basis)] = Field(
        "family",
        description="what the coefficients of a polynomial belong to: the family's polynomials, or, for the same "
        "function, those that are orthonormal on the layer's measured inputs, whose recurrence learns as well",
    )
    depth: int | None = Field(
        None,
        ge=1,
        le=MAX_DEPTH,
        description="polynomial_only: multiplicative depth of each activation, 6 if not given; with target_error the "
        "largest one tried, 16 if not given",
    )
    domain: Annotated[tuple[float, float] | None, BeforeValidator(_read_domain)] = Field(
        None,
        description="polynomial_only: LOW,HIGH, the certified range of every activation; null: the extremes of its "
        "measured inputs, widened by domain_margin",
    )
    domain_margin: float = Field(
        0.25, ge=0, description="polynomial_only: by how much of their distance the extremes are widened on each side"
    )
    polynomial_only: Annotated[bool, AfterValidator(_check_polynomial_only)] = Field(
        False,
        validate_default=True,
        description="sums and products alone, for encrypted inference and verification: compositions of polynomials on "
        "a certified range, without tangents",
    )
    include: list[str] = Field(default_factory=list, description="patterns of module names to convert; default: all")
    exclude: list[str] = Field(default_factory=list, description="patterns of module names to leave as they are")
    types: list[str] = Field(default_factory=list, description="class names to convert; default: all known activations")
    layers: Annotated[str, BeforeValidator(_read_layers)] | None = Field(
        None,
        description="layers to convert: 3, 0-5, or 6- for all from 6 on; they count from 0: the first number in the "
        "module's name",
    )
    calibration_samples: int = Field(256, ge=1, description="training samples that measure the layers' inputs")
    rated_samples: int = Field(
        8,
        ge=0,
        description="samples that tell at which inputs errors move the output most, which the fits go by unless there "
        "is a target_error, and on which every layer alone is converted, to say how far; 0: all inputs count alike, no "
        "layer is rated, and there is no advice",
    )
    keep: int | None = Field(
        None,
        ge=0,
        description="so many activations stay as they are: those whose conversion alone moves the output most",
    )
    output_error: Annotated[float | None, AfterValidator(_check_output_error)] = Field(
        None,
        gt=0,
        validate_default=True,
        description="instead of keep: as few stay as leave an output that moves by at most this, relative to itself, "
        "where the costs of the others add up as squares",
    )
    batch_size: int = Field(32, ge=1, description="samples per forward pass of the calibration")
    threads: int = Field(1, ge=1, description="CPU threads; part of the result's identity")
    ray_tasks: int = Field(
        0,
        ge=0,
        description="calibrate in that many Ray tasks, on the workflow's cluster; the same counts for any number",
    )
    format: Literal["own", "huggingface"] | None = Field(
        None,
        description="of the output; default: own for models of this package, which other stages read, else huggingface",
    )
    onnx: bool = Field(False, description="write model.onnx as well, checked with onnxruntime")
    tables: bool = Field(False, description="write every new activation as a table, tables/NAME.json")
    page: bool = Field(False, description="write conversion.html and plots/ as well")
    register_as: RegisteredName | None = Field(None, description="name in MLflow's model registry")
    register_alias: RegisteredAlias = Field("converted", description="alias of the registered version")
    linear: Annotated[Literal["quadratic"] | None, AfterValidator(_check_linear)] = Field(
        None,
        description="what the linear layers around the activations become, with the same function at first: quadratic "
        "ones; for models of this package",
    )
    quantize: _Quantize = Field(
        None,
        description="after all else: weights of linear layers rounded to few bits; include, exclude and layers are "
        "about them as well; the model is written with ordinary numbers",
    )
    factorize: _Factorize = Field(
        None,
        description="linear layers in two factors, where that makes them smaller; include, exclude and layers are "
        "about them as well; activations are fitted afterwards",
    )
    drop_blocks: _DropBlocks = Field(
        None,
        description="before all else: blocks that go, with a linear map that stands for them; of a GPT-2, of one "
        "stage of a ConvNeXt, or of a model of transformers that is built like Llama",
    )

    def replacement(self) -> str | None:
        """The family of the new activations; None where they stay as they are."""
        structural = any(value is not None for value in self._structure().values())
        if not fits_activations(self.family, self.polynomial_only, structural):
            return None
        return replacement(self.family, self.polynomial_only)

    def title(self) -> str:
        """What becomes of the model, for people."""
        parts = [name for name, given in self._structure().items() if given is not None]
        family = self.replacement()
        return ", ".join(parts if family is None else [*parts, family])

    def _structure(self) -> dict[str, Any]:
        """What is said of anything but activations, by what becomes of it."""
        return {
            "fewer blocks": self.drop_blocks,
            "factored layers": self.factorize,
            "rounded weights": self.quantize,
            "quadratic layers": self.linear,
        }

    def layer_range(self) -> tuple[int, int] | None:
        """The numbers of the first and the last layer; None: all of them."""
        if self.layers is None:
            return None
        first, dash, last = self.layers.partition("-")
        return int(first), int(last) if last else sys.maxsize if dash else int(first)
