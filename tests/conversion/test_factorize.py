"""Linear layers in two factors: ranks the data use, the nearest outputs there are, models that come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_support import LLAMA_SIZES, randomise
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, read_description
from polytrope.models.convert import Conversion, convert
from polytrope.models.convert_options import read_factorize
from polytrope.models.factorize import FactoredLayer, measure_spectra, ratio_rank, utilised_rank
from polytrope.models.factors import FactoredLinear, describe_factors
from polytrope.models.formats import read_model

GPT2 = {"vocab_size": 61, "sequence_length": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return randomise(build_model("gpt2", GPT2), 0.1)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return randomise(LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES)), 0.1)


def tokens() -> list[Tensor]:
    return list(torch.randint(0, 61, (12, 12), generator=torch.Generator().manual_seed(1)).split(5))


def correlated(rank: int | None = None) -> tuple[nn.Linear, Tensor]:
    """A layer 32 → 24 and its inputs, in 8 directions, or in all with energies from 1 to 1/1000."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = nn.Linear(32, 24).double()
    with torch.no_grad():
        layer.weight.copy_(draw(24, 32))
    if rank is not None:
        return layer, draw(4000, rank) @ draw(rank, 32)
    turned = torch.linalg.qr(draw(32, 32))[0]
    return layer, draw(4000, 32) * torch.logspace(0, -1.5, 32, dtype=torch.float64) @ turned


def only_layer(conversion: Conversion) -> FactoredLayer:
    assert conversion.factorization is not None
    (layer,) = conversion.factorization.layers
    return layer


def test_a_layer_uses_no_more_directions_than_its_inputs_have() -> None:
    layer, x = correlated(rank=8)
    assert int(torch.linalg.matrix_rank(layer.weight)) == 24
    made = convert(nn.Sequential(layer), [x], factorize={"energy": 1 - 1e-9})
    found = only_layer(made)
    assert (found.input_rank, found.output_rank, found.utilised_rank, found.rank) == (8, 8, 8, 8)
    with torch.no_grad():
        expected = layer(x)
        assert (made.model(x) - expected).norm() / expected.norm() < 3e-15
    assert made.parameters == (32 * 24 + 24, 8 * (32 + 24) + 24)


def test_the_outputs_are_nearer_than_those_of_any_other_matrix_of_that_rank() -> None:
    """The naive way is the singular value decomposition of the weight alone."""
    layer, x = correlated()
    with torch.no_grad():
        expected = x @ layer.weight.T
        u, s, vh = torch.linalg.svd(layer.weight)
    plain = float((x @ (u[:, :8] * s[:8] @ vh[:8]).T - expected).norm() / expected.norm())
    made = convert(nn.Sequential(layer), [x[:1000], x[1000:]], factorize={"rank": 8}, samples=None)
    factors: Any = made.model[0]  # type: ignore[index]
    with torch.no_grad():
        error = float((x @ (factors.outer.weight @ factors.inner.weight).T - expected).norm() / expected.norm())
    values = torch.linalg.svdvals(expected)  # no matrix of rank 8 has less (Eckart & Young)
    assert error == pytest.approx(float(values[8:].norm() / values.norm()), rel=1e-9)
    assert only_layer(made).relative_error == pytest.approx(error, rel=1e-9)
    assert error < 0.6 * plain


def test_the_share_of_the_energy_decides_the_rank() -> None:
    squares = torch.tensor([0.001, 0.009, 0.09, 0.9], dtype=torch.float64)  # ascending, of 1 in all
    assert [utilised_rank(squares, energy) for energy in (0.5, 0.95, 0.995, 0.9999)] == [1, 2, 3, 4]
    assert utilised_rank(torch.zeros(3, dtype=torch.float64), 0.9) == 0
    layer, x = correlated()
    energies = torch.linalg.svdvals(x).square()
    outputs = torch.linalg.svdvals(x @ layer.weight.detach().T).square()
    found = only_layer(convert(nn.Sequential(layer), [x], factorize={"energy": 0.9}))
    for squares, rank in ((energies, found.input_rank), (outputs, found.output_rank)):
        assert float(squares[:rank].sum() / squares.sum()) >= 0.9 > float(squares[: rank - 1].sum() / squares.sum())
    assert found.rank == min(found.input_rank, found.output_rank)
    assert found.relative_error == pytest.approx(float((outputs[found.rank :].sum() / outputs.sum()).sqrt()), rel=1e-6)


@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (24, 24)])
def test_spectra_are_those_of_inputs_and_outputs(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, shape[1], generator=generator).double() for rows in (shape[0], 100))
    found = measure_spectra(weight, x.T @ x)
    outputs = x @ weight.T
    for squares, matrix in ((found.inputs, x), (found.outputs, outputs)):
        expected = torch.linalg.svdvals(matrix).square()[: len(squares)].flip(0)
        assert torch.allclose(squares, expected, rtol=1e-9)
    first = found.directions[:, -5:]
    assert torch.allclose(first.T @ first, torch.eye(5, dtype=torch.float64), atol=1e-12)
    kept = (outputs @ first).square().sum(0)
    assert torch.allclose(kept, found.outputs[-5:], rtol=1e-9)


def test_a_ratio_is_how_many_times_smaller_a_layer_gets() -> None:
    assert ratio_rank(768, 3072, 3) == 204  # PELA's figure
    layer, x = correlated()
    assert only_layer(convert(nn.Sequential(layer), [x], factorize={"ratio": 2})).rank == 6  # 768 / (2 · 56) = 6.86


def test_a_factored_gpt2_comes_back_and_says_what_it_uses(tmp_path: Path) -> None:
    model = gpt2()
    made = convert(model, tokens(), factorize={"ratio": 1.5}, exclude=["transformer.h.0.attn.*"])
    made.save(tmp_path)
    assert made.factorization is not None
    ranks = {layer.name: layer.rank for layer in made.factorization.layers}
    assert len(ranks) == 6
    assert ranks == describe_factors(made.model) == read_description(tmp_path)["config"]["factors"]
    assert {layer.name: layer.reason for layer in made.factorization.left} == {
        "transformer.h.0.attn.c_attn": "excluded",
        "transformer.h.0.attn.c_proj": "excluded",
        "lm_head": "part of a pooler or a head; it stays unless its type or its name is asked for",
    }
    assert describe_factors(model) == {}
    for layer in made.factorization.layers:
        whole, product = model.get_submodule(layer.name).weight, made.model.get_submodule(layer.name).merged().weight
        assert layer.largest_change == pytest.approx(float((product - whole).detach().abs().max()), rel=1e-4)
    again = Conversion.load(tmp_path)
    assert again.factorization == made.factorization
    assert again.parameters == made.parameters
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(tokens()[0]), made.model(tokens()[0]))
        moved = made.model(tokens()[1][:8]).double() - model(tokens()[1][:8]).double()
    assert 0 < made.difference < 1
    assert float(moved.norm()) > 0
    assert "transformer.h.1.mlp.c_fc" in made.report()


def test_activations_are_fitted_to_what_the_factored_layers_give(tmp_path: Path) -> None:
    made = convert(
        gpt2(), tokens(), drop_blocks={"count": 1}, factorize={"ratio": 2}, family="hermite", degree=4, rated_samples=0
    )
    made.save(tmp_path)
    name = "transformer.h.0.mlp.activation"
    seen: list[Tensor] = []
    made.model.get_submodule(name).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in tokens():
            made.model(batch)
    (entry,) = made.activations
    assert entry.name == name
    assert entry.inputs["minimum"] == pytest.approx(float(min(part.min() for part in seen)), abs=1e-5)
    loaded: Any = load_model(tmp_path)
    assert len(loaded.blocks) == 1
    with torch.no_grad():
        assert torch.equal(loaded(tokens()[0]), made.model(tokens()[0]))


def test_layers_are_factored_once_and_shared_weights_stay() -> None:
    model = gpt2()
    made = convert(model, tokens(), factorize={"ratio": 2}, include=["transformer.h.0.*", "lm_head"])
    assert made.factorization is not None
    assert {layer.reason for layer in made.factorization.left if layer.name == "lm_head"} == {
        "another module has the same weight"
    }
    with pytest.raises(ValueError, match=r"becomes smaller \(transformer.h.0.attn.c_attn: in two factors of rank 6"):
        convert(made.model, tokens(), factorize={"ratio": 4}, include=["transformer.h.0.*"])


class Reaching(nn.Module):
    """Uses the weight of a linear layer without calling it, as some models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.dtype))
        return nn.functional.linear(x, self.second.weight)


def test_a_model_that_reaches_into_its_layers_is_refused_by_name() -> None:
    model, x = Reaching(), torch.randn(64, 16)
    with pytest.raises(ValueError, match=r"Reaching reaches into its linear layers .*weight.* exclude"):
        convert(model, [x], factorize={"rank": 2}, in_place=True)
    assert isinstance(model.first, nn.Linear)
    with pytest.raises(ValueError, match="second: the calibration data never reaches it"):
        convert(model, [x], factorize={"rank": 2}, exclude=["first"])


class Twice(nn.Module):
    """Two layers with the same tensor, which is changed in place between them; the second gets it by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        before = self.first(x)
        x[:, 3:] = 0.0
        found: Tensor = before + self.second(input=x)
        return found


def test_every_layer_is_measured_on_what_it_is_given() -> None:
    made = convert(Twice().double(), [torch.randn(64, 16)], factorize={"rank": 4})
    assert made.factorization is not None
    assert {layer.name: layer.input_rank for layer in made.factorization.layers} == {"first": 16, "second": 3}
    assert made.factorization.layers[1].relative_error < 1e-7


def test_nothing_that_stays_as_large_is_factored() -> None:
    layer, x = correlated()
    with pytest.raises(
        ValueError, match=r"no linear layer of Sequential becomes smaller \(0: 32 → 24 of rank 14 would"
    ):
        convert(nn.Sequential(layer), [x], factorize={"rank": 14})
    assert only_layer(convert(nn.Sequential(layer), [x], factorize={"rank": 13})).rank == 13  # 728 of 768 numbers
    silent = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU())
    with pytest.raises(ValueError, match="0: its outputs are all 0"):
        convert(silent, [torch.zeros(4, 8)], factorize={"rank": 2})


@pytest.mark.parametrize("family", [None, "hermite"])
def test_a_factored_llama_loads_in_transformers_by_the_code_beside_it(family: str | None, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

    model = llama()
    fits = {} if family is None else {"family": family, "degree": 4}
    made = convert(model, [tokens()[0]], factorize={"rank": 4}, rated_samples=8 if family is None else 0, **fits)
    made.save(tmp_path)
    ranks = describe_factors(made.model)
    assert len(ranks) == 5 * 7
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    with pytest.raises(KeyError, match="replaced by polytrope"):
        LlamaForCausalLM.from_pretrained(tmp_path)  # with random weights in the places of the factors
    with torch.no_grad():
        expected = made.model(tokens()[0]).logits
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
        assert torch.allclose(loaded(tokens()[0]).logits, expected, atol=1e-6)
        body = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
        states = body(tokens()[0]).last_hidden_state
        assert torch.allclose(loaded.lm_head(states), expected, atol=1e-6)
        assert torch.equal(read_model(tmp_path)(tokens()[0]).logits, expected)  # type: ignore[operator]
    assert sum(tensor.numel() for tensor in loaded.parameters()) == made.parameters[1]  # type: ignore[index]
    assert loaded.config.polytrope["factors"] == ranks
    loaded.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
        assert torch.allclose(again(tokens()[0]).logits, expected, atol=1e-6)
    smaller = Conversion.load(tmp_path)
    assert smaller.factorization == made.factorization


def test_padding_does_not_count() -> None:
    model = llama()
    short = {"input_ids": tokens()[0][:, :7], "attention_mask": torch.ones(5, 7, dtype=torch.int64)}
    padded = {name: nn.functional.pad(tensor, (0, 5)) for name, tensor in short.items()}
    found = [convert(model, [batch], factorize={"rank": 3}).factorization for batch in (short, padded)]
    first, second = ([layer.relative_error for layer in entry.layers] for entry in found if entry is not None)
    assert first == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give one of energy"),
        ({"rank": 2, "ratio": 3}, "give one of energy"),
        ({"energy": 1}, "energy: expected a share above 0 and below 1, got 1"),
        ({"ratio": 1}, "ratio: expected a number above 1, got 1"),
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"rank": 2.5}, "rank: expected an integer, got 2.5"),
        ({"ranks": 2}, "there is no ranks; there are energy, ratio, rank"),
    ],
)
def test_options_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"factorize: {said}"):
        read_factorize(given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"degree": 4}, "degree is for new activations"),
        ({"constraints": ["ends"]}, "constraints is for new activations"),
        ({"target_error": 0.1}, "target_error is for new activations"),
        ({"keep": 1}, "keep is for new activations"),
        ({"types": ["GELU"]}, "types is for new activations"),
    ],
)
def test_without_family_activations_stay_and_options_of_theirs_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}, and without family they stay as they are"):
        convert(gpt2(), tokens(), factorize={"rank": 4}, **options)


def test_factors_have_the_dtype_and_the_mode_of_the_layer() -> None:
    model = nn.Sequential(nn.Linear(16, 16).to(torch.bfloat16)).train()
    made = convert(model, [torch.randn(64, 16)], factorize={"rank": 2})
    factors = made.model[0]  # type: ignore[index]
    assert isinstance(factors, FactoredLinear)
    assert factors.inner.weight.dtype == factors.outer.bias.dtype == torch.bfloat16
    assert factors.training
    assert factors.inner.training


def test_operations_of_a_factored_head_are_those_of_its_factors() -> None:
    sizes = {"depths": [1], "dims": [16], "num_classes": 8, "in_channels": 1, "patch_size": 1}
    whole, factored = (build_model("convnext", {**sizes, "factors": ranks}) for ranks in ({}, {"head": 2}))
    saved = 6.0 * (16 * 8 - 2 * (16 + 8))
    assert whole.flops_per_image(4, 4) - factored.flops_per_image(4, 4) == saved  # type: ignore[operator]
