"""The stage of the outage benchmark: a training of nothing but its metrics."""

from __future__ import annotations

import json
import time

from polytrope.pipeline.stage import StageContext


def log_steps(context: StageContext, steps: int, step_seconds: float) -> dict[str, float]:
    """Logs three metrics per step and writes how long each call took to `calls.json` (nanoseconds)."""
    calls: list[int] = []
    for step in range(steps):
        time.sleep(step_seconds)
        started = time.perf_counter_ns()
        context.log_metrics({"train/loss": 1.0 / (step + 1), "learning_rate": 1e-3, "gradient_norm": 1.0}, step=step)
        calls.append(time.perf_counter_ns() - started)
    (context.output / "calls.json").write_text(json.dumps(calls), encoding="utf-8")
    return {"steps": float(steps)}
