"""The fan-out of the engine's benchmark in Prefect. Run in an environment of its own; N: number of tasks."""

import os

from prefect import flow, task
from prefect.task_runners import ThreadPoolTaskRunner


@task(persist_result=True)
def nothing(index):  # noqa: ARG001
    return {}


@task(persist_result=True)
def gather(parts):  # noqa: ARG001
    return {}


@flow(task_runner=ThreadPoolTaskRunner(max_workers=2))
def nothing_flow(count):
    """N × nothing → gather"""
    gather([nothing.submit(index) for index in range(count)])


if __name__ == "__main__":
    nothing_flow(int(os.environ["N"]))
