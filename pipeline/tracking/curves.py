"""Metrics and parameters of one run in MLflow: each point once, and no two names become one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mlflow.entities import Metric, Param

from polytrope.pipeline.runs.spool import SpoolEvent
from polytrope.pipeline.tracking.names import (
    KEY_LENGTH,
    METRICS_PER_REQUEST,
    PARAMETERS_PER_REQUEST,
    flatten,
    milliseconds,
    mlflow_name,
    number,
    parameter_text,
    step_number,
)
from polytrope.pipeline.tracking.server import Server


class Latest(NamedTuple):
    """The newest point of a curve. `time` in milliseconds."""

    step: int
    time: int
    value: float


class Curves:
    """What the runs of one copy have in MLflow. The server is asked once for a run that somebody else began."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._latest: dict[str, dict[str, Latest]] = {}  # MLflow run → curve → newest point

    def begin(self, run_id: str) -> None:
        """A run that was just made has no curves."""
        self._latest[run_id] = {}

    def new_points(self, run_id: str, said: SpoolEvent) -> Iterator[Metric]:
        """The points of one event that MLflow does not have: a resumed training says some steps again."""
        moment, step = milliseconds(said.event["time"]), said.event.get("step")
        curves = self._of(run_id)
        for given, value in said.event["values"].items():
            try:
                point = Latest(step_number(step), moment, number(value))
            except (TypeError, ValueError, OverflowError) as error:  # of a version that did not look when it was said
                self.server.refuse(f"metric {given} of {said.stage} at step {step!r}", error)
                continue
            name = self._name(run_id, given)
            latest = curves.get(name)
            if latest is not None:
                old = point.step <= latest.step if step is not None else (moment < latest.time or point == latest)
                if old:
                    continue
            curves[name] = point
            yield Metric(name, point.value, moment, point.step)

    def send(self, run_id: str, metrics: list[Metric]) -> None:
        """Send points."""
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            self.server.send(run_id, "metrics", metrics[start : start + METRICS_PER_REQUEST])

    def summary(self, run_id: str, values: Mapping[str, float], moment: float) -> None:
        """Figures of a stage as a whole: sent if they differ from the newest ones, and never as a point of a curve."""
        if not values:
            return
        curves, metrics = self._of(run_id), []
        for given, figure in values.items():
            name, value = self._name(run_id, given), number(figure)
            latest = curves.get(name)
            if latest is None or (latest.step == 0 and latest.value != value and value == value):
                curves[name] = Latest(0, milliseconds(moment), value)
                metrics.append(Metric(name, value, milliseconds(moment), 0))
        self.send(run_id, metrics)

    def parameters(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Parameters are immutable in MLflow: what it has already is left as it is."""
        flat = {self._name(run_id, key): parameter_text(text) for key, text in flatten(values).items()}
        if not flat:
            return
        have: dict[str, str] = {}
        if not self.server.attempt(f"parameter {next(iter(flat))} and others", self._ask_parameters, run_id, have):
            return
        new = [Param(key, text) for key, text in flat.items() if key not in have]
        for start in range(0, len(new), PARAMETERS_PER_REQUEST):
            self.server.send(run_id, "params", new[start : start + PARAMETERS_PER_REQUEST])

    def _ask_parameters(self, run_id: str, have: dict[str, str]) -> None:
        have.update(self.server.client.get_run(run_id).data.params)

    def _of(self, run_id: str) -> dict[str, Latest]:
        if run_id not in self._latest:
            self.server.attempt("a question for its curves", self._ask, run_id)
        return self._latest.setdefault(run_id, {})

    def _ask(self, run_id: str) -> None:
        metrics = self.server.client.get_run(run_id).data._metric_objs
        self._latest[run_id] = {item.key: Latest(item.step, item.timestamp, item.value) for item in metrics}

    def _name(self, run_id: str, given: str) -> str:
        """The name in MLflow; one that another name has taken there gets a digest of its own behind it."""
        taken = self.server.cursor.names.setdefault(run_id, {})
        name = mlflow_name(given)
        if taken.setdefault(name, given) == given:
            return name
        digest = hashlib.sha256(given.encode(errors="surrogatepass")).hexdigest()[:8]
        name = f"{name[: KEY_LENGTH - 9]}-{digest}"
        taken[name] = given
        return name
