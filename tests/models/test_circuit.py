"""A GPT-2 as a circuit: the same numbers, exact arithmetic of the file itself, costs, and what is no sum or product."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.circuit import CircuitForm, activation_circuit, embed, refuse_other_parts, with_reciprocals
from polytrope.models.formats.onnx import save_onnx
from polytrope.models.formats.ring_graph import (
    MERSENNE_61,
    RATIONAL,
    RingGraph,
    count,
    evaluate,
    prime_field,
    read_ring_graph,
)
from polytrope.models.gpt2 import GPT2
from polytrope.models.parts.reciprocal import RECIPROCAL, NewtonPolynomial, relative_error
from polytrope.models.parts.settings import ReciprocalSettings
from polytrope.ops import Hermite
from polytrope.pipeline.stages.export_circuit.parameters import ReciprocalParameters

HERMITE: dict[str, Any] = {"name": "hermite", "degree": 3, "init": "stable"}


def network(**settings: Any) -> GPT2:
    """Random weights, norms that have seen some data, and polynomials for the divisions."""
    sizes = {"vocab_size": 16, "sequence_length": 4, "n_layer": 2, "n_head": 2, "n_embd": 8}
    given = {**sizes, "activation": HERMITE, "norm": "batch", "attention": "power", **settings}
    torch.manual_seed(0)
    model = build_model("gpt2", given)
    assert isinstance(model, GPT2)
    with torch.no_grad():
        for _ in range(8):
            model.train()(torch.randint(0, 16, (8, given["sequence_length"])))
    with_reciprocals(model, {layer: (0.3 + 0.1 * layer, 12.0) for layer in range(given["n_layer"])}, 7, 1)
    return model.eval()


def graph_of(model: GPT2, path: Path, positions: int) -> tuple[RingGraph, CircuitForm, torch.Tensor, torch.Tensor]:
    """The circuit's file and module, embedded tokens, and the model's logits."""
    tokens = torch.arange(positions)[None] * 3 % 16
    form = CircuitForm(model, dict.fromkeys(range(len(model.blocks)), (-5.0, 4.0)), positions).eval()
    with torch.no_grad():
        embedded, logits = embed(model, tokens), model(tokens)
    save_onnx(path, form, [embedded], ["x"], fixed=True)
    return read_ring_graph(path), form, embedded, logits


@pytest.mark.parametrize("x", [0.7, 0.0, -3e5])
def test_an_activation_that_receives_one_number_alone_is_a_circuit_too(x: float) -> None:
    activation = Hermite(3)
    inputs = torch.tensor([x])
    with torch.no_grad():
        found, wanted = activation_circuit(activation, x, x).run(inputs), activation(inputs)
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "depths"),
    [
        ({}, (10, 20)),
        ({"attention": {"name": "power", "power": 4}, "activation": {**HERMITE, "degree": 2}}, (10, 20)),
        ({"attention": {"name": "power", "sinks": 4}}, (10, 20)),
        ({"feedforward": "gated", "bias": False, "tie_word_embeddings": False}, (11, 22)),
        ({"feedforward": "quadratic"}, (12, 24)),
        ({"activation": {"name": "composition", "degree": [3, 3], "domain": [-9.0, 9.0], "init": "tanh"}}, (12, 24)),
        ({"activation": {"name": "chebyshev", "degree": 8, "variable": [0.5, 6.0]}}, (11, 22)),
    ],
)
def test_the_circuit_computes_what_the_model_does_at_the_depth_of_its_parts(
    tmp_path: Path, settings: dict[str, Any], depths: tuple[int, int]
) -> None:
    """A block: scores 1, power 1 or 2, reciprocal 3 + 2 beside u·V, product 1; activation ⌈log2 n⌉; gates 1 each."""
    model = network(**settings)
    graph, _, embedded, logits = graph_of(model, tmp_path / "circuit.onnx", 4)
    operators = {node.op_type for node in onnx.load(str(tmp_path / "circuit.onnx")).graph.node}
    moves = {"Constant", "Reshape", "Transpose", "Slice", "Identity", "Unsqueeze"}
    assert operators <= {"Add", "Sub", "Mul", "MatMul", "Gemm"} | moves
    computed = evaluate(graph, embedded.double().numpy())
    assert computed == pytest.approx(logits.numpy(), abs=2e-6 * float(logits.abs().max()) + 1e-7)
    costs = count(graph)
    assert (costs["block_0"].depth, costs["block_1"].depth) == depths
    assert costs[""].depth == costs["head"].depth == depths[1]


def test_a_long_polynomial_is_more_exact_than_newton_steps_of_the_same_depth(tmp_path: Path) -> None:
    model = network(n_layer=1)
    usual = ReciprocalParameters()
    with_reciprocals(model, {0: (0.3, 12.0)}, usual.degree, usual.newton)
    graph, _, embedded, logits = graph_of(model, tmp_path / "circuit.onnx", 4)
    assert count(graph)["block_0"].depth == 10  # as with degree 7 and one step
    computed = evaluate(graph, embedded.double().numpy())
    assert computed == pytest.approx(logits.numpy(), abs=2e-6 * float(logits.abs().max()) + 1e-7)
    for ratio in (4.0, 60.0, 400.0, 6000.0):
        assert relative_error(usual.degree, usual.newton, 1.0, ratio) < relative_error(15, 1, 1.0, ratio)
        assert relative_error(15, 1, 1.0, ratio) < relative_error(7, 1, 1.0, ratio)
    assert relative_error(31, 0, 1.0, 60.0) == pytest.approx(5.0e-4, rel=0.05)
    assert relative_error(7, 1, 1.0, 60.0) == pytest.approx(0.062, rel=0.05)


def test_degree_and_counts_of_a_block_are_those_of_its_formula(tmp_path: Path) -> None:
    model = network(n_layer=1)
    graph, _, _, _ = graph_of(model, tmp_path / "circuit.onnx", 4)
    cost = count(graph)["block_0"]
    # scores 2, squared 4; reciprocal 7 · 4, Newton 2 · 28 + 4; times u·V of 5; MLP of degree 3 of that
    assert cost.degree == 3 * (2 * 7 * 4 + 4 + 5)
    heads, length, size, width = 2, 4, 4, 8
    pairs = heads * length * length
    rows = heads * length
    # q·k, square, u·V; three products of Chebyshev polynomials and two splits, Newton's two; division; activation
    reciprocal = rows * (count_products(7) + 2)
    expected = pairs * size + pairs + rows * length * size + reciprocal + rows * size + 2 * length * 4 * width
    assert cost.products == expected


def count_products(degree: int) -> int:
    from polytrope.ops.circuit import count as count_circuit
    from polytrope.ops.circuit import make_circuit

    return count_circuit(make_circuit([[1.0 / (k + 2) for k in range(degree + 1)]], 0.5, 2.0, gated=False)).products


def test_a_whole_block_in_exact_fractions_and_modulo_a_prime(tmp_path: Path) -> None:
    """Of the file itself: its float64 value is the fraction's to rounding, its residue the fraction's exactly."""
    model = network(n_layer=1, n_embd=4, sequence_length=2)
    graph, _, embedded, _ = graph_of(model, tmp_path / "circuit.onnx", 2)
    x = embedded.double().numpy()
    exact = evaluate(graph, x, RATIONAL)
    assert all(isinstance(value, Fraction) for value in exact.ravel())
    assert max(value.denominator.bit_length() for value in exact.ravel()) > 6000  # 2,000 digits
    floats = evaluate(graph, x)
    assert np.array([[float(value) for value in row] for row in exact[0]]) == pytest.approx(
        floats[0], rel=1e-12, abs=1e-12
    )
    residues = evaluate(graph, x, prime_field())
    expected = [value.numerator * pow(value.denominator, -1, MERSENNE_61) % MERSENNE_61 for value in exact.ravel()]
    assert residues.ravel().tolist() == expected


def test_the_degree_of_the_product_rule_is_that_along_a_line(tmp_path: Path) -> None:
    """Modulo a prime the differences of order n of a polynomial of degree n are one number, and the next ones 0."""
    model = network(n_layer=1, n_embd=4, sequence_length=2)
    with_reciprocals(model, {0: (0.3, 12.0)}, 2, 0)
    graph, _, embedded, _ = graph_of(model, tmp_path / "circuit.onnx", 2)
    degree = count(graph)[""].degree
    assert degree == 3 * (2 * 4 + 5)
    field = prime_field()
    start = embedded.double().numpy()
    values = [evaluate(graph, start + t * np.ones_like(start), field).ravel() for t in range(degree + 3)]
    for _ in range(degree):
        values = [(later - earlier) % MERSENNE_61 for earlier, later in itertools.pairwise(values)]
    assert all((value == values[0]).all() for value in values)
    assert (values[0] != 0).any()


def test_modulo_a_prime_the_whole_network_is_the_composition_of_its_blocks(tmp_path: Path) -> None:
    """Residues do not grow: two blocks, whose fractions would have a million digits."""
    model = network(n_embd=4, sequence_length=2)
    graph, _, embedded, _ = graph_of(model, tmp_path / "circuit.onnx", 2)
    field = prime_field(2**31 - 1)
    whole = evaluate(graph, embedded.double().numpy(), field)
    cut = next(index for index, step in enumerate(graph.steps) if step.layer == "block_1")
    between = graph.steps[cut - 1].output
    first = RingGraph(graph.input, between, graph.shape, graph.constants, graph.steps[:cut])
    second = RingGraph(between, graph.output, graph.shape, graph.constants, graph.steps[cut:])
    assert (evaluate(second, evaluate(first, embedded.double().numpy(), field), field) == whole).all()


def test_the_first_operator_that_is_no_sum_or_product_is_named_with_its_layer(tmp_path: Path) -> None:
    sizes = {"vocab_size": 16, "sequence_length": 4, "n_layer": 1, "n_head": 2, "n_embd": 8}
    model = build_model("gpt2", {**sizes, "activation": HERMITE})
    save_onnx(tmp_path / "model.onnx", model, [torch.zeros(1, 4, dtype=torch.int64)], fixed=True)
    with pytest.raises(ValueError, match=r"the first operator that is no sum, .* is (Gather|LayerNormalization), in /"):
        read_ring_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "layer_norm"}, r"transformer\.h\.0\.ln_1: LayerNorm divides by a root; train with norm: batch or"),
        ({"attention": ["power", "softmax"]}, r"transformer\.h\.1\.attn: SoftmaxAttention is no polynomial"),
        ({"activation": "gelu"}, r"transformer\.h\.0\.mlp\.activation: GELU is no polynomial"),
        ({"activation": "rational_spline8"}, r"transformer\.h\.0\.mlp\.activation: RationalSpline is no polynomial"),
        ({"activation": {**HERMITE, "interval": [-4.0, 4.0]}}, "Hermite with tangents is no polynomial"),
        ({"activation": {**HERMITE, "num_parameters": 4}}, "coefficients per channel"),
        ({}, r"transformer\.h\.0\.attn\.reciprocal: Reciprocal divides"),
    ],
)
def test_parts_that_are_no_polynomials_are_named_in_the_order_of_computation(
    settings: dict[str, Any], message: str
) -> None:
    sizes = {"vocab_size": 16, "sequence_length": 4, "n_layer": 2, "n_head": 2, "n_embd": 8}
    model = build_model("gpt2", {**sizes, "activation": HERMITE, "norm": "batch", "attention": "power", **settings})
    assert isinstance(model, GPT2)
    with pytest.raises(ValueError, match=message):
        refuse_other_parts(model, divisions=bool(settings))


def test_the_error_on_a_range_that_is_almost_one_number_is_none() -> None:
    assert relative_error(128, 0, 1.0, 1.0001) == 0.0
    module = NewtonPolynomial(ReciprocalSettings(degree=128, newton=0, domain=(1.0, 1.0001)), RECIPROCAL)
    assert float(module(torch.tensor([1.00005]))) == pytest.approx(1 / 1.00005, rel=1e-6)


def test_a_model_with_polynomials_for_divisions_comes_back_from_its_directory(tmp_path: Path) -> None:
    model = network()
    save_model(tmp_path / "model", model)
    written = load_model(tmp_path / "model")
    reciprocals = [block.attn.reciprocal for block in written.blocks]  # type: ignore[union-attr]
    assert [reciprocal.settings.domain for reciprocal in reciprocals] == [(0.3, 12.0), (0.4, 12.0)]
    tokens = torch.arange(4)[None]
    with torch.no_grad():
        assert torch.equal(written(tokens), model(tokens))
        greedy = written.generate(tokens[:, :1], 3, temperature=0.0)  # type: ignore[operator]
        assert greedy[:, 1] == model(tokens[:, :1])[0, -1].argmax()


@pytest.mark.parametrize(("degree", "newton"), [(1, 0), (3, 0), (7, 0), (7, 1), (3, 2), (24, 0)])
@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (0.1, 10.0)])
def test_the_error_of_a_reciprocal_is_exactly_what_is_certified(
    degree: int, newton: int, low: float, high: float
) -> None:
    module = NewtonPolynomial(ReciprocalSettings(degree=degree, newton=newton, domain=(low, high)), RECIPROCAL).double()
    d = torch.linspace(low, high, 20_001, dtype=torch.float64)
    with torch.no_grad():
        measured = float((1.0 - d * module(d)).abs().max())
    # coefficients are kept in float32
    assert measured == pytest.approx(relative_error(degree, newton, low, high), rel=2e-3, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_the_model_leaves_the_certified_error(dtype: torch.dtype) -> None:
    certified = relative_error(7, 0, 0.1, 10.0)
    model = network().to(dtype)
    attention = model.blocks[0].attn
    assert attention.alpha.dtype == dtype  # type: ignore[union-attr]
    module = NewtonPolynomial(ReciprocalSettings(degree=7, newton=0, domain=(0.1, 10.0)), RECIPROCAL)
    attention.reciprocal = module  # type: ignore[union-attr]
    model.to(dtype)
    d = torch.linspace(0.1, 10.0, 20_001)
    with torch.no_grad():
        measured = float((1.0 - d.double() * module(d).double()).abs().max())
    assert measured == pytest.approx(certified, rel=2e-3)
    assert {parameter.dtype for parameter in model.double().blocks[0].attn.reciprocal.parameters()} == {torch.float64}  # type: ignore[union-attr]
