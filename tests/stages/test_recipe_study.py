"""benchmarks.recipe: what is trained, what is compared with what, and by what something is chosen."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from benchmarks import mnist, recipe, recipe_budgets, recipe_tables, recipe_time, recipe_trainings
from benchmarks.recipe_stages import learned_start
from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.pipeline.stages.train.train import train
from polytrope.pipeline.store.manifest import StoredArtifact
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.code import read_code
from polytrope.pipeline.workflow.encoding import encode
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.spec import load_workflow

LOSSES = {
    "gelu_tanh": {0: 4.2, 1: 4.3, 2: 4.1},
    "affine gelu_tanh × 10": {0: 4.1, 1: 4.2, 2: 4.05, 10: 4.0, 11: 4.3},
    "affine gelu_tanh × 30": {0: 4.1, 10: 4.2},
    "affine gelu_tanh × 10, frozen as learned": {0: 4.15, 1: 4.2},
    "hermite4 gelu [-4, 4] × 10": {0: 4.05, 1: 4.17, 2: 4.05, 10: None},
}
SETTING = {
    "corpus": "text",
    "data": "a",
    "model": "GPT-2, 4 layers of 128",
    "steps": 480,
    "batch": 8,
    "precision": "fp32",
}


def rows() -> list[dict[str, Any]]:
    """Losses that count stand in one half alone; the other has what must not be looked at."""
    found = []
    for name, losses in LOSSES.items():
        for seed, loss in losses.items():
            halves = (
                {"development_loss": loss, "test_loss": 9.0}
                if seed >= 10
                else {"development_loss": 9.0, "test_loss": loss}
            )
            found.append(
                {**SETTING, "learning_rate": 3e-3, "name": name, "seed": seed, "loss": 9.0, "accuracy": None, **halves}
            )
    return found


def test_differences_are_of_the_seeds_and_documents_that_nothing_is_chosen_by() -> None:
    (setting,) = recipe.compare(rows())
    assert (setting["baseline"], setting["controls"]) == (
        "gelu_tanh",
        ["affine gelu_tanh × 10", "affine gelu_tanh × 30"],
    )
    entries = {entry["name"]: entry for entry in setting["activations"]}
    hermite = entries["hermite4 gelu [-4, 4] × 10"]
    assert hermite["difference"]["values"] == pytest.approx([-0.15, -0.13, -0.05])
    same_rate, faster = hermite["differences_to_controls"].values()
    assert same_rate["values"] == pytest.approx([-0.05, -0.03, 0.0])
    assert (faster["mean"], faster["p_value"]) == (pytest.approx(-0.05), None)
    assert hermite["difference"]["holm_p_value"] >= hermite["difference"]["p_value"]
    assert hermite["failed"] == 1
    assert "differences_to_controls" not in entries["affine gelu_tanh × 30"]
    frozen = entries["affine gelu_tanh × 10, frozen as learned"]["differences_to_controls"]
    assert frozen["affine gelu_tanh × 10"]["values"] == pytest.approx([0.05, 0.0])
    assert entries["gelu_tanh"]["loss"]["mean"] == pytest.approx(4.2)
    text = recipe_tables.markdown([setting], [], {})
    assert "| hermite4 gelu [-4, 4] × 10 | 3 | 4.0900 ± 0.1721 | – | -0.1100 ± 0.1314 |" in text
    assert "| affine gelu_tanh × 30 | 1 | 4.1000 | 10: 4.2000 | -0.1000 | – | – | – | – | – | 0 |" in text


def test_the_first_table_has_the_recipe_as_it_was_found_and_as_it_is_the_default() -> None:
    narrow = [row | {"name": recipe.DEFAULT} for row in rows() if row["name"] == recipe.RECIPE]
    (setting,) = recipe.compare(rows() + narrow)
    entries = {entry["name"]: entry for entry in setting["activations"]}
    first = recipe_tables.overview([setting])
    for name in (recipe.RECIPE, recipe.DEFAULT):
        (line,) = (line for line in first if f"| {name} | 3 | 4.2000" in line)
        beyond = entries[name]["differences_to_controls"]["affine gelu_tanh × 10"]
        found = f"-0.1100 ± 0.1314 | {entries[name]['difference']['holm_p_value']:.4f} | "
        assert found in line
        assert line.endswith(f" | -0.0267 ± 0.0625 | {beyond['holm_p_value']:.4f} | 1 |")
    assert "tropical" not in "".join(first)
    only_found = recipe_tables.overview(recipe.compare(rows()))
    assert [recipe.DEFAULT in "".join(only_found), recipe.RECIPE in "".join(only_found)] == [False, True]


def test_what_is_tried_beside_costs_what_is_asked_nothing() -> None:
    """Holm's correction is apart: the control at thirty times the base rate, and what is frozen, were tried beside."""
    asked = [row for row in rows() if row["name"] in ("gelu_tanh", "affine gelu_tanh × 10", recipe.RECIPE)]
    entries, alone = (
        {entry["name"]: entry for entry in recipe.compare(trainings)[0]["activations"]} for trainings in (rows(), asked)
    )
    for name in ("affine gelu_tanh × 10", recipe.RECIPE):
        assert entries[name]["difference"] == alone[name]["difference"]
    same_rate, faster = entries[recipe.RECIPE]["differences_to_controls"].values()
    assert [same_rate] == list(alone[recipe.RECIPE]["differences_to_controls"].values())
    assert (faster["pairs"], faster["holm_p_value"]) == (1, None)
    fixed = ("silu", "polyrelu2 relu_squared × 0")
    assert [recipe.is_asked(name) for name in (*fixed, "hermite8 gelu [-4, 4] × 10")] == [True, True, False]


def test_the_picture_compares_with_the_control_at_the_same_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"gelu": {0: 0.5, 1: 0.6}, "affine gelu × 10": {0: 0.45, 1: 0.5}, "hermite4 × 10": {0: 0.4, 1: 0.5}}
    fast = {"affine gelu × 30": {0: 0.3, 1: 0.5}, "hermite4 × 30": {0: 0.2, 1: 0.2}, "hermite8 × 5": {0: 0.2, 1: 0.2}}
    trainings = [
        {**SETTING, "learning_rate": 3e-3, "name": name, "seed": seed, "test_loss": loss, "accuracy": None}
        for name, losses in (slow | fast).items()
        for seed, loss in losses.items()
    ]
    (setting,) = recipe.compare(trainings)
    drawn: dict[str, Any] = {}

    def keep(_theme: Any, groups: list[dict[str, Any]], *others: Any) -> Any:
        drawn.update({group["group"]: group.get("difference_to_control") for group in groups}, others=others)
        return plt.figure(figsize=(1, 1))

    monkeypatch.setattr(recipe.figures, "draw_groups", keep)
    assert recipe.picture(setting).startswith(b"\x89PNG")
    assert drawn["hermite4 × 10"]["values"] == pytest.approx([-0.05, 0.0])
    assert drawn["hermite4 × 30"]["values"] == pytest.approx([-0.1, -0.3])
    assert drawn["hermite8 × 5"] is None  # the control was not trained at that rate
    assert drawn["others"][-1] == "affine, same rate"


def test_gains_are_told_by_size_and_steps_where_one_text_has_several() -> None:
    about = {"corpus": "text", "data": "a", "batch": 8, "learning_rate": 3e-3, "precision": "fp32", "accuracy": None}
    trainings = []
    for model, steps, gain in (("128", 480, 0.3), ("64", 960, 0.2), ("64", 480, 0.1), ("64, gated", 480, 0.9)):
        for seed in (0, 1):
            for name, loss in (("gelu_tanh", 4.0 + seed), ("hermite4 × 10", 4.0 + seed - gain * (1 + 0.1 * seed))):
                own = {"model": f"GPT-2, 4 layers of {model}", "steps": steps, "name": name, "seed": seed}
                trainings.append({**about, **own, "test_loss": loss})
    again = [row | {"precision": "bf16"} for row in trainings if row["seed"] == 0]  # fewer pairs of the same budgets
    settings = recipe.compare(trainings + again)
    (group,) = recipe_budgets.budgets(settings).values()
    assert {one["precision"] for one in group} == {"fp32"}
    assert [(one["model"][-3:].strip(), one["steps"]) for one in group] == [("64", 480), ("64", 960), ("128", 480)]
    assert recipe_budgets.compared(group) == ["hermite4 × 10"]
    text = recipe_tables.markdown(settings, [], {})
    assert "| model | precision | base rate | steps | seeds | loss of GELU | Δ hermite4 × 10 |" in text
    assert "| GPT-2, 4 layers of 64 | fp32 | 0.003 | 960 | 2 | 4.5000 ± 6.3531 | -0.2100 ± 0.1271 |" in text
    assert recipe_budgets.picture(group).startswith(b"\x89PNG")
    assert recipe_budgets.budgets([one for one in settings if one["steps"] == 480]) == {}


def test_what_a_control_has_learned_is_kept_by_block() -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "sequence_length": 8, "vocab_size": 16}
    control: Any = build_model("gpt2", {**sizes, "activation": {"name": "affine", "init": "gelu_tanh"}})
    with torch.no_grad():
        control.transformer.h[1].mlp.activation.gain.fill_(2.53125)
    learned = recipe_trainings.learned_numbers(control)
    assert learned == {"gain": [1.0, 2.531], "offset": [0.0, 0.0], "input_scale": [1.0, 1.0], "input_shift": [0.0, 0.0]}
    hermite = build_model("gpt2", {**sizes, "activation": "hermite3"})
    assert [len(block) for block in recipe_trainings.learned_numbers(hermite)["coefficients"]] == [4, 4]
    assert recipe_trainings.learned_numbers(build_model("gpt2", {**sizes, "activation": "gelu"})) == {}


def test_images_are_compared_by_their_accuracy_too() -> None:
    """A smaller loss with smoothed labels may be nothing but more confidence."""
    found = {"gelu": {0: 0.99, 1: 0.98, 2: 0.99}, "affine gelu × 10": {0: 0.98, 1: 0.98, 2: 0.97}}
    trainings = [
        {**SETTING, "learning_rate": 3e-3, "name": name, "seed": seed, "test_loss": 1 - share, "accuracy": share}
        for name, shares in found.items()
        for seed, share in shares.items()
    ]
    (setting,) = recipe.compare(trainings)
    assert setting["baseline"] == "gelu"
    affine = next(entry for entry in setting["activations"] if entry["name"].startswith("affine"))
    assert affine["accuracy"]["mean"] == pytest.approx(0.97667, abs=1e-5)
    assert affine["accuracy_difference"]["values"] == pytest.approx([-0.01, 0.0, -0.02])
    assert affine["accuracy_difference"]["holm_p_value"] == affine["accuracy_difference"]["p_value"]
    assert "| accuracy | Δ to GELU | p, Holm | failed |" in recipe_tables.markdown([setting], [], {})


def test_a_base_rate_is_chosen_on_seeds_that_all_rates_have_and_not_where_one_failed() -> None:
    losses = {1.5e-3: {10: 4.0, 11: 4.2, 12: 1.0}, 3e-3: {10: 3.9, 11: 4.2}, 6e-3: {10: 3.0, 11: None}}
    trainings = [
        {
            **SETTING,
            "learning_rate": rate,
            "name": "gelu_tanh",
            "seed": seed,
            "development_loss": loss,
            "test_loss": -loss if loss else None,
        }
        for rate, found in losses.items()
        for seed, loss in found.items()
    ]
    (chosen,) = recipe.base_rates(trainings)
    assert (chosen["chosen"], chosen["seeds"]) == (3e-3, [10, 11])
    assert [rate["mean"] for rate in chosen["rates"]] == [pytest.approx(4.1), pytest.approx(4.05), None]
    assert (
        "| text | GPT-2, 4 layers of 128 | 480 | fp32 | gelu_tanh | 0.006 | 10: 3.0000 · 11: failed | failed |  |"
        in recipe_tables.markdown([], [chosen], {})
    )
    assert recipe.base_rates([row for row in trainings if row["learning_rate"] == 3e-3]) == []


def test_whole_documents_are_for_choosing_or_for_reporting() -> None:
    sizes = [3, 1, 6, 2, 4]  # the longest first, each to the side with fewer tokens: 6, 2 | 4, 3, 1
    tokens = np.concatenate([[1] * (size - 1) + [0] for size in sizes])
    found = recipe_trainings.for_choosing(tokens.reshape(4, 4), 0)
    assert found.shape == (4, 4)
    assert found.reshape(-1).tolist() == [False] * (3 + 1) + [True] * (6 + 2) + [False] * 4
    text = recipe_trainings.describe_halves(tokens.reshape(4, 4), 0)
    assert text == {
        "choosing": {"documents": 2, "tokens": 8, "longest": 6},
        "reporting": {"documents": 3, "tokens": 8, "longest": 4},
    }
    text["choosing"] = {"documents": 1, "tokens": 33_001, "longest": 33_001}
    assert recipe_tables.halves(text) == (
        "For choosing: 1 document of 33,001 tokens, the longest of 33,001. "
        "Reported: 3 documents of 8 tokens, the longest of 4."
    )
    with pytest.raises(ValueError, match="one document"):
        recipe_trainings.for_choosing(np.array([[1, 1, 0]]), 0)


@pytest.mark.parametrize("part", recipe_trainings.PARTS)
def test_each_part_is_a_workflow_of_the_ready_one(part: str, tmp_path: Path) -> None:
    (tmp_path / "1790_someone.txt").write_text("a speech", encoding="utf-8")
    for digit in "01":
        (tmp_path / digit).mkdir()
        Image.new("L", (28, 28)).save(tmp_path / digit / "0001.png")
    composed = recipe_trainings.compose(part, recipe_trainings.Sources(tmp_path, tmp_path))
    assert composed is not None
    file = tmp_path / "workflow.yaml"
    file.write_text(yaml.safe_dump(composed), encoding="utf-8")
    count = len({trainings.data for trainings in recipe_trainings.PARTS[part]})
    for trainings in recipe_trainings.PARTS[part]:
        branches = len(trainings.activations) * len(trainings.seeds)
        conversions = len(trainings.converted) * (1 + len(recipe_trainings.RATES_ON))
        count += branches * (1 + 2 * trainings.frozen + bool(trainings.converted) + conversions)
    assert len(build_graph(load_workflow(file))) == count
    assert {stage["uses"] for stage in composed["stages"].values()} <= {
        "shard", "shard_images", "train", "convert", recipe_trainings.LEARNED_START
    }  # fmt: skip
    rates = [stage["with"]["learning_rate"] for stage in composed["stages"].values() if stage["uses"] == "train"]
    if part == "families":
        multiples = [
            stage["with"]["coefficient_learning_rate"] for name, stage in composed["stages"].items() if name != "tiny"
        ]
        assert multiples == ["${params.coefficient_learning_rate}", 3e-4, 3e-2]
    if part == "base-rates":
        assert rates == [3e-3, 1.5e-3, 6e-3] * 2
    if part == "speeches":
        assert composed["stages"]["speeches"]["with"]["source"]["paths"] == [f"{tmp_path}/*.txt"]
    if part == "mnist":
        assert composed["stages"]["mnist"]["with"]["source"] == {"kind": "folder", "path": str(tmp_path)}
    if part == "sizes":
        sizes = [stage["with"] for name, stage in composed["stages"].items() if name != "speeches"]
        assert [(one["model"]["n_embd"], one["steps"]) for one in sizes] == [
            (64, "${params.steps}"), (64, 960), (128, 960)
        ]  # fmt: skip
    if part == "equal-time":
        made = [(stage["inputs"], stage["with"]) for stage in composed["stages"].values() if stage["uses"] == "train"]
        assert [(inputs["dataset"], own["model"]["patch_size"], own["steps"]) for inputs, own in made] == [
            ("digits", 1, 475), ("digits", 1, 394), ("mnist", 4, 475), ("mnist", 4, 394)
        ]  # fmt: skip
    if part == "gated":
        assert composed["stages"]["train0"]["with"]["model"]["feedforward"] == "gated"
    if part == "frozen":
        frozen = composed["stages"]["frozen0"]
        assert (frozen["inputs"]["initial"], frozen["with"]["coefficient_learning_rate"]) == ("start0", 0.0)
        assert "model" not in frozen["with"]


def test_what_is_recorded_is_not_trained_again(tmp_path: Path) -> None:
    about = {
        "corpus": "state-of-the-union", "model": "GPT-2, 4 layers of 128", "steps": 480, "batch": 8,
        "learning_rate": 3e-3, "precision": "fp32",
    }  # fmt: skip
    names = {
        "gelu_tanh": "gelu_tanh",
        "affine": "affine gelu_tanh × 10",
        "hermite4-wide": "hermite4 gelu [-4, 4] × 10",
    }
    recorded = [about | {"name": name, "seed": seed} for name in names.values() for seed in range(3)]
    recorded += [
        about | {"name": names["affine"], "seed": 3},
        about | {"name": names["hermite4-wide"], "seed": 4, "steps": 9},
    ]
    sources = recipe_trainings.Sources(speeches=tmp_path)
    composed = recipe_trainings.compose("speeches", sources, recorded)
    assert composed is not None
    (tmp_path / "1790_someone.txt").write_text("a speech", encoding="utf-8")
    file = tmp_path / "workflow.yaml"
    file.write_text(yaml.safe_dump(composed), encoding="utf-8")
    branches = [node.branch for node in build_graph(load_workflow(file)).values() if node.spec_name == "train0"]
    left = {(branch["activation"], int(branch["seed"])) for branch in branches}
    assert len(branches) == len(left)
    assert left == {("gelu_tanh", 3), ("gelu_tanh", 4), ("affine", 4), ("hermite4-wide", 3), ("hermite4-wide", 4)}
    recorded += [about | {"name": name, "seed": seed} for name in names.values() for seed in (3, 4)]
    assert recipe_trainings.compose("speeches", sources, recorded) is None
    composed = recipe_trainings.compose("sizes", sources, recorded)  # other models, other steps
    assert composed is not None
    assert "exclude" not in composed["stages"]["train2"]["matrix"]
    python = [row | {"corpus": "python-documentation-and-source"} for row in recorded]
    again = recipe_trainings.compose("frozen", sources, python)  # others start from their models
    assert again is not None
    assert "exclude" not in again["stages"]["train0"]["matrix"]


def test_a_part_says_which_data_it_needs() -> None:
    for part, option in (("speeches", "--speeches"), ("mnist", "--mnist")):
        with pytest.raises(SystemExit, match=f"part `{part}`: {option} DIRECTORY"):
            recipe_trainings.compose(part, recipe_trainings.Sources())


def test_the_record_stays_whatever_becomes_of_the_store(tmp_path: Path) -> None:
    about = {"data": "a", "model": "m", "steps": 1, "batch": 1, "learning_rate": 1e-3, "precision": "fp32"}
    rows = [about | {"corpus": "text", "name": name, "seed": 0, "digest": name, "loss": 1.0} for name in ("b", "a")]
    Store(str(tmp_path / "store"))
    assert recipe_trainings.read_trainings([str(tmp_path / "store")], rows) == [rows[1], rows[0]]
    text = {"choosing": {}, "reporting": {}}
    found = recipe_trainings.read_texts([str(tmp_path / "store")], {"a": text, "b": text}, rows)
    assert found == {"a": text}


def test_times_are_compared_in_turns_and_by_medians() -> None:
    turns: list[str] = []

    def takes(name: str, seconds: float) -> Any:
        return lambda: turns.append(name) or seconds

    found = recipe_time.in_turns({"gelu": takes("gelu", 2.0), "hermite": takes("hermite", 3.0)}, rounds=2)
    assert found == {"gelu": [2.0, 2.0], "hermite": [3.0, 3.0]}
    assert turns == ["hermite", "gelu", "gelu", "hermite", "hermite", "gelu"]  # the first two warm up
    ten = recipe_time.median_interval([10, 3, 2, 1, 9, 8, 4, 5, 7, 6])
    assert ten == {"median": 5.5, "low": 2, "high": 9}  # 2 P(at most 1 of 10 below) = .021, 2 P(at most 2) = .109
    assert recipe_time.median_interval(range(1, 7)) == {"median": 3.5, "low": 1, "high": 6}
    with pytest.raises(ValueError, match="6 rounds or more, got 5"):
        recipe_time.median_interval(range(5))
    model = torch.nn.Linear(2, 1)
    weight = model.weight.clone()
    assert recipe_time.stepper(Loss(model), (torch.ones(1, 2), torch.zeros(1, 1)), steps=1)() >= 0
    assert not torch.equal(model.weight, weight)


class Loss(torch.nn.Module):
    """A model of inputs and targets."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.model(inputs) - targets).square().mean()


def test_mnist_s_images_are_the_lines_of_its_file(tmp_path: Path) -> None:
    lines = [[0] * 784 + [3], [*range(256), *[255] * 528, 7]]
    file = tmp_path / "mnist.csv.gz"
    file.write_bytes(gzip.compress("\n".join(",".join(map(str, line)) for line in lines).encode()))
    assert mnist.unpack(file, tmp_path / "images") == 2
    assert sorted(path.relative_to(tmp_path / "images").as_posix() for path in tmp_path.rglob("*.png")) == [
        "3/0001.png", "7/0002.png"
    ]  # fmt: skip
    with Image.open(tmp_path / "images" / "7" / "0002.png") as image:
        assert (image.mode, image.size, image.getpixel((27, 0)), image.getpixel((0, 1))) == ("L", (28, 28), 27, 28)
    file.write_bytes(gzip.compress(b"1,2,3\n"))
    with pytest.raises(SystemExit, match="line 1: expected 784 grey values and a digit"):
        mnist.unpack(file, tmp_path / "images")


def test_a_frozen_activation_starts_as_learned_and_all_else_as_the_seed_says(tmp_path: Path) -> None:
    config = {
        "vocab_size": 11, "sequence_length": 4, "n_layer": 2, "n_head": 1, "n_embd": 8,
        "activation": {"name": "affine", "init": "gelu_tanh"},
    }  # fmt: skip
    trained = build_model("gpt2", config)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 1.0
    save_model(tmp_path / "learned", trained)

    class Context:
        output = tmp_path / "start"

    class Learned:
        path = tmp_path / "learned"

    assert learned_start(Context(), Learned(), seed=5) == {"activations": 2.0}  # type: ignore[arg-type]
    torch.manual_seed(5)
    fresh = build_model("gpt2", config).state_dict()
    start, learned = load_model(tmp_path / "start").state_dict(), trained.state_dict()
    coefficients = {name for name in fresh if ".activation." in name}
    assert coefficients
    for name, tensor in start.items():
        assert torch.equal(tensor, (learned if name in coefficients else fresh)[name]), name


CODE = read_code([train.__module__]).files


def artifact(**changes: Any) -> StoredArtifact:
    return StoredArtifact(
        **{"key": "", "digest": "", "stage": "", "run_id": "", "duration": 0, "committed": 0, "summary": {}} | changes
    )


def test_a_training_says_its_rate_and_where_its_coefficients_came_from() -> None:
    files = ({"path": "train/shard-000000.tar", "sha256": "ab" * 32, "size": 1},)
    dataset = artifact(components={"uses": "shard", "parameters": {"name": "text"}}, files=files)
    activation = {"name": "hermite", "degree": 4, "init": "gelu", "interval": [-4, 4]}
    parameters = {
        "model": {"$class": "", "activation": activation, "activation_options": None, "n_layer": 4, "n_embd": 128},
        "steps": 480,
        "global_batch_size": 8,
        "seed": 3,
        "validation_samples": 10,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "coefficient_learning_rate": None,
    }

    def trained(
        initial: str | None = None,
        digest: str = "t",
        code: Mapping[str, str] = CODE,
        **changes: Any,
    ) -> StoredArtifact:
        given = parameters | changes
        if given["model"] is not None:  # "$class" is of the key already
            given["model"] = {
                name: part if name == "$class" else encode(part, name) for name, part in given["model"].items()
            }
        components = {
            "uses": "train",
            "code": code,
            "parameters": given,
            "inputs": {"dataset": "d", "initial": initial},
        }
        return artifact(digest=digest, components=components, summary={"val/loss": 4.5})

    def row(**changes: Any) -> dict[str, Any] | None:
        return recipe_trainings.describe(trained(**changes), dataset, others)

    start = {"uses": recipe_trainings.LEARNED_START, "parameters": {"seed": 3}, "inputs": {"learned": "t"}}
    conversion = {"uses": "convert", "parameters": {"family": "chebyshev", "degree": 8}, "inputs": {"model": "t"}}
    others = {"t": trained(), "s": artifact(components=start), "c": artifact(components=conversion)}
    found = row()
    assert found is not None
    assert (found["name"], found["loss"], found["test_loss"]) == ("hermite4 gelu [-4, 4] × 10", 4.5, None)
    assert found["model"] == "GPT-2, 4 layers of 128"
    assert (row(coefficient_learning_rate=9e-2) or {})["name"] == "hermite4 gelu [-4, 4] × 30"
    assert (row(model=parameters["model"] | {"activation": "gelu_tanh"}) or {})["name"] == "gelu_tanh"
    short = parameters["model"] | {"activation": "hermite4"}
    assert (row(model=short) or {})["name"] == "hermite4 gelu [-2, 2] × 10"
    assert (row(model=short, code={}) or {})["name"] == "hermite4 variance_preserving × 0.1"  # of a store from before
    between = {recipe_trainings.DEFAULT_START: "ab" * 32}  # other defaults: [-4, 4] once
    assert row(model=short, code=between) is None
    assert (row(code=between) or {})["name"] == "hermite4 gelu [-4, 4] × 10"  # says it itself
    assert found["model"] == "GPT-2, 4 layers of 128"
    assert row(model=parameters["model"] | {"norm": "batch"}) is None
    gated = row(model=parameters["model"] | {"feedforward": "gated"})
    assert gated is not None
    assert gated["model"] == "GPT-2, 4 layers of 128, gated"
    for other in ("quadratic", {"name": "quadratic", "square": False}, ["mlp", "gated"]):
        assert row(model=parameters["model"] | {"feedforward": other}) is None
    assert row(model=parameters["model"] | {"activation": ["gelu", "relu"]}) is None
    assert row(loss={"name": "poly"}) is None
    assert (row(precision="bf16") or {})["precision"] == "bf16"  # a setting of its own
    frozen = {"initial": "s", "model": None, "coefficient_learning_rate": 0.0}
    assert (row(**frozen) or {})["name"] == "hermite4 gelu [-4, 4] × 10, frozen as learned"
    assert row(**frozen | {"coefficient_learning_rate": 3e-3}) is None
    assert row(**frozen | {"seed": 4}) is None  # other initial weights than its seed's
    assert row(**frozen | {"learning_rate": 1e-3}) is None
    on = row(initial="c", model=None, steps=100, learning_rate=1e-3, coefficient_learning_rate=5e-4)
    assert on is not None
    assert (on["name"], on["model"]) == ("chebyshev8 × 0.5", "GPT-2, 4 layers of 128, trained on")
    assert (row(initial="t", model=None) or {})["model"] == "GPT-2, 4 layers of 128, trained on"
    assert row(initial="c", model=None, seed=4, coefficient_learning_rate=5e-4) is None  # of another seed's model
    assert row(initial="elsewhere", model=None) is None


def test_images_are_measured_whole_and_by_the_training_itself() -> None:
    dataset = artifact(
        components={"uses": "shard_images", "parameters": {"name": "digits"}}, summary={"validation/images": 100.0}
    )
    model = {"activation": "gelu", "activation_options": None, "depths": [1, 1], "dims": [8, 16]}
    parameters = {
        "model": model, "steps": 10, "global_batch_size": 4, "seed": 0, "learning_rate": 3e-3,
        "precision": "fp32", "coefficient_learning_rate": None,
    }  # fmt: skip

    def row(samples: int) -> dict[str, Any] | None:
        components = {
            "uses": "train",
            "code": {},
            "parameters": parameters | {"validation_samples": samples},
            "inputs": {"dataset": "d", "initial": None},
        }
        return recipe_trainings.describe(artifact(components=components, summary={"val/loss": 0.1}), dataset, {})

    found = row(100)
    assert found is not None
    assert (found["model"], found["test_loss"]) == ("ConvNeXt [1, 1] of [8, 16]", 0.1)
    assert row(99) is None
