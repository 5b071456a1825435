"""How long a training step of the recipe takes beside GELU's: `python -m benchmarks.recipe_time`, four minutes.

The models of workflows/recipe.yaml take steps (forward, backward, AdamW) in turns, one thread, float32; what counts is
processor time, which other programs on the machine disturb less than the clock. Each round gives a ratio to GELU's step
of the same round; of these the median is reported, with the interval that holds the median of all rounds with 95 %
(order statistics, no assumption about their distribution). The bar is 1.02. A last row tells what of it is Python's:
torch's own GELU, called by an autograd function in Python as ours is. It writes results/recipe_time.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.recipe_trainings import WORKFLOW, model_name, name_of
from polytrope.models import build_model

RESULTS = Path(__file__).parent / "results"
BAR = 1.02
TEXT = {"vocab_size": 1024, "sequence_length": 128}
IMAGES = {"num_classes": 10, "in_channels": 1}


class GELUByPython(torch.autograd.Function):
    """torch's GELU as it is, but called from Python, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        result: Tensor = torch.ops.aten.gelu(x, approximate=approximate)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.ops.aten.gelu_backward(gradients[0], *ctx.saved_tensors, approximate=ctx.approximate), None


def call_by_python(model: nn.Module) -> nn.Module:
    """The model, whose GELUs now go through `GELUByPython`."""
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.forward = lambda x, module=module: GELUByPython.apply(x, module.approximate)  # type: ignore[method-assign]
    return model


def stepper(model: nn.Module, batch: tuple[Tensor, Tensor], steps: int) -> Callable[[], float]:
    """A function that trains some steps and returns the processor seconds of one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # as pipeline/stages/train has it

    def run() -> float:
        started = time.process_time()
        for _ in range(steps):
            model(*batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return (time.process_time() - started) / steps

    return run


def in_turns(steppers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each by round; who begins changes with the round. A first round warms up and is left out."""
    found: dict[str, list[float]] = {name: [] for name in steppers}
    names = list(steppers)
    for number in range(-1, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = steppers[name]()
            if number >= 0:
                found[name].append(seconds)
    return found


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """The median, and the order statistics that hold the median of what was sampled with at least 95 %.

    Raises:
        ValueError: fewer than 6 values, which no such interval exists for.
    """
    count = len(values)
    outside, rank = 0.5**count, 0  # P(fewer than rank + 1 of the values lie below the median)
    while 2 * (outside + math.comb(count, rank + 1) * 0.5**count) <= 0.05:
        rank += 1
        outside += math.comb(count, rank) * 0.5**count
    if 2 * outside > 0.05:
        raise ValueError(f"an interval of the median needs 6 rounds or more, got {count}")
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "low": ordered[rank], "high": ordered[count - 1 - rank]}


def measure(stage: dict[str, Any], batch: tuple[Tensor, Tensor], sizes: dict[str, int], options: Any) -> dict[str, Any]:
    """Of a training of the workflow: each activation's milliseconds, and its ratio to the first, which is GELU."""
    model = stage["with"]["model"]
    activations = [
        one if isinstance(one, str) else {key: value for key, value in one.items() if key != "label"}
        for one in stage["matrix"]["activation"]
    ]
    architecture = model.get("architecture", "gpt2")
    own = {key: value for key, value in model.items() if key != "architecture"}
    steppers = {}
    for activation in activations:
        torch.manual_seed(0)
        built = build_model(architecture, {**own, **sizes, "activation": activation})
        steppers[name_of(activation)] = stepper(built, batch, options.steps)
    torch.manual_seed(0)
    built = build_model(architecture, {**own, **sizes, "activation": activations[0]})
    steppers[f"{name_of(activations[0])}, called by Python"] = stepper(call_by_python(built), batch, options.steps)
    seconds = in_turns(steppers, options.rounds)
    gelu = seconds[name_of(activations[0])]
    return {
        "model": model_name(model, images=architecture == "convnext"),
        "samples": len(batch[0]),
        "milliseconds": {name: 1000 * statistics.median(own) for name, own in seconds.items()},
        "ratios": {
            name: median_interval([one / other for one, other in zip(own, gelu, strict=True)])
            for name, own in list(seconds.items())[1:]
        },
    }


def markdown(content: dict[str, Any]) -> str:
    """A row per model and activation."""
    lines = ["| model | activation | ms per step | times GELU's step (95 %) | at most 1.02 |", "| --- " * 5 + "|"]
    for row in content["models"]:
        for name, milliseconds in row["milliseconds"].items():
            ratio = row["ratios"].get(name)
            cells = [f"{row['model']}, {row['samples']} samples", name, f"{milliseconds:.1f}"]
            cells += (
                ["–", "–"] if ratio is None else [shown(ratio), "yes" if ratio["median"] <= content["bar"] else "no"]
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2, help="of each model in a round")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stages = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["stages"]
    tokens = torch.randint(TEXT["vocab_size"], (8, TEXT["sequence_length"] + 1))
    images = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    models = [
        measure(stages["train"], (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), TEXT, options),
        measure(stages["convnext"], images, IMAGES, options),
    ]
    content = {"command": "python -m benchmarks.recipe_time", "bar": BAR, "rounds": options.rounds, "models": models}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "recipe_time.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (options.output / "recipe_time.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content))


if __name__ == "__main__":
    main()
