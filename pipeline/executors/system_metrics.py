"""What the machine does while a stage runs, under the names that MLflow shows as system metrics."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from polytrope.pipeline.stage import StageContext

FIRST, INTERVAL = 1.0, 10.0  # seconds until the first sample (shorter stages have none), and between samples


@contextlib.contextmanager
def sampled(context: StageContext, first: float = FIRST, interval: float = INTERVAL) -> Iterator[None]:
    """Log `system/…` metrics of this machine from a thread until the block ends."""
    ended = threading.Event()
    thread = threading.Thread(
        target=_sample, args=(context, first, interval, ended), name="system metrics", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=2.0)


def _sample(context: StageContext, first: float, interval: float, ended: threading.Event) -> None:
    if ended.wait(first):
        return
    try:
        _follow(context, interval, ended)
    except Exception as error:  # no stage fails for want of a look at the machine, but its log says so
        print(f"no system metrics (any more): {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _follow(context: StageContext, interval: float, ended: threading.Event) -> None:
    import psutil

    psutil.cpu_percent()  # the first call has nothing to compare with
    before, step = psutil.net_io_counters(), 0
    while not ended.wait(min(interval, 1.0) if step == 0 else interval):
        memory, network = psutil.virtual_memory(), psutil.net_io_counters()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": memory.percent,
        }
        if network is not None and before is not None:
            values["system/network_receive_megabytes"] = (network.bytes_recv - before.bytes_recv) / 1e6
            values["system/network_transmit_megabytes"] = (network.bytes_sent - before.bytes_sent) / 1e6
        context.log_metrics(values, step=step)
        step += 1
