"""Blocks that go: the map that stands for them, where the cut is made, and models that come back with fewer blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_support import LLAMA_SIZES, randomise
from torch import Tensor, nn

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, read_description
from polytrope.models.convert import Conversion, convert
from polytrope.models.convert_options import DropBlocks
from polytrope.models.drop_blocks import drop_and_map, solve_map
from polytrope.models.factors import restore_factors
from polytrope.models.inputs import forward

GPT2 = {"vocab_size": 61, "sequence_length": 12, "n_layer": 5, "n_head": 2, "n_embd": 16}
CONVNEXT = {"depths": [1, 3], "dims": [8, 12], "num_classes": 3, "patch_size": 1, "layer_scale": 0.5, "drop_path": 0.3}


def gpt2(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(build_model("gpt2", GPT2 | changes).double(), 0.1)


def convnext() -> nn.Module:
    torch.manual_seed(0)
    return randomise(build_model("convnext", CONVNEXT).double(), 0.1)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return randomise(LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES)), 0.1)


def tokens() -> list[Tensor]:
    return list(torch.randint(0, 61, (12, 12), generator=torch.Generator().manual_seed(1)).split(5))


def images() -> list[Tensor]:
    return list(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double().split(4))


def unmerged(model: Any, before: Any, projection: Any, gone: list[Any], mapped: Tensor, inputs: Tensor) -> Tensor:
    """The model whose dropped blocks hand on what they are given, and whose map stands beside the layer before it."""
    scale = before.gamma if hasattr(before, "gamma") else None
    handles = [
        projection.register_forward_hook(
            lambda _module, _inputs, output: (
                (output if scale is None else output * scale) @ mapped / (1 if scale is None else scale)
            )
        ),
        *(block.register_forward_hook(lambda _module, inputs, _output: inputs[0]) for block in gone),
    ]
    with torch.no_grad():
        found: Tensor = model(inputs)
    for handle in handles:
        handle.remove()
    return found


def test_a_planted_map_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, planted = (torch.randn(rows, 16, dtype=torch.float64, generator=generator) for rows in (500, 16))
    found = solve_map(outputs.T @ outputs, outputs.T @ (outputs @ planted), ridge=0.0)
    assert (found - planted).abs().max() < 1e-14
    with pytest.raises(ValueError, match="all 0 or not finite"):
        solve_map(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["gpt2", "factored", "convnext"])
def test_the_merged_map_is_the_map(kind: str) -> None:
    """That of least squares over all vectors, found here by a solver that sees them all at once."""
    model: Any = convnext() if kind == "convnext" else gpt2()
    if kind == "factored":
        restore_factors(model, {"transformer.h.1.mlp.c_proj": 3})
        model.double()
    data, blocks = (images(), [2, 3]) if kind == "convnext" else (tokens(), [2, 3])
    whole = copy.deepcopy(model)
    before, gone = whole.blocks[1], [whole.blocks[number] for number in blocks]
    projection = before.pwconv2 if kind == "convnext" else before.mlp.c_proj
    seen: dict[str, list[Tensor]] = {"mlp": [], "before": [], "after": []}
    for name, module in (("mlp", projection), ("before", before), ("after", gone[-1])):
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen[name].append(output.detach()))
    for batch in data:
        whole(batch)

    def rows(name: str) -> Tensor:
        states = [state.movedim(1, -1) if kind == "convnext" and name != "mlp" else state for state in seen[name]]
        return torch.cat([state.flatten(0, -2) for state in states])

    added = rows("mlp") * before.gamma.detach() if kind == "convnext" else rows("mlp")
    behind, state = rows("after"), rows("before")
    wanted = behind - (state - added)
    weight = 1e-6 * added.square().sum() / added.shape[1]
    stacked = torch.cat([added, weight.sqrt() * torch.eye(added.shape[1])])
    expected = torch.linalg.lstsq(stacked, torch.cat([wanted, torch.zeros_like(stacked[: added.shape[1]])])).solution
    made = drop_and_map(model, data, DropBlocks(blocks=(2, 3)), forward)
    with torch.no_grad():
        assert (model(data[0]) - unmerged(whole, before, projection, gone, expected, data[0])).abs().max() < 1e-10
    error = float((wanted - added @ expected).norm() / behind.norm())
    without = float((behind - state).norm() / behind.norm())
    assert made.relative_error == pytest.approx(error, rel=1e-9)
    assert made.relative_error_without == pytest.approx(without, rel=1e-9)
    assert error < without
    if kind == "convnext":
        assert bool((model.blocks[1].gamma == 1).all())
        assert bool((model.blocks[0].gamma != 1).all())


def test_blocks_that_do_nothing_are_found_and_cost_nothing() -> None:
    model: Any = gpt2()
    with torch.no_grad():
        for block in model.blocks[2:4]:
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
        expected = model(tokens()[0])
    made = convert(model, tokens(), drop_blocks={"count": 2})
    dropped = made.dropped
    assert dropped is not None
    assert dropped.blocks == ("transformer.h.2", "transformer.h.3")
    assert dropped.into == "transformer.h.1.mlp.c_proj"
    assert dropped.total == 5
    assert set(dropped.distances) == {"transformer.h.0", "transformer.h.1", "transformer.h.2"}
    assert dropped.distances["transformer.h.1"] < 1e-12 < dropped.distances["transformer.h.0"]
    assert dropped.relative_error < 1e-5
    with torch.no_grad():
        assert (made.model(tokens()[0]) - expected).abs().max() < 1e-4
    assert made.difference < 1e-5
    assert len(model.blocks) == 5
    assert model.config.n_layer == 5


def test_distances_are_mean_cosine_distances_of_the_states_that_count() -> None:
    model = llama()
    batch = {"input_ids": tokens()[0], "attention_mask": torch.ones(5, 12, dtype=torch.int64)}
    batch["attention_mask"][:3, 7:] = 0
    states: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _module, _inputs, output: states.append(output.detach()))
    with torch.no_grad():
        model(**batch)
    kept = [state[batch["attention_mask"] == 1].double() for state in states]
    expected = {
        f"model.layers.{number}": float((1 - nn.functional.cosine_similarity(kept[number], kept[number + 2])).mean())
        for number in range(3)
    }
    dropped = convert(model, [batch], drop_blocks={"count": 2}).dropped
    assert dropped is not None
    assert dropped.distances == pytest.approx(expected, rel=1e-9)
    nearest = min(expected, key=lambda name: expected[name])
    assert dropped.into == f"{nearest}.mlp.down_proj"


def test_a_smaller_gpt2_comes_back_with_what_its_blocks_had(tmp_path: Path) -> None:
    activations = ["gelu", "relu", "silu", "tanh", {"name": "hermite", "degree": 3}]
    attention = ["softmax", {"name": "power", "power": 2}, "softmax", "softmax", {"name": "power", "power": 2}]
    torch.manual_seed(0)
    model = randomise(build_model("gpt2", GPT2 | {"activation": activations, "attention": attention}), 0.1)
    made = convert(model, tokens(), drop_blocks={"blocks": [1, 2]})
    made.save(tmp_path)
    config = read_description(tmp_path)["config"]
    assert config["n_layer"] == 3
    assert [entry if isinstance(entry, str) else entry["name"] for entry in config["activation"]] == [
        "gelu",
        "tanh",
        "hermite",
    ]
    assert config["attention"] == ["softmax", "softmax", {"name": "power", "power": 2}]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(tokens()[0]), made.model(tokens()[0]))
    assert Conversion.load(tmp_path).dropped == made.dropped
    assert made.parameters is not None
    assert made.parameters[1] == sum(parameter.numel() for parameter in made.model.parameters())
    assert "2 of 5 blocks dropped: transformer.h.1, transformer.h.2" in made.report()
    assert "activation" not in made.report()


def test_a_convnext_loses_blocks_within_a_stage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(build_model("convnext", CONVNEXT), 0.1)
    data = [batch.float() for batch in images()]
    made = convert(model, data, drop_blocks={"count": 1}, family="hermite", degree=4)
    assert made.dropped is not None
    assert set(made.dropped.distances) == {"stages.1.0", "stages.1.1"}
    assert len(made.activations) == 3
    made.save(tmp_path)
    loaded: Any = load_model(tmp_path)
    assert loaded.config.depths == [1, 2]
    assert [block.drop_path for block in loaded.blocks] == [block.drop_path for block in made.model.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), made.model(data[0]))


def test_a_smaller_llama_is_one_that_transformers_reads_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama()
    made = convert(model, [{"input_ids": batch} for batch in tokens()], drop_blocks={"blocks": [2, 3]})
    made.save(tmp_path)
    assert not (tmp_path / "modeling_polytrope.py").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == 3
    with torch.no_grad():
        assert torch.equal(loaded(tokens()[0]).logits, made.model(tokens()[0]).logits)
        options = {"max_new_tokens": 6, "do_sample": False}
        expected = loaded.generate(tokens()[0][:2], use_cache=False, **options)
        assert torch.equal(made.model.generate(tokens()[0][:2], use_cache=True, **options), expected)  # type: ignore[operator]
    assert len(model.model.layers) == model.config.num_hidden_layers == 5


def test_what_a_configuration_says_of_each_layer_stays_with_it(tmp_path: Path) -> None:
    from transformers import (
        AutoModelForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        SmolLM3Config,
        SmolLM3ForCausalLM,
    )

    torch.manual_seed(0)
    sliding = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    rope = {"no_rope_layers": [1, 0, 0, 1, 0], "layer_types": sliding, "sliding_window": 4, "use_sliding_window": True}
    smol = SmolLM3ForCausalLM(SmolLM3Config(**LLAMA_SIZES, **rope, pad_token_id=0))
    experts = {"num_experts": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
    dense = Qwen3MoeForCausalLM(Qwen3MoeConfig(**LLAMA_SIZES, **experts, mlp_only_layers=[0, 1, 2, 3, 4]))
    for model, expected in (
        (smol, {"no_rope_layers": [1, 0, 0], "layer_types": [sliding[0], sliding[1], sliding[4]]}),
        (dense, {"mlp_only_layers": [0, 1, 2]}),
    ):
        data = [{"input_ids": batch} for batch in tokens()]
        made = convert(randomise(model, 0.1), data, drop_blocks={"blocks": [2, 3]})
        made.save(tmp_path / model.config.model_type)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / model.config.model_type).eval()
        assert {name: getattr(loaded.config, name) for name in expected} == expected
        with torch.no_grad():
            assert torch.equal(loaded(tokens()[0]).logits, made.model(tokens()[0]).logits)


def test_what_cannot_be_said_of_fewer_layers_is_refused_by_name() -> None:
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

    data = [{"input_ids": batch} for batch in tokens()]
    plain = (LlamaForCausalLM, LlamaConfig)
    for (kind, settings), changes, said in (
        (plain, {"layer_map": [0, 0, 2, 2, 4]}, r"layer_map = \[0, 0, 2, 2, 4\], and nothing says what that becomes"),
        (plain, {"block_rows": {"1": 8}}, "block_rows = {'1': 8}, and nothing says"),
        (plain, {"moe_layers": [1, 5]}, r"moe_layers = \[1, 5\], and it should be numbers of layers"),
        (plain, {"no_rope_layers": [1]}, r"no_rope_layers = \[1\], and it should be one entry per layer"),
        (
            (DiffLlamaForCausalLM, DiffLlamaConfig),  # what it takes off its attention grows with the layer's number
            {},
            r"`model.layers.3` of DiffLlamaForCausalLM .*: `self_attn` would have lambda_init = 0.35\d*, and has 0.55",
        ),
    ):
        config = settings(**LLAMA_SIZES | {"num_key_value_heads": 2})
        for name, value in changes.items():
            setattr(config, name, value)
        given: Any = randomise(kind(config), 0.1)
        with pytest.raises(ValueError, match=f"drop_blocks: .*{said}"):
            convert(given, data, drop_blocks={"blocks": [1, 2]}, in_place=True)
        assert len(given.model.layers) == given.config.num_hidden_layers == 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"count": 5}, "count: 5 blocks cannot go: there are 5 in a row"),
        ({}, "give one of count .* and blocks"),
        ({"count": 1, "blocks": [1, 2]}, "give one of count .* and blocks"),
        ({"blocks": [0, 1]}, "block 0 has none before it"),
        ({"blocks": [3, 2]}, r"expected \[first, last\] with first ≤ last"),
        ({"blocks": [3, 5]}, r"\[3, 5\] goes beyond the last block, 4"),
        ({"blocks": [3]}, r"blocks: expected \[first, last\], got \[3\]"),
        ({"count": "two"}, "count: expected an integer, got 'two'"),
        ({"number": 2}, "there is no number; there are count, blocks"),
    ],
)
def test_cuts_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"drop_blocks: .*{said}"):
        convert(gpt2(), tokens(), drop_blocks=given)


def test_stages_are_not_cut_across() -> None:
    for blocks, said in (([1, 1], "1 is the first of a stage"), ([3, 4], "goes beyond the last block, 3")):
        with pytest.raises(ValueError, match=said):
            convert(convnext(), images(), drop_blocks={"blocks": blocks})
    with pytest.raises(ValueError, match="3 blocks cannot go: there are 3 in one stage"):
        convert(convnext(), images(), drop_blocks={"count": 3})
    wide = build_model("convnext", CONVNEXT | {"depths": [2, 2]})
    with pytest.raises(ValueError, match=r"\[1, 2\] goes beyond its stage, which ends with 1"):
        convert(wide, images(), drop_blocks={"blocks": [1, 2]})


def test_models_whose_blocks_cannot_go_are_refused_by_name() -> None:
    from transformers import BertConfig, BertModel, Gemma2Config, Gemma2ForCausalLM

    bert = BertModel(
        BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    for model, data, said in (
        (build_model("mlp", {"inputs": 4}), [torch.randn(3, 4)], "mlp has no blocks that add"),
        (gpt2(scale_attn_by_inverse_layer_idx=True), tokens(), "scale_attn_by_inverse_layer_idx divides"),
        (gpt2(feedforward="quadratic"), tokens(), r"`transformer.h.0.mlp.c_proj` is a QuadraticLinear"),
        (nn.Sequential(nn.Linear(4, 4)), [torch.randn(3, 4)], "a Sequential is neither a GPT-2 or ConvNeXt"),
        (bert, [{"input_ids": tokens()[0]}], "BertModel has 0 lists of blocks"),
        (
            Gemma2ForCausalLM(Gemma2Config(**LLAMA_SIZES)),
            [{"input_ids": tokens()[0]}],
            "Gemma2ForCausalLM does something else to the output of its `mlp.down_proj`",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            convert(model, data, drop_blocks={"blocks": [1, 1]}, in_place=True)


def test_after_an_error_the_model_is_as_it_was() -> None:
    model: Any = gpt2()
    names, config = [name for name, _ in model.named_modules()], model.config
    with torch.no_grad():
        expected = model(tokens()[0])
    with pytest.raises(ValueError, match="not of a type to convert"):
        convert(model, tokens(), drop_blocks={"count": 2}, family="hermite", types=["ReLU"], in_place=True)
    assert [name for name, _ in model.named_modules()] == names
    assert model.config is config
    with torch.no_grad():
        assert torch.equal(model(tokens()[0]), expected)
    wide: Any = convnext()
    scales = [block.gamma for block in wide.blocks]
    with pytest.raises(ValueError, match="not of a type to convert"):
        convert(wide, images(), drop_blocks={"count": 1}, family="hermite", types=["ReLU"], in_place=True)
    assert all(block.gamma is scale for block, scale in zip(wide.blocks, scales, strict=True))
