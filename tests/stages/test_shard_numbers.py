"""The shard_numbers stage: functions that are known exactly and files to tar shards; an MLP trains on them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.pipeline.data.description import read_dataset
from polytrope.pipeline.data.evaluation_file import read_evaluation
from polytrope.pipeline.data.misfits import misfit
from polytrope.pipeline.data.promised import PromisedEvaluation, PromisedModel, PromisedNumbers, PromisedText
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, stage_context
from polytrope.pipeline.stages.analyze.analyze import analyze
from polytrope.pipeline.stages.analyze.parameters import AnalyzeParameters
from polytrope.pipeline.stages.convert.convert import convert
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.stages.evaluate.evaluate import evaluate
from polytrope.pipeline.stages.evaluate.evaluate import promise as evaluate_promise
from polytrope.pipeline.stages.evaluate.measure_speed import measure_speed
from polytrope.pipeline.stages.evaluate.parameters import EvaluateParameters, MeasureSpeedParameters
from polytrope.pipeline.stages.report.parameters import ReportParameters
from polytrope.pipeline.stages.report.report import report
from polytrope.pipeline.stages.select import SelectParameters
from polytrope.pipeline.stages.select import promise as select_promise
from polytrope.pipeline.stages.shard.numbers import (
    FileSource,
    HierarchicalSource,
    Table,
    directions_of,
    hierarchical,
    make_rows,
    normalised_hermite,
    split_rows,
)
from polytrope.pipeline.stages.shard.parameters import ShardNumbersParameters
from polytrope.pipeline.stages.shard.shard_numbers import fingerprint, promise, shard_numbers
from polytrope.pipeline.stages.train.parameters import TrainParameters
from polytrope.pipeline.stages.train.train import promise as train_promise

HIERARCHICAL = {
    "kind": "hierarchical", "rows": 600, "dimension": 4, "inner": {"degree": 2, "rank": 2}, "outer": [0, 0, 0, 1],
}  # fmt: skip


def run_stage(directory: Path, source: Mapping[str, Any], workers: int = 1, **parameters: Any) -> Path:
    """Run the stage as the engine does; returns its output."""
    context = stage_context(directory, stage="numbers", resources=Resources(workers=workers))
    shard_numbers(context, ShardNumbersParameters.model_validate({"source": source, **parameters}))
    return context.output


def rows_of(dataset: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    reader = open_split(dataset, split)
    return reader.numbers(np.arange(len(reader)))


@pytest.fixture(scope="module")
def polynomials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stage(tmp_path_factory.mktemp("polynomials"), {**HIERARCHICAL, "noise": 0.1})


def test_rows_are_the_same_bits_whatever_the_shards(polynomials: Path, tmp_path: Path) -> None:
    again = run_stage(tmp_path, {**HIERARCHICAL, "noise": 0.1}, workers=2, shard_rows=97)
    assert len(list((again / "train").glob("*.tar"))) == 5
    for split in ("train", "validation"):
        for ours, theirs in zip(rows_of(polynomials, split), rows_of(again, split), strict=True):
            assert ours.dtype == np.float32
            assert hashlib.sha256(ours.tobytes()).digest() == hashlib.sha256(theirs.tobytes()).digest()
    assert sum(len(rows_of(again, split)[0]) for split in ("train", "validation")) == 600
    source = HierarchicalSource.model_validate(HIERARCHICAL)
    # row 17 is drawn from Philox at (0, 0, 0, 17), alone
    drawn = np.random.Generator(np.random.Philox(key=0, counter=[0, 0, 0, 17])).standard_normal(4)
    assert np.array_equal(make_rows(source, np.array([17])).inputs[0], drawn.astype(np.float32))


def test_webdataset_reads_the_shards(polynomials: Path) -> None:
    import webdataset

    inputs, targets = rows_of(polynomials, "validation")
    path = str(polynomials / "validation/shard-000000.tar")
    read = list(webdataset.WebDataset(path, shardshuffle=False).decode())
    assert np.array_equal([sample["inputs.npy"] for sample in read], inputs)
    assert np.array_equal([sample["targets.npy"] for sample in read], targets)


def test_the_polynomial_has_its_moments_and_nothing_above_its_degree() -> None:
    source = HierarchicalSource.model_validate({**HIERARCHICAL, "dimension": 2})
    directions, weights = directions_of(source)
    np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=1e-15)
    assert np.square(weights).sum() == pytest.approx(1.0, abs=1e-15)
    # Gauss-Hermite: exact for polynomials of degree < 40 of normal x, so for products with y of degree 6
    points, mass = np.polynomial.hermite_e.hermegauss(20)
    mass = mass / math.sqrt(2 * math.pi)
    grid = np.array(list(itertools.product(points, points)))
    products = np.array([one * other for one, other in itertools.product(mass, mass)])
    inner = source.model_copy(update={"outer": [0.0, 1.0]})
    p = hierarchical(inner, grid)
    assert (products * p).sum() == pytest.approx(0.0, abs=1e-13)
    assert (products * p * p).sum() == pytest.approx(1.0, abs=1e-12)
    y = hierarchical(source, grid)
    np.testing.assert_allclose(y, (p**3 - 3 * p) / math.sqrt(6), rtol=1e-12, atol=1e-9)
    first, second = (normalised_hermite(10, grid[:, axis]) for axis in (0, 1))
    sizes = dict.fromkeys(range(11), 0.0)
    for j, k in itertools.product(range(11), repeat=2):
        if j + k <= 10:
            sizes[j + k] = max(sizes[j + k], abs(float((products * y * first[j] * second[k]).sum())))
    assert sizes[6] > 0.1
    assert max(sizes[degree] for degree in range(7, 11)) < 1e-10
    assert max(sizes[degree] for degree in (1, 3, 5)) < 1e-10  # of even inner degree: an even function


def test_modular_has_all_pairs_once(tmp_path: Path) -> None:
    dataset = run_stage(tmp_path, {"kind": "modular", "modulus": 11}, shard_rows=50)
    parts = [rows_of(dataset, split) for split in ("train", "validation")]
    inputs, classes = (np.concatenate([part[index] for part in parts]) for index in (0, 1))
    assert inputs.shape == (121, 22)
    assert np.array_equal(inputs.reshape(121, 2, 11).sum(axis=2), np.ones((121, 2)))
    first, second = inputs[:, :11].argmax(1), inputs[:, 11:].argmax(1)
    assert len({*zip(first.tolist(), second.tolist(), strict=True)}) == 121
    assert classes.dtype == np.int64
    assert np.array_equal(classes, (first + second) % 11)
    assert 10 < len(parts[1][0]) < 40


def test_circle_is_a_sum_of_waves(tmp_path: Path) -> None:
    dataset = run_stage(
        tmp_path, {"kind": "circle", "rows": 200, "amplitudes": [1.0, 0.0, 0.5], "phases": [0.0, 0.0, 0.25]}
    )
    inputs, targets = rows_of(dataset, "train")
    angles = np.arctan2(inputs[:, 1].astype(float), inputs[:, 0].astype(float))
    np.testing.assert_allclose(targets[:, 0], np.cos(angles) + 0.5 * np.cos(3 * angles + 0.25), atol=1e-6)
    np.testing.assert_allclose(np.square(inputs).sum(1), 1.0, atol=1e-6)


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "circle", "rows": 50, "amplitudes": [1e40]},
        {**HIERARCHICAL, "inner": {"rank": 1, "degree": 32}, "outer": [0] * 32 + [1e300]},
    ],
)
def test_a_number_that_float32_does_not_hold_is_refused(source: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source: y of row \d+ is .*, which float32 does not hold"):
        run_stage(tmp_path, source)


def test_rows_that_differ_in_the_sign_of_zero_are_equal() -> None:
    inputs = np.array([[number, zero] for number in range(32) for zero in (0.0, -0.0)], dtype=np.float32)
    source = FileSource(kind="file", path="rows.npz")
    chosen = set(split_rows(source, Table(inputs, inputs), 0.5)["validation"].tolist())
    assert 0 < len(chosen) < 64
    assert all((row in chosen) == (row + 1 in chosen) for row in range(0, 64, 2))


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    inputs, targets = generator.normal(size=(40, 3)), generator.normal(size=(40, 2))
    inputs[39] = inputs[0]
    np.savez(tmp_path / "rows.npz", inputs=inputs, targets=targets, labels=np.arange(40) % 4)
    table = np.column_stack([inputs[:, 0], np.arange(40) % 3])
    np.savetxt(tmp_path / "rows.csv", table, delimiter=",", header="x,label", comments="")

    dataset = run_stage(tmp_path / "a", {"kind": "file", "path": "rows.npz"})
    found = [rows_of(dataset, split) for split in ("train", "validation")]
    assert sorted(np.concatenate([x for x, _ in found]).tolist()) == sorted(inputs.astype(np.float32).tolist())
    places = [np.flatnonzero((x == inputs[0].astype(np.float32)).all(1)) for x, _ in found]
    assert sorted(len(place) for place in places) == [0, 2]  # equal rows are in one split
    assert read_dataset(dataset).model_dump(include={"inputs", "targets", "classes"}) == {
        "inputs": 3, "targets": 2, "classes": None,
    }  # fmt: skip
    dataset = run_stage(
        tmp_path / "b", {"kind": "file", "path": "rows.csv", "inputs": ["x"], "targets": ["label"], "classes": 3}
    )
    assert set(rows_of(dataset, "train")[1].tolist()) == {0, 1, 2}

    parameters = ShardNumbersParameters.model_validate({"source": {"kind": "file", "path": "rows.npz"}})
    before = fingerprint(parameters, tmp_path)
    np.savez(tmp_path / "rows.npz", inputs=inputs, targets=targets + 1, labels=np.arange(40) % 4)
    assert fingerprint(parameters, tmp_path) != before

    (tmp_path / "bad.csv").write_text("x,y\n1,2\n3,none\n")
    (tmp_path / "commas.csv").write_text("x,y\n1,2,\n1,5,2,7\n")  # 1.5 and 2.7, as half of Europe writes them
    np.savez(tmp_path / "nan.npz", inputs=[[1.0], [np.nan]], targets=[1.0, 2.0])
    np.savez(tmp_path / "short.npz", inputs=np.zeros((3, 1)), targets=np.zeros(2))
    (tmp_path / "text.npz").write_text("no zip")
    for number, (source, expected) in enumerate(
        [
            ({"path": "rows.npz", "targets": ["y"]}, "source.targets: .* has no `y`"),
            ({"path": "rows.npz", "targets": ["labels"], "classes": 3}, "row 3 of .* has the class 3"),
            ({"path": "bad.csv", "inputs": ["x"], "targets": ["y"]}, "line 3, `y`: 'none' is no number"),
            ({"path": "commas.csv", "inputs": ["x"], "targets": ["y"]}, "line 3 has 4 values for 2 columns"),
            ({"path": "nan.npz"}, "source.inputs: row 1 of .* float32 does not hold"),
            ({"path": "short.npz"}, "different numbers of rows .* inputs 3, targets 2"),
            ({"path": "text.npz"}, "source.path: .* cannot be read"),
            ({"path": "absent.npz"}, "source.path: .* cannot be read"),
        ]
    ):
        with pytest.raises(UserError, match=expected):
            run_stage(tmp_path / f"refused{number}", {"kind": "file", **source})


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ({**HIERARCHICAL, "inner": {"rank": 5}}, "inner.rank: 5"),
        ({**HIERARCHICAL, "outer": [0, 0]}, "outer: "),
        ({"kind": "circle", "rows": 5, "amplitudes": [1.0], "phases": [0.0, 1.0]}, "phases: 2 for 1"),
    ],
)
def test_impossible_sources(source: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ShardNumbersParameters.model_validate({"source": source})


def test_relations_between_stages_are_checked_before_anything_starts(tmp_path: Path) -> None:
    def data_of(source: Mapping[str, Any]) -> PromisedNumbers:
        return promise(ShardNumbersParameters.model_validate({"source": source}), {}, Resources(), tmp_path)

    numbers, pairs = data_of(HIERARCHICAL), data_of({"kind": "modular", "modulus": 7})
    assert numbers == PromisedNumbers(4, 1, None)
    assert pairs == PromisedNumbers(14, None, 7)
    assert data_of({"kind": "file", "path": "a.npz", "classes": 3}) == PromisedNumbers(None, None, 3)
    assert data_of({"kind": "file", "path": "a.csv", "inputs": ["a", "b"]}) == PromisedNumbers(2, 1, None)

    def trained(data: Any, model: Mapping[str, Any], **more: Any) -> PromisedModel:
        parameters = TrainParameters.model_validate({"model": {"architecture": "mlp", **model}, "steps": 1, **more})
        found = train_promise(parameters, {"dataset": data, "initial": None}, Resources(), tmp_path)
        assert found is not None
        return found

    model = trained(numbers, {})
    built = {"activation": "gelu", "factors": {}}  # promised where nothing is said of it
    assert model.settings == {"inputs": 4, "outputs": 1, "loss": "mse", **built}
    assert "val/accuracy" not in model.figures
    classifier = trained(pairs, {})
    assert classifier.settings == {"inputs": 14, "outputs": 7, "loss": "cross_entropy", **built}
    assert "val/accuracy" in classifier.figures
    assert misfit(model, numbers) is None
    for data, settings, more, expected in (
        (PromisedText(8, 257, "bytes"), {}, {}, r"model\.architecture: .* cannot take text"),
        (numbers, {"inputs": 5}, {}, r"model\.inputs: the dataset's rows have 4 numbers, the model takes 5"),
        (numbers, {"outputs": 2}, {}, r"model\.outputs: the dataset has 1 numbers to predict, the model 2 outputs"),
        (numbers, {"loss": "cross_entropy"}, {}, r"model\.loss: the dataset has numbers to predict"),
        (pairs, {"loss": "mse"}, {}, r"model\.loss: the dataset has classes"),
        (pairs, {"outputs": 6}, {}, r"model\.outputs: the dataset has 7 classes, the model 6 outputs"),
        (numbers, {}, {"loss": {"name": "poly"}}, "^loss: poly is for classes"),
        (numbers, {}, {"augmentation": {"mixup": 0.1}}, "^augmentation: `mixup`: for images"),
        (numbers, {}, {"activation_checkpointing": "mlp"}, "^activation_checkpointing: mlp"),
    ):
        with pytest.raises(UserError, match=expected):
            trained(data, settings, **more)
    with pytest.raises(ValueError, match=r"trainable: norms: the model has none \(norm: none\)"):
        trained(numbers, {}, trainable=["norms"])
    assert trained(pairs, {"outputs": 8}, loss={"name": "poly"}).settings["outputs"] == 8

    def evaluated(data: Any, model: PromisedModel, **parameters: Any) -> PromisedEvaluation:
        upstream = {"dataset": data, "models": {"a": model, "b": model}}
        return evaluate_promise(EvaluateParameters.model_validate(parameters), upstream, Resources(), tmp_path)

    with pytest.raises(UserError, match=r"^inputs\.models\.a: the dataset's rows have 14 numbers"):
        evaluated(pairs, model)
    with pytest.raises(UserError, match=r"^drift: "):
        evaluated(numbers, model, drift={"a": "b"})
    with pytest.raises(UserError, match=r"^stride: for text, and this dataset holds numbers"):
        evaluated(numbers, model, stride=4)
    for data, own, metric, there in (
        (numbers, model, "r2", True),
        (numbers, model, "top1", False),
        (pairs, classifier, "top1", True),
        (pairs, classifier, "r2", False),
        (pairs, classifier, "perplexity", False),
    ):
        parameters = SelectParameters.model_validate({"metric": metric, "mode": "max"})
        upstream = {"evaluation": evaluated(data, own), "models": {"a": own, "b": own}}
        if there:
            assert select_promise(parameters, upstream, Resources(), tmp_path) == own
        else:
            with pytest.raises(UserError, match=f"^metric: an evaluation on numbers has no figure `{metric}`"):
                select_promise(parameters, upstream, Resources(), tmp_path)


def test_a_classifier_of_numbers_is_a_model_as_any_other(tmp_path: Path) -> None:
    pairs = Artifact(run_stage(tmp_path / "pairs", {"kind": "modular", "modulus": 9}), "digest", "pairs")
    torch.manual_seed(0)
    sizes = {"inputs": 18, "outputs": 9, "widths": [32, 32], "loss": "cross_entropy"}
    save_model(tmp_path / "model", build_model("mlp", {**sizes, "activation": "gelu"}))
    model = Artifact(tmp_path / "model", "digest", "train")

    def context(name: str) -> Any:
        return stage_context(tmp_path / name, stage=name, resources=Resources())

    speed = context("speed")
    measure_speed(speed, pairs, {"a": model}, MeasureSpeedParameters(rounds=1, steps=1, batch_size=4))
    protocol = json.loads((speed.output / "speed.json").read_text())["protocol"]
    assert (protocol["unit"], protocol["units"]) == ("rows", 4)

    converting = context("convert")
    convert(converting, model, pairs, ConvertParameters(family="hermite", degree=6))
    converted = Artifact(converting.output, "other", "convert")

    scoring = context("scores")
    both = {"a": model, "b": converted}
    evaluate(scoring, pairs, both, EvaluateParameters(drift={"b": "a"}, activation_samples=8))
    figures = read_evaluation(scoring.output).models
    rows, classes = rows_of(pairs.path, "validation")
    with torch.no_grad():
        logits = load_model(model.path)(torch.from_numpy(rows))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(classes))
    assert figures["a"].loss == pytest.approx(float(loss), rel=1e-5)
    assert figures["a"].top1 == pytest.approx(float((logits.argmax(1).numpy() == classes).mean()))
    assert (figures["a"].rows, figures["a"].r2) == (len(rows), None)
    assert np.sum(figures["a"].confusion) == len(rows)
    drift = figures["b"].drift
    assert drift is not None
    assert drift.kl_divergence < 1e-3
    assert drift.cosine is not None
    assert min(drift.cosine) > 0.999

    save_model(tmp_path / "other", build_model("mlp", {**sizes, "loss": "mse"}))
    mixed = {"a": model, "c": Artifact(tmp_path / "other", "digest", "train")}
    mixing = context("mixed")
    evaluate(mixing, pairs, mixed, EvaluateParameters())
    assert "the model's loss is mse" in str(read_evaluation(mixing.output).models["c"].failure)

    analysing = context("analysis")
    analyze(analysing, pairs, both, AnalyzeParameters(analyses=["signal", "kernel"]))
    layers = json.loads((analysing.output / "analysis.json").read_text())["models"]["b"]["signal"]["layers"]
    assert len(layers) == 2

    page = context("page")
    report(page, Artifact(scoring.output, "digest", "scores"), both, ReportParameters(), dataset=pairs)
    assert "nats per row" in (page.output / "report.html").read_text()


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "circle", "amplitudes": [1.0]},
        {"kind": "hierarchical", "dimension": 2, "inner": {"rank": 1}, "outer": [1]},
    ],
    ids=str,
)
def test_one_row_cannot_be_two_splits(source: dict[str, Any]) -> None:
    ShardNumbersParameters.model_validate({"source": {**source, "rows": 2}})
    with pytest.raises(ValidationError, match=r"rows\n.*greater than or equal to 2"):
        ShardNumbersParameters.model_validate({"source": {**source, "rows": 1}})
