"""The parameters of the `analyze` stage: which analyses, and the options of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

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


AnalysisOptions = SignalOptions | KernelOptions
NAMES = ("signal", "kernel")


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
