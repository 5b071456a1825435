"""One parallel map for stages: Ray tasks on the cluster, or a pool of processes on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import forkserver, get_context
from typing import Any, TypeVar

from polytrope.pipeline.stage import StageContext

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(context: StageContext, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function(item)` for every item, in order, on `context.resources.workers` workers at a time.

    `function` and items travel by pickle. Results come in the order of the items, so that what is made of them does not
    depend on the number of workers or the executor. An exception of `function` is raised here.
    """
    if context.starts_with_ray:
        return _map_on_ray(context, function, items)
    return _map_in_processes(context, function, items)


def prepare_workers(context: StageContext, *modules: str) -> None:
    """Have `modules` imported beside what the stage does before its first `parallel_map`, so that no worker waits for
    them. Only for speed; on Ray nothing, its workers are there already."""
    if not context.starts_with_ray:
        forkserver.set_forkserver_preload(list(modules))
        forkserver.ensure_running()


def _map_in_processes(
    context: StageContext, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    workers = context.resources.workers
    iterator = iter(items)
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        running: list[Future[Result]] = [
            pool.submit(function, item) for item in itertools.islice(iterator, 2 * workers)
        ]
        while running:
            yield running.pop(0).result()
            running.extend(pool.submit(function, item) for item in itertools.islice(iterator, 1))


def _map_on_ray(context: StageContext, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    import ray

    resources = context.resources
    options: dict[str, Any] = {"num_cpus": resources.cpus, "max_retries": 2}
    if resources.memory:
        options["memory"] = resources.memory
    task = ray.remote(**options)(function)
    iterator = iter(items)
    running = [task.remote(item) for item in itertools.islice(iterator, 2 * resources.workers)]
    # whoever takes no more results leaves these to end with this process, or by themselves: `ray.cancel` may end it
    while running:
        try:
            result = ray.get(running[0])
        except ray.exceptions.RayTaskError as error:
            raise getattr(error, "cause", None) or error from None
        running.pop(0)
        yield result
        running.extend(task.remote(item) for item in itertools.islice(iterator, 1))
