"""What the engine costs: `python -m benchmarks.engine` prints a table and writes benchmarks/results/engine.json.

Every figure is of a whole `polytrope` command in a process of its own, durable commits included, unless said otherwise.
The peers (Metaflow, Prefect) run the same fan-out in their local modes, in an environment made for them in a temporary
directory. Start-up does not count: after a run of one task, which makes a database, all run 100 and 600 tasks, and the
difference is divided by 500. (With a few tasks only, Prefect ends before its server has recorded them.) What is printed
are medians of three rounds, in each of which all take their turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
# versions that work together: newer FastAPI releases refuse what Prefect's server asks for
REQUIREMENTS = {"metaflow": ["metaflow==2.19.39"], "prefect": ["prefect==3.4.25", "fastapi<0.120"]}
BARE_RAY = """
import json, sys, time
import ray
ray.init(address="local", include_dashboard=False, num_cpus=int(sys.argv[2]), log_to_driver=False)
@ray.remote(max_retries=0)
def nothing(index):
    return {}
start = time.perf_counter()
ray.get([nothing.remote(index) for index in range(int(sys.argv[1]))])
print(json.dumps(time.perf_counter() - start))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted(CASES), help="measure this only; repeatable")
    parser.add_argument("--stages", type=int, default=1000, help="of a run (default 1000)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "engine.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.only and options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))["results"]
    # removed at the end only: removing thousands of files is no part of the next case
    with tempfile.TemporaryDirectory(prefix="polytrope-benchmark-") as directory:
        for name in options.only or CASES:
            (place := Path(directory, name)).mkdir()
            results[name] = {**CASES[name](place, options.stages), **circumstances()}
            print(f"{name}: {json.dumps(results[name])}", flush=True)
            save(results, options.output)  # one by one: the next case may be cut short
    print_table(results)


def save(results: Mapping[str, Any], output: Path) -> None:
    record = {"command": "python -m benchmarks.engine", "results": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def circumstances() -> dict[str, Any]:
    """Where and when a case was measured: `--only` keeps the others as they were measured elsewhere or earlier."""
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


# -- cases -------------------------------------------------------------------------------------------------------------


def local(directory: Path, stages: int) -> dict[str, float]:
    """Stages that do nothing, local executor; then the same command again."""
    file = fan_out(directory, stages)
    first = polytrope(directory, "run", str(file), "--executor", "local")
    again = polytrope(directory, "run", str(file), "--executor", "local")
    return {"stages": stages, "seconds": first, "ms_per_stage": 1000 * first / stages, "no_change_seconds": again}


def ray(directory: Path, stages: int) -> dict[str, float]:
    """The same on Ray, from the first stage to the last (Ray itself is up), beside as many bare Ray tasks: in turns."""
    cpus = len(os.sched_getaffinity(0))
    ours, theirs = [], []
    for _ in range(3):
        place = Path(tempfile.mkdtemp(dir=directory))
        polytrope(place, "run", str(fan_out(place, stages)), "--executor", "ray", "--run-id", "measured")
        times: dict[str, list[float]] = {"stage_started": [], "stage_succeeded": []}
        for line in (place / "store" / "runs" / "measured" / "journal.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["type"] in times:
                times[event["type"]].append(event["time"])
        ours.append(max(times["stage_succeeded"]) - min(times["stage_started"]))
        command = [sys.executable, "-c", BARE_RAY, str(stages), str(cpus)]
        theirs.append(float(run(command, directory).stdout.splitlines()[-1]))
    seconds, bare = median(ours), median(theirs)
    return {
        "stages": stages,
        "seconds": seconds,
        "ms_per_stage": 1000 * seconds / stages,
        "bare_ms_per_task": 1000 * bare / stages,
        "bar_ms_per_stage": 1.5 * 1000 * bare / stages + 5,
    }


def plan(directory: Path, _stages: int) -> dict[str, float]:
    """A plan of 10,000 stages."""
    file = fan_out(directory, 10_000)
    return {"stages": 10_000, "seconds": polytrope(directory, "plan", str(file), quiet=False)}


def journal(directory: Path, _stages: int) -> dict[str, float]:
    """Opening a journal of 100,000 events for writing: every line is checked."""
    from polytrope.pipeline.runs.journal import FILE_NAME, Event, Journal, encode, fold, read

    key, types = "0123456789abcdef" * 4, ("stage_started", "stage_succeeded")
    with open(directory / FILE_NAME, "wb") as file:
        for number in range(1, 100_001):
            data = {"stage": f"nothing[index={number // 2}]", "attempt": 1, "key": key}
            if number % 2:
                data |= {
                    "components": {"parameters": {"index": number}, "inputs": {"source": key}},
                    "log": "logs/1.log",
                }
            else:
                data |= {"digest": key, "summary": {"loss": 1.5}, "duration": 0.001}
            file.write(encode(Event(number, time.time(), 1, types[1 - number % 2], data)))
    start = time.perf_counter()
    opened = Journal.open(directory, fence=1)
    seconds = time.perf_counter() - start
    opened.close()
    start = time.perf_counter()
    assert len(fold(read(directory)).stages) > 0
    return {
        "events": 100_000,
        "megabytes": (directory / FILE_NAME).stat().st_size / 1e6,
        "seconds": seconds,
        "read_and_fold_seconds": time.perf_counter() - start,
    }


def hashing(directory: Path, _stages: int) -> dict[str, float]:
    """A stored artifact of 10 GiB: run again, and run again with `--verify`, which hashes it."""
    file = directory / "workflow.yaml"
    stage = {"uses": "benchmarks.engine_stages:large", "with": {"gibibytes": 10}, "resources": {"cpus": 1}}
    write(file, {"large": stage})
    polytrope(directory, "run", str(file), "--executor", "local")
    again = polytrope(directory, "run", str(file), "--executor", "local")
    verify = polytrope(directory, "run", str(file), "--executor", "local", "--verify")
    return {"gibibytes": 10, "no_change_seconds": again, "verify_seconds": verify}


def peers(directory: Path, _stages: int) -> dict[str, float]:
    """Milliseconds per task of a fan-out: polytrope, Metaflow, Prefect in threads and in processes."""

    def ours(count: int) -> None:
        count = max(count, 3)  # start, nothing, gather
        place = Path(tempfile.mkdtemp(dir=directory))
        polytrope(place, "run", str(fan_out(place, count)), "--executor", "local")

    contestants = {"polytrope": ours}
    for case in ("metaflow", "prefect_threads", "prefect_processes"):
        name, _, runner = case.partition("_")
        contestants[case] = peer(directory / case, name, {"RUNNER": runner})
    rounds = [{case: marginal(fan_out_of) for case, fan_out_of in contestants.items()} for _ in range(3)]
    result: dict[str, float] = {}
    for case in contestants:
        result[f"{case}_ms_per_{'stage' if case == 'polytrope' else 'task'}"] = median(each[case] for each in rounds)
        if case != "polytrope":
            result[f"{case}_times_slower"] = median(each[case] / each["polytrope"] for each in rounds)
    return result


CASES: Mapping[str, Callable[[Path, int], dict[str, float]]] = {
    "local": local,
    "ray": ray,
    "plan": plan,
    "journal": journal,
    "hashing": hashing,
    "peers": peers,
}


# -- helpers -----------------------------------------------------------------------------------------------------------


def fan_out(directory: Path, stages: int) -> Path:
    """A workflow file: one stage, then `stages - 2` that read it, then one that reads them all."""
    stage = {"uses": "benchmarks.engine_stages:nothing", "resources": {"cpus": 1}}
    file = directory / "workflow.yaml"
    write(
        file,
        {
            "start": {**stage, "with": {"index": -1}},
            "nothing": {
                **stage,
                "matrix": {"index": list(range(stages - 2))},
                "with": {"index": "${matrix.index}"},
                "inputs": {"source": "start"},
            },
            "gather": {"uses": "benchmarks.engine_stages:gather", "inputs": {"parts": ["nothing"]}},
        },
    )
    return file


def write(file: Path, stages: dict[str, Any]) -> None:
    file.write_text(
        yaml.safe_dump({"name": "benchmark", "stages": stages, "tracking": {"enabled": False}}), encoding="utf-8"
    )


def polytrope(directory: Path, *arguments: str, quiet: bool = True) -> float:
    """Seconds of a whole command."""
    command = [sys.executable, "-m", "polytrope.pipeline.commands.cli", *arguments, "--store", str(directory / "store")]
    start = time.perf_counter()
    run([*command, "--quiet"] if quiet else command, ROOT)
    return time.perf_counter() - start


def run(
    command: list[str], directory: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, **(environment or {})}
    ended = subprocess.run(command, cwd=directory, env=everything, capture_output=True, encoding="utf-8", check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return ended


def peer(directory: Path, name: str, variables: Mapping[str, str]) -> Callable[[int], None]:
    """Runs a peer's fan-out of so many tasks, in an environment that is made here."""
    directory.mkdir()
    run([sys.executable, "-m", "venv", str(directory / "venv")], directory)
    python = str(directory / "venv" / "bin" / "python")
    run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]], directory)
    (directory / ".prefect").mkdir()
    environment = {
        "USERNAME": "benchmark",
        "HOME": str(directory),
        "METAFLOW_HOME": str(directory / "home"),
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(directory / "store"),
        "PREFECT_HOME": str(directory / ".prefect"),
        "PREFECT_LOGGING_LEVEL": "ERROR",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "60",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        **variables,
    }
    command = [python, str(PEERS / f"{name}_flow.py")]
    if name == "metaflow":
        command += ["run", "--max-workers", str(len(os.sched_getaffinity(0))), "--max-num-splits", "1000"]

    def fan_out_of(count: int) -> None:
        run(command, directory, {**environment, "N": str(count)})

    return fan_out_of


def marginal(fan_out_of: Callable[[int], None], few: int = 100, many: int = 600) -> float:
    """Milliseconds per task beyond the start-up."""
    fan_out_of(1)
    seconds = []
    for count in (few, many):
        start = time.perf_counter()
        fan_out_of(count)
        seconds.append(time.perf_counter() - start)
    return 1000 * (seconds[1] - seconds[0]) / (many - few)


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


def print_table(results: Mapping[str, Any]) -> None:
    """Bar and figure of every case that was measured."""
    rows = []

    def row(case: str, what: str, bar: str, name: str, unit: str, met: Callable[[float], bool]) -> None:
        if case in results and name in results[case]:
            value = results[case][name]
            rows.append((what, bar, f"{value:.3g} {unit}", "yes" if met(value) else "NO"))

    row("local", "1,000 stages that do nothing, local", "≤ 10 ms", "ms_per_stage", "ms", lambda value: value <= 10)
    if "ray" in results:
        bar = results["ray"]["bar_ms_per_stage"]
        row("ray", "the same on Ray", f"≤ {bar:.3g} ms (1.5 × bare + 5)", "ms_per_stage", "ms", lambda x: x <= bar)
    row("peers", "Metaflow, same fan-out", "≥ 10 × ours", "metaflow_times_slower", "×", lambda value: value >= 10)
    for kind in ("threads", "processes"):
        what, name = f"Prefect, same fan-out, {kind}", f"prefect_{kind}_times_slower"
        row("peers", what, "≥ 10 × ours", name, "×", lambda value: value >= 10)
    row("plan", "plan of 10,000 stages", "< 5 s", "seconds", "s", lambda value: value < 5)
    row("local", "no-change re-run of 1,000", "< 3 s", "no_change_seconds", "s", lambda value: value < 3)
    row("journal", "journal of 100,000 events: open", "< 1 s", "seconds", "s", lambda value: value < 1)
    row("journal", "the same, read and folded", "< 1 s", "read_and_fold_seconds", "s", lambda value: value < 1)
    row("hashing", "re-run on a 10 GiB artifact", "not hashed", "no_change_seconds", "s", lambda value: value < 3)
    row("hashing", "the same with --verify", "hashed", "verify_seconds", "s", lambda value: value > 3)
    widths = [max(len(cells[column]) for cells in rows) for column in range(4)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)))


if __name__ == "__main__":
    main()
