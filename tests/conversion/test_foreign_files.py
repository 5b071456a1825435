"""Files as others leave them: wrapped names, nested dicts, several weight files, stale pointers; and those we write."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_support import CONVNEXT, GPT2, images, own_model, tokens, write_bert, write_tokenizer
from safetensors.torch import load_file, save_file
from safetensors.torch import save_model as save_safetensors_model
from torch import nn

from polytrope.models import ARCHITECTURES, build_model, find_architecture
from polytrope.models.checkpoint import activation_modules, load_model, save_model
from polytrope.models.configurations import activation_configs
from polytrope.models.foreign import original_settings
from polytrope.models.formats import read_model
from polytrope.models.formats.deepspeed import read_state
from polytrope.models.formats.huggingface import save_huggingface
from polytrope.models.surgery import replace_module
from polytrope.ops import build_activation

ASKED = {"n_head": 2, "activation": "gelu_tanh"}


def made(architecture: str, **changes: Any) -> nn.Module:
    """The same model each time."""
    torch.manual_seed(0)
    return own_model(architecture, **changes)


def output(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(batch)
    return result if isinstance(result, torch.Tensor) else result[0]


def weights(architecture: str, **changes: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made(architecture, **changes).state_dict().items()}


PREFIXES = [
    *("", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module.", "model."),
    *("model._orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "ema_model.module.", "net.gpt._orig_mod."),
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_names_go_in_any_order(tmp_path: Path, prefix: str) -> None:
    for architecture, config, batch in (("gpt2", ASKED, tokens()), ("convnext", {}, images())):
        state = {prefix + name: tensor for name, tensor in weights(architecture).items()}
        state["n_averaged"] = torch.tensor(3)  # of torch.optim.swa_utils
        torch.save({"state_dict": state, "epoch": 1}, tmp_path / "m.ckpt")
        read = read_model(tmp_path / "m.ckpt", config)
        assert torch.equal(output(read, batch), output(made(architecture), batch))


def test_wrappers_around_single_blocks_go_as_well(tmp_path: Path) -> None:
    state = {
        re.sub(r"(h\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name): tensor
        for name, tensor in weights("gpt2").items()
    }
    torch.save(state, tmp_path / "m.pt")
    assert torch.equal(output(read_model(tmp_path / "m.pt", ASKED), tokens()), output(made("gpt2"), tokens()))


def test_two_models_in_one_file_are_refused(tmp_path: Path) -> None:
    state = weights("convnext")
    other = {name: tensor + 1 for name, tensor in state.items()}
    both = {f"model.{name}": t for name, t in state.items()} | {f"ema_model.{name}": t for name, t in other.items()}
    torch.save({"state_dict": both}, tmp_path / "lightning.ckpt")
    with pytest.raises(ValueError, match=r"lightning\.ckpt: .* begin with 'ema_model\.', 'model\.'"):
        read_model(tmp_path / "lightning.ckpt")
    torch.save({"state_dict": state, "state_dict_ema": other}, tmp_path / "timm.pth")
    with pytest.raises(ValueError, match=r"timm\.pth holds several models, below state_dict, state_dict_ema"):
        read_model(tmp_path / "timm.pth")
    torch.save(
        {"module." + name: t for name, t in state.items()} | {"head.bias": state["head.bias"] + 1}, tmp_path / "c.pt"
    )
    with pytest.raises(ValueError, match=r"module\.head\.bias and head\.bias are both head\.bias, and differ"):
        read_model(tmp_path / "c.pt")


@pytest.mark.parametrize("keys", [("ema",), ("net",), ("state_dict_ema",), ("ema", "module"), ("model",)], ids=str)
def test_state_dicts_lie_below_any_name(tmp_path: Path, keys: tuple[str, ...]) -> None:
    content: dict[str, Any] = weights("convnext")
    for key in reversed(keys):
        content = {key: content, "epoch": torch.tensor(4), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    torch.save(content | {"args": {"lr": 0.1}}, tmp_path / "m.pth")
    assert torch.equal(output(read_model(tmp_path / "m.pth"), images()), output(made("convnext"), images()))


def test_settings_below_the_name_of_the_weights_are_no_weights(tmp_path: Path) -> None:
    torch.save({"model": {"width": 8, "scale": 0.5}, "state_dict": weights("convnext")}, tmp_path / "m.pth")
    assert torch.equal(output(read_model(tmp_path / "m.pth"), images()), output(made("convnext"), images()))


def nanogpt(directory: Path, model_args: dict[str, Any] | None, **changes: Any) -> Path:
    content: dict[str, Any] = {"model": weights("gpt2", **changes), "optimizer": {}, "iter_num": 100, "config": {}}
    if model_args is not None:
        sizes = {"n_layer": 2, "n_embd": 16, "block_size": 24, "bias": True, "vocab_size": 97, "dropout": 0.1}
        content["model_args"] = sizes | model_args
    torch.save(content, directory / "ckpt.pt")
    return directory / "ckpt.pt"


def test_nanogpt_says_its_heads_and_is_asked_for_its_activation(tmp_path: Path) -> None:
    for heads, activation in ((1, "gelu_tanh"), (4, "gelu"), (16, "gelu")):
        path = nanogpt(tmp_path, {"n_head": heads}, n_head=heads, activation=activation)
        read = read_model(path, {"activation": activation})
        assert torch.equal(output(read, tokens()), output(made("gpt2", n_head=heads, activation=activation), tokens()))
        assert read.config.dropout == 0.1  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"activation: the file does not say, .*--set activation=.* n_head = 16"):
        read_model(path)
    for changes, config, message in (
        ({"n_head": 16, "rotary": True}, ASKED, "model_args: rotary = True: nanoGPT has no such field"),
        ({"n_head": 16, "n_layer": 3}, ASKED, "n_layer: the shapes of the weights say 2, the file 3"),
        ({"n_head": 16}, ASKED, "n_head: the file says 16, what was given 2"),
    ):
        with pytest.raises(ValueError, match=message):
            read_model(nanogpt(tmp_path, changes), config)
    with pytest.raises(ValueError, match=r"n_head, activation: the file does not say"):
        read_model(nanogpt(tmp_path, None))


def test_heads_that_are_not_the_embedding_are_read_or_refused(tmp_path: Path) -> None:
    torch.save(weights("gpt2", tie_word_embeddings=False), tmp_path / "untied.pt")
    read = read_model(tmp_path / "untied.pt", ASKED)
    assert torch.equal(output(read, tokens()), output(made("gpt2", tie_word_embeddings=False), tokens()))
    save_huggingface(tmp_path / "hf", read, {}, None)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(
        ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight, but tie_word_embeddings"
    ):
        read_model(tmp_path / "hf")
    save_safetensors_model(made("gpt2"), str(tmp_path / "m.safetensors"))  # keeps the head, not the embedding
    assert "transformer.wte.weight" not in load_file(tmp_path / "m.safetensors")
    assert torch.equal(output(read_model(tmp_path / "m.safetensors", ASKED), tokens()), output(made("gpt2"), tokens()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in weights("gpt2").items()}
    torch.save(state, tmp_path / "m.pt")
    read = read_model(tmp_path / "m.pt", ASKED).state_dict()
    assert all(
        torch.equal(read[name], tensor.float()) and read[name].dtype == torch.float32 for name, tensor in state.items()
    )
    write_bert(tmp_path / "bert").to(dtype).save_pretrained(tmp_path / "half")  # type: ignore[operator]
    bert = read_model(tmp_path / "half").state_dict()
    assert bert["embeddings.word_embeddings.weight"].dtype == torch.float32
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(bert[name], tensor.float()) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.int8, r"c_fc\.weight is int8, the model's is float32: quantised weights are not read"),
        (torch.float8_e4m3fn, r"c_fc\.weight is float8_e4m3fn, .*quantised"),
        (torch.float64, r"c_fc\.weight is float64, which float32 would round"),
    ],
)
def test_other_numbers_are_refused(tmp_path: Path, dtype: torch.dtype, message: str) -> None:
    state = weights("gpt2")
    state["transformer.h.0.mlp.c_fc.weight"] = state["transformer.h.0.mlp.c_fc.weight"].to(dtype)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path / "m.pt", ASKED)


def test_parts_of_weights_and_tensors_without_numbers_are_refused(tmp_path: Path) -> None:
    part = {name: tensor for name, tensor in weights("gpt2").items() if "h.1." not in name}
    save_file(
        {name: t for name, t in part.items() if name != "lm_head.weight"}, tmp_path / "m-00001-of-00002.safetensors"
    )
    with pytest.raises(ValueError, match=r"m-00001-of-00002\.safetensors is one part of the weights"):
        read_model(tmp_path / "m-00001-of-00002.safetensors", ASKED)
    for changed in (part["lm_head.weight"].to("meta"), part["lm_head.weight"].to_sparse()):
        torch.save(part | {"lm_head.weight": changed}, tmp_path / "m.pt")
        with pytest.raises(ValueError, match=r"m\.pt: lm_head\.weight has no numbers"):
            read_model(tmp_path / "m.pt", ASKED)


def test_of_several_weight_files_the_one_that_transformers_reads_counts(tmp_path: Path) -> None:
    model, older = made("gpt2"), made("gpt2", activation="relu")
    with torch.no_grad():
        older.lm_head.weight.add_(1.0)  # type: ignore[union-attr, operator]
    save_huggingface(tmp_path / "hf", model, {}, None)
    save_huggingface(tmp_path / "old", older, {}, None)
    stale = load_file(tmp_path / "old" / "model.safetensors")
    save_file(stale, tmp_path / "hf" / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(stale, tmp_path / "hf" / "pytorch_model.bin")
    assert torch.equal(output(read_model(tmp_path / "hf"), tokens()), output(model, tokens()))
    whole = load_file(tmp_path / "hf" / "model.safetensors")
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (tmp_path / "hf" / name).unlink()
    parts = {"pytorch_model-1.bin": sorted(whole)[::2], "pytorch_model-2.bin": sorted(whole)[1::2]}
    for file, names in parts.items():
        torch.save({name: whole[name] for name in names}, tmp_path / "hf" / file)
    listed = {name: file for file, names in parts.items() for name in names}
    path = tmp_path / "hf" / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": listed}))
    assert torch.equal(output(read_model(tmp_path / "hf"), tokens()), output(model, tokens()))
    for changed, message in (
        ({"transformer.wpe.weight": "../old/model.safetensors"}, "which is no file beside it"),
        ({"transformer.other": "pytorch_model-1.bin"}, r"lists transformer\.other in pytorch_model-1\.bin, which does"),
        ({"transformer.wpe.weight": "pytorch_model-3.bin"}, r"pytorch_model-3\.bin cannot be read"),
    ):
        path.write_text(json.dumps({"weight_map": listed | changed}))
        with pytest.raises(ValueError, match=message):
            read_model(tmp_path / "hf")


def test_directories_that_hold_something_else_beside_are_refused(tmp_path: Path) -> None:
    save_huggingface(tmp_path / "hf", made("gpt2"), {}, None)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for changes, message in (
        (
            {"architectures": ["GPT2ForSequenceClassification"]},
            r"architectures = \[.*only GPT2LMHeadModel or GPT2Model",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            read_model(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: an adapter"):
        read_model(tmp_path / "hf")
    (tmp_path / "hf" / "model.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds two models: model\.json"):
        read_model(tmp_path / "hf")


@pytest.mark.parametrize("save", ["own", "huggingface"])
def test_weights_beside_their_description_are_read_with_it(tmp_path: Path, save: str) -> None:
    if save == "own":
        save_model(tmp_path / "m", made("gpt2"))
    else:
        save_huggingface(tmp_path / "m", made("gpt2"), {}, None)
    with pytest.raises(ValueError, match=r"model\.safetensors: give the directory, whose \w+\.json says"):
        read_model(tmp_path / "m" / "model.safetensors", ASKED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": "2"}, r"model\.json: n_head: expected an integer, got '2'"),
        ({"n_layer": True}, "n_layer: expected an integer, got True"),
        ({"dropout": None}, "dropout: expected a number, got None"),
        ({"bias": 1}, "bias: expected true or false, got 1"),
        ({"layer_norm_epsilon": 0.0}, r"layer_norm_epsilon must be above 0"),
        ({"activation": 5}, "activation: expected a name, its settings, or a list of these, got 5"),
    ],
)
def test_settings_of_another_kind_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_model(tmp_path / "m", made("gpt2"))
    path = tmp_path / "m" / "model.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"config": content["config"] | changes}))
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path / "m")
    path.write_text(json.dumps({"format": 1, "architecture": "gpt2"}))
    with pytest.raises(ValueError, match=r"model\.json: config is missing"):
        read_model(tmp_path / "m")


def test_models_of_transformers_are_refused_with_weights_left_over_or_quantised(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    save_file(load_file(path) | {"other.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit BertModel: unexpected other\.weight"):
        read_model(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ValueError, match=r"config\.json: quantization_config = .* is not supported"):
        read_model(tmp_path / "bert")


def test_a_directory_of_transformers_is_read_out_of_a_deepspeed_checkpoint_in_it(tmp_path: Path) -> None:
    """As the Trainer leaves it: `config.json` beside `latest` and `global_step3`."""
    models = {"bert": write_bert(tmp_path / "bert"), "gpt2": made("gpt2", layer_norm_epsilon=1e-2)}
    save_huggingface(tmp_path / "gpt2", models["gpt2"], {}, None)
    for name, model in models.items():
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "global_step3").mkdir()
        torch.save({"module": model.state_dict()}, tmp_path / name / "global_step3" / "mp_rank_00_model_states.pt")
        (tmp_path / name / "latest").write_text("global_step3")
        assert torch.equal(output(read_model(tmp_path / name), tokens()), output(model, tokens()))


def test_the_newest_deepspeed_checkpoint_is_told_by_number_or_refused(tmp_path: Path) -> None:
    def write(tag: str, value: float) -> None:
        (tmp_path / tag).mkdir()
        state = {"module": {"transformer.wpe.weight": torch.tensor([value])}}
        torch.save(state, tmp_path / tag / "mp_rank_00_model_states.pt")

    for step in (100, 200, 1000):
        write(f"global_step{step}", step)
    assert read_state(tmp_path)["transformer.wpe.weight"] == 1000
    (tmp_path / "latest").write_text("global_step200\n")
    assert read_state(tmp_path)["transformer.wpe.weight"] == 200
    for named in ("global_step2000", "", "../other"):
        (tmp_path / "latest").write_text(named)
        with pytest.raises(ValueError, match=rf"latest names '{re.escape(named)}'.*global_step100, global_step1000"):
            read_state(tmp_path)
    (tmp_path / "latest").write_text("global_step1000")
    (tmp_path / "global_step1000" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ValueError, match=r"latest names 'global_step1000', but .*global_step1000 has no"):
        read_state(tmp_path)
    (tmp_path / "latest").unlink()
    write("best", 7)
    with pytest.raises(ValueError, match=r"several checkpoints and no file `latest`: best, global_step100"):
        read_state(tmp_path)


def test_deepspeed_models_split_in_other_ways_are_refused(tmp_path: Path) -> None:
    for rank in (0, 1):
        torch.save({"module": weights("gpt2")}, tmp_path / f"mp_rank_0{rank}_model_states.pt")
    with pytest.raises(ValueError, match=r"mp_rank_01_model_states\.pt: a model split by tensors, layers or experts"):
        read_state(tmp_path)
    shutil.move(tmp_path / "mp_rank_00_model_states.pt", tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (tmp_path / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(ValueError, match=r"weights of stage 3 are in \*_optim_states\.pt, which are missing"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "activation", ["relu", {"name": "relu"}, ["relu", "relu"], [{"layers": "0-", "name": "relu"}], "gelu_tanh"], ids=str
)
@pytest.mark.parametrize("architecture", ["gpt2", "convnext"])
def test_an_activation_that_the_format_can_name_is_written(tmp_path: Path, architecture: str, activation: Any) -> None:
    import transformers

    blocks = {"gpt2": 2, "convnext": 3}[architecture]
    if isinstance(activation, list) and activation == ["relu", "relu"]:
        activation = ["relu"] * blocks
    model = made(architecture, activation=activation)
    batch = {"gpt2": tokens(), "convnext": images()}[architecture]
    save_huggingface(tmp_path / "hf", model, {}, None)
    assert torch.equal(output(read_model(tmp_path / "hf"), batch), output(model, batch))
    kind = {"gpt2": "GPT2LMHeadModel", "convnext": "ConvNextForImageClassification"}[architecture]
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch).logits, output(model, batch), rtol=1e-5, atol=1e-4)


def test_what_the_format_cannot_name_is_refused_and_nothing_appears(tmp_path: Path) -> None:
    for architecture, activation in (("gpt2", ["relu", "gelu"]), ("convnext", ["relu", "gelu", "relu"])):
        with pytest.raises(ValueError, match=r"has one activation for all blocks; this one has gelu, relu"):
            save_huggingface(tmp_path / "hf", made(architecture, activation=activation), {}, None)
    learned = made("gpt2", activation="hermite3")
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.activation is a learned activation that `activations` does not"):
        save_huggingface(tmp_path / "hf", learned, {}, None)
    with pytest.raises(ValueError, match="has biases"):
        save_huggingface(tmp_path / "hf", made("gpt2", bias=False), {}, None)
    replaced = made("gpt2")
    replace_module(replaced, "transformer.h.1.mlp.activation", nn.Mish())
    for save in (
        lambda: save_huggingface(tmp_path / "hf", replaced, {}, None),
        lambda: save_model(tmp_path / "hf", replaced),
    ):
        with pytest.raises(ValueError, match=r"activation of layer 1 is Mish\(\), which is not `gelu_tanh`"):
            save()
    assert not (tmp_path / "hf").exists()


def test_learned_activations_beside_a_classical_one_come_back(tmp_path: Path) -> None:
    ranges = [{"layers": "0", "name": "relu"}, {"layers": "1", "name": "hermite", "degree": 3}]
    model = made("gpt2", activation=ranges)
    described = {"transformer.h.1.mlp.activation": activation_modules(model)[1].config()}  # type: ignore[operator]
    save_huggingface(tmp_path / "hf", model, described, None)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert original_settings(written)["activation_function"] == "relu" != written["activation_function"]
    assert torch.equal(output(read_model(tmp_path / "hf"), tokens()), output(model, tokens()))


class Doubled(nn.GELU):
    """Looks like a GELU, in every description, and is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)

    def __repr__(self) -> str:
        return "GELU(approximate='tanh')"


def test_a_model_that_computes_something_else_when_read_back_does_not_appear(tmp_path: Path) -> None:
    model = made("gpt2").train()
    replace_module(model, "transformer.h.1.mlp.activation", Doubled("tanh"))
    save_model(tmp_path / "own", made("gpt2", n_head=4))
    before = (tmp_path / "own" / "model.json").read_bytes()
    for save in (
        lambda: save_model(tmp_path / "own", model),
        lambda: save_huggingface(tmp_path / "hf", model, {}, None),
    ):
        with pytest.raises(ValueError, match=r"is not written: the model that was written computes something else"):
            save()
    assert all(module.training for module in model.modules())
    assert not (tmp_path / "hf").exists()
    assert (tmp_path / "own" / "model.json").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["model.json", "model.safetensors"]
    with pytest.raises(ValueError, match="float64"):
        save_model(tmp_path / "double", made("gpt2").double())


def test_writing_changes_no_random_numbers_and_keeps_other_files(tmp_path: Path) -> None:
    model = made("gpt2", dropout=0.1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("kept")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    save_model(tmp_path / "out", model)
    assert torch.equal(torch.rand(3), expected)
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_model(tmp_path / "half", model, weights=half)
    assert torch.equal(load_model(tmp_path / "half").state_dict()["lm_head.weight"], half["lm_head.weight"].float())


def test_dropout_and_the_end_of_text_are_kept(tmp_path: Path) -> None:
    import transformers

    model = made("gpt2", dropout=0.2)
    save_huggingface(tmp_path / "nothing", model, {}, None)
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "tokenizer.json").write_text('{"kind": "bytes"}')
    save_huggingface(tmp_path / "of_bytes", model, {}, tmp_path / "bytes")
    write_tokenizer(tmp_path / "words")
    content = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    content["added_tokens"][0] |= {"id": 5, "content": "<|endoftext|>"}
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(content))
    save_huggingface(tmp_path / "of_words", model, {}, tmp_path / "words")
    config = transformers.GPT2Config(vocab_size=97, n_positions=24, n_layer=2, n_head=2, n_embd=16, eos_token_id=[7, 9])
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs")
    save_huggingface(tmp_path / "again", read_model(tmp_path / "theirs"), {}, tmp_path / "theirs")
    save_model(tmp_path / "own", read_model(tmp_path / "theirs"), tokenizer=tmp_path / "theirs")
    save_huggingface(tmp_path / "third", read_model(tmp_path / "own"), {}, tmp_path / "own")
    ends = {"nothing": None, "of_bytes": 256, "of_words": 5, "again": [7, 9], "third": [7, 9]}
    for name, end in ends.items():
        written = transformers.GPT2Config.from_pretrained(tmp_path / name)
        assert written.eos_token_id == end, name
        dropout = 0.2 if name in ("nothing", "of_bytes", "of_words") else 0.1
        assert {written.resid_pdrop, written.embd_pdrop, written.attn_pdrop} == {dropout}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_record_of_every_architecture_is_true(name: str) -> None:
    record = find_architecture(name)
    sizes = {"gpt2": GPT2, "convnext": CONVNEXT, "mlp": {"widths": [8, 8]}}[name]
    model = build_model(name, sizes)
    assert record.name == model.architecture == name
    modules = activation_modules(model)
    assert len(modules) == len(activation_configs(model.config.activation, len(modules)))
    seen: list[int] = []
    for module in modules.values():
        module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].size(-1)))
    model(record.example(model.config))
    assert seen == record.activation_widths(model.config)
    assert all(isinstance(record.config(**preset), record.config) for preset in record.presets.values())
    assert torch.equal(build_activation("relu")(torch.tensor(-1.0)), torch.tensor(0.0))
