"""The `train` stage: what it writes, that it learns, that its settings mean what they say, what it refuses."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file
from training_support import (
    MODEL,
    PARAMETERS,
    TRAINS_IN_FP16,
    history,
    make_context,
    make_dataset,
    read_events,
    run_training,
    validation_loss,
    weights_hash,
)

from polytrope.models import ARCHITECTURES, build_model, find_architecture
from polytrope.models.checkpoint import load_model
from polytrope.models.configurations import FIXED, MODEL_KINDS
from polytrope.ops.fitting.targets import NAMED
from polytrope.ops.modules import CLASSICAL, LEARNABLE, LearnableActivation, build_activation
from polytrope.pipeline.data.conversion_file import ConversionRecord, write_conversion
from polytrope.pipeline.data.lineage import read_lineage
from polytrope.pipeline.data.promised import PromisedImages, PromisedModel, PromisedText
from polytrope.pipeline.data.training_file import read_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, EventWriter, Resources, load_stage, stage_context
from polytrope.pipeline.stages.evaluate.evaluate import evaluate
from polytrope.pipeline.stages.evaluate.parameters import EvaluateParameters
from polytrope.pipeline.stages.shard.parameters import ShardImagesParameters
from polytrope.pipeline.stages.shard.shard_images import shard_images
from polytrope.pipeline.stages.train.activation_parameters import IMITATED, LEARNABLE_SETTINGS
from polytrope.pipeline.stages.train.activations import apply_activation_options, options_without_effect
from polytrope.pipeline.stages.train.best_weights import load_best
from polytrope.pipeline.stages.train.deepspeed_config import read_configuration, shipped_names, zero_stage_of
from polytrope.pipeline.stages.train.default_start import POLYNOMIALS
from polytrope.pipeline.stages.train.parameters import ModelParameters, TrainParameters
from polytrope.pipeline.stages.train.train import check, fingerprint, promise, train
from polytrope.pipeline.stages.train.training_metrics import rank_metrics
from polytrope.pipeline.stages.train.training_plan import steps_of_epochs
from polytrope.pipeline.stages.train.workers import TrainingError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "dataset")


SECRET = "a-word-of-the-vault"  # as of `${env.NAME}`, which the parameters hold in clear when the stage runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Artifact) -> Path:
    """Two workers, ZeRO-1, 12 steps; where workers were killed while they wrote the model."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "output/.files.half").mkdir(parents=True)
    for half in ("model.safetensors", ".files.half/model.json"):
        (directory / "output" / half).write_text("{")
    run_training(directory, dataset, register_alias=SECRET)
    return directory


def parameters(**changes: Any) -> TrainParameters:
    return TrainParameters.model_validate({**PARAMETERS, **changes})


def test_writes_a_model_that_loads_with_its_tokenizer_and_its_history(trained: Path, dataset: Artifact) -> None:
    output = trained / "output"
    written = {"model.json", "model.safetensors", "tokenizer.json", "training.json", "history.json", "lineage.json"}
    assert {path.name for path in output.iterdir()} == written
    model = load_model(output)
    assert model(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 320)  # 257 tokens, rounded up to 64
    description = json.loads((output / "model.json").read_text())
    assert description["tokenizer"] == {"kind": "bytes", "vocab_size": 257}
    assert (output / "tokenizer.json").read_bytes() == (dataset.path / "tokenizer.json").read_bytes()
    steps = {
        name: [entry["step"] for entry in history(trained) if name in entry] for name in ("train/loss", "val/loss")
    }
    assert steps == {"train/loss": [4, 8, 12], "val/loss": [6, 12]}
    summary = json.loads((output / "training.json").read_text())
    assert summary["tokens"] == 12 * 8 * 32
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    promised_names = set(figures_promised(parameters(), TEXT))  # what `select` is told before anything starts
    never_here = {"trainable_parameters", "result_step", "skipped_batches"}
    training = read_training(output)
    assert training is not None
    assert set(training.figures()) == promised_names - never_here
    facts = {name: value for event in read_events(trained, "params") for name, value in event["values"].items()}
    assert {name: facts[name] for name in ("parameters", "steps", "samples", "tokens")} == {
        name: str(summary[name]) for name in ("parameters", "steps", "samples", "tokens")
    }


def test_no_file_shows_the_parameters_which_may_hold_secrets(trained: Path) -> None:
    """The scratch directory stays while a stage is retried, and goes to the bucket of a store on S3."""
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert [path for path in files if path.match("scratch/launch-000/worker-*.log")]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_what_a_worker_prints_shows_no_secret(
    tmp_path: Path, dataset: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings of a configuration and messages of errors may quote any parameter."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif 'RANK' in os.environ: print('token', {SECRET!r}, flush=True); os._exit(3)\n"
    )
    events = EventWriter(tmp_path / "run/events", {"TOKEN": SECRET})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TrainingError) as error:
        train(replace(make_context(tmp_path / "run", workers=1), events=events), dataset, parameters())
    log = (tmp_path / "run/scratch/launch-000/worker-0.log").read_text()
    assert log == "token ${env.TOKEN}\n"
    assert log in str(error.value)


def test_another_loss_is_trained_on_and_cross_entropy_is_validated(tmp_path: Path, dataset: Artifact) -> None:
    """At the start p is 1/V everywhere: Poly-1 is ε (1 - 1/V) above cross entropy."""
    loss = {"name": "poly", "epsilon": 2.0}
    run_training(
        tmp_path, dataset, workers=1, loss=loss, steps=1, log_every=1, warmup_steps=0, learning_rate=1e-9,
    )  # fmt: skip
    summary = json.loads((tmp_path / "output/training.json").read_text())
    assert summary["val/loss"] == pytest.approx(validation_loss(tmp_path, dataset, 7), rel=1e-5)
    assert summary["train/loss"] - summary["val/loss"] == pytest.approx(2.0 * (1 - 1 / 320), abs=0.05)


def test_learns(trained: Path) -> None:
    losses = [entry["val/loss"] for entry in history(trained) if "val/loss" in entry]
    assert losses[-1] < losses[0] < math.log(320)


def test_validation_loss_is_that_of_the_written_model_on_the_first_samples(trained: Path, dataset: Artifact) -> None:
    loss = validation_loss(trained, dataset, 7)
    assert history(trained)[-1]["val/loss"] == pytest.approx(loss, rel=1e-5)


def test_reports_curves_throughput_and_progress(trained: Path) -> None:
    metrics = read_events(trained, "metrics")
    names = {name for event in metrics for name in event["values"]}
    assert {"train/loss", "val/loss", "learning_rate", "gradient_norm", "tokens_per_second"} <= names
    assert {
        "straggler_ratio",
        "worker_1/forward_seconds",
        "worker_1/data_wait_seconds",
        "peak_memory",
        "data_wait_fraction",
    } <= names
    logged = [event["step"] for event in metrics if "val/loss" in event["values"]]
    assert logged == [6, 12]
    last = read_events(trained, "progress")[-1]
    assert (last["done"], last["total"]) == (12, 12)
    assert "loss" in last["message"]
    assert "tokens/s" in last["message"]


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 0},
        {"deepspeed": "zero-2-offload", "activation_checkpointing": "block"},
        {"deepspeed": "zero-3-offload", "activation_checkpointing": "mlp"},
        pytest.param({"zero_stage": 2}, marks=pytest.mark.chaos),
        pytest.param({"zero_stage": 3}, marks=pytest.mark.chaos),
    ],
    ids=str,
)
def test_all_zero_stages_train_the_same_model(
    tmp_path: Path, dataset: Artifact, trained: Path, changes: dict[str, Any]
) -> None:
    run_training(tmp_path, dataset, **changes)
    weights, expected = (load_file(path / "output" / "model.safetensors") for path in (tmp_path, trained))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    for ours, theirs in zip(history(tmp_path), history(trained), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_and_accumulation_do_not_change_the_training(
    tmp_path: Path, dataset: Artifact, trained: Path, workers: int
) -> None:
    run_training(tmp_path, dataset, workers=workers, micro_batch_size=1)
    for ours, theirs in zip(history(tmp_path), history(trained), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_same_training_gives_the_same_weights_and_another_seed_others(
    tmp_path: Path, dataset: Artifact, trained: Path
) -> None:
    run_training(tmp_path / "again", dataset)
    run_training(tmp_path / "seed", dataset, seed=1)
    assert weights_hash(tmp_path / "again") == weights_hash(trained)
    assert (tmp_path / "again/output/history.json").read_bytes() == (trained / "output/history.json").read_bytes()
    assert weights_hash(tmp_path / "seed") != weights_hash(trained)


def test_fine_tuning_continues_from_the_initial_model(tmp_path: Path, dataset: Artifact, trained: Path) -> None:
    assert "structure" not in json.loads((trained / "output/lineage.json").read_text())
    initial = Artifact(tmp_path / "quadratic", "digest", "convert")
    shutil.copytree(trained / "output", initial.path)
    write_conversion(initial.path, ConversionRecord(layers=[], quadratic=["h.0", "h.1"]))
    run_training(tmp_path, dataset, initial=initial, model=None, steps=4, warmup_steps=0, learning_rate=1e-4)
    assert read_lineage(tmp_path / "output").structure == ["2 quadratic layers"]
    before = json.loads((trained / "output/training.json").read_text())["val/loss"]
    assert json.loads((tmp_path / "output/training.json").read_text())["val/loss"] < before
    ours, theirs = (json.loads((path / "output/model.json").read_text())["config"] for path in (tmp_path, trained))
    assert ours == theirs


def test_fine_tuning_refuses_another_tokenizer(tmp_path: Path, dataset: Artifact, trained: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in (trained / "output").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer of `train` is not the one of `shard`"):
        run_training(tmp_path, dataset, initial=Artifact(other, "digest", "train"), model=None)


@pytest.mark.parametrize(
    "changes", [{"precision": "bf16", "zero_stage": 0}, {"precision": "fp16"}, {"compile": True}], ids=str
)
def test_other_arithmetic_trains_alike(
    tmp_path: Path, dataset: Artifact, trained: Path, changes: dict[str, Any]
) -> None:
    """Half precision with and without sharding, and a compiled model, follow the fp32 eager training closely."""
    if "compile" in changes and shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    if changes == {"precision": "fp16"} and not TRAINS_IN_FP16:
        with pytest.raises(UserError, match="cannot train in fp16 on this CPU"):
            run_training(tmp_path, dataset, workers=1, **changes)
        return
    run_training(tmp_path, dataset, workers=1, **changes)
    tolerance = 1e-5 if "compile" in changes else 2e-3  # a step more or less of Adam is 2e-2
    for ours, theirs in zip(history(tmp_path), history(trained), strict=True):
        for name in ours.keys() & {"train/loss", "val/loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance)
    weights = load_file(tmp_path / "output" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    exact = all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    assert not exact, "the result is the fp32 masters, not the rounded weights"


def test_bf16_with_averaged_weights_recomputed_blocks_and_statistics(tmp_path: Path, dataset: Artifact) -> None:
    activations = [
        {"name": "hermite", "degree": 4, "init": "gelu", "interval": [-4, 4]},
        {"name": "affine", "init": "gelu", "num_parameters": 4},
        {"name": "hermite", "interval": None},
    ]
    run_training(
        tmp_path,
        dataset,
        model={**MODEL, "n_layer": 3, "activation": activations},
        ema_decay=0.9,
        precision="bf16",
        activation_checkpointing="block",
        statistics_every=6,
        peak_flops=1e12,
        register_as="lines",
    )
    assert history(tmp_path)[-1]["val/loss"] < math.log(320)
    tensors = load_file(tmp_path / "output" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    names = {name for event in read_events(tmp_path, "metrics") for name in event["values"]}
    assert {"mfu", "preactivation_std/0", "coefficient_norm/1"} <= names
    logged = next(entry for entry in history(tmp_path) if "train/loss" in entry)
    rates = {name: rate for name, rate in logged.items() if name.startswith("learning_rate")}
    assert rates["learning_rate/coefficients_x10"] == pytest.approx(10 * rates["learning_rate"])
    assert rates["learning_rate/coefficients_x0.1"] == pytest.approx(0.1 * rates["learning_rate"])
    assert len(rates) == 3
    assert read_events(tmp_path, "model")[0]["name"] == "lines"


def test_averaged_weights_are_averages_of_the_masters_and_stay_in_fp32(tmp_path: Path, dataset: Artifact) -> None:
    """With a decay of 0 the average is the last step's masters: what a training without averages writes."""
    changes = {"precision": "bf16", "zero_stage": 1, "steps": 6, "checkpoint_every": 0}
    run_training(tmp_path / "plain", dataset, **changes)
    run_training(tmp_path / "averaged", dataset, **changes, ema_decay=1e-9)
    plain, averaged = (load_file(tmp_path / name / "output/model.safetensors") for name in ("plain", "averaged"))
    for name, tensor in plain.items():
        assert torch.allclose(averaged[name], tensor, rtol=1e-6, atol=1e-9), name
        assert not torch.equal(averaged[name], averaged[name].bfloat16().float()) or tensor.numel() < 8, name


def test_images_train_in_half_precision_and_seeds_may_be_large(tmp_path: Path) -> None:
    context = stage_context(tmp_path / "digits", resources=Resources())
    shard_images(context, ShardImagesParameters())
    digits = Artifact(context.output, "digest", "digits")
    summary = run_training(
        tmp_path / "train", digits, workers=1, model=CONVNEXT, precision="bf16", steps=3, seed=2**62, warmup_steps=0,
        validation_samples=20,
    )  # fmt: skip
    assert summary["val/loss"] < 3
    promised_names = set(figures_promised(parameters(model=CONVNEXT), DIGITS))
    assert {"val/accuracy"} < set(summary) <= promised_names


@pytest.mark.chaos
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", ["gpt2", "convnext"])
def test_every_architecture_trains_resumes_and_is_evaluated_in_every_precision_and_stage(
    tmp_path: Path, dataset: Artifact, architecture: str, precision: str, stage: int
) -> None:
    if precision == "fp16" and (stage == 0 or not TRAINS_IN_FP16):
        pytest.skip("DeepSpeed does not train so on this machine")
    data, model = dataset, MODEL
    if architecture == "convnext":
        context = stage_context(tmp_path / "digits", resources=Resources())
        shard_images(context, ShardImagesParameters())
        data, model = Artifact(context.output, "digest", "digits"), CONVNEXT
    settings = {
        "model": model, "precision": precision, "zero_stage": stage, "checkpoint_every": 1, "warmup_steps": 0,
        "validation_samples": 8, "validation_every": 0,
    }  # fmt: skip
    run_training(tmp_path / "whole", data, workers=1, steps=2, **settings)
    whole = weights_hash(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole/output")
    run_training(tmp_path / "whole", data, workers=1, steps=2, **settings)  # goes on from the checkpoint of step 1
    assert any("checkpoint of step 1" in str(event.get("text")) for event in read_events(tmp_path / "whole", "message"))
    assert weights_hash(tmp_path / "whole") == whole
    trained = Artifact(tmp_path / "whole/output", "digest", "train")
    for narrow in ("fp32", "bf16"):
        directory = tmp_path / narrow
        figures = evaluate(
            stage_context(directory, resources=Resources()), data, {"a": trained},
            EvaluateParameters(samples=4, precision=narrow, sample_tokens=4),
        )  # fmt: skip
        assert figures["a/val_loss"] < 10


def test_the_best_weights_are_the_result_if_asked_for(tmp_path: Path) -> None:
    """Learning one text makes the model worse at another: the last validation loss is not the lowest."""
    dataset = make_dataset(tmp_path / "dataset", ["all work and no play " * 30] * 50 + ["9876543210!" * 40] * 10)
    changes = {"validation_every": 2, "checkpoint_every": 2, "steps": 16}
    run_training(tmp_path, dataset, workers=1, result="best", validation_samples=30, **changes)
    losses = {int(entry["step"]): entry["val/loss"] for entry in history(tmp_path) if "val/loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert best < 12, "the test needs a training that gets worse"
    summary = json.loads((tmp_path / "output/training.json").read_text())
    assert (summary["result_step"], summary["val/loss"]) == (best, losses[best])
    assert validation_loss(tmp_path, dataset, 30) == pytest.approx(losses[best], rel=1e-5)
    kept = tmp_path / "scratch/checkpoints/best"
    assert {path.stem for path in kept.iterdir()} == {f"step-{best:08d}"}
    with (kept / f"step-{best:08d}.pt").open("ab") as file:
        file.write(b"x")
    with pytest.raises(RuntimeError, match="were altered"):
        load_best(kept, best)


def test_the_rank_that_holds_up_the_others_is_named() -> None:
    values = rank_metrics([0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.2, 0.0])
    assert values["slowest_rank"] == 2
    assert values["straggler_ratio"] == pytest.approx(3.0)
    assert values["worker_2/data_wait_seconds"] == 0.2


def test_nan_stops_the_training_and_says_where(tmp_path: Path, dataset: Artifact) -> None:
    with pytest.raises(TrainingError, match=r"training diverged: step \d+ \(batch \d+\): gradient norm is (nan|inf)"):
        run_training(tmp_path, dataset, learning_rate=1e30, gradient_clipping=0.0, warmup_steps=0)


def test_a_divergence_can_be_the_result(tmp_path: Path, dataset: Artifact, trained: Path) -> None:
    broken = {"learning_rate": 1e30, "gradient_clipping": 0.0, "warmup_steps": 0, "zero_stage": 3}
    summary = run_training(tmp_path, dataset, **broken, on_divergence="record", log_every=1, register_as="lines")
    training = json.loads((tmp_path / "output" / "training.json").read_text())
    assert re.match(r"diverged at step \d+ \(batch \d+\): gradient norm is (nan|inf)", training["failure"])
    assert summary == {}, "nothing was measured at its end"
    assert training["steps"] == len(history(tmp_path))
    whole = json.loads((trained / "output/training.json").read_text())
    assert training["parameters"] == whole["parameters"], "also of shards"
    assert not (tmp_path / "output" / "model.safetensors").exists()
    assert read_events(tmp_path, "model") == []


def test_options_of_activations_go_to_the_families_that_have_them() -> None:
    options = {"init": "torchortho", "interval": (-3.0, 3.0), "per_channel": True}
    sizes = {"vocab_size": 64, "sequence_length": 8, "n_layer": 5, "n_head": 2, "n_embd": 16}
    activations = ["gelu", "hermite3", "tropical5", "polynorm", {"name": "rational", "interval": [-5, 5]}]
    model = apply_activation_options("gpt2", {**sizes, "activation": activations, "activation_options": options})
    assert model["activation"] == [
        "gelu",
        {"name": "hermite", "degree": 3, "init": "torchortho", "interval": [-3.0, 3.0], "num_parameters": 64},
        {"name": "tropical", "degree": 5, "init": "torchortho", "num_parameters": 64},
        "polynorm",
        {"name": "rational", "interval": [-5, 5], "num_parameters": 64},
    ]
    assert build_model("gpt2", model).blocks[1].mlp.activation.coefficients.shape == (64, 4)
    unused = options_without_effect("gpt2", {**sizes, "activation": activations, "activation_options": options})
    assert unused == (
        "gelu has no init, interval, per_channel; tropical has no interval; "
        "polynorm has no init, interval, per_channel; rational has no init"
    )
    assert options_without_effect("gpt2", {**sizes, "activation": activations}) == ""
    every = ["legendre2", "fourier2", "polynorm3", "piecewise_linear8", "relu"]
    for init, having in (("stable", {"legendre2"}), ("gelu", set(every) - {"relu"}), ("torchortho", {"fourier2"})):
        given = apply_activation_options("gpt2", {**sizes, "activation": every, "activation_options": {"init": init}})
        entries = zip(every, given["activation"], strict=True)
        assert {name for name, entry in entries if isinstance(entry, dict) and entry.get("init") == init} == having
        build_model("gpt2", given)
    images = {"depths": [1, 1], "dims": [8, 16], "num_classes": 2, "in_channels": 1, "activation": "hermite3"}
    model = apply_activation_options("convnext", {**images, "activation_options": {"per_channel": True}})
    assert [entry["num_parameters"] for entry in model["activation"]] == [32, 64]
    assert apply_activation_options("gpt2", {**sizes, "activation": "gelu", "activation_options": options}) == {
        **sizes,
        "activation": "gelu",
    }


def test_a_damaged_shard_is_the_users_message_not_a_hang(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    shard = dataset.path / "train" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000001\.tar was altered"):
        run_training(tmp_path, dataset)


def test_parameters_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"either `steps` .* or `epochs`"):
        parameters(epochs=1)
    with pytest.raises(ValidationError, match="give either `steps` or `epochs`"):
        parameters(steps=None)
    with pytest.raises(ValidationError, match=r"global_batch_size \(8\) must be a multiple of micro_batch_size \(3\)"):
        parameters(micro_batch_size=3)
    with pytest.raises(ValidationError, match="warmup_steps"):
        parameters(warmup_steps=13)
    with pytest.raises(ValidationError, match="learning_rates"):
        parameters(learning_rates=1)
    assert all(field.description for field in TrainParameters.model_fields.values())


def test_a_batch_that_does_not_divide_over_the_workers_is_refused(tmp_path: Path, dataset: Artifact) -> None:
    with pytest.raises(UserError, match=r"global_batch_size \(8\) must be a multiple of resources.workers \(3\)"):
        run_training(tmp_path, dataset, workers=3)
    with pytest.raises(UserError, match=r"micro_batch_size \(8\) × resources.workers \(2\)"):
        run_training(tmp_path, dataset, micro_batch_size=8)


TEXT = PromisedText(sequence_length=128, tokens=2048, tokenizer="bpe")


def promised(given: TrainParameters, dataset: Any, initial: PromisedModel | None = None) -> PromisedModel | None:
    return promise(given, {"dataset": dataset, "initial": initial}, Resources(workers=2), Path())


def figures_promised(given: TrainParameters, dataset: Any) -> tuple[str, ...]:
    found = promised(given, dataset)
    assert found is not None
    return found.figures


def test_what_activations_a_model_will_have_is_promised() -> None:
    options = {"activation_options": {"per_channel": True}}
    start = {"init": "gelu", "interval": [-2, 2]}
    for model, activation in (
        ({}, "gelu_tanh"),
        ({"activation": "gelu"}, "gelu"),
        ({"feedforward": "mu"}, "none"),
        ({"activation": "hermite", "activation_options": {"init": "stable"}}, {"name": "hermite", "init": "stable"}),
        ({"activation": "hermite", **options}, {"name": "hermite", "num_parameters": 4 * MODEL["n_embd"], **start}),
        ({"activation": "gelu", **options}, "gelu"),
        ({"activation": "hermite"}, {"name": "hermite", **start}),
    ):
        sizes = {name: value for name, value in MODEL.items() if name != "activation"}
        found = promised(parameters(model={**sizes, **model}), TEXT)
        assert found is not None
        assert found.settings["activation"] == activation


def test_what_cannot_work_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match="model: missing"):
        check(parameters(model=None), {"initial": None})
    with pytest.raises(UserError, match="architecture comes from `initial`"):
        check(parameters(), {"initial": SimpleNamespace()})
    check(parameters(), {"initial": None})
    with pytest.raises(UserError, match=r"model\.vocab_size: .*\(2048 tokens\) is larger than the model's embedding"):
        promised(parameters(model={**MODEL, "vocab_size": 1000}), TEXT)
    with pytest.raises(UserError, match=r"model\.sequence_length: .* sequences \(128 tokens\) are longer"):
        promised(parameters(model={**MODEL, "sequence_length": 64}), TEXT)
    with pytest.raises(UserError, match=r"global_batch_size \(5\) must be a multiple of resources\.workers \(2\)"):
        promised(parameters(global_batch_size=5), TEXT)
    with pytest.raises(
        UserError, match=r"augmentation: mixup \(.*\) and cutmix \(0\) mix .* each worker's has only one"
    ):
        promised(parameters(micro_batch_size=1, augmentation={"mixup": 0.2}), DIGITS)
    with pytest.raises(UserError, match=r"inputs\.dataset: .* takes a data set, and the stage makes a model"):
        promised(parameters(), PromisedModel("gpt2", {}))
    with pytest.raises(UserError, match="augmentation: `crop_padding`: for images"):
        promised(parameters(augmentation={"crop_padding": 1}), TEXT)
    own = promised(parameters(), None)  # a stage of one's own promises nothing
    assert own is not None
    assert "vocab_size" not in own.settings


def test_a_fine_tuning_is_compared_with_the_model_it_starts_from() -> None:
    trained = promised(parameters(), TEXT)
    assert trained is not None
    assert (trained.settings["vocab_size"], trained.settings["sequence_length"]) == (2048, 128)
    tuning = parameters(model=None)
    assert promised(tuning, TEXT, trained) == trained
    assert promised(tuning, TEXT, replace(trained, figures=())) == trained  # of a converted model
    for dataset, words in (
        (replace(TEXT, sequence_length=129), r"sequences \(129 tokens\) are longer"),
        (replace(TEXT, tokens=4096), "vocabulary"),
        (replace(TEXT, tokenizer="bytes", tokens=257), "trained with a bpe tokenizer"),
        (DIGITS, "a gpt2 cannot take images"),
    ):
        with pytest.raises(UserError, match=f"inputs\\.initial: .*{words}"):
            promised(tuning, dataset, trained)


def test_what_is_known_of_a_model_without_torch_is_what_its_record_says() -> None:
    records = {name: find_architecture(name) for name in ARCHITECTURES}
    assert {name: (record.config, record.data, record.presets) for name, record in records.items()} == {
        name: (kind.config, kind.data, kind.presets) for name, kind in MODEL_KINDS.items()
    }
    schema = ModelParameters.model_json_schema()["properties"]["architecture"]
    assert schema["enum"] == list(ARCHITECTURES)


def test_the_settings_of_activations_are_the_arguments_of_their_modules() -> None:
    assert set(LEARNABLE_SETTINGS) == set(LEARNABLE)
    assert tuple(CLASSICAL) == FIXED
    assert set(IMITATED) == set(NAMED)
    common = inspect.signature(LearnableActivation.__init__).parameters.keys() - {"self", "name", "degree"}
    for name, settings in LEARNABLE_SETTINGS.items():
        family = LEARNABLE[name]
        own = [item for item in inspect.signature(family.__init__).parameters if item not in ("self", "options")]
        parents = inspect.signature(family.__mro__[1].__init__).parameters  # type: ignore[misc]
        accepted = common | set(own) | (parents.keys() & {"learnable_recurrence", "variable"})
        accepted -= {"device", "dtype"} | (set() if family.accepts_interval else {"interval"})
        accepted -= set() if family.accepts_groups else {"num_parameters", "dim", "glu"}
        assert settings.model_fields.keys() - {"name", "layers"} == accepted, name
        made = family()
        for field, value in {"degree": made.degree, "init": made.init, "interval": made.interval}.items():
            added = field == "init" and name in POLYNOMIALS  # default_start.py says which
            if field in settings.model_fields:
                assert settings.model_fields[field].default == (None if added else value), (name, field)
        for init in ("variance_preserving", "stable", "torchortho", "gelu"):
            assert _taken(settings, name, init=init) == _built(name, init=init), (name, init)
        for degree in (0, 16, 17, 64, 65):
            assert _taken(settings, name, degree=degree) == _built(name, degree=degree), (name, degree)


def _taken(settings: type[BaseModel], name: str, **options: Any) -> bool:
    try:
        settings.model_validate({"name": name, **options})
    except ValidationError:
        return False
    return True


def _built(name: str, **options: Any) -> bool:
    try:
        build_activation({"name": name, **options})
    except ValueError:
        return False
    return True


DIGITS = PromisedImages(size=8, channels=1, classes=10)
CONVNEXT = {"architecture": "convnext", "depths": [1, 1], "dims": [8, 16], "patch_size": 1}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_classes": 3}, r"model\.num_classes: .*10 classes, the model 3 outputs \(`num_classes`\)"),
        ({"in_channels": 3}, r"model\.in_channels: .*1 channel \(`channels`\), the model takes 3 \(`in_channels`\)"),
        (
            {"patch_size": 4, "depths": [1] * 4, "dims": [8] * 4},
            r"model\.patch_size: images of 8 × 8 \(`image_size`\) are too small for a stem of 4",
        ),
        ({"preset": "convnext-atto", "depths": None, "dims": None, "patch_size": 4}, "and 4 stages"),
    ],
)
def test_a_model_that_does_not_fit_the_images_is_refused_before_anything_starts(
    model: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        promised(parameters(model={**CONVNEXT, **model}), DIGITS)
    promised(parameters(model={**CONVNEXT, "num_classes": 1000, "in_channels": 1}), DIGITS)
    with pytest.raises(UserError, match=r"model\.architecture: a convnext cannot take text"):
        promised(parameters(model=CONVNEXT), TEXT)
    with pytest.raises(UserError, match=r"model\.architecture: a gpt2 cannot take images"):
        promised(parameters(), DIGITS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": math.inf}, "finite"),
        ({"steps": None, "epochs": math.inf}, "finite"),
        ({"betas": (0.9, 1.0)}, "less than 1"),
        ({"betas": (-0.1, 0.9)}, "greater than or equal to 0"),
        ({"gradient_clipping": math.nan}, "finite"),
        ({"seed": 2**63}, "less than 9223372036854775808"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        parameters(**changes)


def test_epochs_count_steps_exactly() -> None:
    assert steps_of_epochs(1.1, 100, 10) == 11
    assert steps_of_epochs(0.3, 100, 10) == 3
    assert steps_of_epochs(1.0, 101, 10) == 11


def test_a_warm_up_longer_than_the_epochs_and_mixing_of_single_samples_are_refused(
    tmp_path: Path, dataset: Artifact
) -> None:
    with pytest.raises(UserError, match=r"warmup_steps \(1000\) is more than the \d+ steps of 0\.1 epochs"):
        run_training(tmp_path, dataset, steps=None, epochs=0.1, warmup_steps=1000)
    with pytest.raises(UserError, match="each worker's has only one"):
        run_training(tmp_path, dataset, workers=2, global_batch_size=2, augmentation={"mixup": 0.5})


def test_a_shipped_deepspeed_configuration_that_is_missing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("polytrope.pipeline.stages.train.deepspeed_config.SHIPPED", tmp_path)
    with pytest.raises(UserError, match=r"zero-1.*cannot be read"):
        read_configuration(TrainParameters(steps=1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"zero_stage": 1, "deepspeed": {"zero_optimization": {"stage": 3}}},
            r"stage = 3, the stage's `zero_stage` says 1",
        ),
        ({"zero_stage": 0, "precision": "fp16"}, "use zero_stage: 1"),
        ({"zero_stage": 3, "deepspeed": "zero-2-offload"}, r"stage = 2, the stage's `zero_stage` says 3"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, r"bf16\.enabled = true, the stage's `precision` says fp32"),
        ({"deepspeed": {"optimizer": {"type": "Adam"}}}, "sets `optimizer`"),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, r"zero_optimization\.stage = 4"),
        ({"deepspeed": "zero-3", "ema_decay": 0.99}, "ema_decay: needs whole weights"),
        ({"zero_stage": 3, "statistics_every": 5}, "statistics_every: needs whole coefficients"),
        ({"deepspeed": "missing.json"}, "no such file"),
        ({"deepspeed": "zero-7"}, "zero-3-offload"),
        ({"deepspeed": "list.json"}, "not a JSON object"),
    ],
)
def test_deepspeed_settings_that_contradict_the_stage_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError) as caught:
        fingerprint(parameters(**changes), tmp_path)
    assert re.search(words, f"{caught.value.message} {caught.value.hint}")


def test_the_deepspeed_configuration_is_the_file_and_part_of_the_key(tmp_path: Path) -> None:
    own = tmp_path / "zero.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": False}}))
    first = fingerprint(parameters(deepspeed="zero.json"), tmp_path)
    configuration = read_configuration(parameters(deepspeed="zero.json"), tmp_path)
    assert configuration == json.loads(own.read_text())
    assert zero_stage_of(configuration, parameters()) == 2
    own.write_text("{}")
    assert fingerprint(parameters(deepspeed="zero.json"), tmp_path) != first
    shipped = json.loads((Path(__file__).parents[2] / "infra/deepspeed/zero-3.json").read_text())
    assert read_configuration(parameters(zero_stage=3)) == read_configuration(parameters(deepspeed="zero-3")) == shipped
    assert {f"zero-{stage}" for stage in range(4)} < set(shipped_names())


def test_the_stage_is_found_by_name_with_its_inputs() -> None:
    definition = load_stage("train")
    assert definition.inputs == {"dataset": "required", "initial": "optional", "teacher": "optional"}
    assert definition.parameters_model is TrainParameters
    assert definition.options.parallel


def test_parameters_without_dimensions_train_and_are_clipped_with_and_without_sharding(
    tmp_path: Path, dataset: Artifact
) -> None:
    """Fourier's bias is one; DeepSpeed's own broadcast and clipping fail on it."""
    model = {**MODEL, "activation": {"name": "fourier", "degree": 3}}
    for stage in (0, 1):
        run_training(tmp_path / str(stage), dataset, zero_stage=stage, model=model, gradient_clipping=0.1)
    for ours, theirs in zip(history(tmp_path / "0"), history(tmp_path / "1"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
