"""The analyses of what a network computes: features of its blocks, units that are alike, products by adding bits."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_support import SEQUENCE_LENGTH, make_context, make_dataset

from polytrope.models import build_model
from polytrope.models.checkpoint import save_model
from polytrope.models.factorize import utilised_rank
from polytrope.pipeline.data.analysis_file import MergedUnits, MergingFigures, read_analysis
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.stage import Artifact
from polytrope.pipeline.stages.analyze.analyses.arithmetic import (
    multiplies,
    piecewise_layer,
    piecewise_linear,
    piecewise_products,
)
from polytrope.pipeline.stages.analyze.analyses.features import (
    condition_number,
    intrinsic_dimension,
    linear_information,
)
from polytrope.pipeline.stages.analyze.analyses.merging import Merger, acts_alone
from polytrope.pipeline.stages.analyze.analyze import analyze
from polytrope.pipeline.stages.analyze.parameters import AnalyzeParameters
from polytrope.pipeline.stages.shard.parameters import ShardNumbersParameters
from polytrope.pipeline.stages.shard.shard_numbers import shard_numbers

GPT2: dict[str, Any] = {"vocab_size": 320, "sequence_length": SEQUENCE_LENGTH, "n_layer": 2, "n_head": 2, "n_embd": 16}
NAMES = ["features", {"name": "merging", "distances": [0.0, 0.2, 9.0]}, "arithmetic"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dimension", [2, 5])
def test_the_dimension_is_that_of_the_data_wherever_they_lie(dimension: int) -> None:
    plane = random(1500, dimension) @ random(dimension, 20, seed=1)
    found = intrinsic_dimension(plane, 1500)
    assert found == pytest.approx(dimension, rel=0.08)
    assert intrinsic_dimension(torch.cat([plane, plane[:700]]), 1500) == pytest.approx(found, rel=1e-12)
    assert intrinsic_dimension(plane[:1].expand(50, -1), 100) is None
    assert intrinsic_dimension(torch.eye(6, dtype=torch.float64), 100) is None  # all equally far apart


def test_ranks_and_conditions_are_those_of_the_spectrum() -> None:
    basis = torch.linalg.qr(random(400, 6)).Q
    vectors = basis * torch.tensor([10.0, 5.0, 1.0, 0.1, 0.0, 0.0])
    squares = torch.linalg.eigvalsh(vectors.T @ vectors)
    assert [utilised_rank(squares, energy) for energy in (0.5, 0.9, 0.999, 0.99999)] == [1, 2, 3, 4]
    assert condition_number(vectors) is None
    assert condition_number(vectors[:1]) is None
    centred = basis - basis.mean(0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(centred.T))).T
    assert condition_number(white * torch.tensor([1.0, 1, 1, 1, 1, 7])) == pytest.approx(49.0)


def test_linear_information_is_that_of_the_noise() -> None:
    x, noise = random(40_000, 4), random(40_000, 1, seed=1)
    targets = x[:, :1] + math.sqrt(1 / (math.e ** (2 * 0.4055) - 1)) * noise
    information, unexplained = told(x, targets)
    assert information == pytest.approx(0.4055, abs=0.01)
    assert unexplained == pytest.approx(math.e ** (-2 * 0.4055), abs=0.01)
    nothing, all_of_it = told(x, random(40_000, 3, seed=2))
    assert nothing == pytest.approx(0.0, abs=1e-3)
    assert all_of_it == pytest.approx(1.0, abs=1e-3)
    assert told(x, x**2)[1] == pytest.approx(1.0, abs=0.01)
    assert told(torch.ones_like(x), x) == pytest.approx((0.0, 1.0), abs=1e-12)
    assert linear_information(x, torch.ones_like(x)) is None


def test_blocks_that_died_have_no_figures_and_take_none_of_the_others(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers"
    source = {"kind": "circle", "rows": 400, "amplitudes": [1.0]}
    shard_numbers(make_context(numbers), ShardNumbersParameters.model_validate({"source": source}))
    dataset, models = Artifact(numbers / "output", "d" * 64, "shard_numbers"), {}
    for name, widths, dead in (("dead", [8, 8], 1.0), ("alive", [8, 8], 0.0), ("exploded", [8], 0.0)):
        torch.manual_seed(0)
        sizes = {"inputs": 2, "outputs": 1, "widths": widths, "loss": "mse", "activation": "relu"}
        model: Any = build_model("mlp", sizes)
        with torch.no_grad():
            model.blocks[0].layer.bias.sub_(100.0 * dead)
            model.head.weight.mul_(1e30 if name == "exploded" else 1.0)
        save_model(tmp_path / name, model)
        models[name] = Artifact(tmp_path / name, name, "train")
    parameters = AnalyzeParameters.model_validate({"analyses": ["signal", "features", "arithmetic"]})
    analyze(make_context(tmp_path / "run"), dataset, models, parameters)
    found = read_analysis(tmp_path / "run" / "output").models
    dead_features, alive_features = found["dead"].features, found["alive"].features
    assert dead_features is not None
    assert alive_features is not None
    assert dead_features.missing == [
        "block 1: the features of the last block are constant: there is nothing to tell",
        "block 1: fewer than three different vectors, or all equally far apart, have no dimension",
        "block 2: fewer than three different vectors, or all equally far apart, have no dimension",
    ]
    assert alive_features.complexity is not None
    assert found["exploded"].failure is None
    assert found["exploded"].failures == {"arithmetic": "arithmetic: loss is not a finite number"}
    assert found["exploded"].arithmetic is None
    assert found["exploded"].features is not None
    assert not found["alive"].failures


def told(vectors: Tensor, targets: Tensor) -> tuple[float, float]:
    found = linear_information(vectors, targets)
    assert found is not None
    return found


def mlp(units: int = 24, seed: int = 0) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(seed)
    return nn.Linear(6, units).double(), nn.Linear(units, 5).double()


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Tanh(), torch.sin], ids=str)
def test_planted_duplicates_are_joined_without_a_change(activation: Any) -> None:
    inner, outer = mlp()
    with torch.no_grad():
        for copied, own in ((3, 0), (7, 0), (20, 11)):
            inner.weight[copied], inner.bias[copied] = inner.weight[own].clone(), inner.bias[own].clone()
    merger, x = Merger(inner, outer), random(50, 6)
    merger.merge_up_to(0.0)
    assert merger.left == 21
    first, second = (layer.double() for layer in merger.linears())
    torch.testing.assert_close(second(activation(first(x))), outer(activation(inner(x))), rtol=0, atol=1e-6)


def test_the_nearest_pair_is_joined_first_by_the_weighted_mean() -> None:
    inner, outer = mlp(9)
    merger = Merger(inner, outer)
    rows = {(unit,): torch.cat([inner.weight[unit], inner.bias[unit : unit + 1]]).detach() for unit in range(9)}
    unit = math.sqrt(float(torch.stack(list(rows.values())).square().sum(1).mean()))
    counts = []
    for furthest in (0.8, 1.0, 1.1, 1.2, 9.0):
        while len(rows) > 1:  # the definition
            pairs = {pair: float((rows[pair[0]] - rows[pair[1]]).norm()) for pair in itertools.combinations(rows, 2)}
            (first, second), distance = min(pairs.items(), key=lambda item: item[1])
            if distance > furthest * unit:
                break
            sizes = len(first), len(second)
            rows[first + second] = (sizes[0] * rows.pop(first) + sizes[1] * rows.pop(second)) / sum(sizes)
        merger.merge_up_to(furthest)
        found = torch.cat([merger.linears()[0].weight, merger.linears()[0].bias[:, None]], dim=1).double()
        expected = torch.stack(sorted(rows.values(), key=lambda row: float(row[0])))
        torch.testing.assert_close(found[found[:, 0].argsort()], expected, rtol=1e-5, atol=1e-6)
        counts.append(len(rows))
    assert len(set(counts)) >= 4
    assert counts[-1] == 1
    torch.testing.assert_close(merger.linears()[1].weight[:, 0].double(), outer.weight.sum(1), rtol=1e-5, atol=1e-6)


def test_an_activation_that_looks_at_other_units_or_at_which_one_it_is_does_not_act_alone() -> None:
    from polytrope.ops import build_activation

    assert acts_alone(build_activation("hermite3"), 8)
    assert not acts_alone(build_activation("polynorm"), 8)
    per_channel = build_activation({"name": "hermite", "degree": 3, "num_parameters": 8})
    with torch.no_grad():
        per_channel.coefficients[0] += 1.0  # type: ignore[operator, index]
    assert not acts_alone(per_channel, 8)


def test_piecewise_products_are_sums_of_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(200_000, generator=generator) * 2.0 ** torch.randint(-20, 20, (200_000,), generator=generator)
        for _ in range(2)
    )
    found, exact = piecewise_products(a, b), a.double() * b.double()
    errors = (found.double() / exact - 1.0).numpy()
    assert errors.max() <= 0.0
    assert -1 / 9 - 1e-7 <= errors.min() < -0.111
    assert errors.mean() == pytest.approx(-0.038, abs=1e-3)
    assert (piecewise_products(a, b, 1.0552).double() / exact - 1.0).mean().item() == pytest.approx(0.0, abs=1.5e-3)
    assert torch.equal(found, piecewise_products(b, a))
    power = torch.tensor([0.25, -2.0, 1.0])[:, None]
    assert torch.equal(piecewise_products(power, a), power * a)
    by_hand = (a.numpy().view(np.int32) & 0x7FFFFFFF).astype(np.int64) + (b.numpy().view(np.int32) & 0x7FFFFFFF)
    bits = (by_hand - 0x3F800000).astype(np.int32).view(np.float32) * np.sign(a.numpy() * b.numpy())
    assert np.array_equal(found.numpy(), bits)
    edges = piecewise_products(
        torch.tensor([0.0, -0.0, 1e-30, 1e30, math.inf, math.nan]), torch.tensor([2.0, 2.0, 1e-30, 1e30, 0.5, 1.0])
    )
    assert edges[:3].tolist() == [0.0, 0.0, 0.0]
    assert edges[3:].isnan().all()


def test_piecewise_layers_are_sums_of_such_products() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 5)
    layer = nn.Conv2d(6, 4, 3, padding=1, stride=2, groups=2)
    with torch.no_grad():
        layer.weight.copy_(2.0 ** torch.randint(-3, 3, layer.weight.shape))  # products by these are exact
        forward = piecewise_layer(layer, 1.0)
        assert forward is not None
        torch.testing.assert_close(forward(x), layer(x))
        linear = nn.Linear(5, 3)
        forward = piecewise_layer(linear, 1.0)
        assert forward is not None
        expected = piecewise_linear(x.reshape(-1, 5), linear.weight, 1.0).view(2, 6, 7, 3) + linear.bias
        torch.testing.assert_close(forward(x), expected)
        assert (forward(x) - linear(x)).abs().max() > 1e-3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def test_what_stays_exact_is_named() -> None:
    kinds = {"gpt2": ["gated", "quadratic"], "mlp": ["dense", "kan"]}
    found = {}
    for architecture, layers in kinds.items():
        sizes = GPT2 if architecture == "gpt2" else {"widths": [4, 4]}
        model = build_model(architecture, {**sizes, "feedforward": layers, "activation": "hermite3"})
        others = [module for module in model.modules() if piecewise_layer(module, 1.0) is None]
        found[architecture] = {type(module).__name__ for module in others if multiplies(module)}
    assert found == {"gpt2": {"QuadraticLinear"}, "mlp": {"KANLinear"}}


def test_the_stage_says_what_the_network_does_on_the_validation_samples(tmp_path: Path, dataset: Artifact) -> None:
    torch.manual_seed(0)
    model: Any = build_model("gpt2", {**GPT2, "activation": "hermite3"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model.blocks[0].mlp.c_fc.weight[5:9] = model.blocks[0].mlp.c_fc.weight[:4]
        model.blocks[0].mlp.c_fc.bias[5:9] = model.blocks[0].mlp.c_fc.bias[:4]
    save_model(tmp_path / "model", model, tokenizer=dataset.path)
    gated = build_model("gpt2", {**GPT2, "feedforward": "gated", "activation": "hermite3"})
    save_model(tmp_path / "gated", gated, tokenizer=dataset.path)
    models = {name: Artifact(tmp_path / name, name, "train") for name in ("model", "gated")}
    parameters = AnalyzeParameters.model_validate({"analyses": NAMES, "samples": 6, "batch_size": 4})
    metrics = analyze(make_context(tmp_path / "run"), dataset, models, parameters)
    found = read_analysis(tmp_path / "run" / "output").models["model"]
    blocks = torch.from_numpy(open_split(dataset.path, "validation").samples(np.arange(6)).astype(np.int64))
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.flatten(0, 1).double()))
    with torch.no_grad():
        loss = float(model.eval()(blocks[:, :-1], blocks[:, 1:]))
    assert found.features is not None
    assert [layer.vectors for layer in found.features.layers] == [6 * SEQUENCE_LENGTH] * 2
    assert found.features.layers[0].rank == utilised_rank(torch.linalg.svdvals(outputs[0]).square().flip(0), 0.999)
    assert found.features.layers[0].dimension == pytest.approx(intrinsic_dimension(outputs[0], 1000), rel=1e-5)
    information, unexplained = told(*outputs)
    assert found.features.layers[0].information == pytest.approx(information, rel=1e-4)
    assert found.features.complexity == pytest.approx(unexplained, rel=1e-4)
    assert found.features.layers[1].information is None
    assert found.merging is not None
    assert found.merging.loss == pytest.approx(loss, rel=1e-6)
    exact, near, one = found.merging.merged
    assert exact.left == [60, 64]
    assert exact.loss == pytest.approx(loss, rel=1e-5)
    assert near.share <= exact.share
    assert one.left == [1, 1]
    assert found.arithmetic is not None
    assert found.arithmetic.piecewise_loss is not None
    assert abs(found.arithmetic.piecewise_loss - loss) < 1.0
    own = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert found.arithmetic.products == 8 * SEQUENCE_LENGTH * own  # two batches of 4
    assert metrics["model/merging/share_0"] == pytest.approx(124 / 128)
    assert "gated/merging/share_0" not in metrics
    other = read_analysis(tmp_path / "run" / "output").models["gated"].merging
    assert other is not None
    assert other.missing == [f"block {n}: its activation does not stand between two linear layers" for n in (1, 2)]
    few = AnalyzeParameters.model_validate({"analyses": ["features"], "samples": 1})
    analyze(make_context(tmp_path / "few"), dataset, {"model": models["model"]}, few)
    features = read_analysis(tmp_path / "few" / "output").models["model"].features
    assert features is not None
    assert features.complexity is None
    assert features.missing == [
        "block 1: 32 vectors are too few to tell how much 16 features say of the last block; raise `samples`"
    ]


def test_distances_that_differ_have_figures_of_their_own() -> None:
    distances = (0.0, 0.1, 0.25, 0.2500000001, 1e-7)
    merged = [MergedUnits(distance=entry, left=[1], share=entry, loss=2 + entry) for entry in distances]
    found = MergingFigures(names=["block 1"], units=[4], loss=2.0, merged=merged, missing=[]).metrics()
    names = ("0", "0.1", "0.25", "0.2500000001", "1e-07")
    assert {name: value for name, value in found.items() if name.startswith("share")} == {
        f"share_{name}": distance for name, distance in zip(names, distances, strict=True)
    }
    assert found["loss_0.25"] == 2.25
    assert len(found) == 11
