"""The parameters of the `convert` stage: what replaces the activations, and how it is fitted."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ConvertParameters(BaseModel):
    """What replaces the activations, and how it is fitted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    family: Literal[
        "hermite", "chebyshev", "legendre", "fourier", "tropical", "tropical_rational", "rational", "polyrelu"
    ] = Field("hermite", description="family of the new activations")
    degree: int = Field(8, ge=1, le=16, description="degree; with target_error the highest one tried")
    target_error: float | None = Field(
        None,
        gt=0,
        description="smallest degree per layer with at most this rms error, relative to the activation's rms",
    )
    coverage: float | None = Field(
        None,
        gt=0.5,
        le=1,
        description="share of a layer's inputs inside the fitted interval, tangent lines outside; "
        "null: the interval of the smallest error over all inputs",
    )
    derivative_weight: float = Field(0.01, ge=0, description="weight of the slope's error against the value's")
    constraints: list[Literal["ends", "end_values", "origin"]] = Field(
        default_factory=list, description="what holds exactly: value and slope at the ends, values there, F(0) = f(0)"
    )
    include: list[str] = Field(default_factory=list, description="patterns of module names to convert; default: all")
    exclude: list[str] = Field(default_factory=list, description="patterns of module names to leave as they are")
    types: list[str] = Field(default_factory=list, description="class names to convert; default: all known activations")
    layers: tuple[int, int] | None = Field(
        None, description="first and last layer to convert, from 0: the first number in the module's name"
    )
    calibration_samples: int = Field(256, ge=1, description="training samples that measure the layers' inputs")
    batch_size: int = Field(32, ge=1, description="samples per forward pass of the calibration")
    threads: int = Field(1, ge=1, description="CPU threads; part of the result's identity")
    ray_tasks: int = Field(
        0,
        ge=0,
        description="calibrate in that many Ray tasks, on the workflow's cluster; the same counts for any number",
    )
    format: Literal["own", "huggingface"] | None = Field(
        None,
        description="of the output; default: own for GPT-2 and ConvNeXt, which other stages read, else huggingface",
    )
    onnx: bool = Field(False, description="write model.onnx as well, checked with onnxruntime")
    tables: bool = Field(False, description="write every new activation as a table, tables/NAME.json")
    page: bool = Field(False, description="write conversion.html and plots/ as well")
    register_as: str | None = Field(None, description="name in MLflow's model registry")
    register_alias: str = Field("converted", description="alias of the registered version")
