"""The study of the recipe, from the trainings in stores: `python -m benchmarks.recipe --store DIRECTORY …`.

`polytrope run workflows/recipe.yaml` makes trainings; `--set` gives other rates, seeds, activations, run after run in
one store. Of every training that was validated on the whole validation split this takes the loss. Trainings that differ
in nothing but the activation and the rate of its coefficients are compared, paired by seed: with GELU, and with the
control at every rate it was trained at. Seeds from 10 on are for choosing rates; what is reported is of the others. It
writes results/recipe.json (every loss and comparison), recipe.md (tables) and recipe-groups.png.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polytrope.ops import LearnableActivation, build_activation
from polytrope.pipeline.stages.report.contents import paired_difference
from polytrope.pipeline.stages.report.statistics import holm, mean_interval
from polytrope.pipeline.stages.train.coefficient_rates import coefficient_multiple
from polytrope.pipeline.store.manifest import StoredArtifact
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support import figures

RESULTS = Path(__file__).parent / "results"
DEVELOPMENT = 10  # the first of the seeds that rates are chosen by
BASELINE = "gelu_tanh"
CONTROL = "affine"
SETTING = ("data", "train_tokens", "layers", "width", "steps", "batch", "learning_rate")
Row = dict[str, Any]


def read_trainings(addresses: Iterable[str]) -> list[Row]:
    """Every training from scratch in the stores whose loss is of the whole validation split; each once."""
    found: dict[tuple[Any, ...], Row] = {}
    for address in addresses:
        store = Store(address)
        loaded = map(store.load, store.keys())
        artifacts = [artifact for artifact in loaded if artifact is not None]
        datasets = {artifact.digest: artifact for artifact in artifacts if artifact.components["uses"] == "shard"}
        for artifact in artifacts:
            inputs = artifact.components["inputs"]
            dataset = datasets.get(inputs.get("dataset"))
            if artifact.components["uses"] == "train" and dataset is not None and inputs["initial"] is None:
                row = describe(artifact, dataset)
                if row is not None:
                    found.setdefault((*(row[key] for key in SETTING), row["name"], row["seed"]), row)
    return [found[key] for key in sorted(found)]


def describe(artifact: StoredArtifact, dataset: StoredArtifact) -> Row | None:
    """One training as a row; None where a part of the validation split was left out, or blocks differ."""
    parameters, sizes = artifact.components["parameters"], dataset.components["parameters"]
    if parameters["validation_samples"] * sizes["sequence_length"] < dataset.summary["validation/tokens"]:
        return None
    model, base = parameters["model"], parameters["learning_rate"]
    activation, own = model["activation"], parameters["coefficient_learning_rate"]
    if isinstance(activation, list) or model["activation_options"] is not None:
        return None
    module = build_activation(activation)
    name = name_of(activation)
    if isinstance(module, LearnableActivation):
        name += f" × {coefficient_multiple(module) if own is None else round(own / base, 4):g}"
    return {
        "data": next(file["sha256"] for file in dataset.files if file["path"].startswith("train/shard"))[:12],
        "train_tokens": int(dataset.summary["train/tokens"]),
        "layers": model["n_layer"],
        "width": model["n_embd"],
        "steps": parameters["steps"],
        "batch": parameters["global_batch_size"],
        "learning_rate": base,
        "activation": activation,
        "name": name,
        "seed": parameters["seed"],
        "loss": artifact.summary.get("val/loss"),  # None: it diverged
    }


def name_of(activation: str | Mapping[str, Any]) -> str:
    """`hermite4 gelu [-4, 4]`: name, degree and options."""
    if isinstance(activation, str):
        return activation
    options = [str(value) for key, value in activation.items() if key not in ("name", "degree")]
    return " ".join([f"{activation['name']}{activation.get('degree', '')}", *options])


def compare(trainings: Sequence[Row]) -> list[Row]:
    """Each setting with its activations, compared with GELU and with every control; Holm's correction for each kind."""
    settings: dict[tuple[Any, ...], dict[str, dict[int, float | None]]] = {}
    for row in trainings:
        members = settings.setdefault(tuple(row[key] for key in SETTING), {})
        members.setdefault(row["name"], {})[row["seed"]] = row["loss"]
    found = []
    for setting, losses in settings.items():
        controls = {name: of for name, of in losses.items() if name.startswith(f"{CONTROL} ")}
        entries = [summarize(name, of, losses.get(BASELINE, {})) for name, of in losses.items()]
        for entry in entries:
            if entry["name"] not in (BASELINE, *controls):
                own = losses[entry["name"]]
                entry["differences_to_controls"] = {name: difference(own, of) for name, of in controls.items()}
        correct([entry.get("difference") for entry in entries])
        correct([one for entry in entries for one in entry.get("differences_to_controls", {}).values()])
        found.append({**dict(zip(SETTING, setting, strict=True)), "controls": list(controls), "activations": entries})
    return found


def correct(differences: Sequence[Row | None]) -> None:
    """Write Holm's corrected p-values into those that have one."""
    tested = [one for one in differences if one is not None and one["p_value"] is not None]
    for one, corrected in zip(tested, holm([one["p_value"] for one in tested]), strict=True):
        one["holm_p_value"] = corrected


def summarize(name: str, losses: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Row:
    """Mean loss over the reported seeds, and paired differences to the baseline there and on the development seeds."""
    reported = [loss for seed, loss in losses.items() if seed < DEVELOPMENT and loss is not None]
    developed = {seed: loss for seed, loss in losses.items() if seed >= DEVELOPMENT and loss is not None}
    failed = sum(loss is None for loss in losses.values())
    entry: Row = {"name": name, "failed": failed, "development": developed, "loss": None}
    if reported:
        interval = mean_interval(reported)
        entry["loss"] = {"mean": interval.mean, "half_width": interval.half_width, "values": reported}
    if name != BASELINE:
        entry["difference"] = difference(losses, baseline)
        entry["difference_in_development"] = difference(losses, baseline, development=True)
    return entry


def difference(
    losses: Mapping[int, float | None], reference: Mapping[int, float | None], *, development: bool = False
) -> Row | None:
    """Paired over the reported seeds, or the development seeds, that both have; None without any."""
    pairs = [
        (own, other)
        for seed in losses
        if (seed >= DEVELOPMENT) == development
        if (own := losses[seed]) is not None and (other := reference.get(seed)) is not None
    ]
    return paired_difference([own for own, _ in pairs], [other for _, other in pairs]) if pairs else None


def markdown(settings: Sequence[Row]) -> str:
    """A table for each setting."""
    lines: list[str] = []
    for setting in settings:
        heads = ["activation × rate", "loss, nats per token", "development seeds", "Δ to GELU, paired", "p, Holm"]
        for control in setting["controls"]:
            heads += [f"Δ to {control}", "p, Holm"]
        heads.append("failed")
        lines += [
            f"{setting['layers']} layers of {setting['width']}, {setting['steps']} steps of {setting['batch']} "
            f"samples, base learning rate {setting['learning_rate']:g}, {setting['train_tokens']:,} tokens "
            f"({setting['data']})",
            "",
        ]
        rows = []
        for entry in setting["activations"]:
            row = [entry["name"], plus_minus(entry["loss"], ".4f")]
            row.append(" · ".join(f"{seed}: {loss:.4f}" for seed, loss in entry["development"].items()) or "–")
            of_controls = entry.get("differences_to_controls", {})
            for compared in (entry.get("difference"), *(of_controls.get(name) for name in setting["controls"])):
                row += [plus_minus(compared, "+.4f"), p_value(compared)]
            rows.append([*row, str(entry["failed"])])
        lines += ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)] + [""]
    return "\n".join(lines)


def plus_minus(entry: Row | None, layout: str) -> str:
    """`4.2563 ± 0.0123`: mean and half of the 95 % interval."""
    if entry is None:
        return "–"
    half = entry["half_width"]
    return format(entry["mean"], layout) + (f" ± {half:{layout.lstrip('+')}}" if half is not None else "")


def p_value(entry: Row | None) -> str:
    return "–" if entry is None or entry["holm_p_value"] is None else f"{entry['holm_p_value']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("POLYTROPE_STORE", ".polytrope")
    parser.add_argument("--store", nargs="+", default=[default], help="stores that hold trainings; the first wins")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the figures and the plot")
    options = parser.parse_args()
    trainings = read_trainings(options.store)
    settings = compare(trainings)
    if not settings:
        raise SystemExit(f"no finished training in {', '.join(options.store)}: polytrope run workflows/recipe.yaml")
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"format": 2, "baseline": BASELINE, "development_seeds_from": DEVELOPMENT, "settings": settings}
    content["trainings"] = trainings
    (options.output / "recipe.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (options.output / "recipe.md").write_text(markdown(settings), encoding="utf-8")
    largest = max(settings, key=lambda one: sum(entry["loss"] is not None for entry in one["activations"]))
    control = next(iter(largest["controls"]), None)
    shown = []
    for entry in sorted((one for one in largest["activations"] if one["loss"]), key=lambda one: one["loss"]["mean"]):
        compared = {
            "difference": entry.get("difference"),
            "difference_to_control": entry.get("differences_to_controls", {}).get(control),
        }
        present = {key: value for key, value in compared.items() if value is not None}
        shown.append({"group": entry["name"], "loss": entry["loss"], **present})
    picture = figures.render(
        lambda theme: figures.draw_groups(theme, shown, BASELINE, "loss", "validation loss, nats per token", control),
        "light",
    )
    (options.output / "recipe-groups.png").write_bytes(picture)
    print(markdown(settings))


if __name__ == "__main__":
    main()
