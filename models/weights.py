"""Loads published weights whose names have been translated to a model's own, or says what does not fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

_SHOWN = 8  # problems named in an error


def load_renamed(
    model: nn.Module, tensors: Mapping[str, Tensor], *, optional: str, tied: Collection[str], what: str
) -> None:
    """Copy `tensors` into `model`.

    Args:
        model: receives the weights; its own dtypes and devices stay.
        tensors: weights by the model's own names.
        optional: parameters with this in their names may be absent (the coefficients of learnable activations).
        tied: names of the model that share another one's tensor and are not looked for.
        what: for the message: `ConvNeXt`.

    Raises:
        ValueError: names or shapes that do not fit, listed; the model is unchanged.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    problems = [f"missing {name}" for name in own if name not in tensors and optional not in name]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the model's is {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(f"not the weights of this {what}: " + "; ".join(problems[:_SHOWN]))
    model.load_state_dict(tensors, strict=False)
