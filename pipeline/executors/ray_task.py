"""What runs on a Ray worker: one stage, the watch for its cancellation, and the end of all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

from polytrope.pipeline.executors.descendants import adopt_orphans, has_children, kill_descendants, living_descendants
from polytrope.pipeline.executors.nursery import GRACE
from polytrope.pipeline.executors.worker import Outcome, StageError, load_task, run_logged

NAMESPACE = b"polytrope"  # in Ray's key-value store
PATIENCE = 1.0  # seconds after which a cancelled task that has not started is taken for one that queues
_POLL = 0.25  # seconds between two looks of a stage for its cancellation


def execute(data: bytes, mark: bytes, submitted: float) -> Outcome:
    """The body of the Ray task.

    Args:
        data: the task.
        mark: the key in Ray's key-value store by which the driver cancels it.
        submitted: when, by this machine's clock: only a task that has queued can have been cancelled; 0: not known.
    """
    if abs(time.time() - submitted) > PATIENCE / 2 and _is_marked(mark):
        return Outcome(error=StageError("cancelled", "cancelled"))
    task = load_task(data)
    adopt_orphans()
    before = {process.pid for process in living_descendants()} if has_children() else set()
    claim, ended = threading.Lock(), threading.Event()
    threading.Thread(target=_watch, args=(mark, claim, ended), name="polytrope-cancel", daemon=True).start()
    try:
        outcome = run_logged(task)
        if has_children():  # Ray runs other stages in this process
            kill_descendants(GRACE, spared=before)
        return outcome
    finally:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                if claim.acquire(blocking=False):
                    break
                ended.set()
                time.sleep(GRACE)  # cancelled: no reply any more, this process is about to be killed
        ended.set()


def _watch(mark: bytes, claim: threading.Lock, ended: threading.Event) -> None:
    """Interrupt the stage when its mark is set, then end this process with all that it started.

    `ray.cancel` is not used: Ray 2.60 ends the driver's process if a task is completed while it is being cancelled
    ("Tried to complete task that was not pending"). Whoever gets `claim` first, this thread or the end of the stage,
    decides whether there is a reply.
    """
    while not ended.wait(_POLL) and not _is_marked(mark):
        pass
    if not claim.acquire(blocking=False):
        return
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)
    with contextlib.suppress(Exception):  # whatever happens here, the process must end
        ended.wait(GRACE)
        kill_descendants(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_marked(mark: bytes) -> bool:
    with contextlib.suppress(Exception):  # Ray's control service is away: asked again
        from ray.experimental import internal_kv

        return bool(internal_kv._internal_kv_exists(mark, namespace=NAMESPACE))
    return False
