"""The evaluate stage: what its figures mean, that they agree with the model, and that they repeat exactly."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from training_support import make_context, read_events

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.pipeline.data.evaluation_file import read_evaluation
from polytrope.pipeline.data.promised import PromisedEvaluation, PromisedImages, PromisedModel, PromisedText
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.tokenization import BpeTokenizer, make_tokenizer, same_tokenizer
from polytrope.pipeline.data.training_file import Training, write_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, load_stage
from polytrope.pipeline.stages.evaluate.evaluate import check, evaluate, promise
from polytrope.pipeline.stages.evaluate.measure_speed import measure_speed
from polytrope.pipeline.stages.evaluate.parameters import EvaluateParameters, MeasureSpeedParameters
from polytrope.pipeline.stages.evaluate.scores import Scores
from polytrope.pipeline.stages.evaluate.speed import bytes_kept_for_backward
from polytrope.pipeline.stages.evaluate.token_bytes import byte_lengths
from polytrope.pipeline.stages.evaluate.windows import block_windows, sliding_windows
from polytrope.pipeline.stages.shard.parameters import ShardParameters
from polytrope.pipeline.stages.shard.shard import shard

SEQUENCE_LENGTH = 32


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Bytes of short texts, through the shard stage."""
    directory = tmp_path_factory.mktemp("dataset")
    texts = [{"text": f"line {number} of a text that is easy to learn; " * 12} for number in range(60)]
    (directory / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    parameters = ShardParameters.model_validate(
        {
            "source": {"kind": "files", "paths": [str(directory / "texts.jsonl")], "format": "jsonl"},
            "tokenizer": {"kind": "bytes"},
            "sequence_length": SEQUENCE_LENGTH,
            "validation_fraction": 0.2,
        }
    )
    shard(make_context(directory, workers=1), parameters)
    return Artifact(directory / "output", "digest of the data", "shard")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, dataset: Artifact) -> dict[str, Artifact]:
    """Two untrained models with the same weights and different activations."""
    result = {}
    for label, activation in (("gelu", "gelu_tanh"), ("hermite", {"name": "hermite", "degree": 3})):
        torch.manual_seed(0)
        config = {"vocab_size": 320, "sequence_length": SEQUENCE_LENGTH, "n_layer": 2, "n_head": 2, "n_embd": 32}
        model = build_model("gpt2", {**config, "activation": activation})
        directory = tmp_path_factory.mktemp(label)
        save_model(directory, model, tokenizer=dataset.path)
        result[label] = Artifact(directory, f"digest of {label}", f"train-{label}")
    return result


def run(directory: Path, dataset: Artifact, models: dict[str, Artifact], **parameters: Any) -> dict[str, Any]:
    """The content of evaluation.json, and the returned metrics under `returned`."""
    settings = {"sample_tokens": 8, "activation_samples": 2, **parameters}
    returned = evaluate(make_context(directory), dataset, models, EvaluateParameters.model_validate(settings))
    content: dict[str, Any] = json.loads((directory / "output" / "evaluation.json").read_text())
    assert read_evaluation(directory / "output").model_dump(exclude_unset=True) == content
    return {**content, "returned": returned}


def test_loss_and_bits_per_byte_are_those_of_the_model_on_every_validation_token(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    figures = run(tmp_path, dataset, models, batch_size=5)["models"]["hermite"]
    reader = open_split(dataset.path, "validation")
    blocks = torch.from_numpy(reader.samples(np.arange(len(reader))).astype(np.int64))
    model = load_model(models["hermite"].path)
    with torch.no_grad():
        losses = model(blocks[:, :-1], blocks[:, 1:], reduction="none").double()
        accuracy = (model(blocks[:, :-1]).argmax(-1) == blocks[:, 1:]).double().mean()
    assert figures["tokens"] == len(reader) * SEQUENCE_LENGTH
    assert figures["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["top1"] == pytest.approx(float(accuracy))
    # one byte per token, except where the predicted token ends a text
    predicted_bytes = int((blocks[:, 1:] < 256).sum())
    assert figures["bytes"] == predicted_bytes < figures["tokens"]
    assert figures["bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / predicted_bytes, rel=1e-6)


def test_the_same_evaluation_twice_gives_the_same_bytes(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    for name in ("first", "second"):
        torch.manual_seed(hash(name) % 1000)  # the global random state must not matter
        run(tmp_path / name, dataset, models, samples=20)
    first, second = (tmp_path / name / "output" / "evaluation.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_metrics_carry_the_label_and_throughput_stays_out_of_the_artifact(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    content = run(tmp_path, dataset, models, samples=8)
    logged = {name: value for event in read_events(tmp_path, "metrics") for name, value in event["values"].items()}
    for label in models:
        assert (
            content["returned"][f"{label}/val_loss"] == content["models"][label]["loss"] == logged[f"{label}/val_loss"]
        )
        assert logged[f"{label}/tokens_per_second"] > 0
    assert "per_second" not in (tmp_path / "output" / "evaluation.json").read_text()


def test_drift_is_zero_to_itself_and_positive_to_another_model(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    trio = {**models, "copy": models["gelu"]}
    results = run(tmp_path, dataset, trio, samples=8, drift={"hermite": "gelu", "copy": "gelu"})["models"]
    drift = results["copy"]["drift"]
    assert (drift["kl_divergence"], drift["agreement"]) == (0.0, 1.0)
    assert drift["cosine"] == pytest.approx([1.0, 1.0])
    first, second = results["hermite"]["drift"]["cosine"]
    assert -1 <= second < 1
    assert first < 1
    assert results["hermite"]["drift"]["kl_divergence"] > 0
    assert "drift" not in results["gelu"]


def test_inputs_outside_of_certified_ranges_are_counted_and_said(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    wide, narrow = ({"name": "composition", "degree": 4, "domain": [-end, end]} for end in (50.0, 0.05))
    config = {"vocab_size": 320, "sequence_length": SEQUENCE_LENGTH, "n_layer": 2, "n_head": 2, "n_embd": 32}
    torch.manual_seed(0)
    model = build_model("gpt2", {**config, "activation": [wide, narrow]})
    save_model(tmp_path / "model", model, tokenizer=dataset.path)
    artifact = Artifact(tmp_path / "model", "digest", "convert")
    results = run(tmp_path, dataset, {"gelu": models["gelu"], "polynomial": artifact}, samples=6)
    assert "domains" not in results["models"]["gelu"]
    first, second = results["models"]["polynomial"]["domains"]
    assert (first["name"], first["domain"]) == ("transformer.h.0.mlp.activation", [-50.0, 50.0])
    assert (first["outside"], first["probability"]) == (0, 0.0)
    received: list[torch.Tensor] = []
    own = load_model(tmp_path / "model")
    own.get_submodule(second["name"]).register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    blocks = torch.from_numpy(open_split(dataset.path, "validation").samples(np.arange(6)).astype(np.int64))
    with torch.no_grad():
        own(blocks[:, :-1])
    (x,) = received
    assert second["inputs"] == x.numel() == 6 * SEQUENCE_LENGTH * 128
    assert second["outside"] == int((x.abs() > 0.05).sum()) > 0
    assert second["probability"] == second["outside"] / x.numel()
    assert results["returned"]["polynomial/outside_probability"] == second["probability"]
    assert "gelu/outside_probability" not in results["returned"]
    (said,) = [event["text"] for event in read_events(tmp_path, "message") if "OUTSIDE" in event["text"]]
    assert said.startswith("polynomial: INPUTS OUTSIDE OF THE CERTIFIED RANGE")
    assert f"`{second['name']}` {second['outside']} of {x.numel()}" in said


def test_shapes_are_measured_per_block_with_the_density_of_their_inputs(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    layers = run(tmp_path, dataset, models, samples=8)["models"]["gelu"]["layers"]
    assert [layer["name"] for layer in layers] == ["block 1", "block 2"]
    for layer in layers:
        low, high = layer["edges"]
        assert sum(layer["density"]) * (high - low) / len(layer["density"]) == pytest.approx(1.0, abs=0.01)
        expected = torch.nn.functional.gelu(torch.tensor(layer["x"]), approximate="tanh")
        assert layer["y"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert layer["minimum"] < layer["mean"] < layer["maximum"]


def test_sliding_windows_score_every_token_but_the_first_once_with_enough_context() -> None:
    length, stride, samples = 8, 3, 5
    stream = np.arange(samples * (length + 1))

    def read(indices: np.ndarray) -> np.ndarray:
        return stream.reshape(samples, length + 1)[indices]

    seen: list[int] = []
    for batch in sliding_windows(read, samples, length, stride, batch_size=4):
        assert batch.inputs.shape[1] == length
        for inputs, targets, scored in zip(batch.inputs, batch.targets, batch.scored, strict=True):
            assert (targets == inputs + 1).all()
            seen += targets[scored].tolist()
            if inputs[0] > 0:
                assert np.nonzero(scored)[0][0] >= length - stride
    assert seen == stream[1:].tolist()


TEXT = PromisedText(sequence_length=32, tokens=512, tokenizer="bpe")


def test_a_stride_of_the_whole_length_scores_what_blocks_cannot(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    sliding = run(tmp_path / "sliding", dataset, models, samples=10, stride=8)["models"]["gelu"]
    blocks = run(tmp_path / "blocks", dataset, models, samples=10)["models"]["gelu"]
    assert sliding["tokens"] == blocks["tokens"] + 9  # the first token of every later block
    with pytest.raises(UserError, match="longer than the dataset's sequences"):
        promise(EvaluateParameters(stride=64), {"models": {"a": None}, "dataset": TEXT}, Resources(), Path())


def test_blocks_are_read_batch_by_batch() -> None:
    sizes = [len(batch.inputs) for batch in block_windows(lambda index: np.zeros((len(index), 5)), 7, 3)]
    assert sizes == [3, 3, 1]


def test_bytes_behind_tokens_add_up_to_the_text() -> None:
    text = "Grüße, naïve café → 日本語 and plain words, plain words, plain words."
    tokenizer = make_tokenizer(BpeTokenizer(vocab_size=300), [text * 20], Path())
    lengths = byte_lengths(tokenizer)
    assert lengths is not None
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[tokenizer.end_of_text] == 0
    assert lengths.max() > 1


def test_calibration_error_of_a_model_that_is_right_as_often_as_it_says() -> None:
    scores = Scores(bins=10)
    logits = torch.tensor([[math.log(0.75), math.log(0.25)]]).repeat(400, 1)
    scores.add(logits, torch.tensor([0, 0, 0, 1] * 100))
    assert scores.figures()["calibration_error"] == pytest.approx(0.0, abs=1e-6)
    overconfident = Scores(bins=10)
    overconfident.add(logits, torch.tensor([0, 1] * 200))
    assert overconfident.figures()["calibration_error"] == pytest.approx(0.25, abs=1e-6)


def test_confusion_matrix_counts_true_classes_by_prediction() -> None:
    scores = Scores(bins=5, classes=3)
    scores.add(torch.eye(3)[[0, 1, 1, 2]] * 5, torch.tensor([0, 1, 2, 2]))
    assert scores.figures()["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert scores.figures()["top5"] == 1.0
    assert "perplexity" not in scores.figures(), "of classes it says nothing"


def copy_of(model: Artifact, directory: Path) -> Artifact:
    """The same model in another directory, to be changed."""
    shutil.copytree(model.path, directory)
    return Artifact(directory, f"digest of {directory.name}", directory.name)


def gpt2_of(directory: Path, dataset: Artifact, rows: int) -> Artifact:
    """An untrained GPT-2 with so many rows in its embedding."""
    torch.manual_seed(0)
    config = {"vocab_size": rows, "sequence_length": SEQUENCE_LENGTH, "n_layer": 1, "n_head": 2, "n_embd": 32}
    directory.mkdir()
    save_model(directory, build_model("gpt2", config), tokenizer=dataset.path)
    return Artifact(directory, f"digest of {directory.name}", directory.name)


def test_one_model_that_cannot_be_evaluated_is_a_row_and_the_others_keep_theirs(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    loud = copy_of(models["gelu"], tmp_path / "loud")
    network = load_model(loud.path)
    with torch.no_grad():
        network.transformer.wte.weight.mul_(3000.0)
    save_model(loud.path, network, tokenizer=dataset.path)
    stranger = copy_of(models["gelu"], tmp_path / "stranger")
    written = BytesAsBpe().backend().to_str()
    (stranger.path / "tokenizer.json").write_text(written)
    damaged = copy_of(models["gelu"], tmp_path / "damaged")
    (damaged.path / "model.safetensors").write_bytes(b"no weights")
    given = {
        "loud": loud, "stranger": stranger, "damaged": damaged, "small": gpt2_of(tmp_path / "small", dataset, 200),
        "gelu": models["gelu"],
    }  # fmt: skip
    content = run(tmp_path / "run", dataset, given, samples=8)
    rows = content["models"]
    assert rows["loud"]["loss"] > 709
    assert rows["loud"]["perplexity"] is None
    assert "loud/val_loss" in content["returned"]
    assert "loud/perplexity" not in content["returned"]
    assert "tokenizer of `stranger` is not the one" in rows["stranger"]["failure"]
    assert rows["damaged"]["failure"]
    assert rows["small"]["failure"].startswith(
        "`small`: the dataset's vocabulary (257 tokens) is larger than the model's embedding (`vocab_size`: 200)"
    )
    assert rows["gelu"]["loss"] == run(tmp_path / "alone", dataset, models, samples=8)["models"]["gelu"]["loss"]
    json.loads((tmp_path / "run/output/evaluation.json").read_text(), parse_constant=pytest.fail)


class BytesAsBpe:
    """A byte-level BPE of 257 tokens whose ids are other ones than those of the bytes."""

    def backend(self, reverse: bool = False) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
        vocabulary = {token: number for number, token in enumerate([*alphabet, "<|endoftext|>"])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return backend


def test_tokenizers_are_told_apart_by_what_they_do_not_by_how_they_are_written(tmp_path: Path) -> None:
    text = BytesAsBpe().backend().to_str()
    content = json.loads(text)
    for name, value in {
        "one": text,
        "reformatted": json.dumps({**content, "version": "other", "truncation": None}, indent=3),
        "reversed": BytesAsBpe().backend(reverse=True).to_str(),
        "bytes": json.dumps({"kind": "bytes"}),
    }.items():
        (tmp_path / name).write_text(value)
    assert same_tokenizer(tmp_path / "one", tmp_path / "reformatted")
    assert not same_tokenizer(tmp_path / "one", tmp_path / "reversed")
    assert not same_tokenizer(tmp_path / "one", tmp_path / "bytes")


def test_models_whose_vocabularies_were_padded_differently_are_compared_on_the_tokens(
    tmp_path: Path, dataset: Artifact
) -> None:
    wide = gpt2_of(tmp_path / "wide", dataset, 320)
    narrow = copy_of(wide, tmp_path / "narrow")
    network = build_model("gpt2", {**json.loads((wide.path / "model.json").read_text())["config"], "vocab_size": 257})
    state = load_model(wide.path).state_dict()
    state = {name: tensor[:257] if tensor.shape[:1] == (320,) else tensor for name, tensor in state.items()}
    network.load_state_dict(state)
    save_model(narrow.path, network, tokenizer=dataset.path)
    content = run(tmp_path / "run", dataset, {"wide": wide, "narrow": narrow}, samples=4, drift={"wide": "narrow"})
    assert content["models"]["wide"]["drift"]["kl_divergence"] == pytest.approx(0.0, abs=1e-6)
    assert content["models"]["wide"]["drift"]["agreement"] == 1.0


def test_a_model_may_have_more_outputs_than_there_are_classes() -> None:
    scores = Scores(bins=5, classes=3)
    scores.add(torch.eye(7)[[0, 6, 2]] * 5, torch.tensor([0, 1, 2]))
    assert scores.figures()["top1"] == pytest.approx(2 / 3)
    assert scores.figures()["confusion"] == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_of_many_classes_only_what_is_confused_most_is_kept() -> None:
    scores = Scores(bins=5, classes=21_841)
    logits = torch.zeros(6, 21_841)
    for row, column in enumerate([5, 5, 5, 7, 21_840, 1]):
        logits[row, column] = 9.0
    scores.add(logits, torch.tensor([4, 4, 4, 7, 0, 1]))
    assert scores.figures()["most_confused"] == [[4, 5, 3], [0, 21_840, 1]]
    assert "confusion" not in scores.figures()


def failed_training(directory: Path) -> Artifact:
    """What `train` leaves under `on_divergence: record`."""
    directory.mkdir()
    failure = "diverged at step 3: gradient norm is nan"
    training = Training(architecture="gpt2", parameters=1000, steps=2, failure=failure)
    write_training(directory, training, [])
    return Artifact(directory, "digest of the failure", "train-failed")


def test_a_failed_training_and_a_loss_that_is_no_number_are_results_too(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    broken = load_model(models["gelu"].path)
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    save_model(tmp_path / "broken", broken, tokenizer=dataset.path)
    failed = {"diverged": failed_training(tmp_path / "failed"), "nan": Artifact(tmp_path / "broken", "digest", "train")}
    content = run(
        tmp_path / "run", dataset, {**models, **failed}, samples=8, drift={"hermite": "diverged", "gelu": "relu"}
    )
    assert content["models"]["diverged"]["failure"] == "diverged at step 3: gradient norm is nan"
    assert content["models"]["nan"]["failure"] == "its validation loss is nan"
    assert content["models"]["gelu"]["loss"] > 0
    assert "drift" not in content["models"]["hermite"]
    why = "no drift from `diverged`, whose training failed: diverged at step 3: gradient norm is nan"
    assert content["models"]["hermite"]["drift_missing"] == why
    assert content["models"]["gelu"]["drift_missing"] == "no drift from `relu`, whose stage was skipped"
    assert f"hermite: {why}" in [event["text"] for event in read_events(tmp_path / "run", "message")]
    assert not any(name.startswith(("diverged", "nan")) for name in content["returned"])
    with pytest.raises(UserError, match="no model is left to evaluate; `diverged`: diverged at step 3"):
        run(tmp_path / "none", dataset, failed, samples=8)


def test_no_models_at_all_are_refused(tmp_path: Path, dataset: Artifact) -> None:
    with pytest.raises(UserError, match="the stages of all `models` were skipped"):
        run(tmp_path, dataset, {})


def test_speed_is_measured_for_every_model_and_leaves_it_as_it_was(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    parameters = MeasureSpeedParameters(batch_size=4, rounds=1, steps=1)
    trio = {**models, "failed": failed_training(tmp_path / "failed")}
    returned = measure_speed(make_context(tmp_path), dataset, trio, parameters)
    content = json.loads((tmp_path / "output" / "speed.json").read_text())
    assert content["protocol"]["units"] == 4 * SEQUENCE_LENGTH
    assert set(content["models"]) == set(models)
    assert content["failures"] == {"failed": "diverged at step 3: gradient norm is nan"}
    (said,) = read_events(tmp_path, "message")
    assert said["text"] == "failed is not measured: diverged at step 3: gradient norm is nan"
    for label, figures in content["models"].items():
        assert returned[f"{label}/step_milliseconds"] == figures["step_milliseconds"] > 0
        assert figures["training_throughput"] == pytest.approx(
            4 * SEQUENCE_LENGTH * 1000 / figures["step_milliseconds"]
        )
        assert figures["forward_throughput"] > 0
        assert figures["latency_milliseconds"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_see_is_not_replaced_by_the_cpu(
    tmp_path: Path, dataset: Artifact, models: dict[str, Artifact]
) -> None:
    context = replace(make_context(tmp_path), resources=Resources(gpus=1))
    with pytest.raises(
        UserError, match=r"resources\.gpus: `train` was given 1 GPUs, but torch .* sees none"
    ) as refused:
        measure_speed(context, dataset, models, MeasureSpeedParameters())
    assert "leave `gpus:` out to use the CPU" in refused.value.hint
    with pytest.raises(UserError, match=r"resources\.gpus"):
        evaluate(context, dataset, models, EvaluateParameters())


def test_bytes_kept_for_backward_count_each_tensor_once() -> None:
    weight = torch.randn(16, 16, requires_grad=True)
    x = torch.randn(64, 16)
    # both products keep the weight; the first keeps x, the second what comes out of the first
    assert bytes_kept_for_backward(lambda: ((x @ weight) @ weight).sum()) == 4 * (16 * 16 + 2 * 64 * 16)


def test_the_evaluation_harness_scores_like_the_model(models: dict[str, Artifact]) -> None:
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    from lm_eval.api.registry import get_model

    from polytrope.pipeline.stages.evaluate import harness

    model: Any = get_model("polytrope")(path=str(models["gelu"].path))
    assert isinstance(model, harness.HarnessModel)

    def ask(*arguments: Any) -> SimpleNamespace:
        return SimpleNamespace(args=arguments)

    text = "a text that is longer than the context of thirty-two tokens, so that windows slide"
    tokens = torch.tensor([256, *text.encode()])
    network = load_model(models["gelu"].path)
    expected, start = 0.0, 0
    with torch.no_grad():
        while start < len(text):  # full windows, and for the rest the last full window
            end = min(start + SEQUENCE_LENGTH, len(text))
            window = tokens[max(0, end - SEQUENCE_LENGTH) : end + 1]
            losses = network(window[None, :-1], window[None, 1:], reduction="none").double().flatten()
            expected -= float(losses[-(end - start) :].sum())
            start = end
        first = network(torch.tensor([[*b"ab"]]))[0].log_softmax(-1)
    assert model.loglikelihood_rolling([ask(text)]) == [pytest.approx(expected, rel=1e-6)]
    ((value, greedy),) = model.loglikelihood([ask("a", "bc")])
    assert value == pytest.approx(float(first[0, ord("b")] + first[1, ord("c")]), rel=1e-5)
    assert greedy == (first.argmax(-1).tolist() == [ord("b"), ord("c")])
    (long,) = model.generate_until([ask("ab", {"max_gen_toks": 6})])
    (short,) = model.generate_until([ask("ab", {"max_gen_toks": 6, "until": [long[2:3]]})])
    assert short == long[: long.index(long[2:3])]


def test_labels_are_checked_before_anything_starts() -> None:
    load_stage("evaluate")
    upstream = {"models": {"baseline": SimpleNamespace()}, "dataset": SimpleNamespace(sequence_length=32)}
    with pytest.raises(UserError, match="drift: `converted` is not a model"):
        check(EvaluateParameters(drift={"converted": "baseline"}), upstream)
    with pytest.raises(UserError, match="no models"):
        check(EvaluateParameters(), {"models": {}})


def test_models_are_compared_with_the_data_before_anything_starts() -> None:
    model = PromisedModel("gpt2", {"vocab_size": 512, "sequence_length": 32}, "bpe")
    found = promise(EvaluateParameters(), {"models": {"a": model, "b": None}, "dataset": TEXT}, Resources(), Path())
    assert found == PromisedEvaluation(("a", "b"), "text")
    images = PromisedImages(size=8, channels=1, classes=10)
    upstream = {"models": {"b": None}, "dataset": images}
    assert promise(EvaluateParameters(), upstream, Resources(), Path()) == PromisedEvaluation(("b",), "images")
    unknown = {"models": {"b": None}, "dataset": None}
    assert promise(EvaluateParameters(), unknown, Resources(), Path()) == PromisedEvaluation(("b",), None)
    for dataset, one, words in (
        (images, model, r"inputs\.models\.a: a gpt2 cannot take images"),
        (replace(TEXT, sequence_length=64), model, r"inputs\.models\.a: .*\(64 tokens\) are longer"),
        (TEXT, TEXT, r"inputs\.models\.a: this input takes a model, and the stage makes a data set"),
    ):
        with pytest.raises(UserError, match=words):
            promise(EvaluateParameters(), {"models": {"a": one}, "dataset": dataset}, Resources(), Path())
    with pytest.raises(UserError, match="stride: for text"):
        promise(EvaluateParameters(stride=4), {"models": {"a": None}, "dataset": images}, Resources(), Path())


@pytest.mark.parametrize(
    "wrong", [{"top_k": 0}, {"temperature": -0.1}, {"temperature": math.inf}, {"sample_tokens": -1}, {"seed": 2**64}]
)
def test_what_sampling_refuses_is_refused_before_the_stage_starts(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        EvaluateParameters.model_validate(wrong)
