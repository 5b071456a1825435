"""`python -m benchmarks.gpu_train` rehearsed on the CPU, in an environment like that of a bare GPU machine.

There polytrope is not installed, and what it only needs elsewhere (Ray, MLflow, datasets, object stores) is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_train
from polytrope.pipeline.commands.cli import main

ROOT = Path(__file__).resolve().parent.parent
MISSING = (
    "polytrope",
    "_polytrope",
    "__editable__",
    "ray",
    "mlflow",
    "datasets",
    "obstore",
    "boto3",
    "moto",
    "aa_",
    "zz_",
)


def bare_python(directory: Path) -> Path:
    """An interpreter with this one's packages, without those in `MISSING`."""
    venv.create(directory, with_pip=False)
    packages = next((directory / "lib").glob("python3*/site-packages"))
    for path in Path(torch.__file__).parents[1].iterdir():
        if not path.name.startswith(MISSING):
            (packages / path.name).symlink_to(path)
    return directory / "bin" / "python"


def test_a_bare_machine_trains_and_resumes_in_the_same_bytes(tmp_path: Path) -> None:
    travels = tmp_path / "travels"
    command = ["-m", "benchmarks.gpu_train"]
    prepare = [sys.executable, *command, "prepare", str(travels), "--small", "--no-wheels"]
    subprocess.run(prepare, cwd=ROOT, check=True)
    python, record = bare_python(tmp_path / "python"), tmp_path / "record.json"
    run = [
        str(python),
        *command,
        "run",
        str(travels),
        "--small",
        "--only",
        "training",
        "resume",
        "--output",
        str(record),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(run, cwd=ROOT, check=True, env=environment, capture_output=True, encoding="utf-8").stdout
    written = json.loads(record.read_text())
    steps = written["steps"]
    assert "error" not in steps["training"], said
    met = {(bar["step"], bar["figure"]): bar["met"] for bar in written["bars"]}
    assert met[("resume", "same_bytes")] is True
    assert met[("training", "activation_fallbacks")] is True
    assert met[("training", "mfu")] is False  # of a GPU's peak
    assert met[("kernels", "compiled_block_over_gelu")] is None
    assert "training: mfu ≥ 0.45: missed" in said
    assert steps["training"]["activation_fallbacks"] == {"gelu_tanh": 0.0, "hermite4": 0.0, "hermite8": 0.0}
    assert all(speed > 0 for speed in steps["training"]["tokens_per_second"].values())
    assert steps["resume"]["same_bytes"] == {"dataset": True, "train": True}, said
    assert "driver killed after the checkpoint of step 2" in said


def test_what_runs_on_a_gpu_would_be_accepted_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The workflows in full, and for a GPU: planning one looks at everything that is refused before it starts."""
    (tmp_path / gpu_train.DATASET).mkdir()
    (tmp_path / gpu_train.DATASET / "dataset.json").write_text("{}")
    full = {**gpu_train.FULL, "images": {**gpu_train.FULL["images"], "count": 8}}
    workflows = {
        **gpu_train.training_workflows(tmp_path, full),
        "resume": gpu_train.resume_stages(tmp_path, full),
        "conversion": gpu_train.conversion_stages(tmp_path, full),
        **gpu_train.image_workflows(tmp_path, full),
    }
    assert full["gpus"] == 1
    for name, stages in workflows.items():
        file = gpu_train.write_workflow(tmp_path, name, stages)
        assert main(["plan", str(file), "--store", str(tmp_path / "store")]) == 0, capsys.readouterr()
        assert f"{len(stages)} of {len(stages)} stages will run" in capsys.readouterr().out
        assert stages["train"]["resources"] == {"gpus": 1}


def test_a_step_that_fails_is_in_the_record_and_in_the_exit_code(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    wrong = {**gpu_train.SMALL, "model": {"n_layer": 0}}
    with pytest.raises(SystemExit, match="training failed"):
        gpu_train.measure(tmp_path / "travels", wrong, ["training", "kernels"], record)
    steps = json.loads(record.read_text())["steps"]
    assert "n_layer" in steps["training"]["error"]
    assert steps["kernels"]["skipped"] == "needs a GPU"


def test_each_bar_is_compared_with_every_value_of_its_figure() -> None:
    steps = {
        "training": {"step_over_gelu": {"hermite3": 1.01, "hermite8": 1.03}, "mfu": {"gelu_tanh": 0.45}},
        "resume": {"same_bytes": {"shard": True, "train": False}},
        "images": {"error": "no memory"},
        "kernels": {"compiled_block_over_gelu": {"hermite 3": 1.05, "tropical 6": 0.9}},
    }
    judged = [(bar["step"], bar["figure"], bar["met"]) for bar in gpu_train.judge(steps)]
    assert judged == [
        ("training", "step_over_gelu", False),
        ("training", "mfu", True),
        ("training", "activation_fallbacks", None),
        ("resume", "same_bytes", False),
        ("images", "activation_fallbacks", None),
        ("kernels", "compiled_block_over_gelu", True),
    ]
    assert {bar.step for bar in gpu_train.BARS} <= set(gpu_train.STEPS)
