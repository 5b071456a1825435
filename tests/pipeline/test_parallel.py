"""The parallel map of stages: results in order, and an early end that harms nobody."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from polytrope.pipeline.stage import Resources, stage_context
from polytrope.pipeline.stages.shard.parallel import parallel_map

STOPPED_EARLY = """
import os, sys, time
from itertools import islice
from pathlib import Path
import ray
from polytrope.pipeline.stages.shard.parallel import parallel_map
from polytrope.pipeline.stage import Resources, stage_context

def square(number):
    time.sleep(0.01)
    return number * number

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
context = stage_context(Path(sys.argv[1]), executor="ray", resources=Resources(workers=2))
for taken in [3] * 60 + [1] * 20:
    results = parallel_map(context, square, range(3))
    assert list(islice(results, taken)) == [0, 1, 4][:taken]
    results.close()
ray.shutdown()
print("done")
"""


def test_results_come_in_the_order_of_the_items_and_an_exception_is_raised_here(tmp_path: Path) -> None:
    context = stage_context(tmp_path, resources=Resources(workers=2))
    assert list(islice(parallel_map(context, abs, [-3, 2, -1]), 3)) == [3, 2, 1]
    with pytest.raises(TypeError):
        list(parallel_map(context, abs, [1, "x"]))


def test_whoever_takes_no_more_results_on_ray_goes_on(tmp_path: Path) -> None:
    # In a process of its own: Ray ended the one that cancelled a task which was just completed.
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_EARLY, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-2000:]
