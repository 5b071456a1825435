"""The fan-out of the engine's benchmark in Prefect. Run in an environment of its own; N: number of tasks.

RUNNER: `threads` (Prefect's default: all tasks in one process) or `processes` (isolated from one another, as ours are).
"""

import os

from prefect import flow, task
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

RUNNERS = {"threads": ThreadPoolTaskRunner, "processes": ProcessPoolTaskRunner}


@task(persist_result=True)
def nothing(index):  # noqa: ARG001
    return {}


@task(persist_result=True)
def gather(parts):  # noqa: ARG001
    return {}


@flow(task_runner=RUNNERS[os.environ["RUNNER"]](max_workers=2))
def nothing_flow(count):
    """N × nothing → gather"""
    gather([nothing.submit(index) for index in range(count)])


if __name__ == "__main__":
    nothing_flow(int(os.environ["N"]))
