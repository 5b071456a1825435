"""Mixers: max-plus convolution and polynomials of mixtures, against plain loops and what their formulas promise."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.convert import convert
from polytrope.models.formats.onnx import save_onnx
from polytrope.models.parts.attention import AttentionSizes, build_attention
from polytrope.models.parts.feedforward import multiplicative_parameters
from polytrope.models.parts.max_plus import MaxPlusConvolution, max_plus
from polytrope.models.parts.mixer import build_mixer
from polytrope.models.parts.polynomial_mixer import CausalPolynomialMixer
from polytrope.models.parts.settings import read_part
from polytrope.pipeline.stages.train.optimization import parameter_groups
from polytrope.pipeline.stages.train.parameters import ModelParameters, TrainParameters

CONVNEXT: dict[str, Any] = {"depths": [1, 1], "dims": [8, 16], "num_classes": 3, "in_channels": 1, "patch_size": 1}
GPT2: dict[str, Any] = {"vocab_size": 64, "sequence_length": 24, "n_layer": 2, "n_head": 2, "n_embd": 16}
IMAGES = torch.linspace(-2, 2, 128).sin().reshape(2, 1, 8, 8)
TOKENS = (torch.arange(48).reshape(2, 24) * 7 + 3) % 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loops(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of one channel, `[height, width]`."""
    half, result = weight.shape[-1] // 2, np.full_like(x, -np.inf)
    for i, j in itertools.product(*map(range, x.shape)):
        for u, v in itertools.product(range(-half, half + 1), repeat=2):
            if 0 <= i + u < x.shape[0] and 0 <= j + v < x.shape[1]:
                result[i, j] = max(result[i, j], weight[u + half, v + half] + x[i + u, j + v])
    return result


@pytest.mark.parametrize("size", [3, 7])
def test_max_plus_is_its_definition_and_its_gradient_goes_to_the_winners(size: int) -> None:
    x, weight = random(2, 3, 5, 6).requires_grad_(), random(3, size, size, seed=1).requires_grad_()
    found = max_plus(x, weight)
    for image, channel in itertools.product(range(2), range(3)):
        expected = by_loops(x[image, channel].detach().numpy(), weight[channel].detach().numpy())
        assert np.array_equal(found[image, channel].detach().numpy(), expected)
    gradients = torch.autograd.grad(found.sum(), (x, weight))
    for gradient in gradients:
        assert gradient.sum().item() == found.numel()  # each result has one winner
        assert torch.equal(gradient, gradient.round())


def test_max_plus_has_first_and_second_derivatives_in_both_modes_and_over_batches() -> None:
    x, weight = random(1, 2, 3, 4).requires_grad_(), random(2, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(max_plus, (x, weight), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(max_plus, (x, weight))


def test_of_equal_candidates_the_first_wins_and_nan_is_not_lost() -> None:
    x, weight = torch.zeros(1, 1, 3, 3, requires_grad=True), torch.zeros(1, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(max_plus(x, weight)[0, 0, 1, 1], weight)
    assert gradient[0, 0, 0] == gradient.sum() == 1
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = torch.nan
    found = max_plus(x, torch.zeros(1, 3, 3))[0, 0]
    assert found[:2, :2].isnan().all()
    assert found[2:].isfinite().all()
    assert found[:, 2:].isfinite().all()


def test_max_plus_is_associative_distributes_over_the_maximum_and_is_the_limit_of_log_sum_exp() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, first, second = (
        torch.randint(-9, 9, shape, generator=generator).double()
        for shape in ((1, 2, 6, 6), (1, 2, 6, 6), (2, 3, 3), (2, 3, 3))
    )
    assert torch.equal(max_plus(torch.maximum(x, y), first), torch.maximum(max_plus(x, first), max_plus(y, first)))
    both = torch.full((2, 5, 5), -torch.inf, dtype=torch.float64)
    for (a, b), (c, d) in itertools.product(itertools.product(range(3), repeat=2), repeat=2):
        both[:, a + c, b + d] = torch.maximum(both[:, a + c, b + d], first[:, a, b] + second[:, c, d])
    inside = (..., slice(2, 4), slice(2, 4))  # where no window leaves the image
    assert torch.equal(max_plus(max_plus(x, first), second)[inside], max_plus(x, both)[inside])
    x, weight = random(1, 1, 5, 5), random(1, 3, 3, seed=1)
    candidates = torch.nn.functional.unfold(x, 3).view(9, 3, 3) + weight.view(9, 1, 1)
    distances = [
        float((T * (candidates / T).logsumexp(0) - max_plus(x, weight)[0, 0, 1:4, 1:4]).max()) for T in (1.0, 0.1, 0.01)
    ]
    assert 1.0 < distances[0] <= np.log(9)
    assert distances[1] < 0.2 * distances[0]
    assert distances[2] < 0.2 * distances[1]


def test_the_three_forms_start_as_dilation_erosion_and_their_difference() -> None:
    x = random(2, 4, 8, 8).float()
    mixed = {
        form: build_mixer(read_part("mixer", {"name": "max_plus", "form": form}), 4)(x)
        for form in ("max", "min", "difference")
    }
    assert (mixed["max"] >= x).all()
    assert (mixed["min"] <= x).all()
    assert torch.equal(mixed["difference"], mixed["max"] - mixed["min"])
    module = build_mixer(read_part("mixer", "max_plus"), 4)
    assert isinstance(module, MaxPlusConvolution)
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(-mixed["min"], module.float()(-x))  # dual


def test_filters_of_max_plus_do_not_decay() -> None:
    model = build_model("convnext", {**CONVNEXT, "mixer": {"name": "max_plus", "form": "difference"}})
    filters = {id(weight) for name, weight in model.named_parameters() if name.endswith(("maximum", "minimum"))}
    groups = parameter_groups(model, TrainParameters(steps=1, learning_rate=1e-3))
    decay = {group["weight_decay"] for group in groups for weight in group["params"] if id(weight) in filters}
    assert (len(filters), decay) == (4, {0.0})


def attention(degree: int = 2, reach: int = 4, width: int = 6) -> CausalPolynomialMixer:
    torch.manual_seed(0)
    sizes = AttentionSizes(width=width, heads=2, bias=False, dropout=0.0, scale=1.0)
    part = build_attention(
        read_part("attention", {"name": "polynomial_mixer", "degree": degree, "reach": reach}), sizes
    )
    assert isinstance(part, CausalPolynomialMixer)
    return part.double()


def changed(module: nn.Module, size: float = 0.3) -> Any:
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(size * random(*parameter.shape, seed=number))
    return module


@pytest.mark.parametrize("degree", [2, 3])
def test_a_polynomial_mixer_is_its_recursion_and_starts_linear(degree: int) -> None:
    part, x = attention(degree), random(2, 9, 6)
    assert torch.equal(part(2 * x), 2 * part(x))
    own = changed(part).mixer
    distance = torch.arange(9)[:, None] - torch.arange(9)

    def mix(z: Tensor, filters: Tensor) -> Tensor:
        matrices = torch.where((distance >= 0) & (distance <= 3), filters[:, 0][:, (3 - distance).clamp(0, 3)], 0.0)
        return torch.einsum("cij,bjc->bic", matrices, z)

    mixtures = [mix(x @ own.inputs[i], own.input_filters[i]) for i in range(degree)]
    powers = [mixtures[0]]
    for i in range(1, degree):
        powers.append(mix(powers[-1] @ own.states[i - 1], own.state_filters[i - 1]) * mixtures[i])
    outer = [own.c_proj.weight.T, *own.products]
    expected = sum(power @ matrix for power, matrix in zip(powers, outer, strict=True))
    torch.testing.assert_close(part(x), expected, rtol=1e-12, atol=1e-13)
    weights = {name: weight.detach().requires_grad_() for name, weight in part.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(part, dict(zip(weights, values, strict=True)), (x,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, (x[:1, :4].requires_grad_(), *weights.values()))


@pytest.mark.parametrize("degree", [2, 3])
def test_along_a_line_a_polynomial_mixer_has_its_degree(degree: int) -> None:
    part, (start, direction) = changed(attention(degree)), random(2, 1, 9, 6)
    angles = (np.arange(12) + 0.5) * np.pi / 12
    with torch.no_grad():
        values = np.stack([part(start + np.cos(angle) * direction).flatten().numpy() for angle in angles])
    sizes = np.abs(np.cos(np.outer(np.arange(12), angles)) @ values).max(1)
    assert sizes[degree] > 1e-3 * sizes.max()
    assert sizes[degree + 1 :].max() < 1e-13 * sizes.max()


def test_a_later_position_changes_nothing_before_it_and_a_cache_is_the_same() -> None:
    part, x = changed(attention(3)), random(2, 11, 6)
    later = x.clone()
    later[:, 6] += 1.0
    with torch.no_grad():
        whole = part(x)
        assert torch.equal(part(later)[:, :6], whole[:, :6])
        assert not torch.equal(part(later)[:, 6], whole[:, 6])
        past, found = None, []
        for chunk in x.split([2, 1, 1, 5, 2], dim=1):
            mixed, past = part.forward_with_cache(chunk, past)
            found.append(mixed)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=0, atol=1e-13)
    assert past is not None
    assert [tuple(state.shape) for state in past] == [(2, 3, 6)] * 3  # X, Z_1, Z_2: does not grow
    assert part.bfloat16()(x.bfloat16()).isfinite().all()


def test_padre_mixes_images_as_its_definition_and_starts_linear() -> None:
    torch.manual_seed(0)
    part, x = build_mixer(read_part("mixer", {"name": "padre", "degree": 3}), 4).double(), random(2, 4, 8, 8)
    bias = part(torch.zeros_like(x))
    torch.testing.assert_close(part(3 * x) - bias, 3 * (part(x) - bias), rtol=1e-12, atol=1e-13)
    own = changed(part).mixer
    y = [
        torch.nn.functional.conv2d((x.movedim(1, -1) @ matrix).movedim(-1, 1), filters, padding=3, groups=4)
        for matrix, filters in zip(own.inputs, own.input_filters, strict=True)
    ]
    z, expected = y[0], own.c_proj(y[0].movedim(1, -1))
    for i in range(2):
        mixed = (z.movedim(1, -1) @ own.states[i]).movedim(-1, 1)
        z = torch.nn.functional.conv2d(mixed, own.state_filters[i], padding=3, groups=4) * y[i + 1]
        expected = expected + z.movedim(1, -1) @ own.products[i]
    torch.testing.assert_close(part(x), expected.movedim(-1, 1), rtol=1e-12, atol=1e-13)


def test_a_number_of_heads_is_for_blocks_that_have_heads() -> None:
    sizes = {"n_layer": 2, "n_embd": 8, "vocab_size": 11, "sequence_length": 5, "attention": "polynomial_mixer"}
    build_model("gpt2", sizes)(torch.zeros(1, 3, dtype=torch.long))  # 12 heads, the default, do not divide 8 channels
    ModelParameters.model_validate(sizes)
    with pytest.raises(ValueError, match="n_head: it has no effect: every block has attention: polynomial_mixer"):
        ModelParameters.model_validate({**sizes, "n_head": 2})
    ModelParameters.model_validate({**sizes, "n_head": 2, "attention": ["polynomial_mixer", "power"]})
    with pytest.raises(ValueError, match=r"n_embd \(8\) must be a multiple of n_head \(12\)"):
        build_model("gpt2", {**sizes, "attention": ["polynomial_mixer", "power"]})


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("convnext", {"mixer": [{"name": "max_plus", "form": "difference"}, "padre"]}),
        ("gpt2", {"attention": ["softmax", {"name": "polynomial_mixer", "degree": 3, "reach": 8}]}),
    ],
)
def test_models_with_mixers_learn_sample_convert_export_and_count(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    sizes, example = {"convnext": (CONVNEXT, IMAGES), "gpt2": (GPT2, TOKENS)}[architecture]
    torch.manual_seed(0)
    model: Any = build_model(architecture, {**sizes, **settings})
    model(example, example if architecture == "gpt2" else torch.tensor([0, 2])).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert [names[id(weight)].rsplit(".", 1)[-1] for weight in multiplicative_parameters(model)] == ["products"]
    changed(model, 0.02).eval()
    converted = convert(model, [example], degree=12)
    assert 0 < converted.difference < 1e-3
    save_onnx(tmp_path / "model.onnx", converted.model, [example])  # it compares the outputs
    usual: Any = build_model(architecture, sizes)
    if architecture == "gpt2":
        continued = model.generate(TOKENS[:, :4], 30, temperature=0.0)  # beyond the context: the cache starts again
        tokens = TOKENS[:, :4]
        for _ in range(18):
            tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(continued[:, :22], tokens)
        mixer = sum(weight.numel() for weight in model.blocks[1].attn.parameters())
        softmax = sum(weight.numel() for weight in usual.blocks[1].attn.parameters())
        assert model.flops_per_token() - usual.flops_per_token() == 6.0 * (mixer - softmax) - 12.0 * 16 * 24
    else:
        multiply_adds = -64 * 49 * 8 + 16 * (2 * 49 * 16 + 5 * 16**2)  # max-plus has none; padre has 3 filters, not 1
        assert model.flops_per_image(8, 8) - usual.flops_per_image(8, 8) == 6.0 * multiply_adds
