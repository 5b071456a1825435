"""`drop_blocks` and `factorize` of the command and the stage: one record, and models that come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_support import GPT2, LLAMA_SIZES, own_model, randomise, read_json, tokens
from pydantic import ValidationError

from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.convert import convert as convert_in_python
from polytrope.models.formats import read_model
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.data.conversion_file import read_conversion
from polytrope.pipeline.data.promised import PromisedForeignModel, PromisedModel
from polytrope.pipeline.errors import EXIT_USER_ERROR, UserError
from polytrope.pipeline.stage import Artifact, Resources, stage_context
from polytrope.pipeline.stages.convert.convert import convert, promise
from polytrope.pipeline.stages.convert.parameters import ConvertParameters


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", own_model("gpt2", n_layer=4))
    np.save(tmp_path / "calibration.npy", tokens().numpy())
    return tmp_path / "model"


def test_command_stage_and_python_do_the_same(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "calibration.npy"
    options = ["--drop-blocks", "count=2", "--factorize", "ratio=1.5", "--family", "hermite", "--degree", "4"]
    options += ["--samples", "6", "--batch-size", "6"]
    assert main(["convert", str(model), str(tmp_path / "command"), "--data", str(data), *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    (tmp_path / "data").mkdir()
    data.rename(tmp_path / "data" / "calibration.npy")
    context = stage_context(tmp_path / "stage", stage="smaller", resources=Resources())
    with_ = {"drop_blocks": {"count": 2}, "factorize": {"ratio": 1.5}, "family": "hermite", "degree": 4, "page": True}
    artifacts = Artifact(model, "digest", "train"), Artifact(tmp_path / "data", "digest", "data")
    metrics = convert(context, *artifacts, ConvertParameters.model_validate({**with_, "calibration_samples": 6}))
    made = convert_in_python(
        load_model(model), [tokens()], drop_blocks={"count": 2}, factorize={"ratio": 1.5}, family="hermite", degree=4
    )
    for output in (tmp_path / "command", context.output):
        written = read_model(output)
        assert all(torch.equal(tensor, written.state_dict()[name]) for name, tensor in made.model.state_dict().items())
        record = read_conversion(output)
        assert made.dropped is not None
        assert made.factorization is not None
        assert record.dropped == made.dropped
        assert record.factorization == made.factorization
        assert [entry.name for entry in record.layers] == [entry.name for entry in made.activations]
        assert record.size is not None
        assert (record.size.before, record.size.after) == made.parameters
        assert record.size.difference == pytest.approx(made.difference)
        page = " ".join((output / "conversion.html").read_text().split())
        for heading in ("Dropped blocks", "Factored layers", "Certificates"):
            assert f"<h2>{heading}</h2>" in page
        assert f"merged into <code>{made.dropped.into}</code>" in page
    assert metrics["dropped_blocks"] == 2
    assert metrics["factored_layers"] == 8
    assert metrics["layers"] == 2
    assert metrics["parameters"] == sum(parameter.numel() for parameter in made.model.parameters())
    assert 0 < metrics["utilisation"] <= 1
    assert f"2 of 4 blocks dropped: {', '.join(made.dropped.blocks)}" in printed  # type: ignore[union-attr]
    assert "transformer.h.*.mlp.c_fc" in printed
    assert "lm_head stays: part of a pooler or a head" in printed


def test_without_a_family_activations_stay(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(tmp_path / "calibration.npy")]
    assert main(["convert", str(model), str(tmp_path / "out"), *data, "--drop-blocks", "blocks=1,2", "--onnx"]) == 0
    assert read_json(tmp_path / "out" / "model.json")["config"]["activation"] == "gelu_tanh"
    content = read_json(tmp_path / "out" / "conversion.json")
    assert content["layers"] == []
    assert content["dropped"]["blocks"] == ["transformer.h.1", "transformer.h.2"]
    assert not (tmp_path / "out" / "plots").exists()
    assert "Certificates" not in (tmp_path / "out" / "conversion.html").read_text()
    assert (tmp_path / "out" / "model.onnx").exists()
    assert "errors:" not in capsys.readouterr().out
    assert main(["convert", str(model), *data, "--factorize", "energy=0.9", "--dry-run"]) == 0
    assert "linear layers in two factors" in capsys.readouterr().out


def test_a_llama_of_transformers_gets_smaller_by_the_command(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    randomise(LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES)), 0.1).save_pretrained(tmp_path / "llama")  # type: ignore[operator]
    np.save(tmp_path / "calibration.npy", tokens().numpy() % 61)
    command = ["convert", str(tmp_path / "llama"), str(tmp_path / "out"), "--data", str(tmp_path / "calibration.npy")]
    assert main([*command, "--drop-blocks", "count=2"]) == 0
    assert read_json(tmp_path / "out" / "config.json")["num_hidden_layers"] == 3
    record = read_conversion(tmp_path / "out")
    assert record.dropped is not None
    assert record.dropped.into.endswith(".mlp.down_proj")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--drop-blocks", "count=0"], "--drop-blocks: count: expected at least 1, got 0"),
        (["--drop-blocks", "2"], "--drop-blocks: expected NAME=NUMBER"),
        (["--drop-blocks", "count=4"], "drop_blocks: count: 4 blocks cannot go: there are 4 in a row"),
        (["--drop-blocks", "count=1", "--degree", "4"], "--drop-blocks: degree is for new activations"),
        (["--drop-blocks", "count=1", "--exclude", "x"], "--drop-blocks: exclude is for new activations"),
        (["--factorize", "rank=200"], "factorize: no linear layer of GPT2 becomes smaller"),
        (["--factorize", "rank=2", "--linear", "quadratic"], "--factorize: linear changes the same layers"),
        (["--factorize", "rank=2", "--ray", "2"], "--factorize: ray_tasks read the model as it was"),
        (["--factorize", "rank=2", "--tables"], "--factorize: tables: without family there are no new activations"),
        (["--factorize", "rank=2", "--as-is"], "--as-is fits nothing, so --factorize means nothing"),
        (
            ["--factorize", "rank=2", "--format", "huggingface"],
            "transformers has no GPT-2 whose linear layers are in two factors",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    command = ["convert", str(model), str(tmp_path / "out"), "--data", str(tmp_path / "calibration.npy")]
    assert main([*command, *options]) == EXIT_USER_ERROR
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def promised(settings: dict[str, Any], architecture: str = "gpt2", **parameters: Any) -> Any:
    upstream = {"model": PromisedModel(architecture, settings), "dataset": None}
    return promise(ConvertParameters.model_validate(parameters), upstream, Resources(), Path())


def test_what_will_be_is_known_before_anything_starts() -> None:
    settings = {**GPT2, "n_layer": 4, "activation": ["gelu", "relu", "silu", "gelu"]}
    assert promised(settings, drop_blocks={"blocks": [1, 2]}).settings == {
        **settings,
        "n_layer": 2,
        "activation": ["gelu", "gelu"],
    }
    assert promised({**settings, "activation": "gelu"}, drop_blocks={"count": 3}).settings["n_layer"] == 1
    mixed = {**GPT2, "n_layer": 3, "feedforward": ["mlp", "gated", "pade"]}
    assert promised(mixed, drop_blocks={"count": 1}) is None
    mixed["feedforward"] = ["pade", "mlp", "gated"]  # the first cannot take in a map, so that the last block goes
    assert promised(mixed, drop_blocks={"count": 1}).settings["feedforward"] == ["pade", "mlp"]
    assert promised(settings, drop_blocks={"count": 1}) is None  # which of the activations goes, only the data tell
    smaller = promised(settings, drop_blocks={"blocks": [1, 1]}, family="hermite", layers="0-2")
    assert smaller.settings["n_layer"] == 3
    assert "activation" not in smaller.settings
    assert promised({**settings, "factors": {}}, factorize={"rank": 2}).settings == settings
    factored = {**settings, "factors": {"transformer.h.1.attn.c_attn": 2}}
    assert promised(factored, linear="quadratic", family=None).settings == {**factored, "feedforward": "quadratic"}
    assert promised(factored, drop_blocks={"blocks": [2, 2]}).settings["n_layer"] == 3
    assert "factors" not in promised(factored, drop_blocks={"blocks": [2, 2]}).settings
    assert promised({"depths": [1, 3], "dims": [8, 16]}, "convnext", drop_blocks={"count": 1}).settings == {
        "depths": [1, 2],
        "dims": [8, 16],
    }
    assert promised({"depths": [2, 3], "dims": [8, 16]}, "convnext", drop_blocks={"count": 1}) is None
    assert promised(settings, drop_blocks={"blocks": [1, 1]}, format="huggingface") == PromisedForeignModel("gpt2")


QUADRATIC: dict[str, Any] = {"linear": "quadratic", "family": None}


@pytest.mark.parametrize(
    ("settings", "architecture", "given", "said"),
    [
        ({"n_layer": 4}, "gpt2", {"drop_blocks": {"count": 4}}, "count: 4 blocks cannot go"),
        ({"n_layer": 4}, "gpt2", {"drop_blocks": {"blocks": [2, 4]}}, "goes beyond the last block, 3"),
        (
            {"n_layer": 4, "scale_attn_by_inverse_layer_idx": True},
            "gpt2",
            {"drop_blocks": {"count": 1}},
            "scale_attn_by_inverse_layer_idx",
        ),
        ({"inputs": 3}, "mlp", {"drop_blocks": {"count": 1}}, "mlp has no blocks"),
        *(
            ({**sizes, "factors": {name: 2}}, architecture, QUADRATIC, f"`{name}` is in two factors")
            for architecture, name, sizes in (
                ("gpt2", "transformer.h.0.mlp.c_fc", {}),
                ("convnext", "stages.0.0.pwconv2", {}),
                ("mlp", "blocks.0.layer", {"inputs": 3}),
            )
        ),
        (
            {"n_layer": 3, "feedforward": ["pade", "quadratic", "mlp"]},
            "gpt2",
            {"drop_blocks": {"count": 1}},
            "block 0 has feedforward: pade; only a linear layer can take in a map",
        ),
        ({}, "gpt2", {"factorize": {"rank": 2}, "format": "huggingface"}, "no gpt2 with factored layers"),
        ({"n_layer": 4}, "gpt2", {"drop_blocks": {"blocks": [1, 2]}, "family": "hermite", "layers": 2}, "has 2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    settings: dict[str, Any], architecture: str, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        promised(settings, architecture, **given)


def test_parameters_say_where_they_are_wrong() -> None:
    for given, place in (
        ({"drop_blocks": {"count": "two"}}, ("drop_blocks", "count")),
        ({"factorize": {"ranks": 2}}, ("factorize", "ranks")),
        ({"factorize": {}}, ("factorize",)),
    ):
        with pytest.raises(ValidationError) as caught:
            ConvertParameters.model_validate(given)
        assert caught.value.errors()[0]["loc"] == place
