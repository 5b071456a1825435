"""Positions that an attention mask hides: nothing that is measured on calibration data knows of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conversion_support import LLAMA_SIZES, randomise
from torch import Tensor, nn

from polytrope.models.calibration import calibrate
from polytrope.models.conversion import layer_costs
from polytrope.models.convert import convert
from polytrope.models.factorize import measure_inputs
from polytrope.models.inputs import counted, forward
from polytrope.models.matching import find_blocks
from polytrope.models.sensitivity import sensitivities
from polytrope.models.surgery import Activation
from polytrope.pipeline.stages.convert.calibration_data import _with_decoder_inputs
from polytrope.pipeline.stages.convert.distillation import distill, received

LENGTHS = (9, 4, 7)
PADDING = 60  # a token


def llama() -> Any:
    """In float64, its padding far from all else."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = randomise(LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES)).double(), 0.2)
    with torch.no_grad():
        model.model.embed_tokens.weight[PADDING] = 300.0
        model.model.layers[0].mlp.gate_proj.weight += 1.0
    return model


def padded() -> dict[str, Tensor]:
    ids = torch.randint(3, 59, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[int(place < length) for place in range(max(LENGTHS))] for length in LENGTHS])
    return {"input_ids": torch.where(mask == 1, ids, PADDING), "attention_mask": mask}


def rows() -> list[dict[str, Tensor]]:
    """The same, without padding."""
    ids = padded()["input_ids"]
    return [{"input_ids": ids[row : row + 1, :length]} for row, length in enumerate(LENGTHS)]


def test_histograms_are_those_of_the_samples_without_padding() -> None:
    model = llama()
    found = [Activation(name, module) for name, module in model.named_modules() if name.endswith("act_fn")]
    with_padding, without = (calibrate(model, found, batches, forward) for batches in ([padded()], rows()))
    everything = calibrate(model, found, [{"input_ids": padded()["input_ids"]}], forward)
    for name, expected in without.items():
        measured = with_padding[name]
        assert measured.total == expected.total == sum(LENGTHS) * 32
        assert (measured.minimum, measured.maximum) == pytest.approx((expected.minimum, expected.maximum), rel=1e-9)
        assert abs(measured.counts - expected.counts).sum() <= 4  # a number at the edge of two bins
    first = found[0].name
    assert everything[first].maximum > 1.5 * without[first].maximum  # what would have counted


@pytest.mark.parametrize("options", [{"family": "hermite"}, {"polynomial_only": True, "depth": 3, "family": None}])
def test_a_conversion_is_that_of_the_samples_without_padding(options: dict[str, Any]) -> None:
    made, expected = (convert(llama(), batches, **options) for batches in ([padded()] * 4, rows() * 4))
    for mine, theirs in zip(made.activations, expected.activations, strict=True):
        assert mine.relative_error == pytest.approx(theirs.relative_error, rel=0.3)  # other raw inputs are kept aside
        assert mine.inputs["maximum"] == pytest.approx(theirs.inputs["maximum"], rel=1e-9)
    costs, wanted = (layer_costs(llama(), made.layers, batches, forward) for batches in ([padded()], rows()))
    assert costs == pytest.approx(wanted, rel=1e-6)
    if made.polynomials is not None:
        assert {seen.inputs for seen in made.polynomials.seen.values()} == {sum(LENGTHS) * 32}


def test_the_two_sides_of_an_encoder_decoder_have_their_own_padding() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=61, **sizes, decoder_start_token_id=0)).eval()
    (batch,) = _with_decoder_inputs(model, [padded()], lambda _text: None)
    assert batch["decoder_attention_mask"].sum(1).tolist() == [9, 5, 8]  # a start, and the tokens before the last place
    seen: dict[str, int] = {}
    found = [Activation(name, module) for name, module in model.named_modules() if name.endswith(".act")]
    for name, measured in calibrate(model, found, [batch], forward).items():
        seen[name.split(".")[0]] = measured.total
    assert seen == {"encoder": sum(LENGTHS) * 32, "decoder": (9 + 5 + 8) * 32}
    labels = {**padded(), "labels": padded()["input_ids"]}  # nothing says which of them are padding
    seen = {name.split(".")[0]: entry.total for name, entry in calibrate(model, found, [labels], forward).items()}
    assert seen == {"encoder": sum(LENGTHS) * 32, "decoder": 3 * 9 * 32}


def bart(**sizes: int) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = BartConfig(vocab_size=61, d_model=16, max_position_embeddings=32, **heads, **sizes)
    return BartForConditionalGeneration(config).double().eval()


def test_the_keys_of_cross_attention_have_the_padding_of_the_encoder() -> None:
    model = bart(encoder_layers=1, decoder_layers=1)
    (batch,) = _with_decoder_inputs(model, [padded()], lambda _text: None)
    states = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    real = states[batch["attention_mask"] == 1]
    assert batch["decoder_attention_mask"].sum() != batch["attention_mask"].sum()  # as long, one place off
    shorter = {**batch, **{name: batch[name][:, :6] for name in ("decoder_input_ids", "decoder_attention_mask")}}
    keys, values, queries = (f"model.decoder.layers.0.encoder_attn.{part}_proj" for part in "kvq")

    def grams(of: Any, given: Any) -> dict[str, Tensor]:
        linears = {name: module for name, module in of.named_modules() if isinstance(module, nn.Linear)}
        return measure_inputs(of, linears, [given], forward, iter)

    encoded = {name: value for name, value in batch.items() if name != "input_ids"} | {"encoder_outputs": (states,)}
    for given in (batch, shorter, encoded):
        found = grams(model, given)
        for name in (keys, values):
            assert torch.allclose(found[name], real.T @ real, rtol=1e-9)
        assert not torch.allclose(found[queries], found[keys])
    factored = convert(model, [batch], factorize={"rank": 3}, include=[keys]).model
    inner = factored.get_submodule(f"{keys}.inner")(real)
    assert torch.allclose(grams(factored, batch)[f"{keys}.outer"], inner.T @ inner, rtol=1e-9)
    # An activation on the way to the keys, and what an error of it does to the output.
    attention = model.get_submodule("model.decoder.layers.0.encoder_attn")
    attention.k_proj = nn.Sequential(attention.k_proj, nn.GELU())
    (found_activation,) = (Activation(n, m) for n, m in model.named_modules() if isinstance(m, nn.GELU))
    calibrations = calibrate(model, [found_activation], [batch], forward)
    assert calibrations[found_activation.name].total == sum(LENGTHS) * 16
    assert sensitivities(model, [found_activation], calibrations, [batch], forward)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_on_the_decoder_has_its_padding(tied: bool) -> None:
    """T5 with tied embeddings scales what the decoder gives, so that the head receives another tensor."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    torch.manual_seed(0)
    config = T5Config(vocab_size=61, **sizes, decoder_start_token_id=0, tie_word_embeddings=tied)
    for model in (T5ForConditionalGeneration(config).double().eval(), bart(encoder_layers=1, decoder_layers=1)):
        (batch,) = _with_decoder_inputs(model, [padded()], lambda _text: None)
        received_by_head: list[Tensor] = []
        handle = model.lm_head.register_forward_pre_hook(
            lambda _module, inputs, found=received_by_head: found.append(inputs[0].detach())
        )
        with torch.no_grad():
            model(**batch)
        handle.remove()
        assert not torch.equal(batch["decoder_attention_mask"], batch["attention_mask"])  # as long, one place off
        real = received_by_head[0][batch["decoder_attention_mask"] == 1]
        shorter = {**batch, **{name: batch[name][:, :6] for name in ("input_ids", "attention_mask")}}
        states = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        encoded = {name: value for name, value in batch.items() if name != "input_ids"} | {"encoder_outputs": (states,)}
        for given in (batch, encoded):
            found = measure_inputs(model, {"lm_head": model.lm_head}, [shorter, given], forward, iter)["lm_head"]
            before = measure_inputs(model, {"lm_head": model.lm_head}, [shorter], forward, iter)["lm_head"]
            assert torch.allclose(found - before, real.T @ real, rtol=1e-9)
        model.lm_head = nn.Sequential(nn.GELU(), model.lm_head)
        (activation,) = (Activation(n, m) for n, m in model.named_modules() if n == "lm_head.0")
        seen = calibrate(model, [activation], [batch], forward)
        assert seen[activation.name].total == len(real) * 16
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_recovery_by_states_is_refused_where_half_of_the_blocks_are_the_encoders() -> None:
    model = bart(encoder_layers=1, decoder_layers=2)
    with pytest.raises(ValueError, match="BartForConditionalGeneration has an encoder and a decoder"):
        find_blocks(model)


def test_tokens_in_one_row_are_told_by_their_number_and_other_shapes_count() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.arange(12.0).reshape(2, 3, 2)
    kept = torch.tensor([[0.0, 1], [2, 3], [6, 7]])
    assert torch.equal(counted(x, mask), kept)
    assert torch.equal(counted(x.flatten(0, 1), mask), kept)
    for other in (torch.zeros(2, 3), torch.zeros(2, 4, 5), torch.zeros(7), torch.zeros(5, 2)):
        assert counted(other, mask) is other


def test_a_recovery_learns_nothing_from_padding() -> None:
    student = convert(llama(), [padded()], family="hermite", degree=4).model
    inputs, everything = (
        next(iter(received(student, batch).values())) for batch in (padded(), {"input_ids": padded()["input_ids"]})
    )
    assert float(everything.max()) > 1.5 * float(inputs.max())
    other = padded()
    other["input_ids"] = torch.where(other["attention_mask"] == 1, other["input_ids"], 59)
    first, second = (distill(llama(), copy.deepcopy(student), [batch], steps=1) for batch in (padded(), other))
    assert first == pytest.approx(second, rel=1e-9)


def test_a_model_that_is_told_of_padding_by_other_words_counts_all() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(2, 3, 4)
    found = calibrate(model, [Activation("1", model[1])], [x], forward)
    assert found["1"].total == x.numel()
