"""Training losses: Poly-1 against its series and its gradient in closed form, and where models use it."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from polytrope.models import build_model
from polytrope.models.losses import LOSSES, make_loss
from polytrope.pipeline.stages.train.parameters import TrainingLoss, TrainParameters

CLASSES = 10


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1000, CLASSES, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.fixture
def classes() -> Tensor:
    return torch.randint(0, CLASSES, (1000,), generator=torch.Generator().manual_seed(1))


def test_it_is_cross_entropys_series_with_another_first_coefficient(logits: Tensor, classes: Tensor) -> None:
    missed = 1.0 - logits.softmax(-1)[torch.arange(1000), classes]
    missed = missed.clamp(max=0.995)  # beyond, 3000 terms do not do
    series = sum(missed**power / power for power in range(2, 3000))
    for epsilon in (-1.0, 0.0, 2.0):
        loss = make_loss("poly", epsilon=epsilon)(logits, classes, reduction="none")
        expected = (1.0 + epsilon) * missed + series
        torch.testing.assert_close(loss[missed < 0.995], expected[missed < 0.995], rtol=0, atol=1e-5)


def test_its_gradient_is_that_of_cross_entropy_times_one_plus_epsilon_p(logits: Tensor, classes: Tensor) -> None:
    (gradient,) = torch.autograd.grad(make_loss("poly", epsilon=2.0)(logits, classes), logits)
    probabilities, targets = logits.softmax(-1).detach(), F.one_hot(classes, CLASSES)
    of_target = (probabilities * targets).sum(-1, keepdim=True)
    expected = (probabilities - targets) * (1.0 + 2.0 * of_target) / 1000
    assert (gradient - expected).abs().max() < 4e-19


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_without_epsilon_it_is_cross_entropy_bit_for_bit(
    logits: Tensor, classes: Tensor, smoothing: float, reduction: str
) -> None:
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    values = [
        loss(logits, classes, **options)
        for loss in (make_loss("poly", epsilon=0.0), make_loss("cross_entropy"), F.cross_entropy)
    ]
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value in values]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classes_probabilities_and_smoothing_agree(logits: Tensor, classes: Tensor, smoothing: float) -> None:
    """p_t = Σ_c q_c p_c, of whatever q is."""
    loss = make_loss("poly", epsilon=2.0)
    one_hot = F.one_hot(classes, CLASSES).double()
    smooth = one_hot * (1.0 - smoothing) + smoothing / CLASSES
    expected = F.cross_entropy(logits, smooth) + 2.0 * (1.0 - (smooth * logits.softmax(-1)).sum(-1)).mean()
    for targets in (classes, one_hot):
        torch.testing.assert_close(loss(logits, targets, label_smoothing=smoothing), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_positions_that_do_not_count_do_not(logits: Tensor, classes: Tensor, smoothing: float) -> None:
    loss = make_loss("poly", epsilon=2.0)
    some = classes.clone()
    some[300:] = -100
    expected = loss(logits[:300], classes[:300], label_smoothing=smoothing)
    torch.testing.assert_close(loss(logits, some, label_smoothing=smoothing), expected)
    torch.testing.assert_close(loss(logits, some, reduction="sum", label_smoothing=smoothing), 300 * expected)
    assert not loss(logits, some, reduction="none", label_smoothing=smoothing)[300:].any()


@pytest.mark.parametrize(
    ("architecture", "sizes", "inputs"),
    [
        (
            "gpt2",
            {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 16, "sequence_length": 8},
            torch.arange(16).view(2, 8),
        ),
        (
            "convnext",
            {"depths": [1], "dims": [8], "num_classes": 5, "in_channels": 1, "patch_size": 2},
            torch.ones(2, 1, 8, 8),
        ),
    ],
)
def test_every_model_is_trained_by_it_and_measured_by_cross_entropy(
    architecture: str, sizes: dict[str, Any], inputs: Tensor
) -> None:
    model = build_model(architecture, sizes).train()
    targets = inputs if architecture == "gpt2" else torch.tensor([0, 4])
    logits = model(inputs).flatten(0, -2)
    plain = F.cross_entropy(logits, targets.flatten())
    assert torch.equal(model(inputs, targets), plain), "as it is left out"
    model.training_loss = make_loss("poly", epsilon=2.0)  # type: ignore[assignment]
    of_target = logits.softmax(-1).gather(1, targets.reshape(-1, 1))
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same(inputs, targets), plain + 2.0 * (1.0 - of_target).mean())
    torch.testing.assert_close(model.eval()(inputs, targets), plain)


def test_what_a_workflow_may_say_are_the_losses_and_their_options() -> None:
    said = {get_args(model.model_fields["name"].annotation)[0]: model for model in get_args(TrainingLoss)}
    assert said.keys() == LOSSES.keys()
    for name, model in said.items():
        arguments = inspect.signature(LOSSES[name]).parameters
        own = arguments.keys() - {"logits", "targets", "reduction", "label_smoothing"}
        assert model.model_fields.keys() - {"name"} == own
        assert all(model.model_fields[option].default == arguments[option].default for option in own)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"name": "focal"}, "expected tags: 'cross_entropy', 'poly'"),
        ({"name": "poly", "epsilon": -1.5}, "greater than or equal to -1"),
        ({"name": "poly", "epsilon": float("nan")}, "finite|greater than"),
        ({"name": "cross_entropy", "epsilon": 1.0}, "Extra inputs are not permitted"),
    ],
)
def test_other_losses_and_options_are_refused(loss: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainParameters.model_validate({"steps": 1, "loss": loss})
