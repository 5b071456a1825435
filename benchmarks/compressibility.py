"""Do models with learnable activations become smaller better or worse than those with GELU?

python -m benchmarks.compressibility --store DIRECTORY

The models are trainings of the recipe's study on its first text, five seeds of GELU, Hermite 4 and the control `affine`
each (`polytrope run workflows/recipe.yaml --set 'params.seeds=[5, 6, 7, 8, 9]' --store DIRECTORY`). Every one loses a
block, gets its linear layers in two factors, its weights rounded, or a quarter of its units joined; nothing is trained
afterwards. Calibrated on training text, compared on the part of the validation text that is for reporting. What counts
is how much the loss rises, in nats per token, paired by seed: the rise with the learnable activation less that with
GELU, with 95 % intervals and Holm's correction over all of them. It writes results/compressibility.json, .md and .png.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.recipe import RESULTS, correct, difference, mean_of
from benchmarks.recipe_tables import p_value, plus_minus, table
from benchmarks.recipe_trainings import describe, for_choosing
from polytrope.models.checkpoint import load_model
from polytrope.models.convert import convert
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.tokenization import read_tokenizer
from polytrope.pipeline.stages.analyze.analyses.merging import Merger
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support import figures

SETTING = {
    "corpus": "python-documentation-and-source",
    "model": "GPT-2, 4 layers of 128",
    "steps": 480,
    "learning_rate": 3e-3,
}
BASELINE = "gelu_tanh"
LEARNABLE = {"hermite4 gelu [-4, 4] × 10": "Hermite 4", "affine gelu_tanh × 10": "affine (control)"}
SEEDS = range(5, 10)
LEFT = 0.75  # of the units, where they are joined
CALIBRATION = 64  # samples
Way = Callable[[nn.Module, list[Tensor]], nn.Module]
Row = dict[str, Any]


def converted(**options: Any) -> Way:
    """By `polytrope.convert`, the model as it is otherwise."""

    def change(model: nn.Module, calibration: list[Tensor]) -> nn.Module:
        return convert(model, calibration, samples=None, **options).model

    return change


def join_units(model: nn.Module, _calibration: list[Tensor]) -> nn.Module:
    """Units of every MLP joined, the nearest first, until a quarter of them is gone."""
    changed = copy.deepcopy(model)
    for module in changed.modules():
        if not (isinstance(getattr(module, "c_fc", None), nn.Linear) and isinstance(module.c_proj, nn.Linear)):
            continue
        merger = Merger(module.c_fc, module.c_proj)
        wanted, distance = int(LEFT * merger.left), 0.0
        while merger.left > wanted:
            distance += 0.002
            merger.merge_up_to(distance)
        module.c_fc, module.c_proj = merger.linears()
    return changed


WAYS: dict[str, Way] = {
    "1 of 4 blocks dropped": converted(drop_blocks={"count": 1}),
    "layers factored, 1.5 times smaller": converted(factorize={"ratio": 1.5}),
    "layers factored, 3 times smaller": converted(factorize={"ratio": 3.0}),
    "8 bits": converted(quantize={"bits": 8}),
    "4 bits": converted(quantize={"bits": 4}),
    "3 bits": converted(quantize={"bits": 3}),
    "a quarter of the units joined": join_units,
}


def read_models(store: Store) -> dict[str, dict[int, tuple[Path, Path]]]:
    """Of each activation and seed the directories of the model and of its data.

    Raises:
        SystemExit: a model that is not in the store.
    """
    present = [artifact for artifact in map(store.load, store.keys()) if artifact is not None]
    by_digest = {artifact.digest: artifact for artifact in present}
    found: dict[str, dict[int, tuple[Path, Path]]] = {name: {} for name in (BASELINE, *LEARNABLE)}
    for artifact in present:
        if artifact.components["uses"] != "train":
            continue
        dataset = by_digest.get(artifact.components["inputs"]["dataset"])
        row = None if dataset is None else describe(artifact, dataset, by_digest)
        if row is None or dataset is None or any(row[key] != value for key, value in SETTING.items()):
            continue
        if row["name"] in found and row["seed"] in SEEDS:
            found[row["name"]][row["seed"]] = (store.materialize(artifact.key), store.materialize(dataset.key))
    for name, models in found.items():
        missing = sorted(set(SEEDS) - set(models))
        if missing:
            raise SystemExit(
                f"{store.address}: no {name} of seeds {', '.join(map(str, missing))}; they are made by `polytrope run "
                f"workflows/recipe.yaml --set 'params.seeds={list(SEEDS)}' --store {store.address}`"
            )
    return found


def read_data(directory: Path) -> tuple[list[Tensor], Tensor, Tensor]:
    """Training samples for the calibration; the validation text `[samples, tokens]`, and which tokens are reported."""
    training, validation = open_split(directory, "train"), open_split(directory, "validation")
    known = torch.from_numpy(training.samples(np.arange(CALIBRATION)).astype(np.int64))[:, :-1]
    blocks = validation.samples(np.arange(len(validation))).astype(np.int64)
    reported = ~for_choosing(blocks, read_tokenizer(directory).end_of_text)
    return list(known.split(16)), torch.from_numpy(blocks), torch.from_numpy(reported)


def loss_of(model: nn.Module, blocks: Tensor, reported: Tensor) -> float:
    """Mean cross entropy of the reported tokens, nats."""
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens, counts in zip(blocks.split(16), reported.split(16), strict=True):
            logits = model(tokens[:, :-1])
            found = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
            chosen = counts[:, 1:].flatten()
            total += float(found[chosen].double().sum())
            count += int(chosen.sum())
    return total / count


def measure(models: Mapping[str, Mapping[int, tuple[Path, Path]]]) -> list[Row]:
    """A row per model and way: the loss before, and after."""
    rows: list[Row] = []
    data: dict[Path, tuple[list[Tensor], Tensor, Tensor]] = {}
    for name, seeds in models.items():
        for seed, (model_directory, dataset_directory) in seeds.items():
            if dataset_directory not in data:
                data[dataset_directory] = read_data(dataset_directory)
            calibration, blocks, reported = data[dataset_directory]
            model = load_model(model_directory).eval()
            start = time.perf_counter()
            before = loss_of(model, blocks, reported)
            for way, change in WAYS.items():
                after = loss_of(change(model, calibration), blocks, reported)
                rows.append({"name": name, "seed": seed, "way": way, "before": before, "after": after})
            print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def compare(rows: Sequence[Row]) -> list[Row]:
    """For each way how far the loss rises, and paired differences of the rises.

    Of both others to GELU, and of Hermite 4 to the control, which is the shape's share; Holm's correction is over all
    of the former, and over all of the latter.
    """
    rises: dict[str, dict[str, dict[int, float | None]]] = {way: {} for way in WAYS}
    for row in rows:
        rises[row["way"]].setdefault(row["name"], {})[row["seed"]] = row["after"] - row["before"]
    found = []
    for way, by_name in rises.items():
        entry: Row = {"way": way, "rise": {name: mean_of(list(of.values())) for name, of in by_name.items()}}
        entry["difference"] = {name: difference(by_name[name], by_name[BASELINE]) for name in LEARNABLE}
        entry["shape"] = difference(*(by_name[name] for name in LEARNABLE))
        found.append(entry)
    correct([entry["shape"] for entry in found])
    correct([one for entry in found for one in entry["difference"].values()])
    return found


def markdown(ways: Sequence[Row], rows: Sequence[Row]) -> str:
    """The rise with GELU, and for each other activation the difference and its corrected p-value."""
    titles = [*(f"{title} − GELU" for title in LEARNABLE.values()), "Hermite 4 − affine"]
    heads = ["what is done", "GELU", *(part for title in titles for part in (title, "p (Holm)"))]
    lines = []
    for entry in ways:
        cells = [entry["way"], plus_minus(entry["rise"][BASELINE], "+.4f")]
        for found in (*(entry["difference"][name] for name in LEARNABLE), entry["shape"]):
            cells += [plus_minus(found, "+.4f"), p_value(found)]
        lines.append(cells)
    before = {
        name: mean_of([row["before"] for row in rows if row["name"] == name and row["way"] == next(iter(WAYS))])
        for name in (BASELINE, *LEARNABLE)
    }
    names = {BASELINE: "GELU", **LEARNABLE}
    losses = "; ".join(f"{names[name]} {plus_minus(loss, '.3f')}" for name, loss in before.items())
    said = (
        f"Rise of the loss in nats per token, {len({row['seed'] for row in rows})} seeds, mean ± half of the 95 % "
        f"interval; differences paired by seed. Before: {losses}."
    )
    return "\n".join([*table(heads, lines), "", said]) + "\n"


def picture(ways: Sequence[Row]) -> bytes:
    """PNG of the differences with their intervals."""

    def draw(_theme: figures.Theme) -> Figure:
        figure: Figure
        figure, axes = plt.subplots(figsize=(7.0, 0.45 * len(ways) + 1.2), layout="constrained")
        places = np.arange(len(ways))[::-1]
        for number, (name, title) in enumerate(LEARNABLE.items()):
            found = [entry["difference"][name] for entry in ways]
            axes.errorbar(
                [one["mean"] for one in found],
                places - 0.16 * number + 0.08,
                xerr=[one["half_width"] for one in found],
                fmt="o" if number == 0 else "s",
                label=title,
                capsize=3,
            )
        axes.axvline(0.0, linewidth=1, linestyle=":", color="gray")
        axes.set_yticks(places, [entry["way"] for entry in ways])
        axes.set_xlabel("rise of the loss less that with GELU, nats per token (left: better than GELU)")
        axes.legend()
        return figure

    return figures.render(draw, "light")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="the store with the recipe's trainings")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIRECTORY", help="default benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.output / "compressibility.json"
    rows = measure(read_models(Store(options.store)))
    ways = compare(rows)
    content = {"command": "python -m benchmarks.compressibility", "ways": ways, "rows": rows}
    options.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(ways, rows), encoding="utf-8")
    path.with_suffix(".png").write_bytes(picture(ways))
    print(markdown(ways, rows))


if __name__ == "__main__":
    main()
