"""Take a finished activation study's figures and plots into the repository: `python -m benchmarks.activation_study`.

The study itself is `polytrope run workflows/activation-study.yaml` (half an hour on two cores). This reads the newest
finished one in a store and writes results/activation_study.json, a Markdown table and the plots of both reports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from polytrope.pipeline.runs.journal import RunState, fold, read
from polytrope.pipeline.store.store import Store

RESULTS = Path(__file__).parent / "results"
MODELS = {"gpt": "GPT-2 on text", "convnext": "ConvNeXt on handwritten digits"}
PLOTS = ("groups", "losses", "gradients", "moments", "shapes")
COMMAND = "polytrope run workflows/activation-study.yaml"


def newest_study(store: Store) -> tuple[Path, RunState]:
    """The directory and the state of the newest finished study.

    Raises:
        SystemExit: there is none.
    """
    for directory in store.run_directories():
        state = fold(read(directory))
        if all((stage := state.stages.get(f"report_{model}")) and stage.digest for model in MODELS):
            return directory, state
    raise SystemExit(f"{store.address} holds no finished study: {COMMAND} --store {store.address}")


def markdown(name: str, figures: dict[str, Any]) -> str:
    """The table of one model."""
    text = figures["kind"] == "text"
    unit, other = ("token", "bits per byte") if text else ("image", "top-1")
    heads = [
        "activation",
        f"loss, nats per {unit}",
        "Δ to GELU, paired",
        "p",
        other,
        "step, ms",
        "kept for backward, MB",
    ]
    heads.append("failed")
    rows = []
    for group in figures["groups"]:
        if "loss" not in group:
            rows.append([group["group"], *["–"] * (len(heads) - 2), str(group["failed"])])
            continue
        difference, last = group.get("difference"), group["bits_per_byte" if text else "top1"]
        rows.append(
            [
                group["group"],
                plus_minus(group["loss"], ".4f"),
                plus_minus(difference, "+.4f") if difference else "–",
                f"{difference['p_value']:.3f}" if difference and difference["p_value"] is not None else "–",
                plus_minus(last, ".4f"),
                f"{group['speed']['step_milliseconds']:.1f}",
                f"{group['speed']['bytes_kept_for_backward'] / 1e6:.1f}",
                str(group["failed"]),
            ]
        )
    lines = [f"**{name}**", ""]
    lines += ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines) + "\n"


def plus_minus(entry: dict[str, Any], layout: str) -> str:
    """`4.2563 ± 0.0123`: mean and half of the 95 % interval."""
    half = entry.get("half_width")
    return format(entry["mean"], layout) + (f" ± {half:{layout.lstrip('+')}}" if half is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get("POLYTROPE_STORE", ".polytrope")
    parser.add_argument("--store", type=Path, default=Path(default), help="that holds the finished study")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the figures and plots")
    options = parser.parse_args()
    store = Store(options.store)
    directory, state = newest_study(store)
    record = json.loads((directory / "workflow.json").read_bytes())
    environment = record.get("environment") or {}
    content: dict[str, Any] = {
        "command": " ".join([COMMAND, *(f"--set {override}" for override in record.get("overrides", []))]),
        "seconds": None if state.started is None or state.ended is None else round(state.ended - state.started),
        "processor": environment.get("processor"),
        "cores": environment.get("usable_cores"),
        "torch": (environment.get("packages") or {}).get("torch"),
        "params": record["workflow"].get("params", {}),
        "results": {},
    }
    tables = []
    options.output.mkdir(parents=True, exist_ok=True)
    for model, name in MODELS.items():
        artifact = store.load(state.stages[f"report_{model}"].key or "")
        if artifact is None:
            sys.exit(f"the report of {model} is not in the store any more: polytrope resume {directory.name}")
        figures = json.loads((store.materialize(artifact.key) / "report.json").read_text(encoding="utf-8"))
        content["results"][model] = {key: figures[key] for key in ("groups", "failures", "protocol", "speed")}
        tables.append(markdown(name, figures))
        for plot in PLOTS:
            path = store.materialize(artifact.key) / "plots" / f"{plot}.png"
            if path.exists():
                shutil.copyfile(path, options.output / f"activation_study-{model}-{plot}.png")
    about = (
        f"`{content['command']}`, {content['seconds'] or 0:,} s on {content['cores']} cores of {content['processor']}."
    )
    page = "\n".join([about + "\n", *tables])
    (options.output / "activation_study.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (options.output / "activation_study.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
