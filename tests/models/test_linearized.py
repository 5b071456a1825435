"""Tangent models: the derivative is right, linear in what learns, and an average of models is the mean of outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from polytrope.models import build_model
from polytrope.models.linearized import LinearizedModel, average_linearized
from polytrope.models.losses import make_loss

GPT2: dict[str, Any] = {"vocab_size": 64, "sequence_length": 12, "n_layer": 2, "n_head": 2, "n_embd": 24}
CONVNEXT: dict[str, Any] = {
    "depths": [1, 1],
    "dims": [8, 16],
    "num_classes": 3,
    "in_channels": 1,
    "patch_size": 1,
    "layer_scale": 0.5,
    "activation": {"name": "hermite", "degree": 4},
}
MODELS = {"gpt2": GPT2, "convnext": CONVNEXT}
EXAMPLES = {
    "gpt2": (torch.arange(24).reshape(2, 12) * 7 + 3) % 64,
    "convnext": torch.linspace(-2, 2, 128, dtype=torch.float64).sin().reshape(2, 1, 8, 8),
}
each_model = pytest.mark.parametrize("kind", MODELS)


def loss_of_classes(outputs: Tensor, targets: Tensor, training: bool) -> Tensor:
    outputs, targets = outputs.flatten(0, -2), targets.flatten()
    loss = F.cross_entropy(outputs, targets, reduction="none")
    return (loss + (2.0 * (1.0 - (-loss).exp()) if training else 0.0)).mean()


def loss_of_numbers(outputs: Tensor, targets: Tensor, training: bool) -> Tensor:
    return F.mse_loss(outputs, targets) / (4.0 if training else 1.0)


# Configuration, inputs, targets, and the loss.
LOSSES_OF: dict[str, Any] = {
    "gpt2": (GPT2, EXAMPLES["gpt2"], EXAMPLES["gpt2"].flip(1), loss_of_classes),
    "convnext": (CONVNEXT, EXAMPLES["convnext"], torch.tensor([2, 0]), loss_of_classes),
    "mlp": (
        {"inputs": 3, "widths": [8, 8], "output_scale": 2.0},
        torch.linspace(-2, 2, 12, dtype=torch.float64).sin().reshape(4, 3),
        torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(4, 1),
        loss_of_numbers,
    ),
}


def initial_model(kind: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(kind, MODELS[kind] | changes).double()


def directions(model: LinearizedModel, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(v.shape, dtype=v.dtype, generator=generator) for v in model.tangents]


def with_tangents(model: LinearizedModel, tangents: list[Tensor]) -> LinearizedModel:
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, tangent in zip(result.tangents, tangents, strict=True):
            parameter.copy_(tangent)
    return result


def shifted(model: nn.Module, names: tuple[str, ...], tangents: list[Tensor], step: float) -> nn.Module:
    result = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, tangent in zip(names, tangents, strict=True):
            result.get_parameter(name).add_(step * tangent)
    return result


@each_model
def test_the_change_is_the_derivative_and_linear(kind: str) -> None:
    model, x = initial_model(kind), EXAMPLES[kind]
    tangent = LinearizedModel(model)
    assert set(tangent.names) == {name for name, _ in model.named_parameters()}
    start = model.eval()(x)
    torch.testing.assert_close(tangent(x), start, rtol=0, atol=1e-13)
    u, v = directions(tangent, 1), directions(tangent, 2)
    of_u, of_v = (with_tangents(tangent, direction)(x) - start for direction in (u, v))
    step = 2e-5  # errors of the quotient fall with its fourth power
    far, near = (
        shifted(model, tangent.names, u, size)(x) - shifted(model, tangent.names, u, -size)(x)
        for size in (2 * step, step)
    )
    assert of_u.abs().max() > 1e-2
    torch.testing.assert_close(of_u, (8 * near - far) / (12 * step), rtol=0, atol=1e-9)
    mixed = [2.0 * a - 0.5 * b for a, b in zip(u, v, strict=True)]
    of_mixed = with_tangents(tangent, mixed)(x) - start
    torch.testing.assert_close(
        of_mixed, 2.0 * of_u - 0.5 * of_v, rtol=0, atol=1e-13 * float(of_u.detach().abs().max() + 1)
    )


@each_model
def test_without_changes_it_is_the_model_bit_for_bit(kind: str) -> None:
    model, x = initial_model(kind, activation="gelu").eval(), EXAMPLES[kind]
    with sdpa_kernel(SDPBackend.MATH):  # the form that has a derivative
        expected = model(x)
    assert torch.equal(LinearizedModel(model)(x), expected)


@each_model
def test_training_moves_all_tangents_and_nothing_else(kind: str) -> None:
    model, x = initial_model(kind), EXAMPLES[kind]
    before = copy.deepcopy(model.state_dict())
    tangent = LinearizedModel(model)
    outputs = tangent(x)
    targets = torch.arange(outputs[..., 0].numel()) % outputs.size(-1)

    def loss_of(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, -2), targets)

    optimizer = torch.optim.Adam(tangent.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(tangent)
        loss.backward()
        for name, v in zip(tangent.names, tangent.tangents, strict=True):
            assert v.grad is not None, name
            assert v.grad.abs().max() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for weights in (model.state_dict(), tangent.initial.state_dict()):
        assert all(torch.equal(before[name], weights[name]) for name in before)
    again = LinearizedModel(initial_model(kind))
    again.load_state_dict(tangent.state_dict())
    assert torch.equal(again(x), tangent(x))

    ends = [with_tangents(tangent, directions(tangent, seed)) for seed in (3, 4)]
    middle = average_linearized(ends)
    torch.testing.assert_close(middle(x), (ends[0](x) + ends[1](x)) / 2, rtol=0, atol=1e-13)
    with torch.no_grad():
        assert loss_of(middle) <= (loss_of(ends[0]) + loss_of(ends[1])) / 2


@pytest.mark.parametrize("kind", LOSSES_OF)
def test_with_targets_it_is_the_models_loss_of_the_tangents_outputs(kind: str) -> None:
    changes, x, targets, expected = LOSSES_OF[kind]
    torch.manual_seed(0)
    model: Any = build_model(kind, changes).double()
    if kind != "mlp":
        model.training_loss = make_loss("poly", epsilon=2.0)
    tangent = LinearizedModel(model)
    tangent = with_tangents(tangent, [10 * direction for direction in directions(tangent, 1)])
    outputs = tangent(x)
    for training in (False, True):
        of_outputs = expected(outputs, targets, training)
        torch.testing.assert_close(tangent.train(training)(x, targets), of_outputs, check_dtype=False)
        # The model itself takes the same way.
        model.train(training)
        torch.testing.assert_close(model(x, targets), expected(model(x), targets, training), check_dtype=False)
    assert tangent(x, targets, reduction="none").numel() == outputs[..., 0].numel()


def test_the_gradient_at_the_start_is_the_models_own() -> None:
    model, x = initial_model("gpt2").eval(), EXAMPLES["gpt2"]
    tangent = LinearizedModel(model)
    for each in (model, tangent):
        each(x).square().sum().backward()
    for name, v in zip(tangent.names, tangent.tangents, strict=True):
        torch.testing.assert_close(v.grad, model.get_parameter(name).grad, rtol=1e-9, atol=1e-10, msg=name)


def test_it_continues_texts_as_its_whole_forward_pass_says() -> None:
    tangent = LinearizedModel(initial_model("gpt2"))
    tangent = with_tangents(tangent, [10 * direction for direction in directions(tangent, 1)]).train()
    start = EXAMPLES["gpt2"][:, :3]
    expected = start
    for _ in range(9):
        expected = torch.cat((expected, tangent(expected)[:, -1].argmax(-1, keepdim=True)), dim=1)
    plain: Any = tangent.initial
    with torch.inference_mode():
        assert torch.equal(tangent.generate(start, 9, temperature=0.0), expected)
        assert not torch.equal(plain.generate(start, 9, temperature=0.0), expected)
        assert tangent.generate(start, 30).shape == (2, 33)  # beyond the window of 12
    assert tangent.training
    with pytest.raises(ValueError, match="temperature: expected a finite number"):
        tangent.generate(start, 1, temperature=-1.0)


def test_the_frozen_model_computes_as_in_evaluation() -> None:
    model, x = initial_model("gpt2", dropout=0.5), EXAMPLES["gpt2"]
    tangent = LinearizedModel(model.train()).train()
    assert tangent.training
    torch.testing.assert_close(tangent(x), model.eval()(x), rtol=0, atol=1e-13)


def test_a_model_with_a_penalty_of_ranges_has_no_tangent() -> None:
    model: Any = initial_model("gpt2")
    model.ranges = object()
    with pytest.raises(ValueError, match="penalty of ranges"):
        LinearizedModel(model)


def test_frozen_parameters_have_no_tangent() -> None:
    model = initial_model("gpt2").requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model: no parameter requires gradients"):
        LinearizedModel(model)
    name = "transformer.h.1.mlp.c_fc.weight"
    model.get_parameter(name).requires_grad_(True)
    assert LinearizedModel(model).names == (name,)


def test_tangents_of_other_models_are_not_averaged() -> None:
    model = initial_model("gpt2")
    first = LinearizedModel(model)
    name = "transformer.h.0.mlp.c_fc.weight"
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] += 1e-9
    with pytest.raises(ValueError, match=rf"models\[2\]: not a tangent of the same model as models\[0\]: `{name}`"):
        average_linearized([first, first, LinearizedModel(model)])
    with pytest.raises(ValueError, match="the architecture differs"):
        average_linearized([first, LinearizedModel(initial_model("gpt2", n_layer=1))])
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(ValueError, match="which parameters have tangents differs"):
        average_linearized([first, LinearizedModel(model)])
    with pytest.raises(ValueError, match=r"^models: expected one or more"):
        average_linearized([])
