"""`convert: linear: quadratic`: linear layers become quadratic ones, and every output stays the same number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_support import GPT2, images, own_model, randomise, read_json, tokens, write_bert, write_texts
from torch import nn

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.convert import convert as convert_activations
from polytrope.models.factors import describe_factors
from polytrope.models.quadratic import make_quadratic
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.data.promised import PromisedForeignModel, PromisedModel
from polytrope.pipeline.errors import EXIT_USER_ERROR, UserError
from polytrope.pipeline.stage import Artifact, Resources, stage_context
from polytrope.pipeline.stages.convert.convert import convert, promise
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.stages.train.trainable import freeze

MLP = {"inputs": 5, "widths": [6, 6], "outputs": 2, "residual": True}
ROWS = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))


def stage(directory: Path, model: Path, data: Path, **parameters: Any) -> Path:
    context = stage_context(directory, stage="quadratic", resources=Resources())
    artifacts = Artifact(model, "digest", "train"), Artifact(data, "digest", "data")
    convert(context, *artifacts, ConvertParameters.model_validate({"linear": "quadratic", **parameters}))
    return context.output


@pytest.mark.parametrize(
    ("model", "inputs", "names"),
    [
        (own_model("gpt2"), tokens(), ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"]),
        (own_model("gpt2", bias=False, norm="batch", tie_word_embeddings=False, n_layer=1), tokens(),
         ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]),
        (own_model("convnext", activation="hermite3"), images(), ["stages.0.0.pwconv1", "stages.1.1.pwconv2"]),
        (randomise(build_model("mlp", MLP)), ROWS, ["blocks.0.layer", "blocks.1.layer"]),
    ],
)  # fmt: skip
def test_the_function_stays_bit_for_bit(model: nn.Module, inputs: torch.Tensor, names: list[str]) -> None:
    drawn = torch.get_rng_state()
    made, changed = make_quadratic(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [changed[0], changed[-1]] == names
    assert not made.training
    with torch.no_grad():
        assert torch.equal(made(inputs), model(inputs))
    before = model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items() if name in before)
    freeze(made, str(model.architecture), ["multiplicative"])
    learns = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
    assert sorted(learns) == sorted(
        f"{name}.{part}" for name in changed for part in ("gate_weight", "gate_bias", "square_weight")
    )
    made(inputs).square().sum().backward()
    gradients = dict(made.named_parameters())
    assert all(float(gradients[name].grad.abs().sum()) > 0 for name in learns)  # type: ignore[union-attr]


def test_learned_activations_stay(tmp_path: Path) -> None:
    converted = convert_activations(own_model("gpt2"), [tokens()], family="chebyshev", degree=5).model
    save_model(tmp_path / "model", converted)
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "calibration.npy", tokens().numpy())
    output = stage(tmp_path / "a", tmp_path / "model", tmp_path / "data", calibration_samples=4)
    made = load_model(output)
    with torch.no_grad():
        assert torch.equal(made(tokens()), load_model(tmp_path / "model")(tokens()))
    about = read_json(output / "model.json")["config"]
    assert about["feedforward"] == "quadratic"
    assert {entry["name"] for entry in about["activation"]} == {"chebyshev"}
    with pytest.raises(UserError, match="linear: the layers of the model are quadratic already"):
        stage(tmp_path / "b", output, tmp_path / "data")


def test_with_a_family_activations_are_converted_too(tmp_path: Path) -> None:
    save_model(tmp_path / "model", own_model("gpt2"))
    np.save(tmp_path / "calibration.npy", tokens().numpy())
    command = ["convert", str(tmp_path / "model")]
    options = ["--data", str(tmp_path / "calibration.npy"), "--linear", "quadratic"]
    assert main([*command, str(tmp_path / "both"), *options, "--family", "hermite", "--degree", "4"]) == 0
    assert main([*command, str(tmp_path / "linear"), *options]) == 0
    both = read_json(tmp_path / "both" / "conversion.json")
    assert len(both["layers"]) == 2
    assert len(both["quadratic"]) == 4
    for directory in ("both", "linear"):
        page = (tmp_path / directory / "conversion.html").read_text()
        assert "<h2>Quadratic layers</h2>" in page
        assert page.count("c_fc") >= 2
    assert read_json(tmp_path / "linear" / "conversion.json")["quadratic"] == both["quadratic"]
    assert not (tmp_path / "linear" / "plots").exists()
    made = load_model(tmp_path / "both")
    plain = convert_activations(load_model(tmp_path / "model"), [tokens()], family="hermite", degree=4).model
    with torch.no_grad():
        assert torch.equal(made(tokens()), plain(tokens()))
        assert torch.equal(load_model(tmp_path / "linear")(tokens()), load_model(tmp_path / "model")(tokens()))


def test_squares_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = build_model("mlp", {**MLP, "widths": [6], "residual": False})
    save_model(tmp_path / "model", model)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "calibration.npz", rows=1e20 * ROWS.numpy())
    with pytest.raises(UserError, match="linear: the model with quadratic layers computes something else"):
        stage(tmp_path / "a", tmp_path / "model", tmp_path / "data")


def test_a_layer_in_two_factors_is_refused_by_name_and_others_stay_so() -> None:
    batches = [tokens()]
    factored = convert_activations(own_model("gpt2"), batches, factorize={"rank": 2}).model
    with pytest.raises(
        ValueError, match=r"linear: `transformer.h.0.mlp.c_fc` is in two factors, which has no quadratic form"
    ):
        make_quadratic(factored)
    attention = convert_activations(own_model("gpt2"), batches, factorize={"rank": 2}, include=["*.attn.*"]).model
    made, _ = make_quadratic(attention)
    assert describe_factors(made) == describe_factors(attention) == made.config.factors
    with torch.no_grad():
        assert torch.equal(made(tokens()), attention(tokens()))


def promised(settings: dict[str, Any], architecture: str = "gpt2", **parameters: Any) -> Any:
    checked = ConvertParameters.model_validate({"linear": "quadratic", **parameters})
    upstream = {"model": PromisedModel(architecture, settings), "dataset": None}
    return promise(checked, upstream, Resources(), Path())


def test_what_will_be_is_known_before_anything_starts() -> None:
    settings = {**GPT2, "activation": "hermite3"}
    assert promised(settings).settings == {**settings, "feedforward": "quadratic"}
    assert "activation" not in promised(GPT2, family="fourier").settings
    halves = ["mlp", {"name": "quadratic", "square": False}]
    assert promised({**GPT2, "feedforward": halves}).settings["feedforward"] == ["quadratic", halves[1]]
    with pytest.raises(UserError, match="linear: the layers of the model are quadratic already"):
        promised({**GPT2, "feedforward": "quadratic"})
    with pytest.raises(UserError, match="linear: layer 1 has `feedforward: gated`, which has no quadratic form"):
        promised({**GPT2, "feedforward": ["mlp", "gated"]})
    foreign = {"model": PromisedForeignModel("bert"), "dataset": None}
    with pytest.raises(UserError, match=r"linear: quadratic layers are for gpt2, .* will be a bert of transformers"):
        promise(ConvertParameters(linear="quadratic"), foreign, Resources(), Path())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"degree": 4}, "degree is for new activations, and without family they stay as they are"),
        ({"tables": True}, "tables: without family there are no new activations"),
        ({"ray_tasks": 2}, "ray_tasks: without family there are no new activations"),
        ({"layers": "0"}, "layers is for new activations"),
        ({"rated_samples": 0}, "rated_samples is for new activations"),
        ({"domain": [-1, 1]}, "domain is for polynomial_only"),
        ({"target_error": 0.1}, "target_error is for new activations"),
        ({"constraints": ["ends"]}, "constraints is for new activations"),
        ({"format": "huggingface", "family": "hermite"}, "transformers has no quadratic layers"),
    ],
)
def test_options_that_mean_nothing_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConvertParameters.model_validate({"linear": "quadratic", **given})


def test_a_model_of_others_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bert(tmp_path / "bert")
    data = ["--data", str(write_texts(tmp_path)), "--linear", "quadratic"]
    assert main(["convert", str(tmp_path / "bert"), str(tmp_path / "out"), *data]) == EXIT_USER_ERROR
    assert "linear: quadratic layers are for gpt2, convnext, mlp, and this is a BertModel" in flat(capsys)
    assert not (tmp_path / "out").exists()


def flat(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())
