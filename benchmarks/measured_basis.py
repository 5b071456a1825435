"""How fast the coefficients of a conversion learn in either basis: `python -m benchmarks.measured_basis`.

GPT-2 of 2 layers of 64 on the bytes of CPython's documentation, 300 steps with GELU, is converted to Hermite
polynomials of degree 3 and 8, as fitted or with `basis: measured`. Then coefficients alone learn, 60 steps of AdamW
at a constant rate; in the third variant the recurrence does not. Three seeds, a sweep of rates; losses
are of the held-out text. One thread, a few minutes. It writes results/measured_basis.json and measured_basis.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.recipe import mean_of
from benchmarks.recipe_tables import plus_minus, table
from polytrope.models import build_model
from polytrope.models.convert import convert
from polytrope.models.surgery import replace_module
from polytrope.ops import LearnableActivation
from polytrope.pipeline.stages.convert.calibration_data import documentation_sentences

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
RATES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DEGREES = (3, 8)
STEPS = 60
LENGTH = 64
VARIANTS = {"as fitted": "family", "measured": "measured", "measured, recurrence fixed": "measured"}
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 256, "sequence_length": LENGTH, "activation": "gelu"}


def read_corpus() -> tuple[Tensor, Tensor]:
    """Rows of bytes `[rows, LENGTH + 1]`, int64: for training, and the last tenth."""
    text = torch.frombuffer(bytearray("\n".join(documentation_sentences()).encode()), dtype=torch.uint8).long()
    rows = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    held_out = len(rows) // 10
    return rows[:-held_out], rows[-held_out:]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross entropy of the next byte."""
    logits = model(rows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        return float(torch.stack([loss_of(model, part) for part in rows[:512].split(64)]).mean())


def batches(rows: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield rows[torch.randint(len(rows), (8,), generator=generator)]


def train(
    model: nn.Module, parameters: Sequence[nn.Parameter], rows: Tensor, steps: int, rate: float, seed: int
) -> None:
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    for batch in batches(rows, steps, seed):
        optimizer.zero_grad()
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def learn(rows: Tensor, held_out: Tensor, seed: int) -> dict[str, Any]:
    """Losses of one model: with GELU, converted, and of every variant after its coefficients have learned."""
    torch.manual_seed(seed)
    model = build_model("gpt2", MODEL)
    train(model, list(model.parameters()), rows, 300, 3e-3, seed)
    model.requires_grad_(False)
    found: dict[str, Any] = {"seed": seed, "gelu": held_out_loss(model, held_out), "converted": {}, "learned": {}}
    calibration = [rows[torch.arange(0, len(rows), len(rows) // 256)[:256], :-1]]
    for degree in DEGREES:
        for variant, basis in VARIANTS.items():
            done = convert(model, calibration, family="hermite", degree=degree, basis=basis)
            found["converted"][f"{degree}"] = held_out_loss(done.model, held_out)  # the same function in either basis
            losses: dict[str, float] = {}
            for rate in RATES:
                learned = []
                for layer in done.layers:
                    module = layer.fit.build()
                    assert isinstance(module, LearnableActivation)
                    replace_module(done.model, layer.name, module)
                    numbers = dict(module.named_parameters())
                    learned += [numbers["coefficients"]] if variant.endswith("fixed") else list(numbers.values())
                train(done.model, learned, rows, STEPS, rate, 100 + seed)
                losses[f"{rate:g}"] = held_out_loss(done.model, held_out)
            found["learned"][f"{variant}, degree {degree}"] = losses
    return found


def main() -> None:
    torch.set_num_threads(1)
    rows, held_out = read_corpus()
    seeds = []
    for seed in SEEDS:
        seeds.append(learn(rows, held_out, seed))
        print(json.dumps(seeds[-1]), flush=True)
    gained = {
        f"{variant}, degree {degree}": {
            f"{rate:g}": mean_of(
                [
                    one["converted"][f"{degree}"] - one["learned"][f"{variant}, degree {degree}"][f"{rate:g}"]
                    for one in seeds
                ]
            )
            for rate in RATES
        }
        for degree in DEGREES
        for variant in VARIANTS
    }
    lost = {f"{degree}": mean_of([one["converted"][f"{degree}"] - one["gelu"] for one in seeds]) for degree in DEGREES}
    content = {"format": 1, "steps": STEPS, "seeds": seeds, "lost": lost, "gained": gained}
    (RESULTS / "measured_basis.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "measured_basis.md").write_text(markdown(content), encoding="utf-8")


def markdown(content: Mapping[str, Any]) -> str:
    """A row per variant: the fall of the loss in nats per byte, by the rate."""
    rows = [
        [variant, *(plus_minus(value, "+.4f") for value in of.values())] for variant, of in content["gained"].items()
    ]
    lost = ", ".join(f"{plus_minus(value, '.4f')} at degree {degree}" for degree, value in content["lost"].items())
    lines = [f"Nats per byte; the conversion alone loses {lost}. Gained afterwards, by the rate:", ""]
    lines += table(["basis", *(f"{rate:g}" for rate in RATES)], rows)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
