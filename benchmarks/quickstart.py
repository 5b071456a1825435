"""Time and memory of the whole quickstart: `python -m benchmarks.quickstart`.

Runs workflows/quickstart.yaml twice in a new store: once from nothing, once when everything is stored. Memory is the
largest sum, over all processes of the run, of the share of memory each has (PSS, sampled twice a second).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from polytrope.pipeline.support.executor_table import DEFAULT_EXECUTOR, EXECUTORS

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("loss", "perplexity", "bits_per_byte", "top1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", choices=tuple(EXECUTORS), default=DEFAULT_EXECUTOR)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quickstart.json")
    options = parser.parse_args()
    polytrope = str(Path(sys.executable).with_name("polytrope"))
    command = [polytrope, "run", "workflows/quickstart.yaml", "--quiet", "--executor", options.executor]
    with tempfile.TemporaryDirectory(prefix="polytrope-benchmark-") as store:
        first, memory = measured([*command, "--store", store])
        again, _ = measured([*command, "--store", store])
        (report,) = Path(store).glob("artifacts/*/files/report.json")
        figures = json.loads(report.read_text(encoding="utf-8"))
        # what still copies to MLflow has ended before its store is deleted
        subprocess.run([polytrope, "sync", "--all", "--store", store], check=True)
    results = {
        "command": "python -m benchmarks.quickstart",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "executor": options.executor,
        "cpus": os.cpu_count(),
        "seconds": first,
        "peak_memory_gibibytes": memory,
        "second_run_seconds": again,
        "models": {row["name"]: {name: row[name] for name in SHOWN} for row in figures["table"]},
        "unigram_entropy": figures["unigram_entropy"],
    }
    options.output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"first run {first:.1f} s, {memory:.2f} GiB; second run {again:.1f} s")
    for name, row in results["models"].items():
        print(f"{name:<28} " + "  ".join(f"{figure} {value:.4f}" for figure, value in row.items()))
    print(f"unigram entropy {results['unigram_entropy']:.4f}")


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and the peak memory in GiB of a command and all processes it starts; it must succeed."""
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, peak / 2**30


def _memory(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
    return total


if __name__ == "__main__":
    main()
