"""What the stage `train` has no option for: `python -m benchmarks.recipe_variants`, twenty minutes.

Should coefficients share the global gradient clip? Is one function for all blocks enough, or has each channel to have
its own? The GPT-2 of workflows/recipe.yaml on its text, in the optimizer's groups and at the rates that `train` gives
them; the batches are drawn in another order than the trainer's, so these losses are to be compared with one another
alone. Three seeds; differences are paired, losses of the whole validation split. It also says how large the
coefficients' part of the gradient is, and in how many steps the clip acts. It writes recipe_variants.md and .json in
results/ (what stands there is not trained again); `--store DIRECTORY` names where the text is sharded.
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

from benchmarks.recipe import difference, mean_of
from benchmarks.recipe_tables import plus_minus, table
from benchmarks.recipe_trainings import WORKFLOW
from polytrope.models import build_model
from polytrope.models.checkpoint import activation_modules
from polytrope.pipeline.data.description import TextDataset, read_dataset
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.stages.train.optimization import learning_rate_factor, parameter_groups, set_learning_rate
from polytrope.pipeline.stages.train.parameters import TrainParameters
from polytrope.pipeline.stages.train.trainable import COEFFICIENTS
from polytrope.pipeline.store.store import Store

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
LARGEST = 1.0  # the norm that `train` clips to
TOGETHER = "together"  # as `train` does
APART = "apart"
FREE = "coefficients not"
NOTHING = "nothing"


@dataclass(frozen=True)
class Variant:
    """What one training differs in.

    Args:
        activation: its label in the workflow's matrix.
        clipped: whose norms are held at `LARGEST`: of all gradients together, of the coefficients' and the others'
            apart, of the others alone, or none.
        one_function: all blocks share one activation.
        by_channel: each of its channels has coefficients of its own.
    """

    activation: str
    clipped: str = TOGETHER
    one_function: bool = False
    by_channel: bool = False


GELU = "GELU"
RECIPE = "the recipe"
VARIANTS = {
    GELU: Variant("gelu_tanh"),
    "GELU, nothing clipped": Variant("gelu_tanh", NOTHING),
    RECIPE: Variant("hermite4-wide"),
    "the recipe, coefficients clipped apart": Variant("hermite4-wide", APART),
    "the recipe, coefficients not clipped": Variant("hermite4-wide", FREE),
    "the recipe, nothing clipped": Variant("hermite4-wide", NOTHING),
    "the recipe, one function for all blocks": Variant("hermite4-wide", one_function=True),
    "the recipe, a function for each channel": Variant("hermite4-wide", by_channel=True),
    "the control": Variant("affine"),
    "the control, one function for all blocks": Variant("affine", one_function=True),
}


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
        parameters = artifact.parameters
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


def train(variant: Variant, seed: int, stage: Mapping[str, Any], activation: Any, corpus: Corpus) -> dict[str, Any]:
    """One training: its loss, in which share of the steps the clip acted, and the coefficients' share of the gradient's
    squared norm.
    """
    if variant.by_channel:
        activation = {**activation, "num_parameters": 4 * stage["model"]["n_embd"]}
    own = {**stage["model"], "activation": activation}
    parameters = TrainParameters.model_validate({**stage, "model": own, "seed": seed})
    torch.manual_seed(seed)
    sizes = {"vocab_size": corpus.vocabulary, "sequence_length": corpus.training.size(1) - 1}
    model = build_model("gpt2", {**own, **sizes})
    if variant.one_function:
        modules = activation_modules(model)
        for block in model.get_submodule("transformer.h"):  # type: ignore[attr-defined]
            block.mlp.activation = modules[0]
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
        norms.append(clip([one.grad for one in coefficients], [one.grad for one in others], variant.clipped))
        optimizer.step()
    shares = [(of_coefficients / of_all) ** 2 for of_coefficients, of_all in norms]
    return {
        "loss": held_out_loss(model, corpus.validation),
        "learned": sum(one.numel() for one in coefficients),
        "clipped": sum(of_all > LARGEST for _, of_all in norms) / len(norms),
        "share": statistics.median(shares),
        "largest_share": max(shares),
    }


def measure(store: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Every variant's trainings, written as they end."""
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
    labelled = {one if isinstance(one, str) else one["label"]: one for one in stage["matrix"]["activation"]}
    content: dict[str, Any] = {"format": 1, "largest_norm": LARGEST, "trainings": list(recorded.get("trainings", ()))}
    known = {(one["variant"], one["seed"]) for one in content["trainings"]}
    for name, variant in VARIANTS.items():
        given = labelled[variant.activation]
        activation = given if isinstance(given, str) else {key: one for key, one in given.items() if key != "label"}
        for seed in SEEDS:
            if (name, seed) in known:
                continue
            found = {"variant": name, "seed": seed, **train(variant, seed, settings, activation, corpus)}
            print(json.dumps(found), flush=True)
            content["trainings"].append(found)
            (RESULTS / "recipe_variants.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def compare(trainings: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Variant → its trainings, mean loss, and paired differences to GELU and to the recipe (or control) as it is."""
    found: dict[str, dict[str, Any]] = {}
    losses: dict[str, dict[int, float | None]] = {}
    for name in VARIANTS:
        own = [one for one in trainings if one["variant"] == name]
        if not own:
            continue
        losses[name] = {one["seed"]: one["loss"] for one in own}
        as_it_is = name.partition(",")[0]
        found[name] = {
            "trainings": own,
            "loss": mean_of(list(losses[name].values())),
            "to_gelu": None if name == GELU else difference(losses[name], losses[GELU]),
            "to_itself": None if as_it_is == name else difference(losses[name], losses[as_it_is]),
        }
    return found


def markdown(content: Mapping[str, Any]) -> str:
    """A row per variant; p is that of the paired t-test, not corrected."""
    rows = []
    for name, row in compare(content["trainings"]).items():
        trainings = row["trainings"]
        shown = [name, str(trainings[0]["learned"]), plus_minus(row["loss"], ".4f")]
        for compared in (row["to_gelu"], row["to_itself"]):
            p = None if compared is None else compared["p_value"]
            shown += [plus_minus(compared, "+.4f"), "–" if p is None else f"{p:.3f}"]
        shown.append(f"{100 * statistics.mean(one['clipped'] for one in trainings):.0f} %")
        shares = (statistics.median(one["share"] for one in trainings), max(one["largest_share"] for one in trainings))
        rows.append([*shown, *(f"{100 * share:.2g} %" if share else "–" for share in shares)])
    heads = ["variant", "learned numbers", "loss", "Δ to GELU", "p", "Δ to the same, unchanged", "p"]
    heads += ["steps clipped", "coefficients' share of the squared norm: median", "largest"]
    return "\n".join(table(heads, rows)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default=os.environ.get("POLYTROPE_STORE", ".polytrope"), help="holds the text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "recipe_variants.json"
    recorded = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    content = measure(options.store, recorded)
    (RESULTS / "recipe_variants.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content))


if __name__ == "__main__":
    main()
