"""The trainings of the recipe's study: which there are, as workflows, and what each one in a store came to.

results/recipe.json is the record: what stands there is neither trained nor measured again, whatever becomes of the
store it was made in.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from polytrope.models.checkpoint import activation_modules, load_model
from polytrope.ops import LearnableActivation, build_activation
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.tokenization import read_tokenizer
from polytrope.pipeline.stages.train.activation_parameters import spelled_out
from polytrope.pipeline.stages.train.coefficient_rates import coefficient_multiple
from polytrope.pipeline.stages.train.default_start import POLYNOMIALS, with_start
from polytrope.pipeline.store.manifest import StoredArtifact
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.workflow.code import read_code

WORKFLOW = Path(__file__).parents[1] / "workflows" / "recipe.yaml"
DEVELOPMENT = 10  # the first of the seeds that rates are chosen by
BASELINES = ("gelu_tanh", "gelu")  # GPT-2's, ConvNeXt's
CONTROL = "affine"
RECIPE = "hermite4 gelu [-4, 4] × 10"  # as it was found
DEFAULT = "hermite4 gelu [-2, 2] × 10"  # as `activation: hermite4` starts since
FROZEN = "frozen as learned"
LEARNED_START = "benchmarks.recipe_stages:learned_start"
DEFAULT_START = "polytrope/pipeline/stages/train/default_start.py"  # before it, polynomials kept variances
SETTING = ("data", "model", "steps", "batch", "learning_rate", "precision")
ASKED = ("corpus", *SETTING[1:], "name", "seed")  # what a training is known by before its data exist
FEEDFORWARDS = {None: "", "mlp": "", "gated": ", gated"}  # in the name of the model
Row = dict[str, Any]


@dataclass(frozen=True)
class Trainings:
    """Each activation with each seed; everything else as in workflows/recipe.yaml, with the changes of `DATA`.

    Args:
        activations: labels of the workflow's matrix, or any other activation.
        data: a name in `DATA`.
        learning_rate, multiple: the base rate, and that of the coefficients in units of it; None: as in the workflow.
        steps, batch: None: as in the workflow; batch: samples of a step.
        model: changes of the workflow's model.
        precision: of the arithmetic; the weights that the optimizer keeps, and the measured losses, are float32.
        frozen: also from the coefficients each of them ends with, which do not learn then.
        converted: families of degree 8 that each model is converted to; then both are trained on for 100 steps at 1e-3,
            the coefficients at each of `RATES_ON` in units of that.
    """

    activations: tuple[Any, ...] = ("gelu_tanh", "affine", "hermite4-wide")
    seeds: Sequence[int] = range(5)
    data: str = "python"
    learning_rate: float | None = None
    multiple: float | None = None
    steps: int | None = None
    batch: int | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    frozen: bool = False
    converted: tuple[str, ...] = ()

    @property
    def is_started_from(self) -> bool:
        """Whether other trainings start from the models of these, which have to be in the store then."""
        return self.frozen or bool(self.converted)


@dataclass(frozen=True)
class Data:
    """Stages of the workflow that make the data and train on it, and what is changed in their `with:`."""

    stages: tuple[str, str] = ("shard", "train")
    data: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


DATA = {
    "python": Data(),
    "digits": Data(("digits", "convnext")),
    "mnist": Data(
        ("digits", "convnext"),
        data={"name": "mnist-5k", "source": {"kind": "folder"}, "image_size": 28, "validation_fraction": 0.3},
        training={
            "model": {
                "architecture": "convnext",
                "depths": [1, 1],
                "dims": [32, 64],
                "patch_size": 4,
                "layer_scale": 0,
                "activation": "${matrix.activation}",
            },
            "validation_samples": 5000,
        },
    ),
    "speeches": Data(
        data={"name": "state-of-the-union", "source": {"kind": "files"}, "validation_fraction": 0.1},
        training={"validation_every": 0, "validation_samples": 64},  # the whole is measured afterwards
    ),
    "tiny": Data(  # is a rate of harm to any family?
        data={
            "name": "tiny",
            "source": {"kind": "python", "max_bytes": 600_000},
            "tokenizer": {"kind": "bytes"},
            "sequence_length": 64,
            "validation_fraction": 0.1,
        },
        training={
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 64, "activation": "${matrix.activation}"},
            "steps": 300,
            "warmup_steps": 10,
            "validation_every": 0,
        },
    ),
}
ENDED: tuple[dict[str, Any], ...] = (  # straight lines follow outside an interval
    {"name": "hermite", "degree": 4, "init": "gelu", "interval": [-4, 4]},
    {"name": "hermite", "degree": 3, "init": "variance_preserving", "interval": [-4, 4]},
    {"name": "affine", "init": "gelu"},
    {"name": "tropical_rational", "degree": 6},
    {"name": "tropical", "degree": 5},
    {"name": "piecewise_linear", "degree": 8},
    {"name": "polynorm", "degree": 3},
    {"name": "fourier", "degree": 5, "init": "gelu", "interval": [-4, 4]},
    {"name": "rational", "degree": 5, "init": "gelu", "interval": [-4, 4]},
)
ENDLESS: tuple[dict[str, Any], ...] = (
    {"name": "hermite", "degree": 3, "init": "variance_preserving"},
    {"name": "hermite", "degree": 5, "init": "variance_preserving"},
    {"name": "fourier", "degree": 5},
    {"name": "rational", "degree": 5},
    {"name": "polyrelu", "degree": 3},
)
LARGER: tuple[Mapping[str, Any], ...] = (  # 3.8 and 12.7 million parameters
    {"n_layer": 8, "n_head": 4, "n_embd": 192},
    {"n_layer": 10, "n_head": 5, "n_embd": 320},
)
LARGER_RATES = (1.5e-3, 7.5e-4)  # the best of three for GELU
LARGER_STEPS = ((240, 480, 960), (120, 240, 480))  # 960 of the larger do not fit in an hour of two cores
STARTS: tuple[dict[str, Any], ...] = tuple(
    {"name": "hermite", "degree": 4, "init": init, **interval}
    for init in ("variance_preserving", "stable", "gelu")
    for interval in ({}, {"interval": [-4, 4]})
)
ABLATIONS: tuple[dict[str, Any], ...] = (
    *({"name": "hermite", "degree": degree, "init": "gelu", "interval": [-4, 4]} for degree in (3, 5, 8, 12)),
    *({"name": "hermite", "degree": 4, "init": "gelu", "interval": [-end, end]} for end in (2, 8)),
    {"name": "hermite", "degree": 4, "init": "gelu", "interval": [-4, 4], "num_parameters": 32},
)
STABLE: dict[str, Any] = {"name": "hermite", "degree": 4, "init": "stable", "interval": [-4, 4]}
NARROW = "hermite4"  # by default it starts as GELU on [-2, 2]
LOW: tuple[dict[str, Any], ...] = (
    {"name": "hermite", "degree": 3, "init": "stable", "interval": [-4, 4]},
    {"name": "hermite", "degree": 2, "init": "gelu", "interval": [-4, 4]},
    {"name": "hermite", "degree": 3, "init": "gelu", "interval": [-2, 2]},
)
RULE: tuple[dict[str, Any], ...] = (
    {"learning_rate": 1e-3},
    {"learning_rate": 6e-3},
    {"batch": 64},
    {"precision": "bf16"},
)
STEPS_OF_IMAGES = 500
EQUAL_TIME = {"hermite4-wide": 475, "affine": 394}  # of images: 500 / 1.052, as the step took then, and 500 / 1.27
RELU_SQUARED = {"name": "polyrelu", "degree": 2, "init": "relu_squared"}  # as it is where its rate is 0
RATES_ON = (0.0, 0.1, 0.5, 1.0, 5.0, 10.0)  # by the rule 0.5 (Hermite) and 1; from scratch it would be 5 and 10
ON = {"steps": 100, "learning_rate": 1e-3, "warmup_steps": 10}
PARTS: dict[str, tuple[Trainings, ...]] = {
    "digits": (Trainings(("gelu", "affine", "hermite4-wide"), data="digits"),),
    "digits-again": (Trainings(("gelu", "affine", "hermite4-wide"), range(5, 10), "digits"),),
    "mnist": (Trainings(("gelu", "affine", "hermite4-wide"), data="mnist"),),
    "text": (Trainings(),),
    "speeches": (Trainings(data="speeches"),),
    # A quarter of the parameters, and twice the tokens of both: larger ones do not fit in an hour of two cores.
    "sizes": (
        Trainings(seeds=range(3), data="speeches", model={"n_embd": 64}),
        Trainings(seeds=range(3), data="speeches", model={"n_embd": 64}, steps=960),
        Trainings(seeds=range(3), data="speeches", steps=960),
    ),
    # Four and thirteen times the parameters, in bfloat16, which is what makes them fit in hours of two cores.
    "larger-rates": tuple(
        Trainings(
            ("gelu_tanh", "hermite4-wide"),
            (DEVELOPMENT,),
            "speeches",
            learning_rate=rate,
            steps=240,
            model=model,
            precision="bf16",
        )
        for model in LARGER
        for rate in (3e-3, 1.5e-3, 7.5e-4)
    ),
    "larger": tuple(
        Trainings(seeds=range(3), data="speeches", learning_rate=rate, steps=steps, model=model, precision="bf16")
        for model, rate, budgets in zip(LARGER, LARGER_RATES, LARGER_STEPS, strict=True)
        for steps in budgets
    ),
    "starts": (Trainings(STARTS, range(3), "speeches"), Trainings(STARTS, range(3), "mnist")),
    # The best of them, with all seeds, and where nothing was chosen by it.
    "stable": tuple(Trainings((STABLE,), data=data) for data in ("digits", "mnist", "speeches", "python")),
    # Degree, interval, groups of channels with coefficients of their own, and how fast they learn, of the recipe.
    "ablations": tuple(
        trainings
        for data in ("mnist", "speeches")
        for trainings in (
            Trainings(ABLATIONS, range(3), data),
            Trainings(("hermite4-wide",), range(3), data, multiple=1.0),
            Trainings(("hermite4-wide",), range(3), data, multiple=30.0),
        )
    ),
    # The ablation that looked best, with all seeds, and on the text and the images that it was not seen on.
    "default": (Trainings((NARROW,), range(10)),),
    "narrow": (
        *(Trainings((NARROW,), data=data) for data in ("digits", "mnist", "speeches")),
        *(
            Trainings((NARROW,), range(3), "speeches", 1.5e-3, steps=steps, model=LARGER[0], precision="bf16")
            for steps in (240, 480, 960)
        ),
        Trainings((NARROW,), range(3), "speeches", 7.5e-4, steps=480, model=LARGER[1], precision="bf16"),
        *(Trainings((NARROW,), range(3), "speeches", steps=steps) for steps in (240, 960)),
        *(Trainings((NARROW,), range(3), "tiny", rate) for rate in (3e-3, 6e-3)),
    ),
    # Seeds that nothing had been seen of, for what five seeds left open on the addresses.
    "speeches-again": (Trainings(("gelu_tanh", "affine", "hermite4-wide", NARROW), range(5, 10), "speeches"),),
    "low-degrees": (Trainings(LOW, range(3), "speeches"),),
    "shorter": (Trainings(data="speeches", steps=240),),
    "baselines": (
        Trainings((RELU_SQUARED, "silu"), data="mnist", multiple=0.0),
        Trainings((RELU_SQUARED,), data="speeches", multiple=0.0),
        Trainings((RELU_SQUARED,), range(10), data="digits", multiple=0.0),
    ),
    "gated": (
        Trainings(
            ("gelu_tanh", "silu", "affine", "hermite4-wide"), range(3), "speeches", model={"feedforward": "gated"}
        ),
    ),
    # At 3e-3 several of them are spoilt.
    "gated-slower": (
        Trainings(
            ("gelu_tanh", "silu", "affine", "hermite4-wide"),
            range(3),
            "speeches",
            learning_rate=1.5e-3,
            model={"feedforward": "gated"},
        ),
    ),
    # On the text that has eleven documents for choosing, not one.
    "base-rates": tuple(
        Trainings(seeds=(seed,), data="speeches", learning_rate=rate)
        for seed in (DEVELOPMENT, DEVELOPMENT + 1)
        for rate in (3e-3, 1.5e-3, 6e-3)
    ),
    # Is the base rate of the trainings above the best one? Images have no part for choosing, only seeds.
    "base-rates-images": tuple(
        Trainings(("gelu", "affine", "hermite4-wide"), range(DEVELOPMENT, DEVELOPMENT + 2), data, learning_rate=rate)
        for data in ("digits", "mnist")
        for rate in (3e-3, 6e-3, 1.2e-2)
    ),
    # Each at the rate that is the best one for it.
    "chosen-rates-images": (
        Trainings(("gelu",), data="digits", learning_rate=6e-3),
        Trainings(("affine", "hermite4-wide"), data="digits", learning_rate=1.2e-2),
        Trainings(("gelu",), data="mnist", learning_rate=1.2e-2),
        Trainings(("affine",), data="mnist", learning_rate=6e-3),
    ),
    "chosen-rates-digits-again": (
        Trainings(("gelu",), range(5, 10), "digits", 6e-3),
        Trainings(("affine", "hermite4-wide"), range(5, 10), "digits", 1.2e-2),
    ),
    "seeds": (Trainings(seeds=range(5, 10)),),
    # At most as many steps as fit in the time of GELU's 500 (results/recipe_time.json).
    "equal-time": tuple(
        Trainings((name,), data=data, steps=steps) for data in ("digits", "mnist") for name, steps in EQUAL_TIME.items()
    ),
    "frozen": (Trainings(("affine", "hermite4-wide"), seeds=range(3), frozen=True),),
    "frozen-images": (Trainings(("affine", "hermite4-wide"), range(3), "mnist", frozen=True),),
    # Does the rule of the rates harm where it was not found? Where it did: is it the rate of the coefficients?
    "rule": (
        *(
            Trainings((baseline, "hermite4-wide"), range(3), data, **changes)
            for data, baseline in (("digits", "gelu"), ("tiny", "gelu_tanh"))
            for changes in RULE
        ),
        *(
            Trainings(("hermite4-wide",), range(3), "tiny", learning_rate=6e-3, multiple=multiple)
            for multiple in (1.0, 5.0)
        ),
        Trainings(("affine",), range(3), "tiny", learning_rate=6e-3),
    ),
    "faster": (Trainings(("affine", "hermite4-wide"), multiple=30.0),),
    "families": (
        Trainings(("gelu", *ENDED, *ENDLESS), range(3), "tiny"),
        Trainings(ENDED, range(3), "tiny", multiple=0.1),
        Trainings(ENDLESS, range(3), "tiny", multiple=10.0),
    ),
    "fine-tuning": (Trainings(("gelu",), range(3), "tiny", converted=("hermite", "chebyshev")),),
}


@dataclass(frozen=True)
class Sources:
    """Where data are that no installation has.

    Args:
        speeches: directory of the State of the Union addresses, `YEAR_PRESIDENT.txt`.
        mnist: directory of the 5,000 images, one folder per digit (`python -m benchmarks.mnist`).
    """

    speeches: Path | None = None
    mnist: Path | None = None

    def of(self, part: str, data: str) -> dict[str, Any]:
        """What `source:` says of them.

        Raises:
            SystemExit: the part needs what was not named.
        """
        if data == "speeches":
            if self.speeches is None:
                raise SystemExit(f"part `{part}`: --speeches DIRECTORY has to name the State of the Union addresses")
            return {"paths": [f"{self.speeches.resolve()}/*.txt"]}
        if data == "mnist":
            if self.mnist is None:
                raise SystemExit(
                    f"part `{part}`: --mnist DIRECTORY has to name what `python -m benchmarks.mnist` wrote"
                )
            return {"path": str(self.mnist.resolve())}
        return {}


def compose(part: str, sources: Sources, recorded: Sequence[Row] = ()) -> dict[str, Any] | None:
    """A workflow with the trainings of a part, and nothing that follows them; None if all of them are recorded.

    Args:
        recorded: trainings that are not made again, unless others start from their models.
    """
    base = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    stages: dict[str, Any] = {}
    for index, trainings in enumerate(PARTS[part]):
        changes = DATA[trainings.data]
        data, train = (copy.deepcopy(base["stages"][name]) for name in changes.stages)
        data["with"] |= copy.deepcopy(changes.data)
        train["with"] |= copy.deepcopy(dict(changes.training))
        data["with"]["source"] = _source(data["with"]["source"], sources.of(part, trainings.data))
        labelled = {one["label"]: one for one in train["matrix"]["activation"] if isinstance(one, dict)}
        chosen = [
            labelled.get(one, one) if isinstance(one, str) else {"label": f"{one['name']}-{number}", **one}
            for number, one in enumerate(trainings.activations)
        ]
        train["matrix"] = {"seed": list(trainings.seeds), "activation": chosen}
        settings = train["with"]
        settings["model"] |= trainings.model
        settings["precision"] = trainings.precision
        if trainings.steps is not None:
            settings["steps"] = trainings.steps
        if trainings.batch is not None:
            settings["global_batch_size"] = trainings.batch
        if trainings.learning_rate is not None:
            settings["learning_rate"] = trainings.learning_rate
        if trainings.multiple is not None:
            rate = base["params"]["learning_rate"] if trainings.learning_rate is None else trainings.learning_rate
            settings["coefficient_learning_rate"] = round(trainings.multiple * rate, 9)
        if not trainings.is_started_from:
            made = _made_before(data, train, base["params"], recorded)
            if len(made) == len(chosen) * len(trainings.seeds):
                continue
            if made:
                train["matrix"]["exclude"] = made
        train["inputs"] = {"dataset": trainings.data}
        stages[trainings.data], stages[f"train{index}"] = data, train
        if trainings.frozen:
            stages |= _frozen(index, train)
        if trainings.converted:
            stages |= _trained_on(index, train, trainings.converted)
    if not stages:
        return None
    return {"name": f"recipe-{part}", "params": base["params"], "tracking": {"enabled": False}, "stages": stages}


def _source(given: str | Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    return given if isinstance(given, str) else {**given, **found}


def _made_before(
    data: Mapping[str, Any], train: Mapping[str, Any], params: Mapping[str, Any], recorded: Sequence[Row]
) -> list[dict[str, Any]]:
    """Branches of a training's matrix that stand in the record."""
    given = {
        key: params[value.removeprefix("${params.").removesuffix("}")] if str(value).startswith("${params.") else value
        for key, value in train["with"].items()
    }
    rate = given.get("coefficient_learning_rate")
    about = {
        "corpus": data["with"]["name"],
        "model": model_name(given["model"], images=data["uses"] == "shard_images"),
        "steps": given["steps"],
        "batch": given["global_batch_size"],
        "learning_rate": given["learning_rate"],
        "precision": given["precision"],
    }
    known = {tuple(row[key] for key in ASKED) for row in recorded}
    made = []
    for activation in train["matrix"]["activation"]:
        unlabelled = (
            activation if isinstance(activation, str) else {k: v for k, v in activation.items() if k != "label"}
        )
        plain = with_start(unlabelled, {})
        name = f"{name_of(plain)}{rate_name(plain, rate, given['learning_rate'], fine_tuning=False)}"
        for seed in train["matrix"]["seed"]:
            if tuple((about | {"name": name, "seed": seed})[key] for key in ASKED) in known:
                label = activation if isinstance(activation, str) else activation["label"]
                made.append({"seed": seed, "activation": label})
    return made


def _frozen(index: int, train: Mapping[str, Any]) -> dict[str, Any]:
    """Each training of a stage again, from where its coefficients ended, which stay there."""
    kept = {key: value for key, value in train["with"].items() if key != "model"}
    start = {
        "uses": LEARNED_START,
        "matrix": train["matrix"],
        "inputs": {"learned": f"train{index}"},
        "with": {"seed": "${matrix.seed}"},
    }
    again = {
        **train,
        "inputs": {**train["inputs"], "initial": f"start{index}"},
        "with": {**kept, "coefficient_learning_rate": 0.0},
    }
    return {f"start{index}": start, f"frozen{index}": again}


def _trained_on(index: int, train: Mapping[str, Any], families: Iterable[str]) -> dict[str, Any]:
    """The models of a stage trained on as they are, and converted, at every rate of their new coefficients."""
    kept = {key: value for key, value in train["with"].items() if key != "model"} | ON
    inputs = {**train["inputs"], "initial": f"train{index}"}
    stages: dict[str, Any] = {f"on{index}": {**train, "inputs": inputs, "with": kept}}
    for family in families:
        stages[f"{family}{index}"] = {
            "uses": "convert",
            "matrix": train["matrix"],
            "inputs": {**train["inputs"], "model": f"train{index}"},
            "with": {"family": family, "degree": 8},
        }
        stages[f"on_{family}{index}"] = {
            **train,
            "matrix": {**train["matrix"], "rate": [round(rate * ON["learning_rate"], 9) for rate in RATES_ON]},
            "inputs": {**train["inputs"], "initial": f"{family}{index}"},
            "with": {**kept, "coefficient_learning_rate": "${matrix.rate}"},
        }
    return stages


def read_trainings(addresses: Iterable[str], recorded: Iterable[Row] = ()) -> list[Row]:
    """What is recorded, and every other training of the stores that is one of a study's, each once.

    Args:
        recorded: rows of an earlier time; they stay as they are.
    """
    found = {identity(row): row for row in recorded}
    measured = {row["digest"] for row in found.values()}
    corpora = {row["data"]: row["corpus"] for row in found.values()}  # data → its name: the first one's
    for address in addresses:
        store = Store(address)
        present = [artifact for artifact in map(store.load, store.keys()) if artifact is not None]
        by_digest = {artifact.digest: artifact for artifact in present}
        for artifact in present:
            if artifact.components["uses"] != "train" or artifact.digest in measured:
                continue
            dataset = by_digest.get(artifact.components["inputs"]["dataset"])
            row = None if dataset is None else describe(artifact, dataset, by_digest)
            if row is None or dataset is None:
                continue
            row["corpus"] = corpora.setdefault(row["data"], row["corpus"])
            if identity(row) in found:
                continue
            if row["loss"] is not None and dataset.components["uses"] == "shard":
                row |= measure(store.materialize(artifact.key), store.materialize(dataset.key))
            if row["loss"] is not None:
                row["learned"] = learned_numbers(load_model(store.materialize(artifact.key)))
            found[identity(row)] = row
    return [found[key] for key in sorted(found)]


def identity(row: Row) -> tuple[Any, ...]:
    """What two trainings with the same result have in common."""
    return (*(row[key] for key in SETTING), row["name"], row["seed"])


def read_texts(addresses: Iterable[str], recorded: Mapping[str, Row], trainings: Iterable[Row]) -> dict[str, Row]:
    """Of the texts that the trainings are measured by, how much of them is for choosing and how much is reported.

    Args:
        recorded: by `data`, as of an earlier time.
    """
    wanted = {row["data"] for row in trainings}
    found = {data: text for data, text in recorded.items() if data in wanted}
    for address in addresses:
        store = Store(address)
        for artifact in filter(None, map(store.load, store.keys())):
            data = data_of(artifact) if artifact.components["uses"] == "shard" else None
            if data is None or data not in wanted or data in found:
                continue
            directory = store.materialize(artifact.key)
            reader = open_split(directory, "validation")
            blocks = reader.samples(np.arange(len(reader))).astype(np.int64)
            found[data] = describe_halves(blocks, read_tokenizer(directory).end_of_text)
    return dict(sorted(found.items()))


def data_of(dataset: StoredArtifact) -> str:
    """A short digest of what a data set holds, whatever it is called."""
    shards = sorted((file["path"], file["sha256"]) for file in dataset.files if "/shard" in file["path"])
    return hashlib.sha256("".join(digest for _, digest in shards).encode()).hexdigest()[:12]


def describe(artifact: StoredArtifact, dataset: StoredArtifact, others: Mapping[str, StoredArtifact]) -> Row | None:
    """A training as a row; None if it is none of a study's: not measured on all images, or with parts or settings
    that no table here names.

    Args:
        others: what the store holds, by digest: where the training started.
    """
    parameters = artifact.parameters
    start = where_it_started(artifact, others)
    if start is None:
        return None
    model = start.scratch["model"]
    if is_unusual(parameters) or is_unusual(start.scratch):
        return None
    images = dataset.components["uses"] == "shard_images"
    if images and parameters["validation_samples"] < dataset.summary["validation/images"]:
        return None
    name = name_of(start.activation) + rate_name(
        start.activation, start.coefficient_rate, parameters["learning_rate"], fine_tuning=start.kind == "train"
    )
    shape = model_name(model, images=images)
    loss = artifact.summary.get("val/loss")  # None: it diverged
    return {
        "corpus": dataset.parameters["name"],
        "data": data_of(dataset),
        "model": f"{shape}, trained on" if start.kind in ("train", "convert") else shape,
        "steps": parameters["steps"],
        "batch": parameters["global_batch_size"],
        "learning_rate": parameters["learning_rate"],
        "precision": parameters["precision"],
        "activation": start.activation,
        "name": f"{name}, {FROZEN}" if start.kind == LEARNED_START else name,
        "seed": parameters["seed"],
        "digest": artifact.digest,
        "loss": loss,
        "development_loss": None,
        "test_loss": loss if images else None,  # nothing was chosen on images
        "accuracy": artifact.summary.get("val/accuracy") if images else None,
    }


def is_unusual(parameters: Mapping[str, Any]) -> bool:
    """Whether a training has what `SETTING` and its activation's name do not tell: other blocks, losses."""
    model = parameters["model"] or {}
    if isinstance(model.get("activation"), list):
        return True
    if model.get("feedforward") not in tuple(FEEDFORWARDS):  # one with options is no key
        return True
    told = {"architecture", "activation", "n_layer", "n_head", "n_embd", "depths", "dims", "patch_size", "layer_scale"}
    told |= {"feedforward"}
    others = [value for name, value in model.items() if name not in told]
    others += [parameters.get(name) for name in ("loss", "trainable", "ema_decay", "range_penalty")]
    return any(value is not None for value in others)


@dataclass(frozen=True)
class Start:
    """Where a training started.

    Args:
        kind: `scratch`, or the stage that made its first weights: train, convert, `LEARNED_START`.
        scratch: parameters of the training from scratch that all goes back to: its own, if it is one.
        activation: what the model has now.
        coefficient_rate: of this training, or, frozen, of that which its coefficients come from; None: the default.
    """

    kind: str
    scratch: Mapping[str, Any]
    activation: str | Mapping[str, Any]
    coefficient_rate: float | None


def where_it_started(artifact: StoredArtifact, others: Mapping[str, StoredArtifact]) -> Start | None:
    """None if it goes back to a training of another seed, to more than one, or to none that is here, or if it is not
    known how its activation started.
    """
    parameters = artifact.parameters
    own = parameters["coefficient_learning_rate"]
    initial = artifact.components["inputs"]["initial"]
    if initial is None:
        begun = _begun_as(artifact)
        return None if begun is None else Start("scratch", parameters, begun, own)
    start = others.get(initial)
    kind = None if start is None else start.components["uses"]
    source = {"train": initial}
    if start is not None and kind in (LEARNED_START, "convert"):
        source[kind] = start.components["inputs"]["learned" if kind == LEARNED_START else "model"]
    learned = others.get(source.get(kind or "", ""))
    if start is None or kind is None or learned is None or learned.components["uses"] != "train":
        return None
    scratch = learned.parameters
    if learned.components["inputs"]["initial"] is not None or scratch["seed"] != parameters["seed"]:
        return None
    activation = _begun_as(learned)
    if activation is None:
        return None
    if kind == "convert":
        conversion = start.parameters
        activation = {"name": conversion["family"], "degree": conversion["degree"]}
        return None if own is None else Start(kind, scratch, activation, own)
    if kind == LEARNED_START:
        same = all(scratch[key] == parameters[key] for key in ("learning_rate", "steps", "global_batch_size"))
        if not same or own != 0 or start.parameters["seed"] != parameters["seed"]:
            return None
        return Start(kind, scratch, activation, scratch["coefficient_learning_rate"])
    return Start(kind, scratch, activation, own)


def _begun_as(artifact: StoredArtifact) -> str | dict[str, Any] | None:
    """The activation of a training from scratch, with what it does not say: as its code had it, which is in its key.

    None if it leaves something to the defaults of another version than this one.
    """
    given: str | dict[str, Any] = artifact.parameters["model"]["activation"]
    begun, code = with_start(given, {}), artifact.components["code"]
    if DEFAULT_START in code:
        return begun if begun == given or code[DEFAULT_START] == _this_start() else None
    settings = spelled_out(given)
    is_polynomial = isinstance(settings, dict) and settings["name"] in POLYNOMIALS
    return {**settings, "init": "variance_preserving"} if is_polynomial and "init" not in settings else given


@functools.cache
def _this_start() -> str:
    """What a key says of the defaults as they are."""
    return read_code([with_start.__module__]).files[DEFAULT_START]


def name_of(activation: str | Mapping[str, Any]) -> str:
    """`hermite4 gelu [-4, 4]`: name, degree and options."""
    if isinstance(activation, str):
        return activation
    options = [str(value) for key, value in activation.items() if key not in ("name", "degree")]
    return " ".join([f"{activation['name']}{activation.get('degree', '')}", *options])


def rate_name(
    activation: str | Mapping[str, Any], own: float | None, learning_rate: float, *, fine_tuning: bool
) -> str:
    """` × 10`: the rate of the coefficients in units of the base rate; empty where nothing learns.

    Args:
        own: as the training was told; None: by the rule.
    """
    module = build_activation(activation)
    if not isinstance(module, LearnableActivation):
        return ""
    multiple = coefficient_multiple(module, fine_tuning=fine_tuning) if own is None else round(own / learning_rate, 4)
    return f" × {multiple:g}"


def model_name(model: Mapping[str, Any], *, images: bool) -> str:
    """`GPT-2, 4 layers of 128, gated` or `ConvNeXt [1, 1] of [32, 64]`."""
    if images:
        shape = f"ConvNeXt {model['depths']} of {model['dims']}"
    else:
        shape = f"GPT-2, {model['n_layer']} layers of {model['n_embd']}"
    return shape + FEEDFORWARDS[model.get("feedforward")]


def learned_numbers(model: nn.Module) -> dict[str, list[Any]]:
    """What the activations have learned, to four digits: of each parameter its number or its numbers, by block."""
    found: dict[str, list[Any]] = {}
    for module in activation_modules(model).values():
        for name, parameter in module.named_parameters():
            values = [float(f"{value:.4g}") for value in parameter.detach().flatten().tolist()]
            found.setdefault(name, []).append(values if len(values) > 1 else values[0])
    return found


@torch.no_grad()
def measure(model_directory: Path, dataset_directory: Path) -> dict[str, float]:
    """Losses in nats per token of a model of text: on the whole validation split, and on its two parts.

    `development_loss` is of the documents for choosing, `test_loss` of the others.
    """
    model = load_model(model_directory)
    reader = open_split(dataset_directory, "validation")
    blocks = reader.samples(np.arange(len(reader))).astype(np.int64)
    losses = []
    for start in range(0, len(blocks), 16):
        tokens = torch.from_numpy(blocks[start : start + 16])
        logits = model(tokens[:, :-1])
        found = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        losses.append(found.view(len(tokens), -1).double())
    each = torch.cat(losses)
    chosen_by = torch.from_numpy(for_choosing(blocks, read_tokenizer(dataset_directory).end_of_text)[:, 1:])
    parts = {"loss": each, "development_loss": each[chosen_by], "test_loss": each[~chosen_by]}
    return {name: float(part.mean()) for name, part in parts.items()}


def for_choosing(blocks: np.ndarray, end_of_text: int) -> np.ndarray:
    """Which tokens of the blocks `[samples, tokens]`, one behind the other, are of documents for choosing: bool.

    Documents are whole on one side or the other: the longest first, each goes to the side that has fewer tokens.

    Raises:
        ValueError: all is one document.
    """
    document, sides = _halves(blocks, end_of_text)
    chosen: np.ndarray = sides[document].reshape(blocks.shape)
    return chosen


def describe_halves(blocks: np.ndarray, end_of_text: int) -> Row:
    """Documents and tokens of either side, and the tokens of its longest document: few documents say little."""
    document, sides = _halves(blocks, end_of_text)
    sizes = np.bincount(document)
    return {
        name: {"documents": len(own), "tokens": int(own.sum()), "longest": int(own.max())}
        for name, own in (("choosing", sizes[sides]), ("reporting", sizes[~sides]))
    }


def _halves(blocks: np.ndarray, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """The document of each token, and whether each document is for choosing."""
    tokens = blocks.reshape(-1)
    document = np.cumsum(tokens == end_of_text) - (tokens == end_of_text)  # an end belongs to what it ends
    sizes = np.bincount(document)
    if len(sizes) < 2:
        raise ValueError("the validation split is one document, nothing is left to report on: give more documents")
    sides = np.zeros(len(sizes), dtype=bool)
    filled = {True: 0, False: 0}
    for longest in np.argsort(-sizes, kind="stable"):
        side = filled[True] <= filled[False]
        sides[longest] = side
        filled[side] += int(sizes[longest])
    return document, sides
