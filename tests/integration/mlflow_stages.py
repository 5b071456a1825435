"""Stages that say all that a stage can say, and that wait for the test at given points of their curves."""

from __future__ import annotations

import json
import time
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext, Stages


def loss(step: int, rate: float = 1.0) -> float:
    """The curve of this test."""
    return rate / (step + 1)


def train(
    context: StageContext, steps: int, gates: str = "", pauses: list[int] | None = None, rate: float = 1.0
) -> dict[str, float]:
    """Logs a point per step; before each step in `pauses` it waits until the file `gates/STEP` exists."""
    context.log_dataset("numbers", "d" * 64, "made up", {"samples": steps})
    context.log_params({"parameters": 7})
    if gates and (Path(gates) / "fail").exists():
        raise UserError("the corpus is gone", "bring it back")
    done = context.scratch / "step"
    start = int(done.read_text()) if done.exists() else 0
    for step in range(max(0, start - 1), steps):  # a resumed training says its last step again
        if step in (pauses or []):
            (Path(gates) / f"reached-{step}").touch()
            while not (Path(gates) / str(step)).exists():
                time.sleep(0.02)
        context.log_metrics({"train/loss": loss(step, rate), "lr": 0.1}, step=step)
        context.scratch.mkdir(parents=True, exist_ok=True)
        done.write_text(str(step + 1))
    (context.output / "plots").mkdir()
    (context.output / "plots" / "plot.txt").write_text("a plot")
    (context.output / "model.json").write_text(json.dumps({"steps": steps}))
    context.log_artifact("plots")
    return {"final_loss": loss(steps - 1, rate), "train/loss": loss(steps - 1, rate)}


def more(steps: int) -> Stages:
    """Returns two trainings."""
    return Stages({f"train{rate}": {"uses": train, "with": {"steps": steps, "rate": float(rate)}} for rate in (1, 2)})


def report(context: StageContext, models: dict[str, Artifact]) -> dict[str, float]:
    """One page for the parent run, and a table of figures."""
    (context.output / "report.html").write_text("<h1>the report</h1>")
    context.log_artifact("report.html", parent=True)
    context.log_metrics({"models": len(models)})
    return {f"{label}/size": float(len((model.path / "model.json").read_text())) for label, model in models.items()}


def odd_names(context: StageContext, text: str) -> dict[str, float]:
    """Says things that MLflow does not accept as they are."""
    context.log_metrics(
        {"/a//b/../c": 1.0, "a=b[c,d]": float("inf"), "ü|ü": float("nan"), "x" * 400: 2.0}, step=2**63 - 1
    )
    context.log_params({"../long": text * 2000, "": "empty"})
    (context.output / "x").write_text(text)
    context.log_artifact("no-such-file")
    context.log_artifact("x")
    return {"length": float(len(text))}


def make_model(context: StageContext, name: str) -> dict[str, float]:
    """A GPT-2 of bytes as it comes out of the initialisation, registered."""
    import torch

    from polytrope.models import build_model
    from polytrope.models.checkpoint import save_model

    torch.manual_seed(0)
    config = {"vocab_size": 257, "sequence_length": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
    save_model(context.output, build_model("gpt2", config))
    (context.output / "tokenizer.json").write_text('{"kind": "bytes"}')
    context.log_model(".", name=name, alias="champion")
    return {"parameters": 1.0}
