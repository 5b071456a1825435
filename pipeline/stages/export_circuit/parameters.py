"""The parameters of the `export_circuit` stage."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ReciprocalParameters(BaseModel):
    """What stands for the divisions of attention."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    degree: int = Field(31, ge=1, le=128, description="of the Chebyshev polynomial, of depth log2 of it, rounded up")
    newton: int = Field(
        0,
        ge=0,
        le=8,
        description="steps of Newton's iteration after it: each squares the error, as twice the degree does, for a "
        "depth of 2 instead of 1 and fewer products",
    )
    margin: float = Field(
        2.0,
        gt=1,
        description="the range is that of the calibration, from the smallest denominator divided by it to the largest "
        "times it",
    )


class InverseRootParameters(BaseModel):
    """What stands for the roots in `norm: rms`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    degree: int = Field(31, ge=1, le=128, description="of the Chebyshev polynomial, as of `reciprocal`")
    newton: int = Field(
        0,
        ge=0,
        le=8,
        description="steps of Newton's iteration after it, of depth 2 each: an error e becomes one of about -1.5 e²",
    )
    margin: float = Field(
        1.7,
        gt=1,
        description="the range is that of the calibration, from the smallest mean square divided by it to the largest "
        "times it",
    )
    target_error: float = Field(
        0.01, gt=0, lt=1, description="a polynomial with a larger relative error on its range is refused"
    )


class ExportCircuitParameters(BaseModel):
    """How divisions become polynomials, and on what the ranges are measured and checked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    reciprocal: ReciprocalParameters = Field(
        default_factory=ReciprocalParameters, description="polynomials in the place of the divisions of attention"
    )
    inverse_root: InverseRootParameters = Field(
        default_factory=InverseRootParameters, description="polynomials in the place of the roots in norm: rms"
    )
    calibration_samples: int = Field(512, ge=1, description="training samples that measure the ranges")
    held_out_samples: int = Field(256, ge=1, description="validation samples on which what lies outside is counted")
    batch_size: int = Field(32, ge=1, description="samples per forward pass")
    threads: int = Field(1, ge=1, description="CPU threads; part of the result's identity")
