"""Weights & Biases without a network: a run per stage in a group per workflow run, which `wandb sync` sends later."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import wandb

from polytrope.pipeline.tracking.loggers import LoggedRun

_STEP = "step"  # W&B's own step counts calls: curves of a stage (loss, system metrics) have different ones


class WeightsAndBiases:
    """A `Logger`. Parameters are the run's config, a stage's figures its summary."""

    def __init__(self, run: LoggedRun) -> None:
        self.run = run
        self._runs: dict[str, Any] = {}

    def parameters(self, stage: str, values: Mapping[str, str]) -> None:
        """Into the config."""
        self._run(stage).config.update(dict(values), allow_val_change=True)

    def metrics(self, stage: str, values: Mapping[str, float], step: int, moment: float) -> None:
        """A point of each curve, over `step`."""
        self._run(stage).log({**values, _STEP: step, "_timestamp": moment})

    def result(self, stage: str, values: Mapping[str, float], moment: float) -> None:
        """Into the summary."""
        self._run(stage).summary.update({**values, "_timestamp": moment})

    def close(self) -> None:
        """End every run."""
        for run in self._runs.values():
            run.finish()

    def _run(self, stage: str) -> Any:
        if stage not in self._runs:
            run = wandb.init(
                mode="offline",
                dir=str(self.run.directory),
                project=self.run.workflow.replace("/", "-"),
                group=self.run.run_id,
                name=stage,
                id=hashlib.sha256(f"{self.run.run_id}/{stage}".encode()).hexdigest()[:16],
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True),
            )
            run.define_metric("*", step_metric=_STEP)
            self._runs[stage] = run
        return self._runs[stage]
