"""The analyses `modular` and `width`: the network that is known to be best, curves, drift, variances of kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.pipeline.data.analysis_file import ModularFigures, WidthFigures
from polytrope.pipeline.data.promised import PromisedModel, PromisedNumbers, PromisedText
from polytrope.pipeline.data.training_file import Training, write_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources, stage_context
from polytrope.pipeline.stages.analyze.analyses.modular import analyse_modular
from polytrope.pipeline.stages.analyze.analyses.width import analyse_width
from polytrope.pipeline.stages.analyze.analyze import promise
from polytrope.pipeline.stages.analyze.parameters import AnalyzeParameters, ModularOptions, WidthOptions
from polytrope.pipeline.stages.analyze.subject import Subject
from polytrope.pipeline.stages.shard.parameters import ShardNumbersParameters
from polytrope.pipeline.stages.shard.shard_numbers import shard_numbers


def make_numbers(directory: Path, source: dict[str, Any], fraction: float = 0.5) -> Path:
    parameters = ShardNumbersParameters.model_validate({"source": source, "validation_fraction": fraction})
    context = stage_context(directory, stage="pairs", resources=Resources())
    shard_numbers(context, parameters)
    return context.output


def network_of_cosines(modulus: int, frequencies: Sequence[int], **config: Any) -> Any:
    """u = cos(ωa + θ_u), v = cos(ωb + θ_v), w = cos(ωc + θ_u + θ_v), eight neurons per frequency, squares between."""
    phases = [
        (k, first * math.pi / 2, second * math.pi / 2) for k in frequencies for first in (0, 1) for second in range(4)
    ]
    sizes = {"inputs": 2 * modulus, "outputs": modulus, "widths": [len(phases)], "loss": "cross_entropy"}
    model: Any = build_model("mlp", {"activation": "hermite2", **sizes, **config}).double()
    angles = 2 * math.pi * torch.arange(modulus, dtype=torch.float64) / modulus
    with torch.no_grad():
        for neuron, (k, first, second) in enumerate(phases):
            model.blocks[0].layer.weight[neuron] = torch.cat([(k * angles + first).cos(), (k * angles + second).cos()])
            model.head.weight[:, neuron] = (k * angles + first + second).cos()
        model.blocks[0].act.coefficients.copy_(torch.tensor([1.0, 0.0, 2.0]))  # x²
    return model


def analysed(model: nn.Module, dataset: Path, directory: Path) -> ModularFigures:
    subject = Subject(directory, model, dataset, [])
    return analyse_modular(subject, ModularOptions(name="modular"))


@pytest.mark.parametrize("modulus", [7, 13, 23, 31])
def test_the_known_network_has_the_known_margin_and_one_frequency_a_far_smaller_one(
    modulus: int, tmp_path: Path
) -> None:
    dataset = make_numbers(tmp_path, {"kind": "modular", "modulus": modulus})
    every = range(1, (modulus - 1) // 2 + 1)
    found = analysed(network_of_cosines(modulus, every), dataset, tmp_path)
    assert len(found.frequencies or []) == 4 * (modulus - 1)
    assert found.train_accuracy == found.test_accuracy == 1.0
    theory = math.sqrt(2 / 27) / (math.sqrt(modulus) * (modulus - 1))
    assert found.margin == pytest.approx(theory, abs=1e-9, rel=1e-9)
    assert found.metrics()["margin_share"] == pytest.approx(1.0, abs=1e-9)
    assert found.concentrations == pytest.approx([1.0] * len(found.frequencies or []))
    assert sorted(set(found.frequencies or [])) == list(every)
    assert found.effective_frequencies == pytest.approx(len(every))
    single = analysed(network_of_cosines(modulus, [1]), dataset, tmp_path)
    assert single.test_accuracy == 1.0
    assert single.margin is not None
    assert single.margin < theory / 3
    if modulus == 7:
        assert (single.margin, theory) == pytest.approx((0.0055, 0.0171), abs=5e-5)
    assert single.effective_frequencies == pytest.approx(1.0)


def test_the_margin_is_that_of_the_function_not_of_how_its_weights_are_written(tmp_path: Path) -> None:
    dataset = make_numbers(tmp_path, {"kind": "modular", "modulus": 7})
    model = network_of_cosines(7, [1, 2, 3], output_scale=0.3)
    with torch.no_grad():
        model.blocks[0].layer.weight *= 3.0
        model.head.weight *= 0.01
        model.blocks[0].act.coefficients.copy_(torch.tensor([0.3, 0.0, -5.0]))  # another constant, another sign
        model.head.weight *= -1.0
        model.blocks[0].layer.weight[:, :7] += 0.5  # a mean, and what takes it away again
        model.blocks[0].layer.bias -= 0.5
        model.head.weight += torch.randn(1, model.head.in_features)  # to all classes alike
    found = analysed(model, dataset, tmp_path)
    assert found.metrics()["margin_share"] == pytest.approx(1.0, abs=1e-9)
    torch.manual_seed(0)
    for seed in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape))
        assert analysed(model, dataset, tmp_path).metrics()["margin_share"] < 1.0, seed


def test_what_is_not_known_is_not_told(tmp_path: Path) -> None:
    dataset = make_numbers(tmp_path, {"kind": "modular", "modulus": 7})
    sizes = {"inputs": 14, "outputs": 7, "loss": "cross_entropy"}
    for config, reasons in (
        ({"widths": [8], "activation": "relu"}, ["margin: the best one is known of activations that are polynomials"]),
        ({"widths": [8], "activation": "hermite3"}, ["margin: the best one is known of activations that are"]),
        ({"widths": [8, 8], "activation": "hermite2"}, ["margin: known of one dense layer"]),
        ({"widths": [8], "activation": "hermite2", "feedforward": "quadratic"}, ["frequencies: ", "margin: known of"]),
    ):
        found = analysed(build_model("mlp", {**sizes, **config}), dataset, tmp_path)
        assert found.margin is None
        said = [text for text in found.missing if not text.startswith(("curve: ", "kernel_drift: "))]
        assert [text.startswith(reason) for text, reason in zip(said, reasons, strict=True)] == [True] * len(reasons)
        assert (found.concentration is None) == (len(reasons) == 2)
        assert "margin_share" not in found.metrics()
        assert [text.split(":")[0] for text in found.missing if text not in said] == ["curve", "kernel_drift"]


def test_the_curve_and_the_drift_are_those_of_the_training(tmp_path: Path) -> None:
    dataset = make_numbers(tmp_path / "pairs", {"kind": "modular", "modulus": 5})
    torch.manual_seed(0)
    sizes = {"inputs": 10, "outputs": 5, "widths": [6], "activation": "hermite3", "loss": "cross_entropy"}
    before: Any = build_model("mlp", sizes)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.head.weight *= 2.0
        after.blocks[0].layer.weight += 0.1
    save_model(tmp_path / "model", after)
    save_model(tmp_path / "model" / "initial", before)
    shares = [(5, 0.5, 0.1), (10, 0.99, 0.2), (15, 1.0, 0.2), (20, 1.0, 0.995), (25, 1.0, 0.9)]
    history = [{"step": step, "fit/accuracy": fit, "val/accuracy": other} for step, fit, other in shares]
    write_training(tmp_path / "model", Training(architecture="mlp", parameters=1, steps=25), [{"step": 1}, *history])
    found = analysed(load_model(tmp_path / "model"), dataset, tmp_path / "model")
    assert found.curve is not None
    assert found.curve.test == [other for _, _, other in shares]
    assert (found.memorised_step, found.generalised_step) == (10, 20)
    assert found.metrics()["delay"] == 10.0
    rows = torch.eye(5).double()
    rows = torch.cat([rows.repeat_interleave(5, 0), rows.repeat(5, 1)], dim=1)
    kernels = [explicit_kernel(model.double(), rows) for model in (before, after)]
    drift = float((kernels[1] - kernels[0]).norm() / kernels[0].norm())
    assert drift > 0.1
    assert found.kernel_drift == pytest.approx(drift, rel=1e-9)
    # nothing but the curve's absence is said of one that has measured no training pairs
    write_training(
        tmp_path / "model", Training(architecture="mlp", parameters=1, steps=25), [{"step": 1, "val/accuracy": 1}]
    )
    bare = analysed(load_model(tmp_path / "model"), dataset, tmp_path / "model")
    assert bare.curve is bare.memorised_step is None
    assert any("fit_samples" in text for text in bare.missing)


def explicit_kernel(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """J Jᵀ, summed over the outputs, from the whole Jacobian of finite differences."""
    columns = []
    for parameter in model.parameters():
        for index in range(parameter.numel()):
            moved = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.view(-1)[index] += step
                    moved.append(model(rows))
                    parameter.view(-1)[index] -= step
            columns.append((moved[0] - moved[1]) / 2e-5)
    jacobian = torch.stack(columns, dim=-1)
    kernel: torch.Tensor = torch.einsum("acp,bcp->ab", jacobian, jacobian)
    return kernel


def test_the_kernel_s_variance_falls_like_one_over_the_width(tmp_path: Path) -> None:
    """Known: the slope of the logarithms tends to -1, for polynomials and for ReLU."""
    source = {"kind": "circle", "rows": 20, "amplitudes": [1.0]}
    dataset = make_numbers(tmp_path, source)
    options = WidthOptions(name="width", widths=[128, 512], draws=120)
    for activation in ({"name": "hermite", "degree": 2, "init": "stable"}, "relu"):
        config = {"inputs": 2, "outputs": 3, "widths": [4, 4], "activation": activation, "output_scale": 7.0}
        subject = Subject(tmp_path, build_model("mlp", config), dataset, [])
        state = torch.random.get_rng_state()
        found: WidthFigures = analyse_width(subject, options)
        assert torch.equal(torch.random.get_rng_state(), state)  # others draw as if it had not run
        assert found.slope == pytest.approx(-1.0, abs=3 * found.slope_error)
        assert 0.0 < found.slope_error < 0.2


def test_what_cannot_be_analysed_is_refused_before_anything_starts(tmp_path: Path) -> None:
    pairs, numbers = PromisedNumbers(14, None, 7), PromisedNumbers(2, 1, None)
    text = PromisedText(sequence_length=32, tokens=512, tokenizer="bpe")
    mlp, gpt2 = PromisedModel("mlp", {}), PromisedModel("gpt2", {})

    def promised(name: str, data: Any, model: PromisedModel) -> Any:
        parameters = AnalyzeParameters.model_validate({"analyses": [name]})
        return promise(parameters, {"dataset": data, "models": {"a": model}}, Resources(), tmp_path)

    assert promised("modular", pairs, mlp).analyses == ("modular",)
    assert promised("modular", PromisedNumbers(None, None, 7), mlp).labels == ("a",)
    assert promised("width", numbers, mlp).analyses == ("width",)
    for data, model in ((numbers, mlp), (text, gpt2), (PromisedNumbers(13, None, 7), mlp)):
        with pytest.raises(UserError, match="analyses: `modular` is for pairs of numbers"):
            promised("modular", data, model)
    with pytest.raises(UserError, match=r"analyses: `width` draws .* inputs\.models\.a is a gpt2"):
        promised("width", text, gpt2)
    with pytest.raises(UserError, match=r"inputs\.models\.a has feedforward: kan"):
        promised("width", numbers, PromisedModel("mlp", {"feedforward": "kan"}))
    with pytest.raises(ValueError, match="widths: a slope needs two that differ"):
        AnalyzeParameters.model_validate({"analyses": [{"name": "width", "widths": [8, 8]}]})


def test_other_rows_than_pairs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.eye(4)[:, :4]
    np.savez(tmp_path / "rows.npz", inputs=np.tile(rows, (30, 1)) + np.arange(120)[:, None], targets=np.arange(120) % 2)
    monkeypatch.chdir(tmp_path)
    dataset = make_numbers(tmp_path / "rows", {"kind": "file", "path": "rows.npz", "classes": 2})
    model = build_model("mlp", {"inputs": 4, "outputs": 2, "widths": [4], "loss": "cross_entropy"})
    with pytest.raises(UserError, match="modular: the train rows of this data set are no pairs"):
        analysed(model, dataset, tmp_path)
