"""Recover a converted model: train the coefficients of its activations, and nothing else, to imitate the original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.calibration import input_of
from polytrope.models.inputs import Batch, counted, forward, mask_of, masks
from polytrope.models.matching import feature_error, find_blocks, states_behind
from polytrope.models.modes import evaluation_mode
from polytrope.models.parts.reciprocal import certified_modules
from polytrope.models.response import response
from polytrope.ops import LearnableActivation

_INPUTS = 255  # of each activation, that say how far its coefficients move it


def sentence_embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """Mean of the token vectors under the attention mask, of length 1: `[batch, width]`."""
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = (forward(model, batch) * mask).sum(1) / mask.sum(1)
    return F.normalize(vectors, dim=-1)


def learned_activations(model: nn.Module) -> list[LearnableActivation]:
    """The learnable activations, each once, but for the polynomials that a certificate is of.

    Raises:
        ValueError: the model has none.
    """
    fixed = certified_modules(model)
    found = [module for module in model.modules() if isinstance(module, LearnableActivation) and module not in fixed]
    if not found:
        raise ValueError("the model has no learnable activation; convert it first")
    return found


def received(model: nn.Module, batch: Batch) -> dict[LearnableActivation, Tensor]:
    """Some of the inputs `[n]` that each learnable activation gets, padding left out, evenly taken from the first call.

    Raises:
        ValueError: the model has none, or does not call one.
    """
    seen: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = input_of((*arguments, *keywords.values()))
        values = counted(x.detach(), mask_at(batch, module, x)).flatten()
        seen.setdefault(module, values[:: max(1, len(values) // _INPUTS)])

    modules = learned_activations(model)
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad(), evaluation_mode(model), masks(model) as mask_at:
            forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if idle := [name for name, module in model.named_modules() if module in modules and module not in seen]:
        raise ValueError(f"activation `{idle[0]}` is not called, so it cannot be trained")
    return {module: seen[module] for module in modules}


def distill(
    teacher: nn.Module,
    student: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int,
    learning_rate: float = 3e-3,
    features: float = 0.0,
) -> list[float]:
    """Train the student's coefficients so that its token vectors are those of the teacher; weights are frozen.

    Adam with a cosine schedule on the squared distance of the outputs, relative to their size, and that of the states
    behind each block, relative to their variance (`models.matching`). Returns the losses. Batches are taken in turn, in
    an order that depends on nothing but their number. (A training of all weights after a teacher is the stage `train`
    with its `distillation`.)

    Args:
        features: weight of the states against that of the outputs, which is 1.
        learning_rate: by how much a step moves an activation at the start, root mean square over the inputs it gets.
            What that is for a coefficient depends on the basis, its variable, and where the straight lines begin.

    Raises:
        ValueError: a batch for which the teacher gives nothing but 0, or no finite numbers; an activation that receives
            nothing from the first batch, or that its coefficients do not move there; with `features`, models whose
            blocks are not known, or not as many in both, or a block of the teacher whose states are all the same
            number.
    """
    here, there = (find_blocks(model) if features else [] for model in (teacher, student))
    if len(here) != len(there):
        raise ValueError(
            f"features: the teacher has {len(here)} blocks and the student {len(there)}, and nothing says which belong "
            "together"
        )
    names = {module: name for name, module in student.named_modules()}
    groups: list[dict[str, Any]] = [
        {"params": list(module.parameters(recurse=False)), "rate": learning_rate / _response(module, inputs, names)}
        for module, inputs in received(student, batches[0]).items()
    ]
    wanted = {id(parameter) for group in groups for parameter in group["params"]}
    frozen = [p for p in student.parameters() if id(p) not in wanted and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    losses: list[float] = []
    try:
        with evaluation_mode(teacher), evaluation_mode(student):  # no dropout: the target has none
            for step in range(steps):
                number = order[step % len(order)]
                batch = batches[number]
                for group in optimizer.param_groups:
                    group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * step / steps))
                mask = mask_of(student, batch)
                with torch.no_grad(), states_behind(teacher, here) as aims:
                    target = counted(forward(teacher, batch), mask)
                with states_behind(student, there) as states:
                    output = counted(forward(student, batch), mask)
                of_states = features * feature_error(states, aims, mask, here) if features else 0.0
                loss = (output - target).square().sum() / _size(target, number) + of_states
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return losses


def _response(module: LearnableActivation, inputs: Tensor, names: Mapping[nn.Module, str]) -> float:
    """How far its coefficients move an activation, more than 0.

    Raises:
        ValueError: it does not move, or there are no inputs; names it.
    """
    name = names[module]
    if not inputs.numel():
        raise ValueError(
            f"activation `{name}` receives nothing from the first batch (batch 0), so that no learning rate can be "
            "told for it; put a batch first that reaches it"
        )
    found = response(module, inputs)
    if not 0.0 < found < math.inf:
        raise ValueError(
            f"activation `{name}` moves by {found:g} with its coefficients on what it receives from the first batch "
            "(batch 0), so that no learning rate can be told for it; put a batch first with other inputs"
        )
    return found


def _size(target: Tensor, number: int) -> float:
    """The sum of squares that errors are relative to.

    Raises:
        ValueError: 0, or not finite.
    """
    size = float(target.double().square().sum())
    if not 0.0 < size < math.inf:
        what = "no position that counts" if not target.numel() else "nothing but 0" if size == 0 else "NaN or infinity"
        raise ValueError(
            f"for batch {number} the teacher gives {what}, and no error can be relative to that; leave the batch out"
        )
    return size
