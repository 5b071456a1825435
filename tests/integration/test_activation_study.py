"""The activation study in a tiny variant: both models, and a family that diverges is a result, not the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polytrope.pipeline.runs.journal import fold, read
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.spec import load_workflow

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
WORKFLOW = Path(__file__).parents[2] / "workflows" / "activation-study.yaml"
TINY = {
    "activations": "[gelu,silu,hermite3]",
    "seeds": "[0,1]",
    "text": "{kind: python, max_bytes: 200000}",
    "vocab_size": "300",
    "sequence_length": "32",
    "n_layer": "1",
    "n_head": "2",
    "n_embd": "16",
    "steps": "8",
    "image_steps": "8",
    "warmup_steps": "2",
    "samples": "16",
    "dims": "[4,8]",
    "coefficient_learning_rate": "1e30",  # hermite must diverge; the others have no coefficients
}

pytestmark = pytest.mark.timeout(300)


def test_sixty_trainings_and_every_ablation_are_a_valid_graph() -> None:
    ablations = ["params.init=gelu", "params.interval=[-3,3]", "params.per_channel=true"]
    for overrides in ([], ablations, ["params.init=torchortho", "params.gpus=1", "params.precision=bf16"]):
        graph = build_graph(load_workflow(WORKFLOW, overrides))
        assert sum(node.definition.uses == "train" for node in graph.values()) == 60


def test_a_tiny_study_ends_with_both_reports_and_its_failures(tmp_path: Path) -> None:
    settings = [f"--set=params.{name}={value}" for name, value in TINY.items()]
    command = [
        POLYTROPE,
        "run",
        str(WORKFLOW),
        "--store",
        str(tmp_path / "store"),
        "--no-tracking",
        "--quiet",
        *settings,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    store = Store(tmp_path / "store")
    (run,) = store.run_directories()
    stages = fold(read(run)).stages
    for model in ("gpt", "convnext"):
        artifact = store.load(stages[f"report_{model}"].key or "")
        assert artifact is not None
        figures = json.loads((store.materialize(artifact.key) / "report.json").read_text())
        groups = {group["group"]: group for group in figures["groups"]}
        assert set(groups) == {"gelu", "silu", "hermite3"}
        assert [groups[name]["count"] for name in ("gelu", "silu", "hermite3")] == [2, 2, 0]
        assert groups["hermite3"]["failed"] == 2
        assert {failure["label"] for failure in figures["failures"]} == {
            f"{model}[activation=hermite3,seed={seed}]" for seed in (0, 1)
        }
        assert groups["silu"]["difference"]["pairs"] == 2
        assert groups["gelu"]["loss"]["half_width"] > 0
        assert groups["gelu"]["speed"]["step_milliseconds"] > 0
        assert groups["gelu"]["speed"]["bytes_kept_for_backward"] > 0
        plots = {path.stem for path in (store.materialize(artifact.key) / "plots").iterdir()}
        assert {"groups", "losses", "gradients", "moments", "shapes"} <= plots
        assert "diverged at step" in (store.materialize(artifact.key) / "report.html").read_text()


@pytest.mark.chaos
def test_every_ablation_trains_and_changes_what_it_should(tmp_path: Path) -> None:
    """Four steps on the digits: the losses of the learnable activations differ from those without the flag."""
    settings = {**TINY, "activations": "[gelu,hermite3,fourier5,rational,chebyshev]", "seeds": "[0]", "dims": "[4]"}
    settings |= {"depths": "[1]", "image_steps": "4", "coefficient_learning_rate": "null"}
    without_text = [f"stages.{name}gpt.when=false" for name in ("", "evaluate_", "speed_", "report_")]
    store = Store(tmp_path / "store")

    def losses(name: str, *flags: str) -> dict[str, float]:
        command = [POLYTROPE, "run", str(WORKFLOW), "--store", store.address, "--no-tracking", "--quiet"]
        overrides = [*(f"params.{key}={value}" for key, value in settings.items()), *without_text, *flags]
        command += [f"--set={override}" for override in overrides]
        done = subprocess.run(
            [*command, f"--run-id={name}"], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found = {}
        for label, stage in fold(read(store.run_directory(name))).stages.items():
            if label.startswith("convnext"):
                artifact = store.load(stage.key or "")
                assert artifact is not None
                history = json.loads((store.materialize(artifact.key) / "history.json").read_text())
                found[label.split("=")[1].split(",")[0]] = history[-1]["val/loss"]
        return found

    plain = losses("plain")
    learnable = {"hermite3", "fourier5", "rational", "chebyshev"}
    for number, (flag, changed) in enumerate(
        {
            "init=torchortho": {"hermite3", "fourier5"},  # the published ones
            "init=gelu": learnable,
            "interval=[-0.5,0.5]": learnable,
            "per_channel=true": learnable,
            "coefficient_learning_rate=3e-1": learnable,
        }.items()
    ):
        other = losses(f"ablation-{number}", f"params.{flag}")
        assert {name for name in plain if plain[name] != other[name]} >= changed, flag
        assert plain["gelu"] == other["gelu"], flag
