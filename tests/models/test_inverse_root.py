"""Inverse roots as polynomials, and the norm that has them: errors by formula, the module, its circuit, refusals."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, model_config, save_model
from polytrope.models.circuit import (
    CircuitForm,
    embed,
    refuse_other_parts,
    with_divisions,
    with_inverse_roots,
    with_reciprocals,
)
from polytrope.models.configurations import without_blocks
from polytrope.models.convert import convert
from polytrope.models.formats.onnx import save_onnx
from polytrope.models.formats.ring_graph import count, evaluate, read_ring_graph
from polytrope.models.parts.norm import NormSizes, RMSNorm, build_norm
from polytrope.models.parts.ranges import RangePenalty, penalise_ranges
from polytrope.models.parts.reciprocal import INVERSE_ROOT, RECIPROCAL, NewtonPolynomial, certified_modules, root_error
from polytrope.models.parts.settings import ReciprocalSettings, read_part
from polytrope.ops.interpolate import fit
from polytrope.pipeline.stages.train.parameters import TrainParameters

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "sequence_length": 4,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "activation": {"name": "hermite", "degree": 3, "init": "stable"},
    "norm": "rms",
    "attention": "power",
}
TOKENS = torch.arange(4)[None] * 3 % 16
DOMAINS = [(0.2, 3.0), (0.1, 4.0), (0.3, 5.0), (0.2, 6.0), (0.1, 7.0)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(**settings: Any) -> Any:
    """Vectors of about unit size, away from the start."""
    torch.manual_seed(0)
    model = build_model("gpt2", {**SIZES, **settings})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wte.weight", "wpe.weight")):
                parameter.mul_(40.0)
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


# --- the polynomial


def test_a_step_of_newton_s_does_to_an_error_what_is_known() -> None:
    error = torch.linspace(-0.6, 0.6, 13, dtype=torch.float64)
    for d in (0.3, 1.0, 7.0):
        number = torch.tensor(d, dtype=torch.float64)
        root = INVERSE_ROOT.step(number, (1 + error) / number.sqrt()) * number.sqrt() - 1
        assert root.numpy() == pytest.approx((-1.5 * error**2 - 0.5 * error**3).numpy(), abs=1e-15)
        quotient = RECIPROCAL.step(number, (1 + error) / number) * number - 1
        assert quotient.numpy() == pytest.approx((-(error**2)).numpy(), abs=1e-15)


@pytest.mark.parametrize(
    ("low", "high", "degree", "after"),
    [
        (0.5, 2.0, 3, 3.7e-4),
        (0.5, 2.0, 7, 5.9e-8),
        (0.25, 4.0, 3, 4.7e-2),
        (0.25, 4.0, 7, 9.5e-4),
        (0.25, 4.0, 15, 2.9e-7),
    ],
)
def test_largest_errors_after_a_step_are_those_of_the_package_s_fit_or_smaller(
    low: float, high: float, degree: int, after: float
) -> None:
    """Those of `fit` were known before; least squares on nodes that are dense at the ends has smaller ones."""
    x = np.linspace(low, high, 20_001)
    found = fit(
        lambda m: m.clamp_min(low).rsqrt(),
        "chebyshev",
        degree,
        interval=(low, high),
        weight=lambda m: np.maximum(m, 1e-9),
        derivative_weight=0.0,
        tails=False,
        rounding_tolerance=None,
    )
    error = found.curve(x)[0] * np.sqrt(x) - 1
    fitted = float(np.abs(-1.5 * error**2 - 0.5 * error**3).max())
    assert fitted == pytest.approx(after, rel=0.02)
    assert 0.1 * fitted < root_error(degree, 1, low, high) < fitted


def test_a_range_of_a_hundred_needs_a_high_degree() -> None:
    errors = [root_error(degree, 0, 0.1, 10.0) for degree in (3, 7, 15, 31)]
    assert errors[1] > 0.05
    assert errors[3] < 2e-3
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize(("degree", "newton"), [(1, 0), (7, 0), (7, 1), (3, 2), (24, 0)])
@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (0.1, 10.0), (2e-4, 8e-4)])
def test_the_error_of_the_module_is_what_is_certified(degree: int, newton: int, low: float, high: float) -> None:
    module = NewtonPolynomial(ReciprocalSettings(degree, newton, (low, high)), INVERSE_ROOT).double()
    m = torch.linspace(low, high, 20_001, dtype=torch.float64)
    with torch.no_grad():
        measured = float((1.0 - m.sqrt() * module(m)).abs().max())
    # coefficients are kept in float32
    assert measured == pytest.approx(root_error(degree, newton, low, high), rel=3e-3, abs=3e-6)


# --- the norm


def test_the_norm_is_its_formula_and_casts_leave_what_is_certified() -> None:
    norm = build_norm(read_part("norm", "rms"), NormSizes(6, 1e-5)).double()
    assert isinstance(norm, RMSNorm)
    x = 3 * random(4, 5, 6)
    with torch.no_grad():
        norm.weight.copy_(random(6, seed=1))
    sizes = np.sqrt(np.mean(x.numpy() ** 2, axis=-1, keepdims=True) + 1e-5)
    assert norm(x).detach().numpy() == pytest.approx(x.numpy() / sizes * norm.weight.detach().numpy(), rel=1e-12)
    reference = nn.RMSNorm(6, eps=1e-5).double()
    reference.load_state_dict({"weight": norm.weight})
    torch.testing.assert_close(norm(x), reference(x))
    given = {"name": "rms", "root": {"degree": 15, "newton": 0, "domains": [[1.0, 2.0], [0.5, 40.0]]}}
    second = build_norm(read_part("norm", given), NormSizes(6, 1e-5, number=1))
    assert second.inverse_root.settings.domain == (0.5, 40.0)  # type: ignore[union-attr]
    half = second.bfloat16()
    assert (half.weight.dtype, half(x.bfloat16()).dtype) == (torch.bfloat16, torch.bfloat16)
    assert {weight.dtype for weight in half.inverse_root.parameters()} == {torch.float32}  # type: ignore[union-attr]


def test_its_penalty_is_the_variance_of_logarithms_over_a_sample() -> None:
    model = network()
    plain = model.train()(TOKENS, TOKENS)
    seen: list[Tensor] = []
    hooks = [
        module.inverse_root.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
        for module in model.modules()
        if isinstance(module, RMSNorm)
    ]
    divided: list[Tensor] = []
    hooks += [
        block.attn.reciprocal.register_forward_pre_hook(lambda _module, given: divided.append(given[0]))
        for block in model.blocks
    ]
    penalise_ranges(model, RangePenalty(activation=0.0, beyond=1.0, denominator=0.5))
    found = model(TOKENS, TOKENS)
    for hook in hooks:
        hook.remove()
    assert (len(seen), len(divided)) == (5, 2)
    spread = sum(0.5 * m.log().var(dim=1, correction=0).mean() for m in seen)
    expected = plain + spread + sum(0.5 * d.log().square().mean() for d in divided)
    torch.testing.assert_close(found, expected)
    assert spread > 1e-3
    with_scale = RangePenalty(activation=0.0, beyond=1.0, denominator=1.0)
    for factor in (1.0, 30.0):  # its size is free
        with_scale.start()
        with_scale.mean_squares(factor * seen[0])
        torch.testing.assert_close(
            with_scale.added_to(torch.zeros(()), "mean"), seen[0].log().var(1, correction=0).mean()
        )


def test_a_model_with_polynomials_comes_back_and_loses_blocks_with_their_ranges(tmp_path: Path) -> None:
    model = network()
    exact = model(TOKENS)
    with_inverse_roots(model, DOMAINS, 15, 1)
    save_model(tmp_path / "model", model)
    written: Any = load_model(tmp_path / "model")
    assert torch.equal(written(TOKENS), model(TOKENS))
    torch.testing.assert_close(model(TOKENS), exact, rtol=0, atol=1e-2 * float(exact.detach().abs().max()))
    assert model_config(written)["norm"]["root"]["domains"] == [list(ends) for ends in DOMAINS]
    assert written.transformer["ln_f"].inverse_root.settings.domain == (0.1, 7.0)
    assert len({id(module) for module in certified_modules(written)}) >= 5
    fewer = without_blocks(written.config, range(1))
    assert fewer.norm_settings().root.domains == tuple(DOMAINS[2:])
    with_divisions(model)
    assert torch.equal(model(TOKENS), exact)


def test_only_activations_are_converted_and_what_divides_stays_whatever_is_asked_for(tmp_path: Path) -> None:
    """A model with other modules in its parts would be written, and not read again."""
    model = network(activation="gelu")
    polynomials = copy.deepcopy(model)
    with_inverse_roots(polynomials, DOMAINS, 15, 1)
    with_reciprocals(polynomials, {0: (0.3, 12.0), 1: (0.4, 12.0)}, 7, 1)
    activations = [f"transformer.h.{number}.mlp.activation" for number in range(2)]
    given: dict[str, Any] = {"include": ["*"]}
    for options in (given, {"types": ["Composition", "GELU"]}):
        converted = convert(copy.deepcopy(polynomials), [TOKENS], family="hermite", degree=4, **options)
        assert [entry.name for entry in converted.activations] == activations
        save_model(tmp_path / "model", converted.model)
        assert torch.equal(load_model(tmp_path / "model")(TOKENS), converted.model(TOKENS))
    for which, kind, owner in (
        (polynomials, "Composition", "RMSNorm"),
        (polynomials, "Composition", "PowerAttention"),
        (model, "Reciprocal", "PowerAttention"),
        (model, "RMSNorm", "RMSNorm"),
    ):
        with pytest.raises(ValueError, match=rf"\({kind}\): it is a part of {owner}, which is described by its own"):
            convert(copy.deepcopy(which), [TOKENS], family="hermite", types=[kind])


# --- as a circuit


@pytest.mark.parametrize(
    ("settings", "newton", "depths"),
    [
        ({}, 0, (20, 40)),
        ({}, 1, (24, 48)),
        ({"feedforward": "quadratic", "bias": False}, 0, (22, 44)),
        ({"feedforward": {"name": "mu", "norm": "batch"}}, 0, (19, 38)),
    ],
)
def test_the_circuit_computes_what_the_model_does_at_a_depth_that_counts_the_norms(
    tmp_path: Path, settings: dict[str, Any], newton: int, depths: tuple[int, int]
) -> None:
    """A norm: square 1, polynomial of degree 7 3, a step 2, product 1; the rest of a block 10, 12 or 9."""
    model = network(**settings)
    with_inverse_roots(model, DOMAINS, 7, newton)
    with_reciprocals(model, {0: (0.3, 12.0), 1: (0.4, 12.0)}, 7, 1)
    refuse_other_parts(model)
    reach = {} if isinstance(settings.get("feedforward"), dict) else dict.fromkeys(range(2), (-5.0, 4.0))
    form = CircuitForm(model, reach, 4).eval()
    with torch.no_grad():
        embedded, logits = embed(model, TOKENS), model(TOKENS)
    save_onnx(tmp_path / "circuit.onnx", form, [embedded], ["x"], fixed=True)
    graph = read_ring_graph(tmp_path / "circuit.onnx")
    operators = {node.op_type for node in onnx.load(str(tmp_path / "circuit.onnx")).graph.node}
    assert operators <= {
        "Add",
        "Sub",
        "Mul",
        "MatMul",
        "Gemm",
        "Constant",
        "Reshape",
        "Transpose",
        "Slice",
        "Identity",
    } | {"Unsqueeze"}
    computed = evaluate(graph, embedded.double().numpy())
    assert computed == pytest.approx(logits.numpy(), abs=5e-6 * float(logits.abs().max()) + 1e-7)
    costs = count(graph)
    assert (costs["block_0"].depth, costs["block_1"].depth) == depths
    assert costs[""].depth == depths[1] + 5 + 2 * newton


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"norm": "layer_norm"},
            r"transformer\.h\.0\.ln_1: LayerNorm divides by a root; train with norm: batch or norm: r",
        ),
        ({}, r"transformer\.h\.0\.ln_1\.inverse_root: InverseRoot divides by a root"),
    ],
)
def test_roots_that_stay_are_named(settings: dict[str, Any], message: str) -> None:
    model: Any = build_model("gpt2", {**SIZES, **settings})
    with pytest.raises(ValueError, match=message):
        refuse_other_parts(model)


ROOT = {"degree": 3, "newton": 0, "domains": [[0.5, 2.0]]}


@pytest.mark.parametrize(
    ("architecture", "norm", "words"),
    [
        ("convnext", "rms", r"norm: rms is for other models; this one has layer_norm, batch, evonorm"),
        ("mlp", "rms", r"norm: rms is for other models; this one has none, layer_norm, batch"),
        ("gpt2", {"name": "rms", "root": ROOT}, r"norm\.root\.domains: expected one for each of the 25 norms, got 1"),
        ("gpt2", {"name": "rms", "root": {**ROOT, "domains": [[2.0, 0.5]]}}, r"root\.domain: expected \[low, high\]"),
        ("gpt2", {"name": "rms", "root": {**ROOT, "domains": 3}}, r"root\.domains: expected a list of \[low, high\]"),
        ("gpt2", {"name": "rms", "root": {"degree": 3}}, r"root: expected degree, domains, newton"),
        ("gpt2", {"name": "rms", "root": {**ROOT, "degree": 0}}, r"root\.degree: expected an integer in 1…128"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(architecture: str, norm: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_model(architecture, {"norm": norm})
    with pytest.raises(ValueError, match=words):  # pydantic's is one
        TrainParameters.model_validate({"steps": 1, "model": {"architecture": architecture, "norm": norm}})


def test_a_training_heeds_its_penalty() -> None:
    model = {"architecture": "gpt2", "norm": "rms"}
    TrainParameters.model_validate({"steps": 1, "model": model, "range_penalty": {"activation": 0, "denominator": 0.1}})
    with pytest.raises(ValueError, match="denominator: only attention: power and norm: rms have denominators"):
        TrainParameters.model_validate({"steps": 1, "model": {}, "range_penalty": {"denominator": 0.1}})
