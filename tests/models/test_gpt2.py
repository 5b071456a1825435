"""GPT-2: equal to an independent implementation, loads published layouts, samples the same with and without a cache."""

from __future__ import annotations

import ctypes
import gc
import json
import math
from pathlib import Path

import psutil
import pytest
import torch
from architecture_support import WITHOUT_EFFECT, load_published
from torch import nn

from polytrope.models import build_model
from polytrope.models.formats import read_model
from polytrope.models.formats.huggingface import save_huggingface
from polytrope.models.gpt2 import (
    ARCHITECTURE,
    GPT2,
    GPT2_PRESETS,
    HUGGINGFACE_ALIASES,
    HUGGINGFACE_DEFAULTS,
    GPT2Config,
    config_from_huggingface,
)

SIZES = {"vocab_size": 97, "sequence_length": 16, "n_layer": 3, "n_head": 2, "n_embd": 32}


def make_model(**changes: object) -> GPT2:
    torch.manual_seed(0)
    model = build_model("gpt2", {**SIZES, "activation": "gelu_tanh", **changes})
    assert isinstance(model, GPT2)
    return model


def random_tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=16, n_layer=3, n_head=2, n_embd=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # biases and norms start trivial: give every parameter a say
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_logits_equal_huggingface_on_the_same_weights(reference: nn.Module) -> None:
    model = GPT2(config_from_huggingface(reference.config.to_dict())).eval()
    load_published(model, reference.state_dict(), ARCHITECTURE)
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=1e-5, atol=1e-5)


# Fields that change another function only (generation, sampling, the loss, other heads) or none.
UNUSED = {
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "reorder_and_upcast_attn", "id2label", "problem_type"),
    "use_cache",
}
REFUSED = {"n_inner": 96, "add_cross_attention": True, "is_encoder_decoder": True}


def test_every_field_of_transformers_configuration_is_known_with_its_default() -> None:
    theirs = pytest.importorskip("transformers").GPT2Config()
    fields = theirs.to_dict()
    assert {name: fields[name] for name in HUGGINGFACE_DEFAULTS} == HUGGINGFACE_DEFAULTS
    assert theirs.attribute_map == HUGGINGFACE_ALIASES
    assert set(fields) == {*HUGGINGFACE_DEFAULTS, *REFUSED, *WITHOUT_EFFECT, *UNUSED}


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"scale_attn_weights": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"layer_norm_epsilon": 1e-2},
        {"tie_word_embeddings": False},
        {"n_inner": 128},
        *[
            {"activation_function": name}
            for name in (
                *("gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast"),
                *("relu", "silu", "swish", "tanh"),
            )
        ],
    ],
    ids=str,
)
def test_every_supported_field_gives_the_logits_of_transformers(tmp_path: Path, fields: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = {"vocab_size": 97, "n_positions": 16, "n_layer": 3, "n_head": 2, "n_embd": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(read_model(tmp_path)(tokens), model(tokens).logits, rtol=1e-5, atol=2e-5)
    read = read_model(tmp_path)
    assert read.config.dropout == 0.1  # type: ignore[union-attr]
    save_huggingface(tmp_path / "again", read, {}, tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[
            ({name: value}, rf"config\.json: {name} = {json.dumps(value)} is not supported")
            for name, value in REFUSED.items()
        ],
        ({"is_causal": False}, "is_causal = false is not supported, only true"),
        ({"quantization_config": {"quant_method": "gptq"}}, 'quantization_config = {"quant_method": "gptq"} is not'),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"activation_function": "mish"}, 'activation_function = "mish" is not supported, only gelu'),
        ({"resid_pdrop": 0.3}, r"resid_pdrop = 0\.3, embd_pdrop = 0\.1, attn_pdrop = 0\.1 is not supported"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon = null: expected a finite number"),
        ({"n_head": "2"}, 'n_head = "2": expected an integer'),
        ({"hidden_size": 64}, "hidden_size = 64, but n_embd = 32"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "auto_map.AutoModelForCausalLM.* is not run"),
    ],
)
def test_fields_that_this_model_does_not_have_are_refused_by_name(fields: dict[str, object], message: str) -> None:
    sizes = {"vocab_size": 97, "n_positions": 16, "n_layer": 3, "n_head": 2, "n_embd": 32}
    config_from_huggingface(sizes)
    with pytest.raises(ValueError, match=message):
        config_from_huggingface(sizes | fields)


def test_second_names_of_fields_are_read() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 16}
    config = config_from_huggingface(sizes)
    assert (config.n_embd, config.n_layer, config.n_head, config.sequence_length) == (32, 3, 4, 16)


def test_a_mask_that_is_not_causal_is_refused() -> None:
    model = make_model()
    state = model.state_dict() | {"transformer.h.1.attn.bias": torch.ones(1, 1, 16, 16)}
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.attn\.bias is not the causal mask"):
        load_published(model, state, ARCHITECTURE)


def test_an_untied_head_learns_on_its_own_and_its_embedding_is_no_operation() -> None:
    tied, untied = make_model().eval(), make_model(tie_word_embeddings=False).eval()
    assert untied.lm_head.weight is not untied.transformer["wte"].weight
    assert untied.flops_per_token() == tied.flops_per_token()


def test_loads_its_own_layout_and_that_of_a_compiled_nanogpt_model() -> None:
    source, target = make_model(), make_model()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    state = {f"_orig_mod.{name}": tensor for name, tensor in source.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()  # nanoGPT's causal-mask buffer
    load_published(target, state, ARCHITECTURE)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


def test_refuses_weights_of_another_size_and_says_which(reference: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"missing transformer\.h\.3\.ln_1\.weight"):
        load_published(make_model(n_layer=4), reference.state_dict(), ARCHITECTURE)
    with pytest.raises(ValueError, match=r"wte\.weight is \[97, 32\], the model's is \[96, 32\]"):
        load_published(make_model(vocab_size=96), reference.state_dict(), ARCHITECTURE)


def test_loss_is_the_cross_entropy_of_the_logits_and_skips_ignored_targets() -> None:
    model, tokens = make_model().eval(), random_tokens(2, 9)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, :3] = -100
    expected = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(inputs, targets), expected)
    assert model(inputs, targets, reduction="sum").item() == pytest.approx(expected.item() * 13, rel=1e-5)


def test_no_position_sees_a_later_one() -> None:
    model, tokens = make_model().eval(), random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 97
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_initial_loss_is_that_of_a_uniform_guess_and_residual_layers_start_smaller() -> None:
    model, tokens = make_model(n_layer=8), random_tokens(4, 16)
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(97), abs=0.2)
    block = model.blocks[0]
    ratio = block.mlp.c_proj.weight.std() / block.attn.c_attn.weight.std()  # type: ignore[union-attr]
    assert ratio.item() == pytest.approx(1 / 4, rel=0.1)


def test_an_untrained_models_activations_see_inputs_of_variance_one() -> None:
    model, seen = make_model(n_embd=64, n_head=4), []
    model.blocks[0].mlp.activation.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _module, inputs: seen.append(inputs[0].std().item())
    )
    model(random_tokens(8, 16))
    assert seen == [pytest.approx(1.0, rel=0.1)]


def test_cached_sampling_equals_recomputing_everything_also_past_the_window() -> None:
    model, prompt = make_model().eval(), random_tokens(2, 5)
    with torch.no_grad():
        for parameter in model.parameters():  # an untrained model is too flat for argmax to tell anything
            parameter.mul_(4.0)
    generated = model.generate(prompt, 11, temperature=0.0)
    sequence = prompt
    for _ in range(11):
        sequence = torch.cat((sequence, model(sequence)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generated, sequence)
    assert model.generate(prompt, 40, temperature=0.0).shape == (2, 45)


def test_sampling_is_reproducible_and_honours_top_k() -> None:
    model, prompt = make_model().eval(), random_tokens(1, 3)
    first, second = (model.generate(prompt, 9, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(model.generate(prompt, 9, top_k=1), model.generate(prompt, 9, temperature=0.0))


def test_sampling_towards_temperature_zero_is_greedy_and_impossible_settings_are_refused() -> None:
    model, prompt = make_model(), random_tokens(1, 3)
    model.train()
    model.blocks[1].eval()  # frozen: generation gives each module its mode back
    greedy = model.generate(prompt, 5, temperature=0.0)
    for temperature in (1e-40, 1e-300, 1e-10):
        assert torch.equal(model.generate(prompt, 5, temperature=temperature), greedy)
    assert model.training
    assert [block.training for block in model.blocks] == [True, False, True]
    for settings, message in (
        ({"temperature": -1.0}, "temperature: expected a finite number of at least 0, got -1.0"),
        ({"temperature": math.nan}, "temperature: .* got nan"),
        ({"top_k": 0}, "top_k: expected None or a number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, 5, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens: expected at least one position to continue, got \[1, 0\]"):
        model.generate(prompt[:, :0], 5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_gradient(dropout: float) -> None:
    gradients = []
    for mode in ("none", "mlp", "block"):
        model = make_model(activation="hermite", dropout=dropout)
        model.set_activation_checkpointing(mode)  # type: ignore[arg-type]
        tokens = random_tokens(2, 9)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, *recomputed in zip(*gradients, strict=True):
        for other in recomputed:
            torch.testing.assert_close(plain, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("activation", ["gelu_tanh", "hermite"])
def test_recomputing_the_activations_saves_their_outputs(activation: str) -> None:
    """Resident memory after a forward pass; the outputs of 3 activations are 25 MB each here."""
    kept = {}
    model = make_model(n_embd=128, sequence_length=512, activation=activation)
    tokens = random_tokens(25, 512)[:, :512]
    for mode in ("none", "mlp", "block"):
        model.set_activation_checkpointing(mode)  # type: ignore[arg-type]
        model(tokens, tokens).backward()  # warm: buffers of the first pass count for none
        before = resident_memory()
        loss = model(tokens, tokens)
        kept[mode] = resident_memory() - before
        loss.backward()
    saved = (kept["none"] - kept["mlp"]) / (3 * 25 * 512 * 4 * 128 * 4)
    assert saved == pytest.approx(1.0, abs=0.15)
    assert kept["block"] < kept["mlp"]


def resident_memory() -> int:
    """Bytes, without what the allocator could give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def test_one_activation_per_layer() -> None:
    model = make_model(activation=["gelu", {"name": "hermite", "degree": 3}, "relu"])
    outputs = [block.mlp.activation(torch.tensor([-1.0])).item() for block in model.blocks]  # type: ignore[union-attr]
    assert outputs[0] == pytest.approx(-0.15865526)
    assert outputs[2] == 0.0
    assert [bool(list(block.mlp.activation.parameters())) for block in model.blocks] == [False, True, False]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="length 2 for 3 layers"):
        make_model(activation=["gelu", "relu"])


def test_activations_by_ranges_of_layers() -> None:
    ranges = [{"layers": "1-", "name": "hermite", "degree": 3}, {"layers": 0, "name": "gelu"}]
    model = make_model(activation=ranges)
    assert [bool(list(block.mlp.activation.parameters())) for block in model.blocks] == [False, True, True]  # type: ignore[union-attr]
    for layers, words in (("0-1", "two ranges"), ("2", "has layer 1"), ("1-3", "outside 0-2"), ("x", "is no range")):
        with pytest.raises(ValueError, match=words):
            make_model(activation=[{"layers": layers, "name": "relu"}, {"layers": 0, "name": "gelu"}])


def test_presets_have_the_published_parameter_counts() -> None:
    for name, millions in (("gpt2", 124.44), ("gpt2-medium", 354.82), ("gpt2-large", 774.03), ("gpt2-xl", 1557.61)):
        with torch.device("meta"):
            model = GPT2(GPT2Config(**GPT2_PRESETS[name], activation="gelu_tanh"))  # type: ignore[arg-type]
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_impossible_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"n_embd \(32\) must be a multiple of n_head \(5\)"):
        make_model(n_head=5)
    with pytest.raises(ValueError, match="unknown model setting n_layers"):
        build_model("gpt2", {"n_layers": 2})
    with pytest.raises(ValueError, match="unknown architecture `lstm`"):
        build_model("lstm", {})
    with pytest.raises(ValueError, match="17 positions, but the model has 16"):
        make_model()(random_tokens(1, 17))
