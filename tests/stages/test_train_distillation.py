"""Training after a teacher: the terms are what they say, blocks that stay are matched, resumed it is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from training_support import MODEL, history, make_dataset, make_initial, run_training, weights_hash

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.convert import convert
from polytrope.models.factors import FactoredLinear, change_beyond, largest_change
from polytrope.models.matching import feature_error, find_blocks, states_behind
from polytrope.pipeline.data.described import read_model_promise
from polytrope.pipeline.data.lineage import Lineage, Teacher, read_lineage, write_lineage
from polytrope.pipeline.data.order import sample_indices
from polytrope.pipeline.data.promised import PromisedModel
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.training_file import read_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, stage_context
from polytrope.pipeline.stages.convert.convert import promise as promise_conversion
from polytrope.pipeline.stages.convert.distillation import distill
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.stages.import_model.import_model import promise as promise_import
from polytrope.pipeline.stages.import_model.parameters import ImportModelParameters
from polytrope.pipeline.stages.shard.parameters import ShardNumbersParameters
from polytrope.pipeline.stages.shard.shard_numbers import shard_numbers
from polytrope.pipeline.stages.train.imitation import (
    Imitation,
    Perturbation,
    divergence,
    find_factors,
    output_error,
)
from polytrope.pipeline.stages.train.parameters import DistillationParameters, TrainParameters
from polytrope.pipeline.stages.train.teacher import check_factors
from polytrope.pipeline.stages.train.train import check, promise

GPT2: dict[str, Any] = {**MODEL, "n_layer": 3, "vocab_size": 320, "sequence_length": 32}
CONVNEXT: dict[str, Any] = {"depths": [1, 3], "dims": [4, 8], "num_classes": 3, "in_channels": 1, "patch_size": 2}


class Engine:
    """A model, as DeepSpeed wraps it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.module(inputs)
        return found


def weights(**given: float) -> dict[str, float]:
    return DistillationParameters(**given).weights()


def perturbed(model: nn.Module, by: float = 0.3) -> nn.Module:
    """The blocks' matrices with noise of this share of their size."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".h." in name and weight.dim() == 2:
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight.add_(by * weight.std() * noise)
    return model


def test_the_loss_is_its_three_terms_written_by_hand() -> None:
    torch.manual_seed(0)
    teacher, student = (build_model("gpt2", GPT2).double() for _ in range(2))
    tokens, targets = torch.randint(0, 320, (2, 3, 8)).unbind()
    imitation = Imitation(teacher.eval(), weights(outputs=0.7, features=0.4), [("transformer.h.0", "transformer.h.1")])
    found, terms = imitation.loss(Engine(student.train()), tokens, targets)

    def run(model: Any) -> tuple[Tensor, list[Tensor]]:
        x = model.transformer["wte"](tokens) + model.transformer["wpe"](torch.arange(8))
        states = []
        for block in model.blocks:
            x = block(x)
            states.append(x)
        return model.lm_head(model.transformer["ln_f"](x)).flatten(0, 1), states

    (wanted, behind), (logits, own) = run(teacher), run(student)
    log_q = (logits - logits.exp().sum(-1, keepdim=True).log()).detach()
    log_p = wanted - wanted.exp().sum(-1, keepdim=True).log()
    usual = -log_q[torch.arange(24), targets.flatten()].mean()
    outputs = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    t = behind[1]
    features = ((own[0] - t) ** 2).mean() / ((t - t.mean()) ** 2).mean()
    torch.testing.assert_close(found, usual + 0.7 * outputs + 0.4 * features, rtol=2e-6, atol=0)
    torch.testing.assert_close(feature_error([own[0]], [t]), features, rtol=1e-12, atol=0)
    by_hand = {"targets": usual, "outputs": outputs, "features": features}
    assert list(terms) == [f"distillation/{name}" for name in by_hand]
    for name, value in by_hand.items():  # logits are compared in float32
        torch.testing.assert_close(terms[f"distillation/{name}"], value.detach(), rtol=2e-5, atol=0, check_dtype=False)


def test_the_error_of_states_is_relative_to_each_and_leaves_out_what_does_not_count() -> None:
    t = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]], dtype=torch.float64)  # variance 5; of the first position 1
    h = t + torch.tensor([[[1.0, 0.0], [10.0, 10.0]]])
    assert float(feature_error([h], [t])) == pytest.approx(201 / 4 / 5)
    assert float(feature_error([h], [t], torch.tensor([[1, 0]]))) == pytest.approx(0.5 / 1)
    assert float(feature_error([100 * h, t], [100 * t, t])) == pytest.approx(201 / 4 / 5 / 2)
    assert float(output_error(h, t)) == pytest.approx(201 / 4 / 5)
    assert float(divergence(t, t)) == 0.0
    logits = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0**0.5]]).exp().log()
    p = 1 / (1 + float(torch.tensor(3.0**0.5).exp()))
    by_hand = p * torch.tensor(2 * p).log() + (1 - p) * torch.tensor(2 * (1 - p)).log()
    assert float(divergence(*logits)) == pytest.approx(float(by_hand), rel=1e-5)
    with pytest.raises(ValueError, match="`0`: the 1 numbers that are wanted at once are all the same"):
        feature_error([torch.ones(1, 1)], [torch.ones(1, 1)])
    with pytest.raises(ValueError, match=r"`1`: the 2 numbers .* are all the same"):  # those that count
        feature_error([t, t], [t, 0 * t + torch.tensor([[[4.0], [5.0]]])], torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match="no position counts"):
        feature_error([t], [t], torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="cannot be compared"):
        feature_error([t], [t, t])


@pytest.mark.parametrize("value", [0.0, 0.1])  # of many times 0.1 the computed variance is more than 0: rounding
def test_what_has_no_variance_ends_the_training_with_the_name_of_the_block(value: float) -> None:
    teacher, student = build_model("gpt2", GPT2), build_model("gpt2", GPT2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
        teacher.get_submodule("transformer.wte").weight.fill_(value)  # type: ignore[union-attr, operator]
    tokens = torch.randint(0, 320, (2, 8))
    imitation = Imitation(teacher.eval(), weights(features=1.0), [("transformer.h.0", "transformer.h.2")])
    with pytest.raises(UserError, match=r"features: of the teacher, `transformer\.h\.2`: the 512 numbers") as caught:
        imitation.loss(Engine(student.train()), tokens, tokens)
    assert "leave features out" in caught.value.hint
    with pytest.raises(ValueError, match=r"`transformer\.h\.0`: the 512 numbers .* are all the same"):
        distill(teacher, student, [{"tokens": tokens}], steps=1, features=1.0)
    with pytest.raises(UserError, match="outputs: of the teacher, `outputs`: the 7 numbers") as caught:
        output_error(torch.randn(7, 1), torch.full((7, 1), value))
    assert "set outputs: 0.0" in caught.value.hint


def test_states_behind_blocks_come_closer_with_features_than_without() -> None:
    torch.manual_seed(0)
    teacher = build_model("gpt2", GPT2).eval()
    batches = [torch.randint(0, 320, (4, 8)) for _ in range(4)]

    def trained(**given: float) -> float:
        torch.manual_seed(2)
        student = build_model("gpt2", GPT2)
        student.load_state_dict(teacher.state_dict())
        perturbed(student).train()
        pairs = [(name, name) for name in find_blocks(student)]
        imitation = Imitation(teacher, weights(**given), pairs)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
        for step in range(30):
            optimizer.zero_grad()
            imitation.loss(Engine(student), batches[step % 4], batches[step % 4])[0].backward()
            optimizer.step()
        names = find_blocks(student)
        with torch.no_grad(), states_behind(teacher, names) as wanted, states_behind(student, names) as states:
            teacher(batches[0])
            student.eval()(batches[0])
        return float(feature_error(states, wanted))

    assert trained(outputs=0.0, features=5.0) < 0.5 * trained(outputs=5.0, features=0.0)


def test_coefficients_alone_match_states_too_and_blocks_must_be_as_many() -> None:
    torch.manual_seed(0)
    teacher = build_model("gpt2", {**GPT2, "activation": "gelu"})
    student = build_model("gpt2", GPT2)
    student.load_state_dict(teacher.state_dict(), strict=False)
    batches = [{"tokens": torch.randint(0, 320, (4, 8))} for _ in range(2)]
    losses = distill(teacher, student, batches, steps=20, learning_rate=1e-2, features=1.0)
    assert losses[-1] < losses[0]
    names = find_blocks(student)
    assert names == [f"transformer.h.{number}" for number in range(3)]
    smaller = build_model("gpt2", {**GPT2, "n_layer": 2})
    with pytest.raises(ValueError, match="the teacher has 3 blocks and the student 2"):
        distill(teacher, smaller, batches, steps=1, features=1.0)
    mlp = build_model("mlp", {"inputs": 2, "outputs": 1, "widths": [4, 4], "activation": "hermite3"})
    with pytest.raises(ValueError, match="mlp has no blocks that add"):
        distill(mlp, mlp, [{"rows": torch.randn(2, 2)}], steps=1, features=1.0)
    with pytest.raises(ValueError, match="Sequential is neither"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_the_blocks_of_a_bert_are_found() -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=31, max_position_embeddings=16, **sizes)).eval()
    assert find_blocks(bert) == ["encoder.layer.0", "encoder.layer.1"]
    bert.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="0 lists of as many blocks"):
        find_blocks(bert)


def promised(
    student: dict[str, Any], teacher: dict[str, Any], before: int | None = None, batch: int = 32, **options: Any
) -> Any:
    """What the stage says before anything starts."""
    given = {"steps": 1, "global_batch_size": batch, "distillation": {"features": 1.0, **options}}
    parameters = TrainParameters.model_validate(given)
    kind = "convnext" if "dims" in student else "mlp" if "widths" in student else "gpt2"
    initial = PromisedModel(kind, student, blocks_before=before)
    upstream = {"dataset": None, "initial": initial, "teacher": PromisedModel(kind, teacher)}
    check(parameters, upstream)
    return promise(parameters, upstream, Resources(), Path())


@pytest.mark.parametrize(
    ("student", "teacher", "options", "words"),
    [
        (GPT2, {**GPT2, "n_layer": 4}, {}, "features: the teacher has 4 blocks, the model 3, and nothing says"),
        (GPT2, {**GPT2, "n_layer": 4}, {"blocks": [0, 1]}, r"blocks: \[0, 1\] for 3 blocks of the model and 4"),
        (GPT2, {**GPT2, "n_layer": 4}, {"blocks": [0, 1, 4]}, r"blocks: \[0, 1, 4\] for 3"),
        (
            GPT2,
            {**GPT2, "n_layer": 4},
            {"perturbation": 1.0, "features": 0.0},
            "perturbation: the teacher has 4 blocks",
        ),
        (GPT2, {**GPT2, "n_embd": 64}, {}, "`transformer.h.0` of the model adds to states of width 32, .* to 64"),
        (GPT2, {**GPT2, "vocab_size": 257}, {}, r"outputs: the teacher has 257 \(vocab_size\), the model 320"),
        ({**GPT2, "factors": {}}, GPT2, {"perturbation": 1.0}, "perturbation: `initial` has no factored layers"),
        (CONVNEXT, {**CONVNEXT, "depths": [2, 2]}, {}, "`stages.0.1` of the teacher to 4"),
        (
            {**CONVNEXT, "dims": [4, 4]},
            {**CONVNEXT, "dims": [4, 4], "depths": [2, 2]},
            {},
            "`stages.1.0` of the model and `stages.0.1` of the teacher are in different stages",
        ),
        (CONVNEXT, {**CONVNEXT, "patch_size": 4}, {}, "the model has patch_size 2, the teacher 4: their states have"),
        ({"widths": [4, 4]}, {"widths": [4, 4]}, {}, "inputs.teacher: mlp has no blocks that add"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(
    student: dict[str, Any], teacher: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        promised(student, teacher, **options)


def test_one_number_of_one_sample_is_refused_before_anything_starts() -> None:
    one = {"widths": [4, 4], "inputs": 2, "outputs": 1, "loss": "mse"}
    with pytest.raises(UserError, match=r"outputs: the teacher predicts one number \(outputs: 1\)") as caught:
        promised(one, one, features=0.0, batch=1)
    assert "global_batch_size" in caught.value.hint
    for settings, batch in (({**one, "outputs": 2}, 1), (one, 2)):
        assert promised(settings, settings, features=0.0, batch=batch) is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distillation": {"outputs": 0.0}}, "all weights are 0"),
        ({"distillation": {"perturbation_bound": 0.1}}, "perturbation_bound: perturbation is 0"),
        ({"distillation": {"perturbation": 1.0}, "zero_stage": 3}, "perturbation: zero_stage 3 leaves no worker"),
        ({"distillation": {"perturbation": 1.0}, "model": MODEL}, "perturbation: a model that begins from nothing"),
        ({"distillation": {"blocks": [0]}}, "blocks: features is 0"),
        ({"distillation": {"features": 1.0, "blocks": [1, 1]}}, "blocks: expected numbers that rise"),
        ({"distillation": {"features": -1.0}}, "features"),
        ({"distillation": {}, "peak_flops": 1e12}, "peak_flops: MFU does not count the teacher"),
        ({"distillation": {"features": 1.0}, "compile": True}, "compile: compiled code does not show"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainParameters.model_validate({"steps": 1, **changes})


def test_a_teacher_and_what_is_learned_from_it_belong_together() -> None:
    model = PromisedModel("gpt2", GPT2)
    with pytest.raises(UserError, match="distillation: there is no `teacher` input"):
        check(TrainParameters.model_validate({"steps": 1, "distillation": {}}), {"initial": model})
    with pytest.raises(UserError, match=r"inputs\.teacher: nothing is learned"):
        check(TrainParameters(steps=1), {"initial": model, "teacher": model})


def test_a_conversion_in_the_same_workflow_promises_which_model_its_blocks_are_of() -> None:
    whole = PromisedModel("gpt2", GPT2)
    dropping = ConvertParameters.model_validate({"drop_blocks": {"count": 1}})
    smaller: Any = promise_conversion(dropping, {"model": whole, "dataset": None}, Resources(), Path())
    assert (smaller.settings["n_layer"], smaller.blocks_before) == (2, 3)
    assert promised(smaller.settings, GPT2, smaller.blocks_before).blocks_before is None
    again: Any = promise_conversion(
        ConvertParameters.model_validate({"family": "fourier", "types": ["hermite"]}),
        {"model": smaller, "dataset": None},
        Resources(),
        Path(),
    )
    assert again.blocks_before is None  # its own record says nothing of blocks


def factored(rank: int = 4) -> nn.Module:
    """A GPT-2 whose first layers are in two factors, freshly drawn."""
    torch.manual_seed(4)
    return build_model("gpt2", {**GPT2, "factors": {f"transformer.h.{block}.mlp.c_fc": rank for block in range(3)}})


def test_the_bound_is_what_outputs_can_move_by_and_is_reached() -> None:
    layer = FactoredLinear(2, 2, 1, bias=False)
    whole = torch.eye(2)
    with torch.no_grad():  # B A = [[0.5, 0.5], [1, 1]]: off by 0.5, 0.5 and 1, 0
        layer.inner.weight.copy_(torch.tensor([[1.0, 1.0]]))
        layer.outer.weight.copy_(torch.tensor([[0.5], [1.0]]))
        assert float(largest_change(layer, whole)) == 1.0
        x = torch.tensor([3.0, 0.0])
        assert float((layer(x) - whole @ x).abs().max()) == 3.0 == float(x.abs().sum())
        for bound, expected in ((0.25, 0.75**2), (1.0, 0.0), (2.0, 0.0)):
            assert float(change_beyond([layer], [whole], bound)) == expected
        assert float(change_beyond([layer, layer], [whole, layer.product()], 0.5)) == 0.5**2 / 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        layer = FactoredLinear(7, 5, 2, bias=True)
        merged = layer.merged()
        with torch.no_grad():
            merged.weight.add_(0.1 * torch.randn(5, 7, generator=generator))
            x = torch.randn(7, generator=generator)
            moved = (layer(x) - merged(x)).abs().max()
            assert float(moved) <= float(largest_change(layer, merged.weight) * x.abs().sum()) * (1 + 1e-6)


def test_factors_stay_within_the_bound_that_they_are_given() -> None:
    torch.manual_seed(0)
    teacher = build_model("gpt2", GPT2).eval()
    batch = torch.randint(0, 320, (2, 8))

    def beyond(weight: float) -> float:
        student = factored(16)
        layers, wholes = find_factors(student, teacher)
        bounded = Perturbation(1e-3, layers, wholes)
        imitation = Imitation(teacher, weights(perturbation=weight), [], bounded)
        optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            imitation.loss(Engine(student.train()), batch, batch)[0].backward()
            optimizer.step()
        return float(bounded.penalty().detach())

    assert beyond(30.0) < 0.5 * beyond(1e-9)


def test_factors_that_do_not_learn_or_have_no_counterpart_are_refused() -> None:
    teacher, student = build_model("gpt2", {**GPT2, "n_layer": 2}), factored()
    with pytest.raises(
        UserError, match=r"the teacher has no layer like `transformer\.h\.2\.mlp\.c_fc`, of 32 inputs and 128"
    ):
        find_factors(student, teacher)
    student.requires_grad_(False)
    with pytest.raises(UserError, match="perturbation: no factor learns"):
        find_factors(student, build_model("gpt2", GPT2))
    options = DistillationParameters(perturbation=1.0)
    with pytest.raises(UserError, match="perturbation: `initial` has no factored layers"):
        check_factors(options, PromisedModel("gpt2", {**GPT2, "factors": {}}), 1)
    with pytest.raises(UserError, match="perturbation: zero_stage 3"):
        check_factors(options, PromisedModel("gpt2", {**GPT2, "factors": {"a": 1}}), 3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_dataset(tmp_path_factory.mktemp("dataset") / "dataset")


@pytest.mark.parametrize(
    ("changes", "workers"),
    [
        ({"zero_stage": 1, "activation_checkpointing": "block"}, 1),
        pytest.param({"zero_stage": 3, "precision": "bf16"}, 2, marks=pytest.mark.chaos),
    ],
    ids=str,
)
def test_what_dropped_blocks_leave_is_taught_by_the_whole_model_and_a_resumed_training_is_the_same(
    tmp_path: Path, dataset: Artifact, changes: dict[str, Any], workers: int
) -> None:
    teacher = make_initial(tmp_path / "teacher", dataset, {**GPT2, "dropout": 0.1})  # which draws random numbers
    model = load_model(teacher.path)
    tokens = torch.randint(0, 257, (8, 32), generator=torch.Generator().manual_seed(0))
    made = convert(model, [tokens], drop_blocks={"blocks": [1, 1]})
    save_model(tmp_path / "smaller", made.model, tokenizer=dataset.path)
    record = {"format": 1, "layers": [], "dropped": {
        "blocks": ["transformer.h.1"], "into": "transformer.h.0.mlp.c_proj", "total": 3, "distances": {},
        "relative_error": 0.1, "relative_error_without": 0.2,
    }}  # fmt: skip
    (tmp_path / "smaller/conversion.json").write_text(json.dumps(record))
    initial = Artifact(tmp_path / "smaller", "digest", "convert")
    assert read_model_promise(initial.path).blocks_before == 3
    imported: Any = promise_import(ImportModelParameters(path="smaller"), {}, Resources(), tmp_path)
    assert imported.blocks_before is None
    settings: dict[str, Any] = {
        "model": None, "steps": 4, "warmup_steps": 0, "checkpoint_every": 2, "validation_every": 4,
        "distillation": {"outputs": 0.0, "features": 2.0}, "activation_basis": "measured", **changes,
    }  # fmt: skip
    run_training(tmp_path, dataset, workers=workers, initial=initial, teacher=teacher, **settings)
    whole = weights_hash(tmp_path)
    activation = load_model(tmp_path / "output").config.activation
    assert (activation["name"], activation["learnable_recurrence"]) == ("hermite", True)
    shutil.rmtree(tmp_path / "output")
    settings["distillation"] = {"outputs": 0.0, "features": 2.0, "blocks": [0, 2]}  # as the record says
    run_training(tmp_path, dataset, workers=workers, initial=initial, teacher=teacher, **settings)
    assert weights_hash(tmp_path) == whole, "from the checkpoint of step 2"


def test_the_teacher_of_a_rounded_model_gets_what_is_not_rounded_and_the_terms_are_logged(tmp_path: Path) -> None:
    source = {"kind": "circle", "rows": 64, "amplitudes": [1.0, 0.5]}
    shard_numbers(
        stage_context(tmp_path / "numbers", stage="numbers"), ShardNumbersParameters.model_validate({"source": source})
    )
    dataset = Artifact(tmp_path / "numbers/output", "digest", "shard")
    torch.manual_seed(5)
    sizes = {"inputs": 2, "outputs": 1, "widths": [16], "activation": {"name": "fourier", "degree": 1, "init": "siren"}}
    save_model(tmp_path / "teacher", build_model("mlp", sizes))
    write_lineage(tmp_path / "teacher", Lineage(samples=640))
    teacher = Artifact(tmp_path / "teacher", "digest of it", "large")
    run_training(
        tmp_path, dataset, workers=1, teacher=teacher, model={"architecture": "mlp", "widths": [8]}, steps=1,
        warmup_steps=0, precision="bf16", keep_initial=True, distillation={"outputs": 3.0},
    )  # fmt: skip
    samples = len(open_split(dataset.path, "train"))
    rows, targets = open_split(dataset.path, "train").numbers(np.asarray(sample_indices(0, 0, 8, samples)))
    student: Any = load_model(tmp_path / "output/initial").bfloat16()
    x, y = torch.from_numpy(rows), torch.from_numpy(targets)
    with torch.no_grad():
        wanted, outputs = load_model(teacher.path)(x), student(x.bfloat16())
        usual = float(student.loss(outputs, y, reduction="mean", training=True))
    [logged] = [entry for entry in history(tmp_path) if "train/loss" in entry]
    term = float(output_error(outputs, wanted))
    assert logged["train/distillation/outputs"] == pytest.approx(term, rel=1e-5)
    assert logged["train/distillation/targets"] == pytest.approx(usual, rel=1e-5)
    assert logged["train/loss"] == pytest.approx(usual + 3.0 * term, rel=1e-5)
    rounded = float(output_error(outputs, load_model(teacher.path)(x.bfloat16().float()).detach()))
    assert abs(rounded - term) > 1e-3 * term
    lineage = read_lineage(tmp_path / "output")
    assert (lineage.samples, lineage.teachers) == (8, [Teacher(stage="large", digest="digest of it", samples=640)])
    training = read_training(tmp_path / "output")
    assert training is not None
    assert training.metrics()["train/distillation/outputs"] == logged["train/distillation/outputs"]
    assert {"train/distillation/targets", "train/distillation/outputs"} < set(
        promised(sizes, sizes, features=0.0).figures
    )
