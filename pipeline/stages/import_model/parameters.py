"""The parameters of the `import_model` stage: which checkpoint, and what it does not say itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ImportModelParameters(BaseModel):
    """A checkpoint on disk. The content of its files decides whether the stage runs again."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str = Field(
        min_length=1,
        description="a directory of polytrope, Hugging Face or DeepSpeed, or a file with a state dict of GPT-2 or "
        "ConvNeXt; relative to the workflow file",
    )
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="fields of the model's configuration that a state dict or DeepSpeed checkpoint does not tell: "
        "n_head, activation",
    )
