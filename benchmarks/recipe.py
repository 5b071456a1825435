"""The study of the recipe: `python -m benchmarks.recipe --store DIRECTORY … [--train PART …]`.

Of every training in the stores that belongs to it (`polytrope run workflows/recipe.yaml`, with other rates, seeds and
texts by `--set`) this takes the losses and adds them to those of results/recipe.json, which is the record: what stands
there stays, and is not trained again. `--train` makes the trainings of a part of the study that are missing, one at a
time, in the first store; what was interrupted goes on there. Without it, what a store has so far is taken.

Trainings that differ in nothing but the activation and the rate of its coefficients are compared, paired by seed: with
GELU, and with the control at every rate it was trained at. Choices are made with the seeds from 10 on and the documents
with about half of a text's validation tokens; what is reported is of the other seeds and the other documents. It writes
results/recipe.json (every loss, what the coefficients of every model have become, every comparison), recipe.md (tables)
and a plot for each data set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import recipe_budgets, recipe_shapes
from benchmarks.recipe_tables import is_reported, markdown, rate_of
from benchmarks.recipe_trainings import (
    BASELINES,
    CONTROL,
    DEFAULT,
    DEVELOPMENT,
    EQUAL_TIME,
    FROZEN,
    PARTS,
    RECIPE,
    SETTING,
    STEPS_OF_IMAGES,
    Row,
    Sources,
    compose,
    read_texts,
    read_trainings,
)
from polytrope.pipeline.stages.report.contents import paired_difference
from polytrope.pipeline.stages.report.statistics import holm, mean_interval
from polytrope.pipeline.support import figures

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def train(part: str, store: str, sources: Sources, recorded: Sequence[Row]) -> None:
    """Run what is missing of a part, one training at a time; a training that diverges is a result."""
    workflow = compose(part, sources, recorded)
    if workflow is None:
        print(f"part `{part}`: all of it is recorded")
        return
    with tempfile.TemporaryDirectory(prefix="polytrope-recipe-") as directory:
        file = Path(directory) / "workflow.yaml"
        file.write_text(yaml.safe_dump(workflow, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "polytrope.pipeline.commands.cli", "run", str(file), "--store", store]
        subprocess.run([*command, "--executor", "local", "--concurrency", "1"], cwd=ROOT, check=True)


def compare(trainings: Sequence[Row]) -> list[Row]:
    """Each setting with its activations, compared with GELU and with every control. Holm's correction is for each kind,
    and apart for what the study asks (`is_asked`) and for everything that was tried beside it.
    """
    settings: dict[tuple[Any, ...], dict[str, dict[int, float | None]]] = {}
    accuracies: dict[tuple[Any, ...], dict[str, dict[int, float | None]]] = {}
    corpora: dict[tuple[Any, ...], str] = {}
    for row in trainings:
        setting = tuple(row[key] for key in SETTING)
        corpora.setdefault(setting, row["corpus"])
        loss = row["development_loss" if row["seed"] >= DEVELOPMENT else "test_loss"]
        settings.setdefault(setting, {}).setdefault(row["name"], {})[row["seed"]] = loss
        if row["accuracy"] is not None:
            accuracies.setdefault(setting, {}).setdefault(row["name"], {})[row["seed"]] = row["accuracy"]
    found = []
    for setting, losses in settings.items():
        baseline = next((name for name in BASELINES if name in losses), None)
        controls = {
            name: of for name, of in losses.items() if name.startswith(f"{CONTROL} ") and not name.endswith(FROZEN)
        }
        entries = [summarize(name, of, losses.get(baseline or "", {}), baseline) for name, of in losses.items()]
        right = accuracies.get(setting, {})
        for entry in entries:
            if entry["name"] in right:
                of = right[entry["name"]]
                entry["accuracy"] = mean_of([share for seed, share in of.items() if seed < DEVELOPMENT])
                if entry["name"] != baseline:
                    entry["accuracy_difference"] = difference(of, right.get(baseline or "", {}))
            if entry["name"] not in (*BASELINES, *controls):
                own = losses[entry["name"]]
                entry["differences_to_controls"] = {name: difference(own, of) for name, of in controls.items()}
        for asked in (True, False):
            family = [entry for entry in entries if is_asked(entry["name"]) == asked]
            correct([entry.get("difference") for entry in family])
            correct([entry.get("accuracy_difference") for entry in family])
            correct(
                [
                    one
                    for entry in entries
                    for control, one in entry.get("differences_to_controls", {}).items()
                    if (is_asked(entry["name"]) and is_asked(control)) == asked
                ]
            )
        about = {"corpus": corpora[setting], **dict(zip(SETTING, setting, strict=True))}
        found.append({**about, "baseline": baseline, "controls": list(controls), "activations": entries})
    return found


def is_asked(name: str) -> bool:
    """Whether it is what the study asks about: the recipe, the control at its rate, and functions that do not learn."""
    return name == RECIPE or (name.startswith(f"{CONTROL} ") and name.endswith(" × 10")) or rate_of(name) in ("", "0")


def correct(differences: Sequence[Row | None]) -> None:
    """Write Holm's corrected p-values into those that have one."""
    tested = [one for one in differences if one is not None and one["p_value"] is not None]
    for one, corrected in zip(tested, holm([one["p_value"] for one in tested]), strict=True):
        one["holm_p_value"] = corrected


def summarize(
    name: str, losses: Mapping[int, float | None], baseline: Mapping[int, float | None], baseline_name: str | None
) -> Row:
    """Mean loss over the reported seeds, and the paired difference to the baseline there."""
    reported = [loss for seed, loss in losses.items() if seed < DEVELOPMENT]
    developed = {seed: loss for seed, loss in losses.items() if seed >= DEVELOPMENT and loss is not None}
    failed = sum(loss is None for loss in losses.values())
    entry: Row = {"name": name, "failed": failed, "development": developed, "loss": mean_of(reported)}
    if name != baseline_name:
        entry["difference"] = difference(losses, baseline)
    return entry


def mean_of(values: Sequence[float | None]) -> Row | None:
    """Mean and half of its interval; None without a value."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    interval = mean_interval(found)
    return {"mean": interval.mean, "half_width": interval.half_width, "values": found}


def difference(losses: Mapping[int, float | None], reference: Mapping[int, float | None]) -> Row | None:
    """Paired over the reported seeds that both have; None without any."""
    pairs = [
        (own, other)
        for seed in losses
        if seed < DEVELOPMENT and (own := losses[seed]) is not None and (other := reference.get(seed)) is not None
    ]
    return paired_difference([own for own, _ in pairs], [other for _, other in pairs]) if pairs else None


def base_rates(trainings: Sequence[Row]) -> list[Row]:
    """Of activations trained at several base rates with the seeds for choosing: the loss at each, and the best rate.

    Only seeds that every rate has are counted; a rate with a failed training is not chosen.
    """
    groups: dict[tuple[Any, ...], dict[float, dict[int, float | None]]] = {}
    about = [key for key in ("corpus", *SETTING, "name") if key != "learning_rate"]
    for row in trainings:
        if row["seed"] >= DEVELOPMENT:
            rates = groups.setdefault(tuple(row[key] for key in about), {})
            is_image = row.get("accuracy") is not None
            rates.setdefault(row["learning_rate"], {})[row["seed"]] = row["loss" if is_image else "development_loss"]
    found = []
    for group, rates in groups.items():
        seeds = sorted(set.intersection(*(set(losses) for losses in rates.values())))
        if len(rates) < 2 or not seeds:
            continue
        means: dict[float, float] = {}
        for rate in sorted(rates):
            values = [loss for seed in seeds if (loss := rates[rate][seed]) is not None]
            if len(values) == len(seeds):
                means[rate] = sum(values) / len(values)
        found.append(
            {
                **dict(zip(about, group, strict=True)),
                "seeds": seeds,
                "rates": [
                    {"learning_rate": rate, "losses": rates[rate], "mean": means.get(rate)} for rate in sorted(rates)
                ],
                "chosen": min(means, key=means.__getitem__) if means else None,
            }
        )
    return found


def at_chosen_rates(trainings: Sequence[Row], rates: Sequence[Row]) -> list[Row]:
    """Activations compared with GELU, and with the control, where each has the base rate that was chosen for it."""
    about = [key for key in SETTING if key != "learning_rate"]
    losses: dict[tuple[Any, ...], dict[str, dict[int, float | None]]] = {}
    for one in rates:
        key = tuple(one[name] for name in about)
        for row in trainings:
            if (
                row["learning_rate"] == one["chosen"]
                and row["name"] == one["name"]
                and tuple(row[name] for name in about) == key
            ):
                losses.setdefault(key, {}).setdefault(one["name"], {})[row["seed"]] = row["test_loss"]
    found = []
    for one in rates:
        of = losses.get(tuple(one[name] for name in about), {})
        baseline = next((name for name in BASELINES if name in of), None)
        if one["name"] not in of or baseline is None:
            continue
        control = next((name for name in of if name.startswith(f"{CONTROL} ")), None)
        compared = {
            "difference": None if one["name"] == baseline else difference(of[one["name"]], of[baseline]),
            "difference_to_control": difference(of[one["name"]], of[control])
            if control and one["name"] == RECIPE
            else None,
        }
        reported = [loss for seed, loss in of[one["name"]].items() if seed < DEVELOPMENT]
        if reported:
            setting = {key: one[key] for key in ("corpus", *about, "name", "chosen")}
            found.append({**setting, "loss": mean_of(reported), **compared})
    return found


def equal_time(trainings: Sequence[Row]) -> list[Row]:
    """Of activations trained on images for as long as GELU takes for its steps: the paired difference in loss to it.

    Not corrected for their number.
    """
    losses: dict[tuple[Any, ...], dict[int, float | None]] = {}
    for row in trainings:
        about = (row["corpus"], *(row[key] for key in SETTING if key != "steps"))
        losses.setdefault((*about, row["name"], row["steps"]), {})[row["seed"]] = row["test_loss"]
    steps = set(EQUAL_TIME.values())
    found = []
    for (*about, name, short), of in losses.items():
        baseline = losses.get((*about, "gelu", STEPS_OF_IMAGES))
        if short in steps and baseline is not None:
            compared = difference(of, baseline)
            entry = {"corpus": about[0], "name": name, "steps": short, "steps_of_gelu": STEPS_OF_IMAGES}
            found.append({**entry, "loss": mean_of(list(of.values())), "difference": compared})
    return found


def shapes(settings: Iterable[Row], trainings: Sequence[Row]) -> list[Row]:
    """Of every reported setting with the recipe: how much GELU, ReLU² and x² explain of each block's function."""
    found = []
    for setting in filter(is_reported, settings):
        own = [row for row in learned_shapes(setting, trainings) if row["name"] == RECIPE]
        if own:
            about = {key: setting[key] for key in ("corpus", *SETTING)}
            found.append({**about, "seeds": len(own), "blocks": recipe_shapes.explained(own)})
    return found


def picture(setting: Row) -> bytes:
    """Losses, and differences to GELU and to the control at the same rate, best activation first."""
    controls = {rate_of(name): name for name in setting["controls"]}
    shown = []
    for entry in sorted((one for one in setting["activations"] if one["loss"]), key=lambda one: one["loss"]["mean"]):
        at_this_rate = controls.get(rate_of(entry["name"]))
        compared = {
            "difference": entry.get("difference"),
            "difference_to_control": entry.get("differences_to_controls", {}).get(at_this_rate),
        }
        present = {key: value for key, value in compared.items() if value is not None}
        shown.append({"group": entry["name"], "loss": entry["loss"], **present})
    unit = "nats per token" if setting["model"].startswith("GPT") else "nats per image"
    return figures.render(
        lambda theme: figures.draw_groups(
            theme,
            shown,
            setting["baseline"] or "GELU",
            "loss",
            f"{setting['corpus']}:\nloss, {unit}",
            f"{CONTROL}, same rate" if controls else None,
        ),
        "light",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("POLYTROPE_STORE", ".polytrope")
    parser.add_argument("--store", nargs="+", default=[default], help="stores that hold trainings; the first wins")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the figures and the plots")
    parser.add_argument("--train", nargs="+", choices=tuple(PARTS), default=[], help="parts of the study to make first")
    parser.add_argument("--speeches", type=Path, help="State of the Union addresses, a file each, YEAR_PRESIDENT.txt")
    parser.add_argument("--mnist", type=Path, help="MNIST's images, a folder per digit: python -m benchmarks.mnist")
    options = parser.parse_args()
    file = options.output / "recipe.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"trainings": [], "texts": {}}
    for part in options.train:
        train(part, options.store[0], Sources(options.speeches, options.mnist), record["trainings"])
    trainings = read_trainings(options.store, record["trainings"])
    texts = read_texts(options.store, record["texts"], trainings)
    settings, rates = compare(trainings), base_rates(trainings)
    if not settings:
        raise SystemExit(f"no finished training in {', '.join(options.store)}: polytrope run workflows/recipe.yaml")
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"format": 5, "development_seeds_from": DEVELOPMENT, "settings": settings, "base_rates": rates}
    in_time = equal_time(trainings)
    became, tuned = shapes(settings, trainings), at_chosen_rates(trainings, rates)
    content |= {
        "at_chosen_rates": tuned,
        "equal_time": in_time,
        "shapes": became,
        "texts": texts,
        "trainings": trainings,
    }
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = markdown(settings, rates, texts, in_time, became, tuned)
    (options.output / "recipe.md").write_text(text, encoding="utf-8")
    largest: dict[str, Row] = {}
    for setting in filter(is_reported, settings):
        other = largest.setdefault(setting["corpus"], setting)
        if _extent(setting) > _extent(other):
            largest[setting["corpus"]] = setting
    for corpus, setting in largest.items():
        (options.output / f"recipe-{corpus}.png").write_bytes(picture(setting))
        if learned := learned_shapes(setting, trainings):
            image = recipe_shapes.picture(learned, setting["baseline"])
            (options.output / f"recipe-{corpus}-shapes.png").write_bytes(image)
    for corpus, group in recipe_budgets.budgets(filter(is_reported, settings)).items():
        (options.output / f"recipe-{corpus}-budgets.png").write_bytes(recipe_budgets.picture(group))
    print(text)


def learned_shapes(setting: Row, trainings: Iterable[Row]) -> list[Row]:
    """The reported trainings of a setting whose functions are drawn: the recipe's, as it was found and as it is the
    default, and the control's at its rate.
    """
    own = [row for row in trainings if all(row[key] == setting[key] for key in SETTING) and row["seed"] < DEVELOPMENT]
    names = [name for name in (RECIPE, DEFAULT, *setting["controls"]) if rate_of(name) == rate_of(RECIPE)]
    return [row for name in names for row in own if row["name"] == name and row.get("learned")]


def _extent(setting: Row) -> tuple[int, int]:
    """Seeds that are compared, then activations."""
    pairs = [entry["difference"]["pairs"] for entry in setting["activations"] if entry.get("difference")]
    return max(pairs, default=0), len(setting["activations"])


if __name__ == "__main__":
    main()
