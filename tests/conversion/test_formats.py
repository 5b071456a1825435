"""Readers and writers: each on a small real file, and on files that are damaged or dangerous."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_support import CONVNEXT, images, own_model, randomise, tokens, write_bert
from safetensors.torch import load_file, save_file
from torch import nn

from polytrope.models.calibration import calibrate
from polytrope.models.checkpoint import save_model
from polytrope.models.conversion import FitOptions, apply, fit_layers
from polytrope.models.formats import detect_format, read_model
from polytrope.models.formats.deepspeed import read_state
from polytrope.models.formats.huggingface import read_weights, save_huggingface
from polytrope.models.formats.onnx import save_onnx
from polytrope.models.formats.plain import PlainActivation, save_table, tabulate
from polytrope.models.surgery import find_activations, replace_module
from polytrope.ops import build_activation
from polytrope.ops.interpolate import fit


def assert_same(model: nn.Module, other: nn.Module, batch: torch.Tensor, tolerance: float = 0.0) -> None:
    def outputs(network: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            result = network(batch)
        return result if isinstance(result, torch.Tensor) else result[0]

    torch.testing.assert_close(outputs(model), outputs(other), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("architecture", "batch"), [("gpt2", tokens()), ("convnext", images())])
def test_own_directories(tmp_path: Path, architecture: str, batch: torch.Tensor) -> None:
    model = own_model(architecture)
    save_model(tmp_path / "model", model)
    assert detect_format(tmp_path / "model") == "own"
    assert_same(read_model(tmp_path / "model"), model, batch)


@pytest.mark.parametrize(("architecture", "batch"), [("gpt2", tokens()), ("convnext", images())])
def test_huggingface_directories_of_own_models_are_read_back_and_by_transformers(
    tmp_path: Path, architecture: str, batch: torch.Tensor
) -> None:
    import transformers

    model = own_model(architecture)
    save_huggingface(tmp_path / "hf", model, {}, None)
    assert detect_format(tmp_path / "hf") == "huggingface"
    assert_same(read_model(tmp_path / "hf"), model, batch)
    kind = {"gpt2": "GPT2LMHeadModel", "convnext": "ConvNextForImageClassification"}[architecture]
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch).logits, model(batch), rtol=1e-4, atol=1e-4)


def test_bert_and_vit_directories_are_read_with_their_weights(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    bert = write_bert(tmp_path / "bert")
    assert_same(read_model(tmp_path / "bert"), bert, tokens())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vit = randomise(ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)))
    vit.save_pretrained(tmp_path / "vit")
    assert_same(read_model(tmp_path / "vit"), vit, images())


def test_a_converted_bert_comes_back_with_its_activations(tmp_path: Path) -> None:
    model = write_bert(tmp_path / "bert")
    configs = {}
    for found in find_activations(model):
        replace_module(model, found.name, fit(found.module, "hermite", 5, interval=(-3, 3)).build())
        configs[found.name] = model.get_submodule(found.name).config()
    save_huggingface(tmp_path / "converted", model, configs, tmp_path / "bert")
    assert (tmp_path / "converted" / "tokenizer.json").exists()
    assert_same(read_model(tmp_path / "converted"), model, tokens())


def write_transformers_model(directory: Path, name: str) -> nn.Module:
    """A small model of another architecture, as transformers saves it."""
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    kinds = {
        # One layer whose weights and activation serve all; NewGELUActivation.
        "albert": ("Albert", {"embedding_size": 8, "intermediate_size": 32, "hidden_act": "gelu_new"}),
        "llama": ("Llama", {"intermediate_size": 32, "num_key_value_heads": 2}),  # a gated MLP with SiLU
        "mobilenet": ("MobileNetV2", {"depth_multiplier": 0.35, "hidden_act": "relu6"}),
    }
    kind, options = kinds[name]
    config = getattr(transformers, f"{kind}Config")(**((sizes | options) if name != "mobilenet" else options))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config)
    if name == "mobilenet":
        with torch.no_grad():  # its batch norms learn the scale of their inputs
            for _ in range(40):
                model.train()(images() * 3)
        model.eval()
    else:
        randomise(model, 0.05)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    ("name", "classes"), [("albert", {"NewGELUActivation"}), ("llama", {"SiLUActivation"}), ("mobilenet", {"ReLU6"})]
)
def test_models_with_shared_gated_and_clipped_activations_are_converted_and_come_back(
    tmp_path: Path, name: str, classes: set[str]
) -> None:
    model = write_transformers_model(tmp_path / "model", name)
    batch = images() * 3 if name == "mobilenet" else tokens()
    found = find_activations(model, exclude=["pooler_activation"] if name == "albert" else [])[:4]
    assert {type(entry.module).__name__ for entry in found} == classes

    def run(network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = network(inputs)[0]
        return result

    original = run(model, batch)
    fits = fit_layers(found, calibrate(model, found, [batch], run), FitOptions(degree=10))
    apply(model, fits)
    assert all(entry.relative_error < 0.05 for entry in fits)
    moved = float((run(model, batch) - original).norm() / original.norm())
    assert 0 < moved < (2 if name == "mobilenet" else 0.01)  # random weights with batch norms magnify everything
    configs = {entry.name: entry.fit.config for entry in fits}
    save_huggingface(tmp_path / "converted", model, configs, tmp_path / "model")
    assert_same(read_model(tmp_path / "converted"), model, batch)


def test_an_activation_module_of_several_layers_is_written_once_and_comes_back_in_all(tmp_path: Path) -> None:
    model = write_bert(tmp_path / "bert")
    shared = model.get_submodule("encoder.layer.0.intermediate.intermediate_act_fn")
    replace_module(model, "encoder.layer.1.intermediate.intermediate_act_fn", shared)
    found = find_activations(model)
    assert [entry.name for entry in found] == ["encoder.layer.0.intermediate.intermediate_act_fn"]
    learned = fit("gelu", "hermite", 5, interval=(-3, 3)).build()
    replace_module(model, found[0].name, learned)
    assert model.get_submodule("encoder.layer.1.intermediate.intermediate_act_fn") is learned
    save_huggingface(tmp_path / "out", model, {found[0].name: learned.config()}, None)
    saved = [name for name in load_file(tmp_path / "out" / "model.safetensors") if "act_fn" in name]
    assert saved == [f"{found[0].name}.coefficients"]
    back = read_model(tmp_path / "out")
    second = "encoder.layer.1.intermediate.intermediate_act_fn"
    assert back.get_submodule(second) is back.get_submodule(found[0].name)
    assert_same(back, model, tokens())


def test_sharded_weights_and_pytorch_model_bin_are_read(tmp_path: Path) -> None:
    model = own_model("gpt2")
    save_huggingface(tmp_path / "hf", model, {}, None)
    whole = load_file(tmp_path / "hf" / "model.safetensors")
    torch.save(whole, tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert_same(read_model(tmp_path / "hf"), model, tokens())
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    names = sorted(whole)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: whole[name] for name in part}, tmp_path / "hf" / file)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    assert_same(read_model(tmp_path / "hf"), model, tokens())
    index.write_text(index.read_text()[:40])
    with pytest.raises(ValueError, match=r"index.json cannot be read"):
        read_model(tmp_path / "hf")


def timm_name(name: str) -> str:
    """timm's name of a parameter with the original code's name."""
    parts = name.split(".")
    if parts[0] == "downsample_layers":
        return ".".join(["stem", *parts[2:]] if parts[1] == "0" else ["stages", parts[1], "downsample", *parts[2:]])
    if parts[0] == "stages":
        leaf = ".".join(parts[3:]).replace("dwconv", "conv_dw")
        return ".".join(["stages", parts[1], "blocks", parts[2], leaf.replace("pwconv", "mlp.fc")])
    return {"norm": "head.norm.", "head": "head.fc."}[parts[0]] + parts[1]


def torchvision_name(name: str) -> str:
    """torchvision's name of a parameter with the original code's name."""
    parts = name.split(".")
    if parts[0] == "downsample_layers":
        return ".".join(["features", str(2 * int(parts[1])), *parts[2:]])
    if parts[0] == "stages":
        leaf = {"dwconv": "block.0", "norm": "block.2", "pwconv1": "block.3", "pwconv2": "block.5"}.get(parts[3])
        tail = "layer_scale" if leaf is None else f"{leaf}.{parts[4]}"
        return ".".join(["features", str(2 * int(parts[1]) + 1), parts[2], tail])
    return {"norm": "classifier.0.", "head": "classifier.2."}[parts[0]] + parts[1]


@pytest.mark.parametrize("rename", [timm_name, torchvision_name, str])
def test_convnext_state_dicts_of_timm_torchvision_and_the_original(tmp_path: Path, rename: object) -> None:
    model = own_model("convnext")
    state = {rename(name): tensor for name, tensor in model.state_dict().items()}
    if rename is torchvision_name:  # it keeps the scale as [channels, 1, 1]
        state = {name: t[:, None, None] if name.endswith("layer_scale") else t for name, t in state.items()}
    torch.save({"model": state}, tmp_path / "weights.pth")
    read = read_model(tmp_path / "weights.pth", {"activation": "gelu"})
    assert read.config.depths == CONVNEXT["depths"]
    assert_same(read, model, images())


def test_gpt2_state_dicts_with_their_sizes_read_off_the_shapes(tmp_path: Path) -> None:
    model = own_model("gpt2")
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "weights.safetensors")
    read = read_model(tmp_path / "weights.safetensors", {"n_head": 2, "activation": "gelu_tanh"})
    assert_same(read, model, tokens())
    with pytest.raises(ValueError, match=r"weights.safetensors: n_head, activation: the file does not say"):
        read_model(tmp_path / "weights.safetensors")


@pytest.fixture(scope="module")
def zero_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of ZeRO stages 1, 2 and 3, written by DeepSpeed with two ranks, and the weights they hold."""
    import subprocess
    import sys

    directory = tmp_path_factory.mktemp("zero")
    script = Path(__file__).parent / "write_zero_checkpoints.py"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, str(script), str(directory)], check=True, timeout=240, env=environment)
    return directory


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["stage", "frozen"])
def test_deepspeed_checkpoints_of_two_ranks(zero_checkpoints: Path, name: str, stage: int) -> None:
    path = zero_checkpoints / f"{name}{stage}"
    assert detect_format(path) == "deepspeed"
    expected = torch.load(zero_checkpoints / f"{name}{stage}.pt", weights_only=True)
    state = read_state(path)
    for key, tensor in expected.items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)
    model = read_model(path, {"n_head": 2, "activation": {"name": "hermite", "degree": 3}})
    assert torch.equal(model.state_dict()["transformer.h.1.mlp.activation.coefficients"],
                       expected["transformer.h.1.mlp.activation.coefficients"])  # fmt: skip


def test_a_deepspeed_checkpoint_without_one_rank_is_refused(zero_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(zero_checkpoints / "stage1", tmp_path / "copy")
    next((tmp_path / "copy").rglob("zero_pp_rank_1_*_optim_states.pt")).unlink()
    with pytest.raises(ValueError, match="1 of 2 ranks"):
        read_state(tmp_path / "copy")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_the_trainer_of_transformers_under_zero(
    zero_checkpoints: Path, tmp_path: Path, stage: int
) -> None:
    """`config.json` beside `latest` and its folder, without any file of weights."""
    shutil.copytree(zero_checkpoints / f"frozen{stage}", tmp_path / "checkpoint-1")
    config = {"model_type": "gpt2", "vocab_size": 97, "n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 16}
    (tmp_path / "checkpoint-1" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected transformer\.h\.0\.mlp\.activation\.coefficients"):
        read_model(tmp_path / "checkpoint-1")  # it was trained with learned activations, which config.json cannot say
    expected = torch.load(zero_checkpoints / f"frozen{stage}.pt", weights_only=True)
    assert read_weights(tmp_path / "checkpoint-1").keys() >= expected.keys()


class Dangerous:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(2)}, "extra": Dangerous(tmp_path / "created")}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt is not loaded: it holds more than tensors"):
        read_model(tmp_path / "weights.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Dangerous(tmp_path / "created")))
    with pytest.raises(ValueError, match=r"plain.pt"):
        read_model(tmp_path / "plain.pt")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("kind", ["own", "huggingface", "pt", "safetensors"])
def test_truncated_files_are_named(tmp_path: Path, kind: str) -> None:
    model = own_model("gpt2")
    if kind == "own":
        save_model(tmp_path / "model", model)
        path, damaged = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    elif kind == "huggingface":
        save_huggingface(tmp_path / "model", model, {}, None)
        path, damaged = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    else:
        path = damaged = tmp_path / f"weights.{kind}"
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.save(state, path) if kind == "pt" else save_file(state, path)
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=rf"{damaged.name}.* cannot be read"):
        read_model(path)


def test_paths_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        read_model(tmp_path / "absent")
    with pytest.raises(ValueError, match="no model directory"):
        read_model(tmp_path)
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(ValueError, match=r"ends in .safetensors"):
        read_model(tmp_path / "weights.txt")
    torch.save({"some.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="neither those of a GPT-2"):
        read_model(tmp_path / "other.pt")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        read_model(tmp_path / "hf")


def learned(family: str) -> nn.Module:
    return fit("gelu", family, 5, interval=(-4, 4)).build()


POLYNOMIALS = ("hermite", "chebyshev", "legendre")
FAMILIES = (*POLYNOMIALS, "fourier", "rational", "polyrelu", "tropical", "tropical_rational", "rational_spline")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_form_of_ordinary_operations(family: str) -> None:
    module = learned(family)
    x = torch.cat([torch.linspace(-9, 9, 301), torch.tensor([-60.0, 80.0])])
    with torch.no_grad():
        torch.testing.assert_close(PlainActivation(module)(x), module(x), rtol=1e-4, atol=2e-5)


def test_piecewise_linear_has_a_form_of_ordinary_operations() -> None:
    module = build_activation({"name": "piecewise_linear", "degree": 6, "interval": [-3, 3]})
    x = torch.linspace(-8, 8, 200)
    with torch.no_grad():
        torch.testing.assert_close(PlainActivation(module)(x), module(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one set of coefficients"):
        PlainActivation(build_activation({"name": "hermite", "num_parameters": 4}))


@pytest.mark.parametrize(
    "config",
    [
        {"name": "fourier", "degree": 5, "harmonic": True},
        {"name": "fourier", "degree": 5, "harmonic": True, "interval": [-2.0, 3.0]},
        {"name": "hermite", "degree": 5, "learnable_recurrence": True, "interval": [-2, 3], "variable": [0.5, 0.5]},
        {"name": "legendre", "degree": 4, "learnable_recurrence": True},
        {"name": "chebyshev", "degree": 6, "variable": [1.0, 3.0]},
        {"name": "hermite", "degree": 6, "variable": [1.0, 0.5], "interval": [-2.0, 3.0]},
        {"name": "rational", "degree": 3, "denominator_degree": 0, "interval": [-2.0, 3.0]},
        {"name": "polyrelu", "degree": 4, "interval": [-1.0, 2.0]},
        {"name": "affine", "base": "silu"},
        {"name": "rational_spline", "degree": 6},
    ],
    ids=str,
)
def test_variants_of_a_family_have_a_form_of_ordinary_operations(tmp_path: Path, config: dict[str, Any]) -> None:
    module, generator = build_activation(config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        x = torch.linspace(-6, 6, 240).reshape(2, 120)
        torch.testing.assert_close(PlainActivation(module)(x), module(x), rtol=1e-4, atol=1e-4)
    if config["name"] in ("fourier", "affine"):
        assert save_onnx(tmp_path / "activation.onnx", module, [x]).deviation <= 1e-4


@pytest.mark.parametrize(
    "config",
    [
        {"name": "rational", "degree": 12},  # 10⁴ to the twelfth is more than float32 holds; its leading terms are 0
        {"name": "rational", "degree": 8, "denominator_degree": 8, "init": "gelu"},
        {"name": "rational", "degree": 2, "denominator_degree": 5},
        {"name": "rational", "degree": 4, "denominator_degree": 3, "interval": [-20, 20]},
    ],
)
def test_ordinary_operations_of_a_quotient_do_not_overflow_far_out(config: dict[str, Any]) -> None:
    module = build_activation(config)
    size = torch.tensor([15.0, 17.0, 1e3, 1e4, 1e6, 1e9])
    x = torch.cat([-size, size])
    torch.testing.assert_close(PlainActivation(module)(x), module(x), rtol=2e-5, atol=1e-6)
    ends = torch.tensor([-math.inf, math.inf, math.nan])
    torch.testing.assert_close(PlainActivation(module)(ends), module(ends), equal_nan=True)


def test_what_is_not_elementwise_has_no_plain_form() -> None:
    with pytest.raises(ValueError, match="activation polynorm: only elementwise activations"):
        PlainActivation(build_activation("polynorm"))


@pytest.mark.parametrize("family", ["hermite", "fourier", "rational", "tropical_rational"])
def test_an_activation_runs_in_onnxruntime(tmp_path: Path, family: str) -> None:
    x = torch.linspace(-9, 9, 240).reshape(2, 120)
    assert save_onnx(tmp_path / "activation.onnx", learned(family), [x]).deviation <= 1e-4


@pytest.mark.parametrize(("architecture", "batch"), [("gpt2", tokens()), ("convnext", images())])
def test_a_converted_model_runs_in_onnxruntime_with_another_batch_size(
    tmp_path: Path, architecture: str, batch: torch.Tensor
) -> None:
    import onnx
    import onnxruntime

    model = own_model(architecture)
    for found in find_activations(model):
        replace_module(model, found.name, learned("hermite"))
    path = tmp_path / "model.onnx"
    written = save_onnx(path, model, [batch])
    assert written.deviation <= 1e-3
    assert written.free == (("batch", "length") if architecture == "gpt2" else ("batch",))
    assert written.reason is None
    assert {node.domain for node in onnx.load(path).graph.node} == {""}  # ordinary operators only
    if architecture == "gpt2":
        batch = batch[:, :7]  # sequences of another length, too
    (output,) = onnxruntime.InferenceSession(str(path)).run(None, {"input_0": batch[:1].numpy()})
    with torch.no_grad():
        expected = model(batch[:1]).numpy()
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_written_to_onnx_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    for architecture, batch in (("gpt2", tokens()), ("convnext", images())):
        assert save_onnx(tmp_path / "model.onnx", own_model(architecture).to(dtype), [batch]).deviation <= 1e-3


class Fixed(nn.Module):
    """Its trace keeps the length it was traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(97, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.from_numpy(np.arange(tokens.size(1)))
        mixed: torch.Tensor = self.table(tokens) * places[None, :, None]
        return mixed


def test_a_model_whose_trace_keeps_its_length_is_written_with_that_length(tmp_path: Path) -> None:
    import onnxruntime

    written = save_onnx(tmp_path / "model.onnx", Fixed(), [tokens()])
    assert written.deviation <= 1e-3
    assert written.free == ("batch",)
    assert "takes any batch, not more: onnxruntime " in written.limits()
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    assert session.get_inputs()[0].shape == ["batch", 20]


class Undoing(nn.Module):
    """Has an operator that ONNX does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x.unsqueeze(-1) @ x.unsqueeze(-2) + torch.eye(x.size(-1)))


def test_an_operator_that_onnx_does_not_have_is_named_without_printing_the_graph(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"ONNX export failed: .*linalg_inv"):
        save_onnx(tmp_path / "model.onnx", Undoing(), [torch.ones(2, 4)])
    printed = capfd.readouterr()
    assert "graph(" not in printed.out + printed.err
    assert not (tmp_path / "model.onnx").exists()


def test_queries_in_groups_and_a_decoder_are_written_with_free_lengths(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=1, **sizes)).eval()
    written = save_onnx(tmp_path / "llama.onnx", llama, [tokens()], ["input_ids"])
    assert written.free == ("batch", "length")
    assert llama.config._attn_implementation == "sdpa"  # a copy was changed
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    ).eval()
    named = {"input_ids": tokens(), "decoder_input_ids": tokens()[:, :9]}
    written = save_onnx(tmp_path / "t5.onnx", t5, list(named.values()), list(named))
    assert written.free == ("batch", "length")
    assert written.reason is None


def test_a_model_that_onnx_cannot_express_leaves_no_file(tmp_path: Path) -> None:
    module = build_activation({"name": "hermite", "glu": True})
    with pytest.raises(ValueError, match="one set of coefficients"):
        save_onnx(tmp_path / "model.onnx", module, [torch.ones(1, 4)])
    assert not (tmp_path / "model.onnx").exists()


def test_a_table_says_how_exact_it_is(tmp_path: Path) -> None:
    module = learned("hermite").double()
    table = save_table(tmp_path / "table.json", module, (-5.0, 5.0), 513)
    stored = json.loads((tmp_path / "table.json").read_text())
    assert stored == table
    x = np.random.default_rng(0).uniform(-5, 5, 4000)
    inside = np.interp(x, np.linspace(-5, 5, 513), stored["values"])
    with torch.no_grad():
        exact = module(torch.from_numpy(x)).numpy()
        beyond = float(module(torch.tensor([7.0], dtype=torch.float64)))
    assert np.abs(inside - exact).max() <= stored["maximum_error"] * 1.01 + 1e-12
    assert stored["values"][-1] + 2.0 * stored["slopes_outside"][1] == pytest.approx(beyond, abs=1e-9)
    free = build_activation({"name": "hermite", "degree": 3}).double()  # without an interval: no lines outside
    ends = torch.tensor([-2.0, 2.0], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(free(ends).sum(), ends)
    assert tabulate(free, (-2.0, 2.0))["slopes_outside"] == pytest.approx(slopes.tolist(), rel=1e-7)
    for interval in ((1.0, 1.0), (-math.inf, 1.0), (0.0, math.nan)):
        with pytest.raises(ValueError, match="finite lo < hi"):
            save_table(tmp_path / "other.json", module, interval)
    plain, in_place = (tabulate(nn.SiLU(inplace=inplace), (-2.0, 3.0), 9) for inplace in (False, True))
    assert plain == in_place
