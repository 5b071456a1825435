"""Models merged by averaging, weights against tangents: `python -m benchmarks.tangent`, a few minutes on one core.

A byte-level GPT-2 learns the source of CPython's standard library, and is then fine-tuned on each half of its
documentation, by its weights and by its tangents. It writes results/tangent.json and tangent.md.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models import build_model
from polytrope.models.linearized import LinearizedModel, average_linearized

RESULTS = Path(__file__).parent / "results"
MODEL = {"vocab_size": 256, "sequence_length": 64, "n_layer": 2, "n_head": 2, "n_embd": 64}
SEEDS = (0, 1, 2)
RATES = (1e-3, 3e-3)
PRETRAINING_STEPS = 300
PRETRAINING_RATE = 3e-3
STEPS = 40
BATCH = 16
HELD_OUT = 10  # one row of the documentation in so many


def rows_of(content: bytes) -> Tensor:
    """`[rows, sequence_length + 1]` int64 bytes, one row after the other."""
    length = MODEL["sequence_length"] + 1
    usable = len(content) // length * length
    return torch.frombuffer(bytearray(content[:usable]), dtype=torch.uint8).long().view(-1, length)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Cross entropy in nats per byte."""
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def train(model: nn.Module, rows: Tensor, steps: int, learning_rate: float, seed: int) -> None:
    """Adam, whose learning rate falls to 0 in a line."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        loss = loss_of(model, rows[torch.randint(len(rows), (BATCH,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def averaged(models: Sequence[nn.Module]) -> nn.Module:
    """The first, with the mean of all weights."""
    result = copy.deepcopy(models[0])
    weights = [model.state_dict() for model in models]
    result.load_state_dict({name: torch.stack([each[name] for each in weights]).mean(dim=0) for name in weights[0]})
    return result


def measure(model: nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        return statistics.fmean(float(loss_of(model, part)) for part in rows.split(64) if len(part) == 64)


def run_seed(seed: int, source: Tensor, halves: Sequence[Tensor], held_out: Tensor) -> dict[str, Any]:
    torch.manual_seed(seed)
    initial = build_model("gpt2", MODEL)
    train(initial, source, PRETRAINING_STEPS, PRETRAINING_RATE, seed)
    row: dict[str, Any] = {"seed": seed, "initial": measure(initial, held_out), "rates": []}
    for rate in RATES:
        weights = [copy.deepcopy(initial) for _ in halves]
        tangents = [LinearizedModel(initial) for _ in halves]
        for number, half in enumerate(halves):
            train(weights[number], half, STEPS, rate, seed)
            train(tangents[number], half, STEPS, rate, seed)
        row["rates"].append(
            {
                "learning_rate": rate,
                "weights": [measure(model, held_out) for model in weights],
                "average of weights": measure(averaged(weights), held_out),
                "tangents": [measure(model, held_out) for model in tangents],
                "average of tangents": measure(average_linearized(tangents), held_out),
            }
        )
        print(json.dumps(row["rates"][-1]), flush=True)
    return row


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row per learning rate: means over the seeds."""
    lines = [
        "| learning rate | one half, weights | average of weights | one half, tangents | average of tangents |",
        "|---|---|---|---|---|",
    ]
    for number, rate in enumerate(RATES):
        found = [row["rates"][number] for row in rows]
        cells = [
            statistics.fmean(value for one in found for value in one["weights"]),
            statistics.fmean(one["average of weights"] for one in found),
            statistics.fmean(value for one in found for value in one["tangents"]),
            statistics.fmean(one["average of tangents"] for one in found),
        ]
        lines.append(f"| {rate:g} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    initial = statistics.fmean(row["initial"] for row in rows)
    return "\n".join([*lines, "", f"Before fine-tuning: {initial:.3f}."]) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    library = Path(sysconfig.get_paths()["stdlib"])
    source = rows_of(b"".join(path.read_bytes() for path in sorted(library.glob("*.py"))))
    documentation = rows_of((library / "pydoc_data" / "topics.py").read_bytes())
    held = torch.arange(len(documentation)) % HELD_OUT == 0
    learned = documentation[~held]
    halves = [learned[: len(learned) // 2], learned[len(learned) // 2 :]]
    rows = [run_seed(seed, source, halves, documentation[held]) for seed in SEEDS]
    content = {
        "command": "python -m benchmarks.tangent",
        "python": platform.python_version(),
        "torch": version("torch"),
        "model": MODEL,
        "pretraining": {"steps": PRETRAINING_STEPS, "learning_rate": PRETRAINING_RATE},
        "steps": STEPS,
        "batch": BATCH,
        "rows": {"source": len(source), "halves": [len(half) for half in halves], "held_out": int(held.sum())},
        "seeds": rows,
    }
    (RESULTS / "tangent.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "tangent.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
