"""Recover a converted model: train the coefficients of its activations, and nothing else, to imitate the original."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.inputs import Batch, forward
from polytrope.models.modes import evaluation_mode
from polytrope.ops import is_learnable_activation


def sentence_embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """Mean of the token vectors under the attention mask, of length 1: `[batch, width]`."""
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = (forward(model, batch) * mask).sum(1) / mask.sum(1)
    return F.normalize(vectors, dim=-1)


def coefficients(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the learnable activations.

    Raises:
        ValueError: the model has none.
    """
    found = [
        parameter
        for module in model.modules()
        if is_learnable_activation(module)
        for parameter in module.parameters(recurse=False)
    ]
    if not found:
        raise ValueError("the model has no learnable activation; convert it first")
    return found


def distill(
    teacher: nn.Module, student: nn.Module, batches: Sequence[Batch], *, steps: int, learning_rate: float = 2e-3
) -> list[float]:
    """Train the student's coefficients so that its token vectors are those of the teacher; weights are frozen.

    Adam with a cosine schedule on the squared distance of the outputs, relative to their size. Returns the losses.
    Batches are taken in turn, in an order that depends on nothing but their number.
    """
    learned = coefficients(student)
    wanted = {id(parameter) for parameter in learned}
    frozen = [p for p in student.parameters() if id(p) not in wanted and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(learned, lr=learning_rate, betas=(0.9, 0.99))
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    losses: list[float] = []
    try:
        with evaluation_mode(teacher), evaluation_mode(student):  # no dropout: the target has none
            for step in range(steps):
                batch = batches[order[step % len(order)]]
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                with torch.no_grad():
                    target = forward(teacher, batch)
                output = forward(student, batch)
                mask = batch["attention_mask"].unsqueeze(-1) if "attention_mask" in batch else torch.ones_like(target)
                loss = ((output - target) ** 2 * mask).sum() / (target**2 * mask).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return losses
