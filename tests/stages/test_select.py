"""`select`: the best model of a fan-in, itself, with the reason beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polytrope import Workflow, run
from polytrope.pipeline.data.evaluation_file import EVALUATION_FILE
from polytrope.pipeline.data.promised import PromisedEvaluation, PromisedModel, PromisedSpeed
from polytrope.pipeline.data.training_file import figure_names
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.launch.interface import RunResult
from polytrope.pipeline.stage import (
    RETURNED_STAGES,
    UNPROMISED,
    Artifact,
    Resources,
    StageContext,
    load_stage,
    stage_context,
)
from polytrope.pipeline.stages.select import SELECTION_FILE, SelectParameters, check, promise, read_selection

STAGE = load_stage("select")


def model(directory: Path, name: str, **training: Any) -> Artifact:
    path = directory / name
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_text(f"weights of {name}")
    (path / "inner" / "vocabulary").write_text(name)
    (path / RETURNED_STAGES).write_text("{}")
    if training:
        content = {"format": 1, "architecture": "gpt2", "parameters": 7, "steps": 3, **training}
        (path / "training.json").write_text(json.dumps(content))
    return Artifact(path, f"digest of {name}", f"train[{name}]")


def evaluation(directory: Path, **models: dict[str, Any]) -> Artifact:
    directory.mkdir()
    content = {
        "format": 1,
        "kind": "images",
        "dataset": {"name": "digits", "digest": "0", "splits": {}},
        "unigram_entropy": None,
        "protocol": {"samples": 3, "stride": None, "precision": "fp32"},
        "models": {name: {"stage": name, "digest": f"digest of {name}", **figures} for name, figures in models.items()},
    }
    (directory / EVALUATION_FILE).write_text(json.dumps(content))
    return Artifact(directory, "evaluation", "evaluate")


def choose(
    directory: Path, models: dict[str, Artifact], metric: str, mode: str, evaluated: Artifact | None = None
) -> tuple[StageContext, dict[str, float]]:
    context = stage_context(directory)
    parameters = SelectParameters.model_validate({"metric": metric, "mode": mode})
    return context, STAGE.call(context, parameters, {"models": models, "evaluation": evaluated})


def files(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_the_best_training_is_the_artifact_and_what_was_left_out_is_said(tmp_path: Path) -> None:
    models = {
        "a": model(tmp_path, "a", **{"val/loss": 2.0}),
        "b": model(tmp_path, "b", **{"val/loss": 1.5}),
        "c": model(tmp_path, "c", **{"val/loss": 1.5}),  # of equal ones, the first
        "d": model(tmp_path, "d", **{"val/loss": None}),  # it was not finite
        "e": model(tmp_path, "e", failure="diverged at step 2"),
    }
    context, summary = choose(tmp_path / "stage", models, "val/loss", "min")
    assert summary == {"val/loss": 1.5, "compared": 3.0, "left_out": 2.0}
    chosen = files(context.output)
    selection = json.loads(chosen.pop(SELECTION_FILE))
    expected = files(models["b"].path)
    expected.pop(RETURNED_STAGES)  # `select` is followed by no stages
    assert chosen == expected
    assert [selection[name] for name in ("chosen", "metric", "mode", "source")] == [
        "b", "val/loss", "min", "training.json",
    ]  # fmt: skip
    assert selection["candidates"] == {
        "a": {"stage": "train[a]", "digest": "digest of a", "value": 2.0},
        "b": {"stage": "train[b]", "digest": "digest of b", "value": 1.5},
        "c": {"stage": "train[c]", "digest": "digest of c", "value": 1.5},
        "d": {"stage": "train[d]", "digest": "digest of d", "left_out": "val/loss is not finite"},
        "e": {"stage": "train[e]", "digest": "digest of e", "left_out": "diverged at step 2"},
    }
    assert choose(tmp_path / "largest", models, "val/loss", "max")[1]["val/loss"] == 2.0

    again = {"first": Artifact(context.output, "digest of first", "best"), "a": models["a"]}
    second, _ = choose(tmp_path / "second", again, "val/loss", "min")
    found = read_selection(second.output)
    assert found.chosen == "first"
    assert found.earlier == read_selection(context.output)


def test_an_evaluation_decides_by_the_digest_of_each_model(tmp_path: Path) -> None:
    models = {name: model(tmp_path, name) for name in ("x", "y", "z")}
    figures = evaluation(tmp_path / "e", z={"top1": 0.9}, y={"failure": "no weights"}, x={"top1": 0.7})
    context, summary = choose(tmp_path / "stage", models, "top1", "max", figures)
    assert (context.output / "weights").read_text() == "weights of z"
    assert summary == {"top1": 0.9, "compared": 2.0, "left_out": 1.0}
    with pytest.raises(UserError, match=r"no model is left to choose from; `y`: no weights"):
        choose(tmp_path / "none", {"y": models["y"]}, "top1", "max", figures)
    with pytest.raises(UserError, match=r"`new` \(stage `train\[new\]`\) is not in the evaluation, which has `z`"):
        choose(tmp_path / "new", {"new": model(tmp_path, "new")}, "top1", "max", figures)
    with pytest.raises(UserError, match="`x` has no figure `loss`"):
        choose(tmp_path / "loss", models, "loss", "min", figures)


def test_what_has_no_figures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`a`: .*training.json has no figure `val/los`\n.*did you mean `val/loss`"):
        choose(tmp_path / "1", {"a": model(tmp_path, "a", **{"val/loss": 2.0})}, "val/los", "min")
    with pytest.raises(UserError, match=r"`b` .* was not trained here.*\n.*evaluation: EVALUATE_STAGE"):
        choose(tmp_path / "2", {"b": model(tmp_path, "b")}, "val/loss", "min")
    parameters = SelectParameters(metric="val/loss", mode="min")
    with pytest.raises(UserError, match="no models"):
        check(parameters, {"models": {}})
    with pytest.raises(UserError, match=r"an evaluation has no figure `val/loss`\n.*did you mean `loss`"):
        check(parameters, {"models": {"a": None}, "evaluation": object()})


def test_it_promises_what_all_its_models_promise() -> None:
    small, large = (PromisedModel("gpt2", {"n_layer": layers}) for layers in (1, 2))
    parameters = SelectParameters(metric="loss", mode="min")
    for models, expected in (({"a": small, "b": small}, small), ({"a": small, "b": large}, None), ({"a": None}, None)):
        assert promise(parameters, {"models": models, "evaluation": UNPROMISED}, Resources(), Path()) == expected
    with pytest.raises(UserError, match=r"inputs\.models\.a: this input takes a model"):
        promise(parameters, {"models": {"a": PromisedSpeed(("a",))}, "evaluation": None}, Resources(), Path())
    with pytest.raises(UserError, match=r"inputs\.evaluation: this input takes an evaluation"):
        promise(parameters, {"models": {"a": small}, "evaluation": small}, Resources(), Path())


def test_a_figure_that_no_model_will_have_is_refused_before_anything_starts() -> None:
    trained, converted = PromisedModel("gpt2", {}, figures=figure_names("text")), PromisedModel("gpt2", {})
    images, text = PromisedEvaluation(("a",), "images"), PromisedEvaluation(("a",), "text")

    def promised(metric: str, model: Any, evaluation: Any = None) -> Any:
        parameters = SelectParameters.model_validate({"metric": metric, "mode": "min"})
        return promise(parameters, {"models": {"a": model}, "evaluation": evaluation}, Resources(), Path())

    for metric, model, evaluation in (
        ("val/loss", trained, None),
        ("tokens", trained, None),
        ("my_figure", UNPROMISED, None),  # a stage of one's own
        ("loss", UNPROMISED, None),
        ("top1", converted, images),
        ("perplexity", converted, text),
        ("top1", converted, UNPROMISED),  # an evaluation of one's own
    ):
        assert promised(metric, model, evaluation) == (None if model is UNPROMISED else model)
    with pytest.raises(UserError, match=r"^metric: the training of `a` .* `val/los`\n.*did you mean `val/loss`"):
        promised("val/los", trained)
    with pytest.raises(UserError, match=r"^metric: the training of `a` .* no figure `val/accuracy`"):
        promised("val/accuracy", trained)
    with pytest.raises(UserError, match=r"no figure `loss`\n.*did you mean `val/loss`\?; evaluate the models first"):
        promised("loss", trained)
    with pytest.raises(UserError, match=r"^inputs\.models\.a: .* not trained here"):
        promised("top1", converted)
    with pytest.raises(UserError, match=r"^inputs\.models\.a: .* not trained here.*\n.*evaluation: EVALUATE_STAGE"):
        promised("val/loss", converted)
    with pytest.raises(UserError, match=r"^metric: an evaluation on images has no figure `perplexity`"):
        promised("perplexity", converted, images)


STAGES = """
import json
from polytrope.pipeline.stage import Artifact, StageContext

def train(context: StageContext, loss: float) -> None:
    (context.output / "inner").mkdir()
    (context.output / "inner" / "weights").write_text(str(loss))
    training = {"format": 1, "architecture": "gpt2", "parameters": 1, "steps": 1, "val/loss": loss}
    (context.output / "training.json").write_text(json.dumps(training))

def use(context: StageContext, model: Artifact) -> dict[str, float]:
    return {"weights": float((model.path / "inner" / "weights").read_text())}
"""


def test_in_a_run_the_choice_is_stored_and_made_again_when_a_branch_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "select_test_stages.py").write_text(STAGES)
    monkeypatch.syspath_prepend(tmp_path)
    matrix: dict[str, Any] = {"loss": [3.0, 2.0, 4.0], "exclude": [{"loss": 4.0}]}
    stages = {
        "train": {"uses": "select_test_stages:train", "matrix": matrix, "with": {"loss": "${matrix.loss}"}},
        "best": {"uses": "select", "inputs": {"models": "train"}, "with": {"metric": "val/loss", "mode": "min"}},
        "use": {"uses": "select_test_stages:use", "inputs": {"model": "best"}},
    }

    def start() -> RunResult:
        workflow = Workflow.from_dict({"name": "choice", "executor": "local", "stages": stages}, directory=tmp_path)
        return run(workflow, store=tmp_path / "store", tracking=False)

    first = start()
    assert {name: stage.state for name, stage in first.stages.items()} == dict.fromkeys(
        ["train[loss=3.0]", "train[loss=2.0]", "best", "use"], "succeeded"
    )
    assert first.stages["use"].metrics == {"weights": 2.0}
    matrix["include"] = [{"loss": 1.0}]
    second = start()
    assert second.stages["use"].metrics == {"weights": 1.0}
    assert [second.stages[name].state for name in ("train[loss=2.0]", "train[loss=1.0]", "best")] == [
        "cached",
        "succeeded",
        "succeeded",
    ]
