"""Should coefficients share the global gradient clip? `python -m benchmarks.clipping`, a quarter of an hour.

The GPT-2 of workflows/recipe.yaml on its text, with GELU and with the recipe, in the optimizer's groups and at the
learning rates that the stage `train` gives them; what differs is what a step's gradients are scaled down by. Three
seeds, all of a variant's trainings paired with the others'; losses are of the whole validation split. It also says how
large the coefficients' part of the gradient is, and in how many steps the clip acts. It writes results/clipping.json
and clipping.md; `--store DIRECTORY` names where the text is sharded, `.polytrope` by default.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from benchmarks.recipe import difference, mean_of, plus_minus, table
from benchmarks.recipe_trainings import WORKFLOW
from polytrope.models import build_model
from polytrope.pipeline.data.description import TextDataset, read_dataset
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.stages.train.optimization import learning_rate_factor, parameter_groups, set_learning_rate
from polytrope.pipeline.stages.train.parameters import TrainParameters
from polytrope.pipeline.stages.train.trainable import COEFFICIENTS
from polytrope.pipeline.store.store import Store

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
LARGEST = 1.0  # the norm that `train` clips to
TOGETHER = "all together, as `train` does"
APART = "coefficients apart"
FREE = "coefficients never"
NOTHING = "nothing is clipped"
VARIANTS = {"gelu_tanh": (TOGETHER, NOTHING), "hermite4": (TOGETHER, APART, FREE, NOTHING)}


def shard(store: str) -> Path:
    """The directory of the workflow's text, sharded if the store has it not."""
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    workflow["stages"] = {"shard": workflow["stages"]["shard"]}
    workflow["tracking"] = {"enabled": False}
    with tempfile.TemporaryDirectory(prefix="polytrope-clipping-") as directory:
        file = Path(directory) / "workflow.yaml"
        file.write_text(yaml.safe_dump(workflow, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "polytrope.pipeline.commands.cli", "run", str(file), "--store", store]
        subprocess.run([*command, "--executor", "local"], check=True)
    name = workflow["stages"]["shard"]["with"]["name"]
    source = workflow["params"]["source"].items()
    found = Store(store)
    for artifact in filter(None, map(found.load, found.keys())):
        parameters = artifact.components["parameters"]
        if (
            artifact.components["uses"] == "shard"
            and parameters["name"] == name
            and source <= parameters["source"].items()
        ):
            return found.materialize(artifact.key)
    raise SystemExit(f"{store}: the data set `{name}` is not in it")


@dataclass(frozen=True)
class Corpus:
    """All samples of either split, `[samples, tokens]` int64, and how many tokens there are."""

    training: Tensor
    validation: Tensor
    vocabulary: int


def rows_of(directory: Path, split: str) -> Tensor:
    """All samples of a split: `[samples, tokens]`, int64."""
    reader = open_split(directory, split)
    return torch.from_numpy(reader.samples(np.arange(len(reader))).astype(np.int64))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross entropy of the next token."""
    logits = model(rows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    parts = rows.split(32)
    return float(sum(loss_of(model, part).double() * len(part) for part in parts)) / len(rows)


def clip(coefficients: Sequence[Tensor], others: Sequence[Tensor], variant: str) -> tuple[float, float]:
    """Scale the gradients down in place; returns the norms before, of the coefficients and of everything."""
    of_coefficients = torch.nn.utils.get_total_norm(coefficients)
    of_others = torch.nn.utils.get_total_norm(others)
    of_all = torch.hypot(of_coefficients, of_others)
    scale_of = {
        TOGETHER: (of_all, of_all),
        APART: (of_coefficients, of_others),
        FREE: (torch.tensor(0.0), of_others),
        NOTHING: (torch.tensor(0.0), torch.tensor(0.0)),
    }
    for gradients, norm in zip((coefficients, others), scale_of[variant], strict=True):
        if norm > LARGEST:
            for gradient in gradients:
                gradient.mul_(LARGEST / norm)
    return float(of_coefficients), float(of_all)


def train(activation: Any, variant: str, seed: int, stage: Mapping[str, Any], corpus: Corpus) -> dict[str, Any]:
    """One training: its loss, the steps in which more than `LARGEST` was clipped, and the coefficients' share."""
    own = {**stage["model"], "activation": activation}
    parameters = TrainParameters.model_validate({**stage, "model": own, "seed": seed})
    torch.manual_seed(seed)
    model = build_model(
        "gpt2", {**own, "vocab_size": corpus.vocabulary, "sequence_length": corpus.training.size(1) - 1}
    )
    groups = parameter_groups(model, parameters)
    optimizer = torch.optim.AdamW(groups, betas=parameters.betas, eps=parameters.epsilon, fused=True)
    coefficients = [one for group in groups if group["name"].startswith(COEFFICIENTS) for one in group["params"]]
    others = [one for group in groups if not group["name"].startswith(COEFFICIENTS) for one in group["params"]]
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for step in range(parameters.steps):
        factor = learning_rate_factor(step, parameters.steps, parameters.warmup_steps, parameters.minimum_learning_rate)
        set_learning_rate(optimizer.param_groups, factor)
        chosen = torch.randint(len(corpus.training), (parameters.global_batch_size,), generator=generator)
        optimizer.zero_grad()
        loss_of(model, corpus.training[chosen]).backward()  # type: ignore[no-untyped-call]
        norms.append(clip([one.grad for one in coefficients], [one.grad for one in others], variant))
        optimizer.step()
    return {
        "seed": seed,
        "loss": held_out_loss(model, corpus.validation),
        "clipped": sum(of_all > LARGEST for _, of_all in norms) / len(norms),
        "share": statistics.median((own / of_all) ** 2 for own, of_all in norms),
        "largest_share": max((own / of_all) ** 2 for own, of_all in norms),
    }


def measure(store: str) -> dict[str, Any]:
    """Every variant's trainings, and its paired difference to `TOGETHER` of the same activation."""
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    stage = workflow["stages"]["train"]
    directory = shard(store)
    description = read_dataset(directory)
    assert isinstance(description, TextDataset)
    corpus = Corpus(rows_of(directory, "train"), rows_of(directory, "validation"), description.tokenizer.vocab_size)
    settings = {
        key: workflow["params"][value.removeprefix("${params.").removesuffix("}")]
        if str(value).startswith("${params.")
        else value
        for key, value in stage["with"].items()
        if key != "seed"
    }
    rows = []
    for activation in stage["matrix"]["activation"]:
        label = activation if isinstance(activation, str) else activation["label"]
        plain = activation if isinstance(activation, str) else {k: v for k, v in activation.items() if k != "label"}
        losses: dict[str, dict[int, float | None]] = {}
        for variant in VARIANTS.get(label, ()):
            trainings = []
            for seed in SEEDS:
                trainings.append(train(plain, variant, seed, settings, corpus))
                print(json.dumps({"activation": label, "variant": variant, **trainings[-1]}), flush=True)
            losses[variant] = {one["seed"]: one["loss"] for one in trainings}
            rows.append(
                {
                    "activation": label,
                    "variant": variant,
                    "trainings": trainings,
                    "loss": mean_of(list(losses[variant].values())),
                    "difference": None if variant == TOGETHER else difference(losses[variant], losses[TOGETHER]),
                }
            )
    return {"format": 1, "largest_norm": LARGEST, "rows": rows}


def markdown(content: Mapping[str, Any]) -> str:
    """A row per variant; p is that of the paired t-test, not corrected."""
    rows = []
    for row in content["rows"]:
        compared = row["difference"]
        trainings = row["trainings"]
        rows.append(
            [
                row["activation"],
                row["variant"],
                plus_minus(row["loss"], ".4f"),
                plus_minus(compared, "+.4f"),
                "–" if compared is None or compared["p_value"] is None else f"{compared['p_value']:.3f}",
                f"{100 * statistics.mean(one['clipped'] for one in trainings):.0f} %",
                f"{statistics.median(one['share'] for one in trainings):.2g}",
                f"{max(one['largest_share'] for one in trainings):.2g}",
            ]
        )
    heads = ["activation", "clipped", "loss, nats per token", "difference", "p", "steps above the norm"]
    heads += ["coefficients' share of the squared norm, median", "largest"]
    return "\n".join(table(heads, rows)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default=os.environ.get("POLYTROPE_STORE", ".polytrope"), help="holds the text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    content = measure(options.store)
    (RESULTS / "clipping.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "clipping.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content))


if __name__ == "__main__":
    main()
