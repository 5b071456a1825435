"""Figures that people read are those of the JSON that a benchmark wrote: README, the study, deep nets."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import (
    after_training,
    after_training_table,
    compiled,
    compressibility,
    deep_nets,
    gpu_ops,
    grokking,
    measured_basis,
    norms,
    ops,
    polynomial_networks,
    private_inference,
    recipe,
    recipe_tables,
    recipe_time,
    recipe_variants,
    symbolic,
    tangent,
)
from benchmarks.recipe_tables import plus_minus
from polytrope.pipeline.stages.report.statistics import holm

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
HERMITE = "hermite4 gelu [-4, 4] × "
_OF_IMAGES = ("hermite4 gelu [-4, 4]", "affine gelu")
ENDED = ("affine", "tropical", "piecewise_linear", "polynorm")  # in straight lines, or held by a norm


def content(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def says(page: str, *sentences: str) -> None:
    """Line breaks, bullets and emphasis apart."""
    text = " ".join((ROOT / page).read_text(encoding="utf-8").replace("**", "").split())
    for sentence in sentences:
        assert sentence in text, f"{page}: {sentence}"


def p_shown(compared: dict[str, Any]) -> str:
    p = compared["holm_p_value"]
    return "<0.0001" if p < 5e-5 else f"{p:.4f}"


def is_usual(about: dict[str, Any]) -> bool:
    """Base rate, batch and precision of workflows/recipe.yaml."""
    return about["learning_rate"] == 3e-3 and about["batch"] in (8, 32) and about["precision"] == "fp32"


@pytest.fixture
def settings() -> dict[str, dict[str, Any]]:
    """The reported settings of the recipe's study: corpus → activation → its figures."""
    found = [one for one in content("recipe")["settings"] if recipe_tables.is_reported(one)]
    models = ("GPT-2, 4 layers of 128", "ConvNeXt [1, 1] of [32, 64]")
    main = [one for one in found if one["model"] in models and one["steps"] in (480, 500) and is_usual(one)]
    return {setting["corpus"]: {one["name"]: one for one in setting["activations"]} for setting in main}


def test_the_recipe_s_comparisons_follow_from_its_trainings() -> None:
    file = content("recipe")
    assert json.loads(json.dumps(recipe.compare(file["trainings"]))) == file["settings"]
    written = (RESULTS / "recipe.md").read_text(encoding="utf-8")
    assert json.loads(json.dumps(recipe.equal_time(file["trainings"]))) == file["equal_time"]
    parts = (file[key] for key in ("settings", "base_rates", "texts", "equal_time", "shapes", "at_chosen_rates"))
    assert recipe_tables.markdown(*parts) == written


def test_the_first_text_is_told_as_measured(settings: dict[str, dict[str, Any]]) -> None:
    found = settings["python-documentation-and-source"]
    rows = [f"| GELU | 10 | {plus_minus(found['gelu_tanh']['loss'], '.3f')} |"]
    default = found[recipe.DEFAULT]
    beyond = default["differences_to_controls"]["affine gelu_tanh × 10"]
    assert max(*default["difference"]["values"], *beyond["values"]) < 0, "on each of ten seeds, as the pages say"
    rows.append(
        f"| Hermite 4, × 10 | 10 | {plus_minus(default['loss'], '.3f')} "
        f"| {plus_minus(default['difference'], '+.3f')} | {p_shown(default['difference'])} "
        f"| {plus_minus(beyond, '+.3f')} | {beyond['holm_p_value']:.4f} |"
    )
    for rate, seeds in ((10, 10), (30, 5)):
        control, hermite = found[f"affine gelu_tanh × {rate}"], found[f"{HERMITE}{rate}"]
        beyond = hermite["differences_to_controls"][f"affine gelu_tanh × {rate}"]
        for entry in (control, hermite):
            assert max(entry["difference"]["values"]) < 0
            assert len(entry["difference"]["values"]) == seeds
        of_gelu = [
            f"| {seeds} | {plus_minus(entry['loss'], '.3f')} | {plus_minus(entry['difference'], '+.3f')} "
            f"| {p_shown(entry['difference'])} |"
            for entry in (control, hermite)
        ]
        shape = f"{plus_minus(beyond, '+.3f')} | {beyond['holm_p_value']:.2f} |"
        rows += [f"× {rate} {of_gelu[0]}", f"| Hermite 4 on [-4, 4], × {rate} {of_gelu[1]} {shape}"]
        for compared in (control["difference"], hermite["difference"], beyond):
            says("docs/activations/study.md", plus_minus(compared, "+.3f"))
    says("README.md", *rows)
    trainings = [row for row in content("recipe")["trainings"] if row["corpus"] == "python-documentation-and-source"]
    whole = {(row["name"], row["seed"]): row["loss"] for row in trainings if row["steps"] == 480}
    of_gelu = [loss for (name, _), loss in whole.items() if name == "gelu_tanh"]
    warning = whole[f"{HERMITE}10", 10]
    says(
        "docs/activations/study.md",
        f"ended at {warning:.3f} on all documents, behind the worst of GELU's ten ({max(of_gelu):.3f}) and "
        f"{warning - whole['affine gelu_tanh × 10', 10]:.3f} behind the control",
    )


def test_the_other_text_and_the_images_are_told_as_measured(settings: dict[str, dict[str, Any]]) -> None:
    found = settings["state-of-the-union"]
    control, hermite = found["affine gelu_tanh × 10"], found[f"{HERMITE}10"]
    (beyond,) = hermite["differences_to_controls"].values()
    default = found[recipe.DEFAULT]
    (shape,) = default["differences_to_controls"].values()
    assert {entry["difference"]["pairs"] for entry in (control, hermite, default)} == {10}
    each = (*control["difference"]["values"], *default["difference"]["values"], *shape["values"])
    assert max(each) < 0, "on each seed, as the pages say"
    assert sum(value > 0 for value in hermite["difference"]["values"]) == 1
    says(
        "README.md",
        f"ten seeds: GELU {found['gelu_tanh']['loss']['mean']:.3f}, the control "
        f"{plus_minus(control['difference'], '+.3f')} (p {p_shown(control['difference'])}), "
        f"Hermite 4 {plus_minus(default['difference'], '+.3f')} (p {p_shown(default['difference'])}), beyond the "
        f"control {plus_minus(shape, '+.3f')} (p {p_shown(shape)}); on [-4, 4] "
        f"{plus_minus(hermite['difference'], '+.3f')} (p {p_shown(hermite['difference'])}), one of ten seeds behind",
    )
    says(
        "docs/activations/study.md",
        f"better than GELU by {plus_minus(hermite['difference'], '+.3f').lstrip('-')} (p "
        f"{p_shown(hermite['difference'])}, nine of ten seeds), the control by "
        f"{plus_minus(control['difference'], '+.3f').lstrip('-')} (p",
        f"the shape has {plus_minus(beyond, '+.3f')} (p {beyond['holm_p_value']:.2f}), better on "
        f"{('four', 'five', 'six')[sum(value < 0 for value in beyond['values']) - 4]} of ten seeds",
        "seed 7, ended at {:.3f} on all documents, behind GELU's {:.3f}".format(
            *(losses_of("state-of-the-union", name, "loss")[7] for name in (f"{HERMITE}10", "gelu_tanh"))
        ),
        f"the same seed ended at {losses_of('state-of-the-union', recipe.DEFAULT, 'loss')[7]:.3f}",
    )


def test_images_are_told_as_measured(settings: dict[str, dict[str, Any]]) -> None:
    images = settings["digits"]
    hermite, gelu = images[f"{HERMITE}10"], images["gelu"]
    (beyond,) = hermite["differences_to_controls"].values()
    right = hermite["accuracy_difference"]
    assert hermite["difference"]["pairs"] == 10
    assert max(hermite["difference"]["values"]) < 0
    says(
        "README.md",
        f"loss {hermite['loss']['mean']:.4f} against GELU's {gelu['loss']['mean']:.4f}, "
        f"{plus_minus(hermite['difference'], '+.4f')} (p {p_shown(hermite['difference'])}), beyond "
        f"the control {plus_minus(beyond, '+.4f')} (p {beyond['holm_p_value']:.2f}); accuracy "
        f"{hermite['accuracy']['mean']:.3f} against {gelu['accuracy']['mean']:.3f} (p {right['holm_p_value']:.2f})",
    )
    shares = [images[name]["accuracy"]["mean"] for name in ("gelu", "affine gelu × 10", f"{HERMITE}10")]
    says(
        "docs/activations/study.md",
        "GELU has {:.4f}, the control {:.4f}, Hermite {:.4f} of 528 images".format(*shares),
        f"The control has {plus_minus(images['affine gelu × 10']['difference'], '+.4f')}",
        f"the shape has {plus_minus(beyond, '+.4f')} (p {beyond['holm_p_value']:.2f})",
    )
    images = settings["mnist-5k"]
    hermite, gelu, control = images[f"{HERMITE}10"], images["gelu"], images["affine gelu × 10"]
    (beyond,) = hermite["differences_to_controls"].values()
    right = hermite["accuracy_difference"]
    for entry in (hermite, control):
        assert max(entry["difference"]["values"]) < 0 < min(entry["accuracy_difference"]["values"])
        assert entry["difference"]["pairs"] == 5
    says(
        "README.md",
        f"five seeds: loss {plus_minus(hermite['difference'], '+.4f')} (p {p_shown(hermite['difference'])}; each at "
        f"its own best base rate {tuned('mnist-5k', HERMITE + '10')}), accuracy "
        f"{hermite['accuracy']['mean']:.3f} against {gelu['accuracy']['mean']:.3f} (p {p_shown(right)}), "
        f"beyond the control {plus_minus(beyond, '+.4f')}",
    )
    says(
        "docs/activations/study.md",
        f"the control by {plus_minus(control['difference'], '.4f').lstrip('-')} (p",
        f"{gelu['accuracy']['mean']:.4f} with GELU, {control['accuracy']['mean']:.4f} with the control, "
        f"{hermite['accuracy']['mean']:.4f} with Hermite 4 ({plus_minus(right, '+.4f')}",
    )


def test_base_rates_sizes_and_gated_units_are_told_as_measured() -> None:
    file = content("recipe")
    means: dict[str, list[str]] = {}
    for rates in file["base_rates"]:
        if rates["precision"] == "bf16" or rates["corpus"] in ("digits", "mnist-5k"):
            continue  # of larger models and of images
        assert (rates["corpus"], rates["chosen"]) == ("state-of-the-union", 3e-3)
        means[rates["name"]] = [f"{rate['mean']:.3f}" for rate in rates["rates"]]  # 1.5e-3, 3e-3, 6e-3
    told = [
        "{} {}, {} and {}".format(who, *means[name])
        for who, name in (
            ("GELU has", "gelu_tanh"),
            ("the control", "affine gelu_tanh × 10"),
            ("Hermite 4", f"{HERMITE}10"),
        )
    ]
    assert max(means, key=lambda name: means[name][2]) == "gelu_tanh"  # the most spoilt at twice the best rate
    models = {
        setting["model"].removeprefix("GPT-2, 4 layers of "): {one["name"]: one for one in setting["activations"]}
        for setting in file["settings"]
        if setting["corpus"] == "state-of-the-union" and (setting["steps"], setting["learning_rate"]) == (480, 3e-3)
    }
    small = [models["64"][name]["difference"] for name in (f"{HERMITE}10", "affine gelu_tanh × 10")]
    assert {one["pairs"] for one in small} == {3}
    longer = {
        setting["model"].removeprefix("GPT-2, 4 layers of "): {one["name"]: one for one in setting["activations"]}
        for setting in file["settings"]
        if setting["corpus"] == "state-of-the-union" and setting["steps"] == 960
    }
    twice, larger = (
        [longer[size][name]["difference"] for name in (f"{HERMITE}10", "affine gelu_tanh × 10")]
        for size in ("64", "128")
    )
    shape = longer["64"][f"{HERMITE}10"]["differences_to_controls"]["affine gelu_tanh × 10"]
    faded = [plus_minus(one, "+.3f") for one in (small[0], twice[0], larger[0])]
    assert {one["pairs"] for one in (*twice, *larger)} == {3}
    before = models["128"][f"{HERMITE}10"]["difference"]["mean"]
    assert 0 > larger[0]["mean"] > before / 2  # "less than half"
    default = plus_minus(longer["128"][recipe.DEFAULT]["difference"], "+.3f")
    says("README.md", f"After twice the tokens the gain is smaller, {default};")
    images = {(row["corpus"], row["name"]): plus_minus(row["difference"], "+.4f") for row in file["equal_time"]}
    hermite, control = ([images[data, f"{name} × 10"] for data in ("digits", "mnist-5k")] for name in _OF_IMAGES)
    says(
        "docs/activations/study.md",
        f"Hermite 4 has {hermite[0]} on the digits and {hermite[1]} on MNIST",
        f"the control keeps {control[0]} and {control[1]}",
    )
    gated = models["128, gated"]
    spoilt = {name: sum(loss > 4.3 for loss in one["loss"]["values"]) for name, one in gated.items()}
    assert spoilt == {"gelu_tanh": 1, "silu": 2, "affine gelu_tanh × 10": 1, f"{HERMITE}10": 1}
    of_seed = [gated[name]["difference"]["values"][0] for name in (f"{HERMITE}10", "affine gelu_tanh × 10")]
    says(
        "docs/activations/study.md",
        *told,
        f"Hermite 4 × 10 has {faded[0]} and the control {plus_minus(small[1], '+.3f')} after the same 480",
        f"twice the tokens, {faded[1]} and {plus_minus(twice[1], '+.3f')}.",
        f"and is {faded[2]} and {plus_minus(larger[1], '+.3f')} after 960 (three seeds, p "
        f"{larger[0]['holm_p_value']:.3f})",
        f"{plus_minus(shape, '+.3f')} beyond the control (p {shape['holm_p_value']:.3f}",
        f"Hermite 4 is {-of_seed[0]:.3f} below GEGLU, the control {-of_seed[1]:.3f}",
    )


def test_the_start_and_slower_gated_units_are_told_as_measured(settings: dict[str, dict[str, Any]]) -> None:
    text = "state-of-the-union"
    starts = {
        init: [
            ", ".join(f"{losses_of(text, f'hermite4 {init}{rest}', 'loss')[seed]:.3f}" for seed in range(3))
            for rest in (" [-4, 4] × 10", " × 0.1")
        ]
        for init in ("variance_preserving", "stable", "gelu")
    }
    gelu = ["{:.3f}".format(losses_of(text, "gelu_tanh", "loss")[seed]) for seed in range(3)]
    stable = "hermite4 stable [-4, 4] × 10"
    images, control = settings["mnist-5k"][stable], "affine gelu × 10"
    (beyond,) = images["differences_to_controls"].values()
    right = recipe.difference(*(losses_of("mnist-5k", name, "accuracy") for name in (stable, control)))
    assert right is not None
    assert min(right["values"]) > 0
    others = [settings[name][stable]["difference"] for name in ("digits", text)]
    assert sum(value > 0 for value in others[1]["values"]) == 1
    first = losses_of("python-documentation-and-source", stable, "loss")
    spoilt = sorted((loss for loss in first.values() if loss > 4.4), reverse=True)
    assert (len(first), len(spoilt)) == (4, 2)
    (gated,) = (
        {one["name"]: one for one in setting["activations"]}
        for setting in content("recipe")["settings"]
        if setting["model"].endswith("gated") and setting["learning_rate"] == 1.5e-3
    )
    inside, scaled = (gated[name]["difference"] for name in (f"{HERMITE}10", "affine gelu_tanh × 10"))
    assert max(loss for one in gated.values() for loss in one["loss"]["values"]) < 4.2
    says(
        "docs/activations/study.md",
        f"where GELU has {gelu[0]}, {gelu[1]} and {gelu[2]}:",
        f"coefficients positive | {' | '.join(starts['variance_preserving'])} |",
        f"signs + + − − | {' | '.join(starts['stable'])} |",
        f"| as GELU | {' | '.join(starts['gelu'])} |",
        f"with tangents has {plus_minus(images['difference'], '+.4f')} from GELU "
        f"(p {images['difference']['holm_p_value']:.4f})",
        f"{plus_minus(right, '+.4f')} of the images (p {right['p_value']:.3f}, five of five seeds; in loss "
        f"{plus_minus(beyond, '+.4f')}, p {beyond['p_value']:.2f};",
        f"On the digits it has {plus_minus(others[0], '+.4f')} from GELU",
        f"on the addresses {plus_minus(others[1], '+.3f')}, with one of five seeds",
        f"spoilt ({spoilt[0]:.3f} and {spoilt[1]:.3f} on all documents",
        f"Hermite 4 inside has {plus_minus(inside, '+.3f')} from GEGLU (p {inside['holm_p_value']:.4f}), the "
        f"control {plus_minus(scaled, '+.3f')} (p {scaled['holm_p_value']:.2f}), SwiGLU "
        f"{plus_minus(gated['silu']['difference'], '+.3f')}:",
    )


def larger_models() -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """Channels and steps → name → entry, of the models trained in bfloat16 at the base rates that were chosen."""
    return {
        (setting["model"].rpartition(" ")[2], setting["steps"]): {one["name"]: one for one in setting["activations"]}
        for setting in content("recipe")["settings"]
        if setting["precision"] == "bf16"
        and (setting["model"].rpartition(" ")[2], setting["learning_rate"]) in (("192", 1.5e-3), ("320", 7.5e-4))
    }


def test_larger_models_are_told_as_measured() -> None:
    found = {budget: entries for budget, entries in larger_models().items() if f"{HERMITE}10" in entries}
    chosen = {
        rates["model"].rpartition(" ")[2]: (rates["chosen"], {one["learning_rate"]: one for one in rates["rates"]})
        for rates in content("recipe")["base_rates"]
        if rates["precision"] == "bf16" and rates["name"] == "gelu_tanh"
    }
    assert {size: rate for size, (rate, _) in chosen.items()} == {"192": 1.5e-3, "320": 7.5e-4}
    (hermite,) = (
        {one["learning_rate"]: one["mean"] for one in rates["rates"]}
        for rates in content("recipe")["base_rates"]
        if rates["model"].endswith("of 320") and rates["name"] == f"{HERMITE}10"
    )
    assert min(hermite, key=hermite.__getitem__) == 1.5e-3
    gelu = {rate: one["mean"] for rate, one in chosen["320"][1].items()}
    gains = {budget: entries[f"{HERMITE}10"]["difference"] for budget, entries in found.items()}
    assert {one["pairs"] for one in gains.values()} == {3}
    assert all(max(one["values"]) < 0 for one in gains.values())
    told = {budget: plus_minus(one, "+.3f") for budget, one in gains.items()}
    controls = {
        budget: plus_minus(entries["affine gelu_tanh × 10"]["difference"], "+.3f") for budget, entries in found.items()
    }

    def after(size: str, steps: int) -> str:
        return f"{told[size, steps]} after {steps} ({controls[size, steps]})"

    says(
        "docs/activations/study.md",
        f"{told['192', 240]} after 240 steps (the control {controls['192', 240]}), {after('192', 480)} and "
        f"{after('192', 960)}; with 12.7 million {after('320', 120)}, {after('320', 240)} and {after('320', 480)}",
        f"with GELU ({gelu[1.5e-3]:.3f} instead of {gelu[7.5e-4]:.3f}) and not with Hermite 4 ({hermite[1.5e-3]:.3f}",
    )
    beyond = {
        (*budget, name): entries[name]["differences_to_controls"]["affine gelu_tanh × 10"]
        for budget, entries in found.items()
        for name in (f"{HERMITE}10", recipe.DEFAULT)
        if name in entries
    }
    assert all(max(one["values"]) < 0 for (size, steps, _), one in beyond.items() if size == "192" and steps > 240)
    small, narrow = (
        [f"{plus_minus(beyond['192', steps, name], '+.3f')}" for steps in (480, 960)]
        for name in (f"{HERMITE}10", recipe.DEFAULT)
    )
    says(
        "docs/activations/study.md",
        f"beyond the control it has {small[0]} after 480 steps and {small[1]} after 960, on [-2, 2] {narrow[0]} and "
        f"{narrow[1]}",
    )
    default = [plus_minus(found["192", steps][recipe.DEFAULT]["difference"], "+.3f") for steps in (480, 960)]
    says("README.md", f"with four times the size it is not, {default[0]} and, after twice the tokens, {default[1]} (")


def test_the_default_by_size_and_tokens_is_told_as_measured() -> None:
    found = larger_models()
    for setting in content("recipe")["settings"]:
        if (setting["corpus"], setting["model"], setting["learning_rate"]) == (
            "state-of-the-union", "GPT-2, 4 layers of 128", 3e-3,
        ):  # fmt: skip
            found["128", setting["steps"]] = {one["name"]: one for one in setting["activations"]}
    gains, shares = {}, {}
    for budget in (("128", 240), ("128", 960), ("192", 240), ("192", 480), ("192", 960), ("320", 480)):
        entry = found[budget][recipe.DEFAULT]
        share = entry["differences_to_controls"]["affine gelu_tanh × 10"]
        assert (share["pairs"], entry["difference"]["pairs"]) == (3, 3)
        gains[budget] = plus_minus(entry["difference"], "+.3f")
        shares[budget] = plus_minus(share, "+.3f")
    says(
        "docs/activations/study.md",
        f"it is {shares['128', 240]} after 240 steps and {shares['128', 960]} after 960, with 3.8 million "
        f"{shares['192', 240]} after 240, {shares['192', 480]} after 480 and {shares['192', 960]} after 960, with 12.7 "
        f"million {shares['320', 480]} after 480: beyond the control",
        f"from GELU is {gains['128', 240]} and {gains['128', 960]}, {gains['192', 240]}, {gains['192', 480]} and "
        f"{gains['192', 960]}, and {gains['320', 480]}: with 0.9 million more than twice that of the recipe",
    )
    ends = [found["128", 960][name]["difference"]["mean"] for name in (recipe.DEFAULT, f"{HERMITE}10")]
    assert ends[0] < 2 * ends[1] < 0
    longer = [found["192", steps][recipe.DEFAULT]["difference"]["mean"] for steps in (480, 960)]
    assert longer[1] <= longer[0]


def test_ablations_of_the_recipe_are_told_as_measured() -> None:
    gelu = {seed: loss for seed, loss in losses_of("mnist-5k", "gelu").items() if seed < 3}

    def gain(name: str) -> str:
        found = recipe.difference(losses_of("mnist-5k", f"hermite{name}"), gelu)
        assert found is not None
        assert found["pairs"] == 3
        return f"{found['mean']:+.4f}"

    text = "state-of-the-union"
    of_text = {seed: loss for seed, loss in losses_of(text, "gelu_tanh").items() if seed < 3}
    own, control = (losses_of(text, f"{name} × 10") for name in ("hermite4 gelu [-4, 4]", "affine gelu_tanh"))

    def gain_on_text(name: str) -> str:
        return plus_minus(recipe.difference(losses_of(text, f"hermite{name}"), of_text), "+.3f")

    better = []
    for name in ("8 gelu [-4, 4]", "12 gelu [-4, 4]", "4 gelu [-2, 2]", "4 gelu [-4, 4] 32"):
        first = {seed: loss for seed, loss in losses_of(text, f"hermite{name} × 10").items() if seed < 3}
        to_recipe, to_control = recipe.difference(first, own), recipe.difference(first, control)
        assert to_recipe is not None
        assert to_control is not None
        assert max(*to_recipe["values"], *to_control["values"]) < 0
        better.append(f"{-to_recipe['mean']:.3f}")
    says(
        "docs/activations/study.md",
        f"spoilt on three of three seeds ({gain_on_text('3 gelu [-4, 4] × 10')})",
        f"So is [-8, 8] ({gain_on_text('4 gelu [-8, 8] × 1')})",
        f"(by {', '.join(better[:3])} and {better[3]})",
    )

    degrees = [gain(f"{degree} gelu [-4, 4] × 10") for degree in (3, 4, 5, 8, 12)]
    says(
        "docs/activations/study.md",
        f"On MNIST, where GELU has {sum(gelu.values()) / 3:.4f}:",
        f"have {', '.join(degrees[:4])} and {degrees[4]}, the interval [-2, 2] {gain('4 gelu [-2, 2] × 10')}, "
        f"32 groups of channels with coefficients of their own {gain('4 gelu [-4, 4] 32 × 10')}:",
        f"the gain is {gain('4 gelu [-4, 4] × 1')}, at thirty times {gain('4 gelu [-4, 4] × 30')}, and",
        f"it is {gain('4 gelu [-8, 8] × 1')}.",
    )


def test_other_fixed_functions_and_frozen_ones_are_told_as_measured(settings: dict[str, dict[str, Any]]) -> None:
    images = settings["mnist-5k"]
    squared, frozen = images["polyrelu2 relu_squared × 0"], images[f"{HERMITE}10, frozen as learned"]
    (from_control,) = squared["differences_to_controls"].values()
    kept = images["affine gelu × 10, frozen as learned"]["difference"]
    learned = recipe.difference(*(losses_of("mnist-5k", name) for name in (frozen["name"], f"{HERMITE}10")))
    text = settings["state-of-the-union"]["polyrelu2 relu_squared × 0"]["difference"]
    recipe_to_it = recipe.difference(
        *(losses_of("state-of-the-union", name) for name in (f"{HERMITE}10", "polyrelu2 relu_squared × 0"))
    )
    shown = plus_minus(text, "+.3f")
    says(
        "README.md",
        f"does as well on MNIST ({plus_minus(squared['difference'], '+.4f')}); on the addresses it has {shown},",
    )
    says(
        "docs/activations/study.md",
        f"has {shown} (p {text['holm_p_value']:.4f}), and Hermite 4 {plus_minus(recipe_to_it, '+.4f')} from it",
        f"has {plus_minus(squared['difference'], '+.4f')} and {squared['accuracy']['mean']:.4f}, "
        f"and from the control {plus_minus(from_control, '+.4f')}:",
        f"SiLU is worse than GELU ({plus_minus(images['silu']['difference'], '+.4f')})",
        f"fixed, Hermite 4 has {plus_minus(frozen['difference'], '+.4f')}: "
        f"{plus_minus(learned, '+.4f')} from the one that learned them",
        f"The control's are {plus_minus(kept, '+.4f')}",
    )
    assert frozen["difference"]["pairs"] == kept["pairs"] == 3
    first = "python-documentation-and-source"
    own = [f"{HERMITE}10", "affine gelu_tanh × 10"]
    fixed = [settings[first][f"{name}, frozen as learned"]["difference"] for name in own]
    apart = [
        recipe.difference(*(losses_of(first, label) for label in (f"{name}, frozen as learned", name))) for name in own
    ]
    assert all(len(one["values"]) == 3 and max(one["values"]) < 0.0 for one in apart if one is not None)
    of_gelu = [plus_minus(one, "+.3f") for one in fixed]
    learned_too = [plus_minus(one, "+.3f") for one in apart]
    says(
        "docs/activations/study.md",
        f"Hermite 4 has {of_gelu[0]} from GELU, the control {of_gelu[1]}: "
        f"{learned_too[0]} and {learned_too[1]} from those that learned theirs",
    )


def losses_of(corpus: str, name: str, key: str = "test_loss") -> dict[int, float]:
    """Of an activation with the study's steps and base rate, by seed."""
    rows = [row for row in content("recipe")["trainings"] if row["corpus"] == corpus and row["name"] == name]
    of_study = [row for row in rows if is_usual(row) and not row["model"].endswith(("gated", "trained on"))]
    own = [row for row in of_study if corpus != "state-of-the-union" or row["model"].endswith("of 128")]
    return {row["seed"]: row[key] for row in own if row["steps"] in (300, 480, 500)}


def test_what_the_study_says_beside_its_tables_is_measured() -> None:
    """Of other documents, seeds and pairs than the tables compare, and of what the control has learned."""
    first, control = "python-documentation-and-source", "affine gelu_tanh × "
    whole, ended = [], {}
    for rate in ("10", "30"):
        for name in (f"{control}{rate}", f"{HERMITE}{rate}"):
            compared = recipe.difference(losses_of(first, name, "loss"), losses_of(first, "gelu_tanh", "loss"))
            assert compared is not None
            whole.append(f"{compared['mean']:.3f}")
        rows = [
            row for row in content("recipe")["trainings"] if (row["corpus"], row["name"]) == (first, control + rate)
        ]
        ended[rate] = [row["learned"] for row in rows]
    across = recipe.difference(losses_of(first, f"{HERMITE}30"), losses_of(first, f"{control}10"))
    digits = [losses_of("digits", name) for name in (f"{HERMITE}10", "affine gelu × 10")]
    fewer = recipe.difference({seed: loss for seed, loss in digits[0].items() if seed < 5}, digits[1])
    tiny = [
        plus_minus(recipe.difference(losses_of("tiny", name), losses_of("tiny", "gelu")), "+.4f")
        for name in (f"{HERMITE}10", "affine gelu × 10")
    ]
    gains = [learned["gain"] for learned in ended["30"]]
    low, high = sorted(gain[0] for gain in gains)[:: len(gains) - 1]
    near = sum(min(map(abs, gain)) < 0.08 for gain in gains)
    assert (len(ended["10"]), len(gains), near) == (13, 6, 4)
    assert sum(min(map(abs, learned["gain"])) < 0.04 for learned in ended["10"]) == 3
    about = [
        sum(learned[name][0] for learned in ended["10"]) / 13
        for name in ("gain", "input_scale", "input_shift", "offset")
    ]
    steps = [recipe.EQUAL_TIME[name] for name in ("hermite4-wide", "affine")]
    says(
        "docs/activations/study.md",
        f"On all 12 documents it is {', '.join(whole[:3])} and {whole[3]}",
        f"against the control × 10 ({plus_minus(across, '+.3f')})",
        f"the first five seeds alone had {plus_minus(fewer, '+.4f')}",
        f"has {tiny[0]} with Hermite 4 and {tiny[1]} with the control",
        f"the first gain is {low:.1f} to {high:.1f}, in four of six trainings one gain is within 0.08 of 0",
        f"on average {about[0]:.1f} · GELU({about[1]:.1f} x - {-about[2]:.0f}) - {-about[3]:.1f}",
        f"(`--train equal-time`: {steps[0]} and {steps[1]})",
    )


def tuned(corpus: str, name: str) -> str:
    """The difference to GELU where each has the base rate chosen for it."""
    (found,) = (one for one in content("recipe")["at_chosen_rates"] if (one["corpus"], one["name"]) == (corpus, name))
    return plus_minus(found["difference"], "+.4f")


def test_each_at_its_own_base_rate_is_told_as_measured() -> None:
    rates = {
        (one["corpus"], one["name"]): (one["chosen"], len(one["loss"]["values"]))
        for one in content("recipe")["at_chosen_rates"]
        if one["corpus"] in ("digits", "mnist-5k")
    }
    hermite, control = (f"{name} × 10" for name in _OF_IMAGES)
    chosen = {"gelu": (6e-3, 1.2e-2), control: (1.2e-2, 6e-3), hermite: (1.2e-2, 3e-3)}
    assert rates == {
        (corpus, name): (of[number], seeds)
        for number, (corpus, seeds) in enumerate((("digits", 10), ("mnist-5k", 5)))
        for name, of in chosen.items()
    }
    digits, images = ([tuned(corpus, name) for name in (hermite, control)] for corpus in ("digits", "mnist-5k"))
    of_digits = [
        {
            row["seed"]: row["test_loss"]
            for row in content("recipe")["trainings"]
            if (row["corpus"], row["name"], row["learning_rate"]) == ("digits", name, rate)
            and (row["steps"], row["batch"], row["precision"]) == (500, 32, "fp32")
        }
        for name, rate in ((hermite, 1.2e-2), ("gelu", 6e-3))
    ]
    fresh = recipe.difference(*({seed: own[seed] for seed in range(5, 10)} for own in of_digits))
    says("README.md", f"Each at its own best base rate, ten seeds: {digits[0]}.")
    says(
        "docs/activations/study.md",
        f"Hermite 4 (1.2e-2) has {digits[0]} from GELU (6e-3; ten seeds, p 0.015), the control (1.2e-2) {digits[1]}:",
        f"{plus_minus(fresh, '+.4f')} on these alone",
        f"Hermite 4 (3e-3) keeps {images[0]} from GELU (1.2e-2; p 0.004), the control (6e-3) {images[1]}.",
    )


def test_variants_of_the_recipe_are_told_as_measured() -> None:
    file = content("recipe_variants")
    assert recipe_variants.markdown(file) == (RESULTS / "recipe_variants.md").read_text(encoding="utf-8")
    found = recipe_variants.compare(file["trainings"])
    assert {len(one["trainings"]) for one in found.values()} == {3}

    def shown(name: str, key: str = "to_itself") -> str:
        return plus_minus(found[f"the recipe, {name}"][key], "+.3f").removeprefix("+")

    apart, free = (
        [one["loss"] for one in found[f"the recipe, coefficients {how}"]["trainings"]]
        for how in ("clipped apart", "not clipped")
    )
    assert apart == free
    says(
        "docs/activations/study.md",
        f"worse than GELU (+{shown('one function for all blocks', 'to_gelu')}) and by "
        f"{shown('one function for all blocks')} than one each",
        f"is worse by {shown('a function for each channel')} than one for all",
        f"they end {shown('coefficients clipped apart')} higher, without any clip {shown('nothing clipped')}.",
    )


def test_what_the_functions_became_is_told_as_measured() -> None:
    shapes = [
        one for one in content("recipe")["shapes"] if one["model"].startswith("GPT-2") and one["corpus"] != "tiny"
    ]
    assert recipe.shapes(content("recipe")["settings"], content("recipe")["trainings"]) == content("recipe")["shapes"]
    first = {name: [one["blocks"][0][name] for one in shapes] for name in ("GELU", "ReLU²")}
    largest = {one["steps"]: one["blocks"] for one in shapes if one["model"].endswith("of 320")}
    of_largest = sorted(block["ReLU²"] for block in largest[240])
    says(
        "docs/activations/study.md",
        f"ReLU² explains {min(first['ReLU²']):.2f} to {max(first['ReLU²']):.2f} of the variance",
        f"began, {min(first['GELU']):.2f} to {max(first['GELU']):.2f}.",
        f"all ten blocks do after 240 steps ({of_largest[0]:.2f} to {of_largest[-1]:.2f})",
    )
    assert (len(shapes), sum(one > 0.9 for one in first["ReLU²"])) == (14, 12)


def test_the_narrower_interval_is_told_as_measured() -> None:
    narrow = recipe.DEFAULT
    told = []
    for corpus in ("python-documentation-and-source", "state-of-the-union"):
        own = losses_of(corpus, narrow)
        compared = [
            recipe.difference(own, losses_of(corpus, other))
            for other in ("gelu_tanh", f"{HERMITE}10", "affine gelu_tanh × 10")
        ]
        assert all(one is not None and max(one["values"]) < 0 and one["pairs"] == 10 for one in compared)
        told.append([plus_minus(one, "+.3f") for one in compared])
    own, control, relu_squared = (
        losses_of("state-of-the-union", name)
        for name in (narrow, "affine gelu_tanh × 10", "polyrelu2 relu_squared × 0")
    )
    fresh = recipe.difference({seed: loss for seed, loss in own.items() if seed >= 5}, control)
    fixed = plus_minus(recipe.difference(own, relu_squared), "+.3f")
    images = [
        plus_minus(recipe.difference(losses_of(corpus, narrow), losses_of(corpus, other)), "+.4f")
        for corpus in ("mnist-5k", "digits")
        for other in ("gelu", f"{HERMITE}10")
    ]
    gelu = losses_of("state-of-the-union", "gelu_tanh")
    low = [
        plus_minus(recipe.difference(losses_of("state-of-the-union", name), gelu), "+.3f")
        for name in ("hermite2 gelu [-4, 4] × 10", "hermite3 gelu [-2, 2] × 10")
    ]
    says(
        "docs/activations/study.md",
        f"it has {told[0][0]} from GELU on the first text, {told[0][1]} from the recipe and {told[0][2]} beyond the "
        "control",
        f"on the addresses {told[1][0]}, {told[1][1]} and {told[1][2]}",
        f"the five fresh ones alone have {plus_minus(fresh, '+.3f')} beyond the control",
        f"On [-2, 2] it has {fixed} from it.",
        f"On MNIST it has {images[0]} from GELU and {images[1]} from the recipe, on the digits {images[2]} and "
        f"{images[3]}",
        f"Degree 2 on [-4, 4] has {low[0]}, degree 3 on [-2, 2] {low[1]}",
    )
    says(
        "README.md",
        f"the shape adds {told[0][2]} on this text and {told[1][2]} on another, on each of ten seeds",
        f"{fixed.lstrip('-')} less than Hermite 4 (five seeds)",
    )


def test_the_rule_where_it_was_not_found_is_told_as_measured() -> None:
    def of(corpus: str, name: str = f"{HERMITE}10", **about: Any) -> dict[str, Any]:
        usual = {"learning_rate": 3e-3, "precision": "fp32", "batch": 32 if corpus == "digits" else 8}
        steps = 500 if corpus == "digits" else 300
        (setting,) = (
            one
            for one in content("recipe")["settings"]
            if (one["corpus"], one["steps"]) == (corpus, steps)
            and all(one[key] == value for key, value in (usual | about).items())
        )
        (entry,) = (one for one in setting["activations"] if one["name"] == name)
        compared: dict[str, Any] = entry["difference"]
        return compared

    elsewhere = ({"learning_rate": 1e-3}, {"learning_rate": 6e-3}, {"batch": 64}, {"precision": "bf16"})
    digits = [plus_minus(of("digits", **about), "+.4f") for about in elsewhere]
    tiny = [plus_minus(of("tiny", **about), "+.4f") for about in elsewhere]
    harmed = {name: of("tiny", name, learning_rate=6e-3) for name in (f"{HERMITE}10", "affine gelu_tanh × 10")}
    own, control = harmed.values()
    slower = [of("tiny", f"{HERMITE}{rate}", learning_rate=6e-3) for rate in (1, 5)]
    assert all(min(one["values"]) > 0 for one in harmed.values())
    assert sum(value < 0 for value in slower[0]["values"]) == 2
    says(
        "docs/activations/study.md",
        f"Hermite 4 by the rule has {digits[0]} from GELU at a base rate of 1e-3, {digits[1]} at 6e-3, {digits[2]} "
        f"with batches of 64 and {digits[3]} in bfloat16; the tiny model has {tiny[0]} at 1e-3, {tiny[2]} with "
        f"batches of 64 and {tiny[3]} in bfloat16",
        f"Hermite 4 has {plus_minus(own, '+.4f')} (p {own['p_value']:.2f}), the control {plus_minus(control, '+.4f')} "
        f"(p {control['p_value']:.3f})",
        f"it is {plus_minus(slower[0], '+.4f')}, better on two",
        f"is no cure ({plus_minus(slower[1], '+.4f')})",
    )


def test_no_family_is_harmed_by_the_rule() -> None:
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    names = {row["name"] for row in content("recipe")["trainings"] if row["corpus"] == "tiny" and is_usual(row)}
    for slow in sorted(name for name in names if name.endswith("× 0.1") and "8 " not in name.replace("linear8", "")):
        family = slow.removesuffix("0.1")
        (fast,) = (name for name in names if name.startswith(family) and name != slow and not name.endswith("× 0"))
        compared = recipe.difference(*(losses_of("tiny", name, "loss") for name in (fast, slow)))
        assert compared is not None
        assert compared["pairs"] == 3
        has_ends = "[" in family or family.split()[0].startswith(ENDED)
        found[has_ends].append({**compared, "family": family})
    assert {has_ends: len(of) for has_ends, of in found.items()} == {True: 9, False: 5}
    means = {has_ends: sorted(one["mean"] for one in of) for has_ends, of in found.items()}
    told = {one["family"]: one for of in found.values() for one in of if one["mean"] + one["half_width"] < 0}
    assert set(told) == {"affine gelu × ", "rational5 × "}
    tuned = [
        entry["difference"]["mean"]
        for setting in content("recipe")["settings"]
        if setting["corpus"] == "tiny" and "trained on" in setting["model"]
        for entry in setting["activations"]
        if entry["name"] != "gelu"
    ]
    says(
        "docs/activations/study.md",
        f"the differences are {means[True][0]:.3f} to {means[True][-1]:.3f}, of which only the control's "
        f"({plus_minus(told['affine gelu × '], '+.4f')})",
        f"Five without are {-means[False][-1]:.3f} to {-means[False][0]:.3f} better",
        f"only rational's difference ({plus_minus(told['rational5 × '], '+.4f')})",
        f"end between {max(tuned):.4f} above and {-min(tuned):.4f} below GELU",
    )


def test_the_time_of_the_recipe_s_step_is_told_as_measured() -> None:
    file = content("recipe_time")
    assert recipe_time.markdown(file) == (RESULTS / "recipe_time.md").read_text(encoding="utf-8")
    text, images = (
        {"python" if "Python" in name else name.split()[0]: ratio for name, ratio in row["ratios"].items()}
        for row in file["models"]
    )
    assert text["hermite4"]["high"] < file["bar"]
    assert images["hermite4"]["median"] <= file["bar"] < images["hermite4"]["high"]  # met, though more is not excluded
    says(
        "docs/activations/study.md",
        f"a step of GPT-2 with Hermite 4 takes {recipe_time.shown(text['hermite4'])} of GELU's",
        f"of the ConvNeXt {recipe_time.shown(images['hermite4'])}",
        f"the control takes {text['affine']['median']:.2f} and {images['affine']['median']:.2f}",
        f"takes {recipe_time.shown(images['python'])} of the step with GELU, and {text['python']['median']:.3f} in",
    )


def test_fine_tuning_is_told_as_measured() -> None:
    """The table of rates is of the converted model's whole validation text; the rule's own rate is the quickstart's."""
    losses: dict[str, dict[str, float]] = {}
    for row in content("recipe")["trainings"]:
        if "trained on" in row["model"] and row["steps"] == 160:
            losses.setdefault(row["model"].partition("trained on")[2], {})[row["name"]] = row["loss"]
    now, earlier = losses[""], losses[" after an earlier conversion"]
    rates = [f"{now[f'hermite8 × {rate}']:.3f}" for rate in ("0", "0.1", "0.3", "1", "3", "10")]
    rates.insert(3, f"{content('quickstart')['models']['GELU → Hermite, fine-tuned']['loss']:.3f}")
    gelu = now["gelu_tanh"]
    elsewhere = content("quickstart")["models"]["GELU, fine-tuned"]["loss"]
    ends = [f"{earlier[f'hermite8 × {rate}']:.3f}" for rate in ("0.1", "1", "10")]
    says(
        "docs/activations/study.md",
        f"| {' | '.join(rates)} | {gelu:.3f} |",
        f"by the rule is the quickstart's last run, on another machine, where GELU ended at {elsewhere:.3f}.",
        f"ended at {ends[0]}, {ends[1]} and {ends[2]} (× 0.1, × 1, × 10;",
    )


def test_the_measured_basis_is_told_as_measured() -> None:
    file = content("measured_basis")
    assert measured_basis.markdown(file) == (RESULTS / "measured_basis.md").read_text(encoding="utf-8")
    gained = {name: {rate: one["mean"] for rate, one in of.items()} for name, of in file["gained"].items()}
    best = [
        f"{max(gained[f'{name}, degree {degree}'].values()):.4f}"
        for degree in (3, 8)
        for name in ("measured", "as fitted")
    ]
    faster = [gained[f"{name}, degree {degree}"]["0.01"] for name in ("measured", "as fitted") for degree in (3, 8)]
    says(
        "docs/conversion.md",
        f"({best[0]} against {best[1]} nats per byte at degree 3, {best[2]} against {best[3]} at degree 8;",
        f"at a rate of 0.01 it still gains {faster[0]:.4f} and {faster[1]:.4f} where the family's",
        f"basis loses {-faster[2]:.4f} and {-faster[3]:.4f}",
    )


def test_of_ten_activations_one_difference_survives_the_correction() -> None:
    groups = content("activation_study")["results"]
    survive: dict[tuple[str, str], float] = {}
    for data in ("gpt", "convnext"):
        found = {one["group"]: one["difference"]["p_value"] for one in groups[data]["groups"] if one.get("difference")}
        assert len(found) == 9
        corrected = dict(zip(found, holm(list(found.values())), strict=True))
        survive |= {(data, name): p for name, p in corrected.items() if p < 0.05}
        if data == "gpt":
            assert sum(p < 0.05 for p in found.values()) == 6
        else:
            assert f"{corrected['chebyshev']:.2f}" == "0.08"
    assert [(key, f"{p:.3f}") for key, p in survive.items()] == [(("gpt", "fourier5"), "0.019")]
    says("README.md", "only Fourier's remains (p 0.02)")
    says("docs/activations/study.md", "Fourier's on text is 0.019 and every other one above 0.05")


def test_the_quickstart_s_table_is_the_measured_one() -> None:
    found = content("quickstart")
    for name, model in found["models"].items():
        cells = [
            name,
            f"{model['loss']:.4f}",
            f"{model['perplexity']:.2f}",
            f"{model['bits_per_byte']:.4f}",
            f"{100 * model['top1']:.1f} %",
        ]
        says("README.md", "| " + " | ".join(cells) + " |")
    minutes, seconds = divmod(round(found["seconds"]), 60)
    says("README.md", f"{minutes} min {seconds} s, {found['peak_memory_gibibytes']:.1f} GiB")


def test_stable_starts_keep_their_bar_but_at_degree_2_and_the_page_says_so() -> None:
    file = content("deep_nets")
    rows = file["rows"]
    missed = [(row["degree"], row["interval"]) for row in rows if row["init"] == "stable" and not row["within_bar"]]
    assert missed == [(2, None), (2, [-4, 4])]
    says("docs/activations/polynomials.md", "degree 2 of `stable` misses it, as any quadratic would, and meets it with")
    (narrow,) = (row for row in rows if (row["init"], row["degree"], row["interval"]) == ("stable", 2, [-2, 2]))
    assert narrow["lost"] == 0
    says("docs/activations/polynomials.md", "the mean stays within {:.2f} and {:.2f}. So for".format(*narrow["mean"]))
    within = {(row["share"], row["width"]): row["within_bar"] for row in file["quadratics"]}
    assert [key for key, met in within.items() if met] == [(0.5, 1024)]
    lost = {(row["share"], row["width"]): f"{100 * row['lost']:.1f}" for row in file["quadratics"]}
    assert (lost[1.0, 256], lost[0.5, 512], lost[0.5, 1024]) == ("0.1", "0.2", "0.0")
    assert deep_nets.markdown(file) == (RESULTS / "deep_nets.md").read_text(encoding="utf-8")


def test_the_engine_s_time_is_the_measured_one() -> None:
    found = content("engine")["results"]
    local = f"{found['local']['ms_per_stage']:.1f}"
    says(
        "README.md",
        f"takes {found['peers']['polytrope_ms_per_stage']:.1f} to {local} ms",
        f"does nothing takes {local} ms",
    )
    ratios = [content("train")["results"][workers]["ratio"] for workers in ("1 worker", "2 workers")]
    says("README.md", "took {:.2f} times that of a bare PyTorch loop with GELU (two workers: {:.2f})".format(*ratios))


def test_the_layers_of_products_are_told_as_measured() -> None:
    from PIL import Image

    file = content("polynomial_networks")
    numbers, images, tuned = file["numbers"], file["images"], file["tuned"]
    assert (RESULTS / "polynomial_networks.md").read_text(encoding="utf-8") == polynomial_networks.markdown(file)
    with Image.open(RESULTS / "polynomial_networks-rows.png") as picture:
        assert picture.info["Source"] == polynomial_networks.digest_of(file)
    for rows, figure, baseline in ((numbers, "whole", "relu"), (images, "loss", "mlp"), (tuned, "loss", "continued")):
        assert polynomial_networks.compared(rows, figure, baseline) == rows
    assert [name for name, row in numbers.items() if row["above"] is None] == ["relu", "pade"]
    assert file["drift"] == {"kl_divergence": 0.0, "agreement": 1.0}

    def percent(row: dict[str, Any]) -> str:
        return f"{100 * sum(row['accuracy']) / 5:.1f} %"

    alone = file["alone"]
    says(
        "docs/polynomial-networks.md",
        f"has an R² above 0.9 from {numbers['hermite']['above']:,} rows on",
        f"layers with ReLU and a KAN from {numbers['quadratic']['above']:,}, and ReLU",
        f"rows: {sum(numbers['relu']['whole']) / 5:.3f} with all.",
        f"Hermite by {polynomial_networks.plus_minus(numbers['hermite']['difference'])}",
        f"at all, by {polynomial_networks.plus_minus(numbers['pi']['difference'])}",
        f"loss of {polynomial_networks.plus_minus(images['quadratic']['difference'])}, and the rest",
        f"nothing here ({percent(alone['coefficients'])}, chance",
        f"next to nothing ({percent(alone['coefficients_per_channel'])}), norms {percent(alone['norms'])}, the last "
        f"layer {percent(alone['head'])}",
        f"From a checkpoint with {percent(file['baseline'])}",
        f"the products alone reach {percent(tuned['multiplicative'])}",
        f"linear layers ({percent(tuned['continued'])}, a loss of "
        f"{polynomial_networks.plus_minus(tuned['multiplicative']['difference'])} between them)",
    )
    assert numbers["kan"]["above"] == numbers["quadratic"]["above"]
    assert min(row["difference"]["mean"] for name, row in numbers.items() if name != "relu") > 0
    assert {name for name, row in images.items() if name != "mlp" and row["difference"]["holm"] < 0.05} == {"quadratic"}


def test_the_network_of_sums_and_products_is_told_as_measured() -> None:
    file = content("private_inference")
    written = (RESULTS / "private_inference.md").read_text(encoding="utf-8")
    assert private_inference.markdown(file["steps"], file["circuit"]) == written
    gap = file["steps"]["polynomial"]["difference"]
    assert gap["mean"] + gap["half_width"] <= file["bar"]
    says("README.md", f"{gap['mean']:.3f} ± {gap['half_width']:.3f} nats per byte beyond GELU, layer norm and softmax")
    losses = file["circuit"]["nats_per_byte"]
    assert abs(losses["circuit"] - losses["trained"]) <= 1.2e-4
    says("docs/private-inference.md", f"changes the loss by {losses['circuit'] - losses['trained']:.1e} nats per byte")


def test_the_compiled_block_is_told_as_measured() -> None:
    rows = content("ops-cpu")["compiled"]
    assert compiled.markdown(rows, ops.label).strip() in (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    ratios = {(ops.label(row["config"]), row["size"]): row["times_gelu"] for row in rows if row["dtype"] == "float32"}

    def span(name: str) -> str:
        low, high = sorted((ratios[name, "small"], ratios[name, "large"]))
        return f"{low:.2f} to {high:.2f}"

    says("README.md", f"Hermite 3 takes [{span('hermite 3')} of GELU's time")
    says("README.md", f"Hermite 8 with an interval {span('hermite 8, interval')}](docs/ops.md#speed)")


def test_the_kernels_on_a_gpu_are_told_as_measured() -> None:
    document = content("ops-gpu")
    for table in gpu_ops.markdown(document).strip().split("\n\n"):
        assert table in (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    own: dict[str, list[float]] = {"hermite": [], "per channel": [], "both": []}
    for row in document["rows"]:
        config = row["config"]
        kind = "hermite" if set(config) == {"name", "degree"} and config["name"] == "hermite" else None
        if "num_parameters" in config:
            kind = "both" if "interval" in config else "per channel"
        if kind is not None:
            own[kind].append(row["times_gelu"])
    blocks = [row["times_gelu"] for row in document["compiled"] if row["config"]["name"] == "hermite"]
    low, high = (f"{end(own['hermite']):.2f}" for end in (min, max))
    says("README.md", f"Hermite 1 to 8 take {low} to {high} of GELU's time")
    low, high = (f"{end(own['per channel']):.2f}" for end in (min, max))
    says("README.md", f"coefficients per channel {low} to {high} (with an interval too {max(own['both']):.2f})")
    low, high = (f"{end(blocks):.2f}" for end in (min, max))
    says("README.md", f"a compiled block with Hermite {low} to {high}")


def test_the_trainings_on_a_gpu_are_told_as_measured() -> None:
    document = content("gpu-train-2026-11-27")
    first, second, third = (run["steps"] for run in document["runs"])
    speeds = second["training"]["tokens_per_second"]
    shares = [f"{value:.3f}" for value in second["training"]["mfu"].values()]
    rounded = [f"{round(value, -3):,.0f}" for value in speeds.values()]
    ratio = speeds["gelu_tanh"] / speeds["hermite4"]
    says("docs/training.md", f"| {rounded[0]} | {rounded[1]} | step ≤ 1.02 × GELU's: {ratio:.2f} ✗ |")
    says("docs/training.md", f"| {shares[0]} | {shares[1]} | ≥ 0.45 ✗ |")
    earlier = [f"{round(first['training']['tokens_per_second'][name], -3):,.0f}" for name in speeds]
    says("docs/training.md", f"tokens per second | {earlier[0]} | {earlier[1]} | |")
    images = [f"{value:.0f}" for value in third["images"]["images_per_second"].values()]
    says("docs/training.md", f"its own start) | {images[0]} | {images[1]} | |")
    assert second["resume"]["same_bytes"] == {"dataset": True, "train": False}
    steps = [document["phases_in_milliseconds"][name]["step"] for name in speeds]
    says("docs/training.md", f"{steps[0]:.0f} ms with GELU and {steps[1]:.0f} with twelve")
    slower = statistics.median(document["deterministic_with_warn_only"]["gelu_tanh"])
    says("docs/training.md", f"cost {100 * (1 - slower / speeds['gelu_tanh']):.0f} % of the speed there")
    gain = speeds["gelu_tanh"] / first["training"]["tokens_per_second"]["gelu_tanh"] - 1
    says("docs/training.md", f"a multiple of 64 is worth {100 * gain:.0f} %")
    losses = first["training"]["validation_curve"]
    for step in ("300", "600", "900"):
        gelu, hermite = (losses[name][step] for name in speeds)
        says("docs/activations/study.md", f"M | {gelu:.4f} | {hermite:.4f} | {hermite - gelu:+.4f} |")
    gelu, hermite = (second["training"]["validation_loss"][name] for name in speeds)
    says("docs/activations/study.md", f"| {gelu:.4f} | {hermite:.4f} | {hermite - gelu:+.4f} |")
    gelu, hermite = (first["training"]["loss"][name] for name in speeds)
    says(
        "docs/activations/study.md", f"it is {gelu - hermite:.4f} ahead at step 900 ({hermite:.4f} against {gelu:.4f})"
    )


def test_derivatives_are_told_as_measured() -> None:
    file = content("symbolic")
    assert file["workflow"] == yaml.safe_load(symbolic.workflow())
    assert symbolic.markdown(file) == (RESULTS / "symbolic.md").read_text(encoding="utf-8")
    gelu, hermite = file["models"]["gelu"], file["models"]["hermite3"]
    drawn = file["workflow"]["stages"]["lines"]["with"]["source"]["count"]
    says(
        "docs/symbolic.md",
        f"{file['splits']['train']['documents']:,} training lines of depth 2 "
        f"({file['left_out']['lines that were drawn before']:,} of {drawn:,} were drawn before)",
        f"{gelu['parameters']:,} and {hermite['parameters']:,} parameters",
        f"{gelu['answers']['correct']} of GELU's are right, of which one is written otherwise",
        f"and {hermite['answers']['correct']} of `hermite3`'s",
    )
    assert gelu["answers"]["correct"] - gelu["answers"]["exact"] == 1
    assert min(row["answers"]["valid"] for row in (gelu, hermite)) >= 0.9 * 200
    used = [f"{100 * row['rank']['utilisation']:.0f} %" for row in (gelu, hermite)]
    last = [row["rank"]["layers"][-1] for row in (gelu, hermite)]
    assert {layer["name"] for layer in last} == {"transformer.h.1.mlp.c_proj"}
    says(
        "docs/analyses.md",
        f"use {used[0]} (GELU) and {used[1]} (`hermite3`) of their layers",
        f"{last[0]['inputs']} → {last[0]['outputs']}, has rank {last[0]['rank']} and {last[1]['rank']}",
        f"would save {100 * gelu['rank']['saved_share']:.0f} % and {100 * hermite['rank']['saved_share']:.0f} % of all",
    )


def test_grokking_is_told_as_measured() -> None:
    file = content("grokking")
    workflow = yaml.safe_load((ROOT / "workflows" / "grokking.yaml").read_text(encoding="utf-8"))
    assert file["params"] == workflow["params"]
    assert grokking.markdown(file) == (RESULTS / "grokking.md").read_text(encoding="utf-8")
    rows = file["activations"]
    first = {name: rows[name].get("generalised_step", [None]) for name in rows}
    alike = [step for name in ("square", "polyrelu2", "gelu", "tropical5", "relu") for step in first[name]]
    assert max(step for row in rows.values() for step in row["memorised_step"]) == 75
    never = [name for name, steps in first.items() if None in steps]
    assert never == ["hermite3", "rational5", "tanh"]
    shares = {name: f"{100 * sum(row['test_accuracy']) / 3:.1f} %" for name, row in rows.items()}
    says(
        "docs/grokking.md",
        "All memorise within 75 steps",
        f"after {min(first['fourier5']):.0f} to {max(first['fourier5']):.0f} steps on every seed",
        f"({min(first['tropical_rational6']):.0f} to {max(first['tropical_rational6']):.0f} steps)",
        f"at {min(alike):,.0f} to {max(alike):,.0f} steps",
        f"tanh ends at {shares['tanh']}",
        f"at the end {shares['square']} and {shares['polyrelu2']} of the other pairs are right",
    )
    found = {
        name: [scale for scale, row in file["scales"].items() if None not in row[name].get("generalised_step", [None])]
        for name in ("fourier5", "relu")
    }
    assert found == {"fourier5": list(file["scales"]), "relu": ["1", "3", "10"]}
    assert "generalised_step" not in file["scales"]["10"]["square"]


def test_what_is_left_after_training_is_told_as_measured() -> None:
    result = content("after_training")
    written = after_training.markdown(result)
    assert written == (RESULTS / "after_training.md").read_text(encoding="utf-8")
    says("docs/after-training.md", " ".join(written.split()))
    ways = {row["way"]: row for row in result["ways"]}
    for way in ("2 blocks dropped", "linear layers factored, 1.5 times smaller", "4 bits, a scale per row"):
        assert result["nats_per_token"] < ways[way]["nats_per_token"] < ways[way]["naive_nats_per_token"]
    dropped = ways["2 blocks dropped"]
    saved = dropped["naive_nats_per_token"] - dropped["nats_per_token"]
    assert saved / (dropped["naive_nats_per_token"] - result["nats_per_token"]) == pytest.approx(0.75, abs=0.02)
    rounded = ways["4 bits, a scale per row"]
    saved = rounded["naive_nats_per_token"] - rounded["nats_per_token"]
    assert saved / (rounded["naive_nats_per_token"] - result["nats_per_token"]) == pytest.approx(0.26, abs=0.02)


def test_norms_are_told_as_measured() -> None:
    file = content("norms")
    figures = {row: {name: one["values"] for name, one in found.items()} for row, found in file["digits"].items()}
    assert json.loads(json.dumps(norms.compare(figures))) == file["digits"]
    assert norms.markdown(file["digits"]) == (RESULTS / "norms.md").read_text(encoding="utf-8")
    text = file["text"]
    batch = content("private_inference")["steps"]["polynomial"]["nats_per_byte"]
    assert text["batch"] == [batch[seed] for seed in text["seeds"]]
    rms, other = (" ".join(f"{loss:.3f}" for loss in text[name]) for name in ("rms", "batch"))
    says(
        "docs/parts/norm.md",
        f"{rms} nats per byte where batch norm has {other}",
        f"depth {text['depth']} instead of {text['depth_of_batch']}",
        f"{text['rows_outside']} of {text['rows']:,} vectors",
        f"{text['circuit']:.3f} nats per byte with polynomials",
        f"up to {100 * max(error for _, _, error in text['roots'].values()):.2g} percent",
    )


def test_how_learnable_activations_compress_is_told_as_measured() -> None:
    result = content("compressibility")
    assert compressibility.markdown(result["ways"], result["rows"]) == (RESULTS / "compressibility.md").read_text(
        "utf-8"
    )
    assert json.loads(json.dumps(compressibility.compare(result["rows"]))) == result["ways"]
    ways = {entry["way"]: entry["difference"] for entry in result["ways"]}
    gelu, (hermite, affine) = compressibility.BASELINE, compressibility.LEARNABLE
    (less, more) = (ways[f"layers factored, {ratio} times smaller"] for ratio in ("1.5", "3"))
    shape = [entry["shape"] for entry in result["ways"] if entry["way"].startswith("layers factored")]
    thirds = [row for row in result["rows"] if row["way"] == "layers factored, 3 times smaller"]
    after = {name: {row["seed"]: row["after"] for row in thirds if row["name"] == name} for name in (gelu, hermite)}
    worse = recipe.difference(after[hermite], after[gelu])
    assert worse is not None
    says(
        "docs/after-training.md",
        f"by {less[hermite]['mean']:.3f} nats at a ratio of 1.5 and {more[hermite]['mean']:.3f} at 3, on every seed",
        f"the control as well, by {less[affine]['mean']:.3f} and {more[affine]['mean']:.3f}",
        f"({shape[0]['mean']:.3f} ± {shape[0]['half_width']:.3f} at 1.5, p {shape[0]['holm_p_value']:.3f} after",
        f"but p is {shape[1]['holm_p_value']:.2f})",
        f"at 3 they are worse, by {worse['mean']:.3f} ± {worse['half_width']:.3f}",
        f"by {max(ways['3 bits'][name]['mean'] for name in (hermite, affine)):.3f} at most",
    )
    assert shape[1]["mean"] > shape[1]["half_width"]
    assert all(value > 0 for way in (less, more) for name in way for value in way[name]["values"])
    for way, found in ways.items():
        assert all((one["holm_p_value"] < 0.05) == way.startswith("layers factored") for one in found.values()), way
    means = {key: {} for key in ("before", "1.5", "3")}
    for name in (compressibility.BASELINE, hermite):
        own = [row for row in result["rows"] if row["name"] == name]
        means["before"][name] = sum(row["before"] for row in own) / len(own)
        for ratio in ("1.5", "3"):
            after = [row["after"] for row in own if row["way"] == f"layers factored, {ratio} times smaller"]
            means[ratio][name] = sum(after) / len(after)
    better = {key: of[hermite] < of[compressibility.BASELINE] for key, of in means.items()}
    assert better == {"before": True, "1.5": True, "3": False}


def test_merged_tangents_are_told_as_measured() -> None:
    written = tangent.markdown(content("tangent")["seeds"])
    assert written == (RESULTS / "tangent.md").read_text(encoding="utf-8")
    for row in content("tangent")["seeds"]:
        assert len(row["rates"]) == 2
        assert all(rate["average of tangents"] < rate["average of weights"] for rate in row["rates"])
    says("docs/after-training.md", "better than averaged weights in all three seeds, at both learning rates")


def test_what_minilm_loses_is_told_as_measured() -> None:
    result = content("conversion")
    hermite = {row["degree"]: row["cosine"] for row in result["conversion"]}
    distilled = {row["degree"]: row["after"] for row in result["distillation"]}
    places = {4: 5, 6: 5, 8: 5, 12: 7}

    def cell(value: float, digits: int) -> str:
        return f"{value:.{digits}f}".removeprefix("0")

    mean = " | ".join(cell(hermite[degree]["mean"], digits) for degree, digits in places.items())
    minima = zip(hermite.values(), (4, 4, 5, 7), strict=True)
    smallest = " | ".join(cell(row["minimum"], digits) for row, digits in minima)
    last = " | ".join(cell(distilled[degree]["mean"], 5) for degree in (4, 6))
    says(
        "README.md",
        f"| degree | 4 | 6 | 8 | 12 | |---|---|---|---|---| | mean cosine | {mean} |",
        f"| mean cosine | {mean} | | smallest | {smallest} |",
        f"| mean, distilled | {last} | – | – |",
    )
    families = {(row["family"], row["degree"]): row["cosine"]["mean"] for row in result["families"]}
    shown = [
        ("Chebyshev 8 {}", ("chebyshev", 8), 5),
        ("Fourier 2 (7) {}", ("fourier", 2), 5),
        ("Fourier 3 (10) {}", ("fourier", 3), 6),
        ("rational 4 (8) {}", ("rational", 4), 6),
        ("rational 5 (10) {}", ("rational", 5), 6),
        ("tropical rational 1 (8) {}", ("tropical_rational", 1), 3),
        ("tropical rational 2 (12) {}", ("tropical_rational", 2), 3),
        ("PolyReLU 8 (9) {}", ("polyrelu", 8), 3),
    ]
    says("README.md", *(name.format(cell(families[key], digits)) for name, key, digits in shown))
    rows = {f"Hermite {degree}": cosine["mean"] for degree, cosine in hermite.items()}
    rows |= {f"{name.partition(' (')[0].removesuffix(' {}')}": families[key] for name, key, _ in shown}
    rows |= {f"Hermite {degree}, distilled": cosine["mean"] for degree, cosine in distilled.items()}
    page = (ROOT / "docs/conversion.md").read_text(encoding="utf-8")
    for name, value in rows.items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert line.endswith(f"| {f'{1 - value:.1e}'.replace('e-0', 'e-')} |"), (line, value)


def test_the_table_after_training_is_told_as_measured() -> None:
    rows = content("after_training_table")["rows"]
    assert after_training_table.markdown(rows) == (RESULTS / "after_training_table.md").read_text("utf-8")
    loss = {row["name"]: row["loss"] for row in rows}
    assert loss["recovered[by=all]"] < loss["gpt"] < loss["smaller[way=4 bits]"]
    assert f"{loss['smaller[way=4 bits]']:.3f}" == f"{loss['smaller[way=4 bits uniform]']:.3f}"
    taught = [loss[f"taught[by={name}]"] for name in ("outputs", "outputs and states")]
    more = [f"{loss['recovered[by=all]'] - value:.3f}" for value in taught]
    says("docs/after-training.md", f"better by another {more[0]} ({more[1]} where states are matched too)")
    shown = [f"{value - loss['gpt']:.3f}" for value in (loss["recovered[by=all]"], *taught)]
    says(
        "docs/training.md",
        f"{shown[0]} nats against the whole model, with its outputs as a teacher {shown[1]}, with states",
    )
    says("docs/training.md", f"with states too {shown[2]}")
    adapters = [loss[f"recovered[by={name}]"] for name in ("householder", "spectral", "lora")]
    assert all(loss["gpt"] < value < loss["smaller[way=2 blocks dropped]"] for value in adapters)
