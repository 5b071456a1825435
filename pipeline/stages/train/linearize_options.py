"""`linearize`: what a training of a tangent model cannot have, with the reason; refused."""

from __future__ import annotations

from typing import Any

# By parameter, for any value but its default.
REASONS = {
    "model": "a tangent is one of an `initial` input, and this model begins from nothing",
    "adapters": "the tangents of the weights learn, and there is nothing to merge adapters into",
    "distillation": "a tangent has no blocks of its own behind which states could be compared",
    "activation_basis": "the initial model stays as it is, and its polynomials in their basis",
    "range_penalty": "it is of a model's own activations, of which a tangent has none",
    "keep_initial": "the result holds the initial weights anyway, in `model.safetensors`",
    "compile": "torch.compile does not see into the derivative",
    "activation_checkpointing": "backward cannot compute the derivative again",
    "statistics_every": "the activations see the initial weights alone, which do not change",
    "peak_flops": "MFU counts the gradients of all weights",
}


def refuse_with_linearize(parameters: Any) -> None:
    """Raise ValueError for the first of a training's `parameters` that does not go with `linearize: true`, if given."""
    if not parameters.linearize:
        return
    for name, reason in REASONS.items():
        if getattr(parameters, name) != type(parameters).model_fields[name].default:
            raise ValueError(f"{name}: not with `linearize`: {reason}")
    if parameters.precision == "fp16":
        raise ValueError("precision: fp16 loses small derivatives; with `linearize` use fp32 or bf16")
