"""A stage of the recipe's study: what a frozen activation starts from."""

from __future__ import annotations

import torch

from polytrope.models import build_model
from polytrope.models.checkpoint import activation_modules, load_model, read_description, save_model
from polytrope.pipeline.stage import Artifact, StageContext


def learned_start(context: StageContext, learned: Artifact, seed: int) -> dict[str, float]:
    """The weights that a training with this seed starts with, and the coefficients that `learned` ended with.

    Trained on with `coefficient_learning_rate: 0` it says what the learned functions do that do not learn.
    """
    about = read_description(learned.path)
    torch.manual_seed(seed)
    model = build_model(about["architecture"], about["config"])
    ends = activation_modules(load_model(learned.path))
    for block, start in activation_modules(model).items():
        start.load_state_dict(ends[block].state_dict())
    save_model(context.output, model, tokenizer=learned.path)
    return {"activations": float(len(ends))}
