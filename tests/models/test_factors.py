"""Layers in two factors: the same function as their product, built again from `model.json`, seen by whoever counts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, read_description, save_model
from polytrope.models.circuit import refuse_other_parts
from polytrope.models.factors import FactoredLinear, describe_factors, merge_factors, restore_factors
from polytrope.models.formats import read_model, write_model

SIZES = {
    "gpt2": {"vocab_size": 64, "sequence_length": 8, "n_layer": 2, "n_head": 2, "n_embd": 16},
    "convnext": {"depths": [1, 1], "dims": [8, 16], "num_classes": 3, "patch_size": 1, "layer_scale": 0.5},
    "mlp": {"inputs": 4, "outputs": 2, "widths": [16, 16]},
}
FACTORS = {
    "gpt2": {"transformer.h.0.mlp.c_fc": 3, "transformer.h.1.attn.c_attn": 5},
    "convnext": {"stages.1.0.pwconv2": 4},
    "mlp": {"blocks.1.layer": 2},
}
INPUTS = {"gpt2": torch.arange(8)[None], "convnext": torch.randn(1, 3, 8, 8), "mlp": torch.randn(2, 4)}


def factored(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(architecture, {**SIZES[architecture], "factors": FACTORS[architecture]}).eval()


def output(model: nn.Module, architecture: str) -> Tensor:
    inputs = INPUTS[architecture]
    if inputs.is_floating_point():
        inputs = inputs.to(next(model.parameters()).dtype)
    with torch.no_grad():
        found: Tensor = model(inputs)
    return found


@pytest.mark.parametrize("architecture", SIZES)
def test_a_model_with_factors_comes_back_from_its_file(architecture: str, tmp_path: Path) -> None:
    model = factored(architecture)
    assert describe_factors(model) == FACTORS[architecture]
    save_model(tmp_path, model)
    about = read_description(tmp_path)
    assert about["config"]["factors"] == FACTORS[architecture]
    assert about["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    loaded = load_model(tmp_path)
    assert torch.equal(output(loaded, architecture), output(model, architecture))
    whole = build_model(architecture, SIZES[architecture])
    save_model(tmp_path / "whole", whole)
    assert "factors" not in read_description(tmp_path / "whole")["config"]


@pytest.mark.parametrize("architecture", SIZES)
def test_merged_factors_are_the_same_function_in_the_same_module_tree(architecture: str) -> None:
    model = factored(architecture).double()
    merged = copy.deepcopy(model)
    merge_factors(merged)
    assert [name for name, _ in merged.named_parameters()] == [
        name for name, _ in build_model(architecture, SIZES[architecture]).named_parameters()
    ]
    assert (output(merged, architecture) - output(model, architecture)).abs().max() < 1e-14


def test_factors_cost_what_their_ranks_say() -> None:
    convnext, whole = factored("convnext"), build_model("convnext", SIZES["convnext"])
    saved = 16 * 64 - 4 * (16 + 64)
    assert whole.flops_per_image(8, 8) - convnext.flops_per_image(8, 8) == 6 * saved * 4 * 4  # type: ignore[operator]
    saved = 16 * 16 - 2 * (16 + 16)
    mlp, whole = factored("mlp"), build_model("mlp", SIZES["mlp"])
    assert whole.flops_per_row() - mlp.flops_per_row() == 6 * saved  # type: ignore[operator]
    gpt2, whole = factored("gpt2"), build_model("gpt2", SIZES["gpt2"])
    saved = 16 * 64 - 3 * (16 + 64) + 16 * 48 - 5 * (16 + 48)
    assert whole.flops_per_token() - gpt2.flops_per_token() == 6 * saved  # type: ignore[operator]


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({"transformer.h.9.mlp.c_fc": 3}, "no module `transformer.h.9.mlp.c_fc`"),
        ({"transformer.h.0.ln_1": 3}, "`transformer.h.0.ln_1` is a LayerNorm"),
        ({"transformer.h.0.mlp.c_fc": 17}, "16 → 64 cannot have rank 17; expected 1 to 16"),
        ({"transformer.h.0.mlp.c_fc": "3"}, "factors.transformer.h.0.mlp.c_fc: expected an integer"),
        (["transformer.h.0.mlp.c_fc"], "factors: expected numbers by name"),
    ],
)
def test_factors_that_cannot_be_are_refused(factors: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_model("gpt2", {**SIZES["gpt2"], "factors": factors})


def test_a_module_of_anybody_s_own_gets_its_factors_back(tmp_path: Path) -> None:
    def fresh() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 2))

    model = fresh()
    restore_factors(model, {"0": 3})
    write_model(tmp_path, model)
    assert json.loads((tmp_path / "module.json").read_text())["factors"] == {"0": 3}
    loaded = read_model(tmp_path, model=fresh())
    x = torch.randn(5, 8)
    assert isinstance(loaded[0], FactoredLinear)  # type: ignore[index]
    assert torch.equal(loaded(x), model(x))


def test_a_format_that_has_no_factors_refuses_them(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no GPT-2 whose linear layers are in two factors, as transformer.h.0.mlp.c_fc"
    ):
        write_model(tmp_path / "theirs", factored("gpt2"), format="huggingface")
    assert not (tmp_path / "theirs").exists()


def test_a_circuit_wants_its_factors_merged() -> None:
    with pytest.raises(ValueError, match=r"transformer.h.0.mlp.c_fc: two factors in a row are not folded"):
        refuse_other_parts(factored("gpt2"))  # type: ignore[arg-type]


def test_factors_learn() -> None:
    model = factored("mlp").train()
    model(torch.randn(4, 4), torch.randn(4, 2)).backward()
    for name in ("inner", "outer"):
        gradient = model.get_submodule(f"blocks.1.layer.{name}").weight.grad
        assert isinstance(gradient, Tensor)
        assert gradient.abs().max() > 0
