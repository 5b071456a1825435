"""AdamW's parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from polytrope.pipeline.stages.train.parameters import TrainParameters
from polytrope.pipeline.stages.train.trainable import ADAPTERS, COEFFICIENTS, MULTIPLICATIVE

MULTIPLICATIVE_SHARE = 0.1  # of the base rate


def parameter_groups(model: nn.Module, parameters: TrainParameters) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, layer scales, adapters, activation coefficients and multiplicative parameters not,
    nor what a module names in `added`: it adds them to its inputs.

    The last two have their own rates: what multiplies inputs by inputs learns at `MULTIPLICATIVE_SHARE` of the base
    rate where `multiplicative_learning_rate` does not say.

    The tangent of a weight (`linearize`) is in the group that the weight would be in.

    Coefficients are one group, `coefficients`, where `coefficient_learning_rate` is given; else one for each multiple
    of the base rate that `coefficient_multiple` says: `coefficients_x10`; parameters without a model are those of
    fine-tuning. `peak` is a group's peak learning rate; the schedule scales it.
    """
    from polytrope.models.adapters import adapter_parameters
    from polytrope.models.linearized import LinearizedModel
    from polytrope.models.parts.feedforward import multiplicative_parameters
    from polytrope.ops import is_learnable_activation
    from polytrope.pipeline.stages.train.coefficient_rates import coefficient_multiple

    own_rate = parameters.coefficient_learning_rate
    peaks = {"matrices": parameters.learning_rate, "vectors": parameters.learning_rate}
    group_of: dict[int, str] = {}
    for module in model.modules():
        if is_learnable_activation(module):
            name, peak = COEFFICIENTS, own_rate
            if peak is None:
                multiple = coefficient_multiple(module, fine_tuning=parameters.model is None)  # type: ignore[arg-type]
                name, peak = f"{COEFFICIENTS}_x{multiple:g}", multiple * parameters.learning_rate
            peaks[name] = peak
            group_of |= {id(parameter): name for parameter in module.parameters()}
    if multiplicative := multiplicative_parameters(model):
        peak = parameters.multiplicative_learning_rate
        peaks[MULTIPLICATIVE] = MULTIPLICATIVE_SHARE * parameters.learning_rate if peak is None else peak
        group_of |= {id(parameter): MULTIPLICATIVE for parameter in multiplicative}
    if adapters := adapter_parameters(model):
        peaks[ADAPTERS] = parameters.learning_rate
        group_of |= {id(parameter): ADAPTERS for parameter in adapters}
    added = {id(getattr(module, name)) for module in model.modules() for name in getattr(module, "added", ())}
    if isinstance(model, LinearizedModel):
        for _, weight, tangent in model.pairs():
            if id(weight) in group_of:
                group_of[id(tangent)] = group_of[id(weight)]
            if id(weight) in added:
                added.add(id(tangent))
    members: dict[str, list[nn.Parameter]] = {name: [] for name in peaks}
    for parameter in model.parameters():  # names a tied parameter once
        if parameter.requires_grad:
            usual = "matrices" if parameter.dim() >= 2 and id(parameter) not in added else "vectors"
            members[group_of.get(id(parameter), usual)].append(parameter)
    return [
        {
            "params": group,
            "name": name,
            "peak": peaks[name],
            "lr": peaks[name],
            "weight_decay": parameters.weight_decay if name == "matrices" else 0.0,
        }
        for name, group in members.items()
        if group
    ]


def coefficient_rates(groups: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The present learning rates of groups with their own as metrics: `learning_rate/coefficients_x10`, …"""
    return {
        f"learning_rate/{group['name']}": group["lr"]
        for group in groups
        if COEFFICIENTS in group.get("name", "") or group.get("name") == MULTIPLICATIVE
    }


def learning_rate_factor(step: int, steps: int, warmup_steps: int, minimum: float) -> float:
    """Fraction of the peak learning rate at `step` (0-based): linear warm-up, then a cosine down to `minimum`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if steps <= warmup_steps + 1:
        return 1.0
    progress = (step - warmup_steps) / (steps - 1 - warmup_steps)
    return minimum + (1.0 - minimum) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(groups: Iterable[dict[str, Any]], factor: float) -> None:
    """Apply the schedule. It is a pure function of the step, so there is no scheduler state to lose."""
    for group in groups:
        group["lr"] = group["peak"] * factor
