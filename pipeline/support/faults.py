"""Faults on purpose: the driver kills itself, or a write fails, at a chosen durable operation (`--inject-faults`).

Every durable operation of the driver (journal write, fsync, rename) passes a numbered fault point before and after its
effect. A plan says what happens there:

- `7` or `seed:7`: at each point the driver dies (SIGKILL) with a small probability, and each worker now and then;
- `at:12`: it dies at the 12th point; `error:12:ENOSPC`: the 12th point fails with that error instead;
- `stop:NAME`: it stops (SIGSTOP) at the first point of this name, as if its machine hung;
- `count:FILE`: nothing happens, but FILE holds the number of points passed.

What a run must survive is tested by trying every point in turn (`tests/chaos`).
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
from pathlib import Path

from polytrope.pipeline.errors import UserError

ENVIRONMENT_VARIABLE = "POLYTROPE_INJECT_FAULTS"
_KILL_PROBABILITY = 0.01
_WORKER_KILL_PROBABILITY = 0.15


class FaultPlan:
    """What happens at which fault point; see the top of this file for the texts that `parse` reads."""

    def __init__(self) -> None:
        self.passed = 0
        self.kill_at: int | None = None
        self.error_at: tuple[int, int] | None = None
        self.stop_at: str | None = None
        self.random: random.Random | None = None
        self.count_file: Path | None = None

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        plan = cls()
        kind, _, value = text.partition(":") if ":" in text else ("seed", "", text)
        try:
            if kind == "seed":
                plan.random = random.Random(int(value))
            elif kind == "at":
                plan.kill_at = int(value)
            elif kind == "error":
                number, _, name = value.partition(":")
                plan.error_at = (int(number), int(getattr(errno, name or "EIO")))
            elif kind == "stop":
                plan.stop_at = value
            elif kind == "count":
                plan.count_file = Path(value)
            else:
                raise ValueError(kind)
        except (ValueError, AttributeError):
            raise UserError(
                f"fault plan `{text}` is not understood",
                "accepted: SEED, at:NUMBER, error:NUMBER:ERRNO, stop:NAME, count:FILE",
            ) from None
        return plan

    def reach(self, name: str) -> None:
        self.passed += 1
        if self.count_file is not None:
            self.count_file.write_text(str(self.passed), encoding="utf-8")
        if self.error_at is not None and self.passed == self.error_at[0]:
            raise OSError(
                self.error_at[1], f"{os.strerror(self.error_at[1])} (injected at point {self.passed}, {name})"
            )
        if name == self.stop_at:
            self.stop_at = None
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.passed == self.kill_at or (self.random is not None and self.random.random() < _KILL_PROBABILITY):
            print(
                f"polytrope: fault injected: the driver dies at point {self.passed}, {name}",
                file=sys.stderr,
                flush=True,
            )
            os.kill(os.getpid(), signal.SIGKILL)

    def kills_worker(self) -> bool:
        return self.random is not None and self.random.random() < _WORKER_KILL_PROBABILITY


_plan: FaultPlan | None = None


def start_faults(text: str | None) -> None:
    """Follow a plan from now on in this process; None or empty: no faults.

    Raises:
        UserError: a text that is not a plan.
    """
    global _plan
    _plan = FaultPlan.parse(text) if text else None


def fault_point(name: str) -> None:
    """Pass a point where the process may be made to die. Costs nothing without a plan."""
    if _plan is not None:
        _plan.reach(name)


def worker_dies() -> bool:
    """Whether the plan kills the worker that was just started."""
    return _plan is not None and _plan.kills_worker()
