"""The study of the recipe, from the trainings in stores: `python -m benchmarks.recipe --store DIRECTORY …`.

`polytrope run workflows/recipe.yaml` makes trainings; `--set` gives other rates, seeds, activations, run after run in
one store. Of every training that was validated on the whole validation split this takes the loss. Trainings that differ
in nothing but the activation and the rate of its coefficients are compared, paired by seed. Rates are chosen on the
development seeds (10 and up); what is claimed is of the others, by which nothing was chosen. It writes
results/recipe.json (every loss and comparison), recipe.md (tables) and recipe-groups.png.
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
    """Each setting with its activations in the order of their mean loss, compared with GELU and with the control.

    The control is the one whose rate was best on the development seeds that all controls have.
    """
    settings: dict[tuple[Any, ...], dict[str, dict[int, float | None]]] = {}
    for row in trainings:
        members = settings.setdefault(tuple(row[key] for key in SETTING), {})
        members.setdefault(row["name"], {})[row["seed"]] = row["loss"]
    found = []
    for setting, losses in settings.items():
        controls = {name: of for name, of in losses.items() if name.startswith(f"{CONTROL} ")}
        entries = [summarize(name, of, losses.get(BASELINE, {})) for name, of in losses.items()]
        chosen = best_on_development(controls)
        for entry in entries:
            if chosen is not None and entry["name"] not in (BASELINE, *controls):
                entry["difference_to_control"] = difference(losses[entry["name"]], controls[chosen], test=True)
        for key in ("difference", "difference_to_control"):
            tested = [entry[key] for entry in entries if (entry.get(key) or {}).get("p_value") is not None]
            for one, corrected in zip(tested, holm([one["p_value"] for one in tested]), strict=True):
                one["holm_p_value"] = corrected
        found.append({**dict(zip(SETTING, setting, strict=True)), "control": chosen, "activations": entries})
    return found


def best_on_development(controls: Mapping[str, Mapping[int, float | None]]) -> str | None:
    """The name with the lowest mean loss over the development seeds that all of them have."""
    seeds = [
        {seed for seed, loss in of.items() if seed >= DEVELOPMENT and loss is not None} for of in controls.values()
    ]
    shared = set.intersection(*seeds) if seeds else set()
    if not shared:
        return next(iter(controls), None)
    return min(controls, key=lambda name: sum(controls[name][seed] or 0.0 for seed in shared))


def summarize(name: str, losses: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> Row:
    """Mean loss over the reported seeds, and paired differences to the baseline there and on the development seeds."""
    reported = [loss for seed, loss in losses.items() if seed < DEVELOPMENT and loss is not None]
    entry: Row = {"name": name, "failed": sum(loss is None for loss in losses.values()), "loss": None}
    if reported:
        interval = mean_interval(reported)
        entry["loss"] = {"mean": interval.mean, "half_width": interval.half_width, "values": reported}
    if name != BASELINE:
        entry["difference"] = difference(losses, baseline, test=True)
        entry["difference_in_development"] = difference(losses, baseline, test=False)
    return entry


def difference(losses: Mapping[int, float | None], reference: Mapping[int, float | None], *, test: bool) -> Row | None:
    """Paired over the reported seeds (`test`) or the development seeds that both have; None without any."""
    pairs = [
        (own, other)
        for seed in losses
        if (seed < DEVELOPMENT) == test
        if (own := losses[seed]) is not None and (other := reference.get(seed)) is not None
    ]
    return paired_difference([own for own, _ in pairs], [other for _, other in pairs]) if pairs else None


def markdown(settings: Sequence[Row]) -> str:
    """A table for each setting."""
    heads = ["activation × rate", "loss, nats per token", "Δ to GELU, paired", "p, Holm", "Δ to the control"]
    heads += ["p, Holm", "Δ to GELU, development seeds", "failed"]
    lines: list[str] = []
    for setting in settings:
        lines += [
            f"{setting['layers']} layers of {setting['width']}, {setting['steps']} steps of {setting['batch']} "
            f"samples, base learning rate {setting['learning_rate']:g}, {setting['train_tokens']:,} tokens "
            f"({setting['data']}); control: {setting['control'] or '–'}",
            "",
        ]
        rows = []
        for entry in setting["activations"]:
            to_gelu, to_control = entry.get("difference"), entry.get("difference_to_control")
            developed = entry.get("difference_in_development")
            rows.append(
                [
                    entry["name"],
                    plus_minus(entry["loss"], ".4f"),
                    plus_minus(to_gelu, "+.4f"),
                    p_value(to_gelu),
                    plus_minus(to_control, "+.4f"),
                    p_value(to_control),
                    f"{plus_minus(developed, '+.4f')} ({developed['pairs']})" if developed else "–",
                    str(entry["failed"]),
                ]
            )
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
    shown = [
        {"group": entry["name"], **{key: value for key, value in entry.items() if value is not None}}
        for entry in sorted(largest["activations"], key=lambda entry: entry["loss"]["mean"] if entry["loss"] else 0.0)
        if entry["loss"]
    ]
    picture = figures.render(
        lambda theme: figures.draw_groups(
            theme, shown, BASELINE, "loss", "validation loss, nats per token", largest["control"]
        ),
        "light",
    )
    (options.output / "recipe-groups.png").write_bytes(picture)
    print(markdown(settings))


if __name__ == "__main__":
    main()
