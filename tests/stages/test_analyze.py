"""The analyze stage: figures of trained models from their parameters and what their activations receive."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from training_support import SEQUENCE_LENGTH, make_context, make_dataset, read_events

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.factors import restore_factors
from polytrope.ops import build_activation
from polytrope.pipeline.data.analysis_file import InputStatistics, read_analysis
from polytrope.pipeline.data.promised import PromisedAnalysis, PromisedImages, PromisedModel, PromisedText
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.training_file import Training, write_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources
from polytrope.pipeline.stages.analyze.analyses import ANALYSES
from polytrope.pipeline.stages.analyze.analyses.signal import analyse_signal
from polytrope.pipeline.stages.analyze.analyze import analyze, check, promise
from polytrope.pipeline.stages.analyze.parameters import NAMES, AnalyzeParameters, SignalOptions
from polytrope.pipeline.stages.analyze.subject import AnalysedActivation, read_activations, spectral_norm

ACTIVATIONS: dict[str, Any] = {
    "hermite": {"name": "hermite", "degree": 3, "init": "variance_preserving"},
    "gelu": "gelu",
    "composed": [{"name": "composition", "degree": 4, "domain": [-8.0, 8.0]}, "gelu"],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, dataset: Artifact) -> dict[str, Artifact]:
    result = {}
    for label, activation in ACTIVATIONS.items():
        torch.manual_seed(0)
        sizes = {"vocab_size": 320, "sequence_length": SEQUENCE_LENGTH, "n_layer": 2, "n_head": 2, "n_embd": 32}
        directory = tmp_path_factory.mktemp(label)
        save_model(directory, build_model("gpt2", {**sizes, "activation": activation}), tokenizer=dataset.path)
        result[label] = Artifact(directory, f"digest of {label}", f"train-{label}")
    return result


@pytest.fixture(scope="module")
def analysed(
    tmp_path_factory: pytest.TempPathFactory, dataset: Artifact, models: dict[str, Artifact]
) -> tuple[Path, dict[str, float]]:
    directory = tmp_path_factory.mktemp("analysis")
    failed = tmp_path_factory.mktemp("failed")
    write_training(failed, Training(architecture="gpt2", parameters=1, steps=2, failure="diverged at step 3"), [])
    entries = {"analyses": ["signal", {"name": "kernel", "frequencies": 5}], "samples": 6, "batch_size": 4}
    given = {**models, "failed": Artifact(failed, "digest", "train-failed")}
    return directory, analyze(make_context(directory), dataset, given, AnalyzeParameters.model_validate(entries))


def received(model: Artifact, dataset: Artifact) -> np.ndarray:
    """What the activation of block 1 receives on the first 6 validation samples."""
    network = load_model(model.path)
    inputs: list[torch.Tensor] = []
    network.get_submodule("transformer.h.0.mlp.activation").register_forward_pre_hook(
        lambda _module, arguments: inputs.append(arguments[0])
    )
    blocks = torch.from_numpy(open_split(dataset.path, "validation").samples(np.arange(6)).astype(np.int64))
    with torch.no_grad():
        network(blocks[:, :-1])
    return inputs[0].double().numpy()


def test_signal_figures_are_those_of_the_model_on_its_own_inputs(
    analysed: tuple[Path, dict[str, float]], dataset: Artifact, models: dict[str, Artifact]
) -> None:
    x = received(models["hermite"], dataset)
    network = load_model(models["hermite"].path).double()
    mlp = network.get_submodule("transformer.h.0.mlp")
    found = read_analysis(analysed[0] / "output").models["hermite"].signal
    assert found is not None
    layer = found.layers[0]
    assert (layer.name, layer.activation) == ("block 1", "hermite, degree 3")
    assert layer.inputs.count == x.size
    assert (layer.inputs.minimum, layer.inputs.maximum) == (x.min(), x.max())
    assert layer.inputs.mean == pytest.approx(x.mean(), abs=0.02)
    assert layer.inputs.deviation == pytest.approx(x.std(), rel=0.02)
    assert layer.measured is not None
    with torch.no_grad():
        values = mlp.activation(torch.from_numpy(x)).numpy()
    assert layer.measured.value == pytest.approx(float((values**2).mean()), rel=0.05)
    assert layer.standard is not None
    assert (layer.standard.value, layer.standard.derivative) == pytest.approx((1.0, 1.0))
    assert layer.standard.slope == pytest.approx(1.765, abs=1e-3)
    assert layer.slope is not None
    norms = [float(torch.linalg.matrix_norm(part.weight.detach(), 2)) for part in (mlp.c_fc, mlp.c_proj)]
    assert layer.slope.linear_norms == pytest.approx(norms)
    assert layer.slope.bound == pytest.approx(math.prod(norms) * layer.slope.constant)
    # nowhere on these inputs does the MLP move by more than the bound
    ahead = torch.randn(2, 200, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden = mlp.c_fc(ahead).detach()
    ahead = ahead / max(1.0, float((hidden / torch.tensor([x.min(), x.max()])[:, None, None, None]).amax()) * 1.01)
    with torch.no_grad():
        moved = (mlp(ahead[0]) - mlp(ahead[1])).norm(dim=1) / (ahead[0] - ahead[1]).norm(dim=1)
    assert layer.slope.bound is not None
    assert 0.0 < float(moved.max()) <= layer.slope.bound
    assert layer.symmetry is not None
    assert layer.symmetry.odd > 0.1 < layer.symmetry.even


def test_two_factors_count_as_their_product(models: dict[str, Artifact], dataset: Artifact) -> None:
    """A layer that is missing from the bound of the slope would make it too small."""
    model = load_model(models["gelu"].path)
    restore_factors(model, {"transformer.h.0.mlp.c_proj": 4})
    factors = model.get_submodule("transformer.h.0.mlp.c_proj")
    inner, outer = (factors.get_submodule(name).weight.detach() for name in ("inner", "outer"))
    first, second = read_activations(model, dataset.path, 2, 2)[0].linears
    assert spectral_norm(first) == spectral_norm(model.get_submodule("transformer.h.0.mlp.c_fc"))  # type: ignore[arg-type]
    expected = torch.linalg.matrix_norm((outer @ inner).double(), 2)  # type: ignore[operator]
    assert spectral_norm(second) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("reach", "told"), [(7.4, False), (7.6, True)])
def test_symmetries_are_looked_for_only_where_a_polynomial_means_something(reach: float, told: bool) -> None:
    module = build_activation({"name": "composition", "degree": 4, "domain": [-reach, reach]})
    inputs = InputStatistics(count=2, mean=0.0, deviation=1.0, minimum=-1.0, maximum=1.0)
    points = np.array([-1.0, 1.0])
    entry = AnalysedActivation("block 1", "composition", module, [], points, np.full(2, 0.5), inputs)
    (layer,) = analyse_signal([entry], SignalOptions(name="signal")).layers
    assert layer.slope is not None
    assert (layer.symmetry is not None) == told


def test_every_reason_why_a_figure_is_missing_is_told() -> None:
    module = build_activation({"name": "composition", "degree": 4, "domain": [-8.0, 8.0], "num_parameters": 2})
    inputs = InputStatistics(count=2, mean=0.0, deviation=1.0, minimum=-1.0, maximum=1.0)
    entry = AnalysedActivation("block 1", "composition", module, [], np.zeros(1), np.ones(1), inputs)
    (layer,) = analyse_signal([entry], SignalOptions(name="signal")).layers
    assert layer.missing == (
        "only activations with one set of coefficients that are not gated; a polynomial for its domain alone, beyond "
        "which nothing holds, has no normal distribution"
    )


def test_kernels_end_at_the_degree_and_are_of_trace_one(analysed: tuple[Path, dict[str, float]]) -> None:
    models = read_analysis(analysed[0] / "output").models
    hermite, gelu, composed = (models[label].kernel for label in ("hermite", "gelu", "composed"))
    assert hermite is not None
    assert gelu is not None
    assert composed is not None
    for layer in hermite.layers:
        assert layer.coefficients is not None
        assert layer.spectrum is not None
        assert len(layer.coefficients) == 4
        assert layer.spectrum[4:] == [0.0, 0.0]
        assert layer.spectrum[0] + 2 * sum(layer.spectrum[1:]) == pytest.approx(1.0)
    assert (hermite.spectrum or [])[4] > 0.0  # two layers: up to 9
    assert all(len(layer.coefficients or []) == 65 for layer in gelu.layers)
    assert composed.spectrum is None
    assert "for its domain alone" in str(composed.layers[0].missing)
    assert composed.layers[1].spectrum is not None


def test_metrics_carry_label_and_analysis_and_failures_have_none(
    analysed: tuple[Path, dict[str, float]],
) -> None:
    directory, returned = analysed
    content = read_analysis(directory / "output")
    assert content.models["failed"].failure == "diverged at step 3"
    assert not any(name.startswith("failed/") for name in returned)
    assert returned["hermite/signal/largest_variance_slope"] == pytest.approx(1.765, abs=1e-3)
    assert returned["gelu/kernel/mean_frequency"] > 0
    assert "composed/kernel/network_mean_frequency" not in returned
    assert "gelu/kernel/network_mean_frequency" in returned
    logged = {name: value for event in read_events(directory, "metrics") for name, value in event["values"].items()}
    assert logged == returned
    assert sorted(path.name for path in (directory / "output" / "plots").iterdir()) == ["kernel.png", "variances.png"]
    said = [event["text"] for event in read_events(directory, "message")]
    assert any(text.startswith("composed: block 1: composition, degree 4: a polynomial for its") for text in said)


def test_the_same_analysis_twice_gives_the_same_bytes(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    for name in ("first", "second"):
        parameters = AnalyzeParameters.model_validate({"analyses": ["kernel"], "samples": 5})
        analyze(make_context(tmp_path / name), dataset, {"gelu": models["gelu"]}, parameters)
    first, second = (tmp_path / name / "output" for name in ("first", "second"))
    for file in ("analysis.json", "plots/kernel.png"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert "signal" not in json.loads((first / "analysis.json").read_text())["models"]["gelu"]


def test_every_analysis_has_options_and_a_field_of_the_record() -> None:
    assert tuple(ANALYSES) == NAMES
    short = AnalyzeParameters.model_validate({"analyses": list(NAMES)})
    assert [entry.name for entry in short.analyses] == list(NAMES)


@pytest.mark.parametrize(
    ("analyses", "message"),
    [
        (["spectrum"], "spectrum"),
        ([], "at least 1"),
        (["signal", {"name": "signal"}], "`signal` stands there twice"),
        ([{"name": "kernel", "order": 3}], "order"),
    ],
)
def test_wrong_analyses_are_refused(analyses: list[Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AnalyzeParameters.model_validate({"analyses": analyses})


def test_inputs_that_cannot_fit_are_refused_before_anything_starts(tmp_path: Path) -> None:
    parameters = AnalyzeParameters.model_validate({"analyses": ["kernel"]})
    text = PromisedText(sequence_length=32, tokens=512, tokenizer="bpe")
    upstream: dict[str, Any] = {"dataset": text, "models": {"a": PromisedModel("gpt2", {})}}
    assert promise(parameters, upstream, Resources(), tmp_path) == PromisedAnalysis(("a",), ("kernel",))
    with pytest.raises(UserError, match=r"inputs\.models\.a: a gpt2 cannot take images"):
        promise(parameters, {**upstream, "dataset": PromisedImages(8, 1, 10)}, Resources(), tmp_path)
    with pytest.raises(UserError, match=r"inputs\.models: no models"):
        check(parameters, {"models": {}})


def test_models_that_cannot_be_analysed_are_named_and_if_none_is_left_it_ends(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    broken = load_model(models["gelu"].path)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    save_model(tmp_path / "broken", broken, tokenizer=dataset.path)
    parameters = AnalyzeParameters.model_validate({"analyses": ["kernel"], "samples": 2})
    given = {"nan": Artifact(tmp_path / "broken", "digest", "train")}
    with pytest.raises(UserError, match=r"no model is left to analyse; `nan`: activation .* receives NaN or infinity"):
        analyze(make_context(tmp_path / "run"), dataset, given, parameters)
    save_model(tmp_path / "mlp", build_model("mlp", {"widths": [4]}))
    short = {"vocab_size": 320, "sequence_length": 8, "n_layer": 1, "n_head": 1, "n_embd": 8}
    save_model(tmp_path / "short", build_model("gpt2", short), tokenizer=dataset.path)
    fitting = {**short, "sequence_length": SEQUENCE_LENGTH, "feedforward": "mu"}
    save_model(tmp_path / "products", build_model("gpt2", fitting), tokenizer=dataset.path)
    for label, words in (
        ("products", "the model has no activations to analyse: every block has feedforward: mu"),
        ("mlp", "a mlp cannot take text, and this dataset holds text"),
        ("short", r"the dataset's sequences \(32 tokens\) are longer than the model's context"),
    ):
        given = {label: Artifact(tmp_path / label, "digest", "train")}
        with pytest.raises(UserError, match=f"no model is left to analyse; `{label}`: (`{label}`: )?{words}"):
            analyze(make_context(tmp_path / "run" / label), dataset, given, parameters)
    every = ["signal", "kernel", "merging", "rank", "features", "arithmetic"]
    given = {"products": Artifact(tmp_path / "products", "digest", "train")}
    analyze(make_context(tmp_path / "more"), dataset, given, AnalyzeParameters.model_validate({"analyses": every}))
    found = read_analysis(tmp_path / "more" / "output").models["products"]
    assert found.failure is None
    assert list(found.failures) == ["signal", "kernel", "merging"]  # the others are not of activations
    assert found.rank is not None
    assert len(found.rank.layers) == 6  # two of attention, four of the MLP
    assert found.features is not None
    assert found.arithmetic is not None
