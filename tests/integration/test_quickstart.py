"""The quickstart as a user runs it, only smaller: both executors, what the store and MLflow hold, the second run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from quickstart_support import Run, run_quickstart

from polytrope.pipeline.commands.cli import main

LABELS = ("baseline", "hermite", "converted", "finetuned", "control")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_quickstart(tmp_path_factory.mktemp("ray") / "store", "ray")


def test_every_trained_model_beats_the_unigram_entropy_and_fine_tuning_does_not_hurt(local_quickstart: Run) -> None:
    evaluation = local_quickstart.read("evaluate", "evaluation.json")
    losses = {label: result["loss"] for label, result in evaluation["models"].items()}
    assert tuple(losses) == LABELS
    for label in LABELS:
        assert losses[label] < evaluation["unigram_entropy"] - 0.3, label  # measured: 0.58 below
    assert losses["finetuned"] <= losses["converted"]
    assert evaluation["models"]["converted"]["drift"]["kl_divergence"] < 0.05


def test_both_executors_commit_the_same_bytes(local_quickstart: Run, ray: Run) -> None:
    assert ray.state.executor == "ray"
    assert local_quickstart.state.executor == "local"
    for stage in ("shard", "baseline", "hermite", "convert", "finetune", "evaluate", "report"):
        assert local_quickstart.state.stages[stage].digest == ray.state.stages[stage].digest, stage


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_the_logs_show_every_training_from_its_start_to_its_last_step(
    executor: str, local_quickstart: Run, ray: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"local": local_quickstart, "ray": ray}[executor]
    assert main(["logs", "--store", run.store.address, run.state.run_id]) == 0
    parts = capsys.readouterr().out.split("==> ")[1:]
    logs = dict(part.split(" <==\n") for part in parts)
    assert set(logs) == set(run.state.stages)
    for stage, steps in (("baseline", 200), ("hermite", 200), ("finetune", 20), ("finetune_baseline", 20)):
        lines = logs[stage].splitlines()
        assert lines[0].endswith(f"0/{steps} · starting 2 workers")
        assert re.search(rf"{steps}/{steps} · loss \d\.\d+ · [\d.]+k tokens/s$", lines[-1]), stage


def test_mlflow_holds_the_parent_and_all_children_with_the_figures_of_the_report(ray: Run, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{ray.store.address}/mlflow.db")
    experiment = client.get_experiment_by_name("quickstart")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["polytrope.stage"]: run for run in runs if run not in parents}
    assert len(parents) == 1
    assert set(children) == set(ray.state.stages)
    assert {run.info.status for run in runs} == {"FINISHED"}

    figures = ray.read("report", "report.json")
    for row in figures["table"]:
        for key, name in (("loss", "val_loss"), ("perplexity", "perplexity"), ("bits_per_byte", "bits_per_byte")):
            assert children["evaluate"].data.metrics[f"{row['label']}/{name}"] == row[key]
            assert parents[0].data.metrics[f"report/{row['label']}/{name}"] == row[key]
    shown = {item.path for item in client.list_artifacts(parents[0].info.run_id)}
    assert {"report.html", "report.json", "plots"} <= shown
    copy = Path(client.download_artifacts(parents[0].info.run_id, "report.json", str(tmp_path)))
    assert json.loads(copy.read_text()) == figures
    curve = client.get_metric_history(children["baseline"].info.run_id, "val/loss")
    history = [entry for entry in ray.read("baseline", "history.json") if "val/loss" in entry]
    assert history[-1]["val/loss"] in {point.value for point in curve}


def test_the_page_shows_what_the_evaluation_measured(local_quickstart: Run) -> None:
    page = (local_quickstart.artifact("report") / "report.html").read_text()
    for result in local_quickstart.read("evaluate", "evaluation.json")["models"].values():
        assert f"{result['loss']:.4f}" in page
    assert (local_quickstart.artifact("report") / "plots" / "conversion.png").stat().st_size > 10_000


def test_a_second_run_finds_everything_done(local_quickstart: Run) -> None:
    again = run_quickstart(Path(local_quickstart.store.address), "local")
    assert {stage.state for stage in again.state.stages.values()} == {"cached"}
    for name, stage in again.state.stages.items():
        assert stage.digest == local_quickstart.state.stages[name].digest
