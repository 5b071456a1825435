"""Converted models in transformers: loaded as converted or refused, with this package and without it, saved again."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conversion_support import images, own_model, randomise, read_json, tokens, write_bert, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

from polytrope.models.convert import convert as convert_model
from polytrope.models.foreign import original_settings
from polytrope.models.formats import read_model
from polytrope.models.formats.huggingface import save_huggingface
from polytrope.models.formats.remote_code import MODELING_FILE, check_functions, describe_activation, modeling_source
from polytrope.models.surgery import find_activations, replace_module
from polytrope.ops import build_activation, is_learnable_activation

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
# Class, its configuration, the `AutoModel…` that loads it, what its activations become.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", TEXT, "AutoModelForMaskedLM", {"name": "hermite", "degree": 8, "interval": [-3, 3]}),
    "vit": (
        "ViTForImageClassification",
        {name: size for name, size in TEXT.items() if name != "vocab_size"} | {"image_size": 32, "patch_size": 8},
        "AutoModelForImageClassification",
        {"name": "rational", "degree": 5, "init": "gelu"},
    ),
    # One layer whose weights and activation serve all.
    "albert": ("AlbertForMaskedLM", TEXT | {"embedding_size": 8}, "AutoModelForMaskedLM", {"name": "chebyshev"}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 97, "n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 16},
        "AutoModelForCausalLM",
        {"name": "fourier", "degree": 4, "interval": [-4, 4]},
    ),
    "llama": ("LlamaForCausalLM", TEXT, "AutoModelForCausalLM", {"name": "tropical_rational", "init": "silu"}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 97, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        | {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
        "AutoModelForSeq2SeqLM",
        {"name": "piecewise_linear", "degree": 12, "init": "gelu"},
    ),
}


class Case(NamedTuple):
    """A converted model's directory, the one it was made of, and logits of both."""

    directory: Path
    source: Path
    auto: str
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    before: torch.Tensor


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result: Any = model(*inputs.values()) if hasattr(model, "architecture") else model(**inputs)
    tensor: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
    return tensor


def convert(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Other activations, none as it started; their configurations."""
    configs = {}
    for found in find_activations(model):
        module = randomise(build_activation(config), 0.05)
        replace_module(model, found.name, module)
        configs[found.name] = module.config()  # type: ignore[operator]
    return configs


def write_case(directory: Path, name: str) -> Case:
    kind, sizes, auto, config = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    original = randomise(model(model.config_class(**sizes)), 0.05)
    original.save_pretrained(directory / "original")  # type: ignore[operator]
    inputs = {"pixel_values": images()} if name == "vit" else {"input_ids": tokens()}
    if name == "t5":
        inputs["decoder_input_ids"] = tokens()[:, :7]
    converted = read_model(directory / "original")
    configs = convert(converted, config)
    save_huggingface(directory / name, converted, configs, directory / "original")
    logits = run(converted, inputs)
    return Case(directory / name, directory / "original", auto, inputs, logits, run(original, inputs))


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies code it is to run; not into the user's cache."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("code")))
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: write_case(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


def load(case: Case, auto: str = "", directory: Path | None = None) -> nn.Module:
    kind = getattr(transformers, auto or case.auto)
    model: nn.Module = kind.from_pretrained(directory or case.directory, trust_remote_code=True)
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_loads_what_was_converted_or_refuses(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    loaded = load(case)
    torch.testing.assert_close(run(loaded, case.inputs), case.logits, rtol=1e-5, atol=1e-5)
    assert float((case.logits - case.before).abs().max()) > 1e-3
    torch.testing.assert_close(run(read_model(case.directory), case.inputs), case.logits, rtol=0, atol=0)
    for auto in (case.auto, "AutoModel", "AutoConfig"):
        with pytest.raises(ValueError, match="custom code"):
            getattr(transformers, auto).from_pretrained(case.directory, trust_remote_code=False)
    with pytest.raises(KeyError, match="replaced by polytrope: load with trust_remote_code=True"):
        getattr(transformers, ARCHITECTURES[name][0]).from_pretrained(case.directory)


def test_a_slope_for_each_channel_comes_back(tmp_path: Path) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    torch.manual_seed(0)
    model = transformers.ResNetModel(transformers.ResNetConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "original")
    for number, entry in enumerate(find_activations(model)):
        replace_module(model, entry.name, nn.PReLU(8, init=0.1 * number))
        with torch.no_grad():
            model.get_submodule(entry.name).weight += torch.linspace(-0.3, 1.3, 8)
    inputs = {"pixel_values": images()}
    conversion = convert_model(model, [inputs], family="tropical_rational", degree=1)
    assert all(entry.config["num_parameters"] == 8 for entry in conversion.activations)
    torch.testing.assert_close(run(conversion.model, inputs), run(model, inputs), rtol=1e-5, atol=1e-5)
    conversion.save(tmp_path / "converted", tmp_path / "original")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "converted", trust_remote_code=True).eval()
    torch.testing.assert_close(run(loaded, inputs), run(conversion.model, inputs), rtol=1e-5, atol=1e-5)


def test_without_this_package_the_same_logits(cases: dict[str, Case], tmp_path: Path) -> None:
    script = """
        import json, sys

        class Refuses:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "polytrope":
                    raise ImportError("there is no polytrope here")

        sys.meta_path.insert(0, Refuses())
        import torch, transformers

        for directory, auto, path in json.loads(sys.argv[1]):
            model = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True).eval()
            inputs, logits = torch.load(path)
            with torch.no_grad():
                found = model(**inputs)[0]
            assert float((found - logits).abs().max()) <= 1e-6 * float(logits.abs().max().clamp(min=1)), directory
            model(**inputs)[0].sum().backward()
            learned = [p for m in model.modules() if type(m).__name__ == "LearnedActivation" for p in m.parameters()]
            assert learned and all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learned), directory
            try:
                getattr(transformers, auto).from_pretrained(directory)
            except ValueError as error:
                assert "custom code" in str(error)
            else:
                raise AssertionError(f"{directory}: loaded without being trusted")
        assert "polytrope" not in sys.modules
        print("all equal")
    """
    listed = []
    for name, case in cases.items():
        torch.save((case.inputs, case.logits), tmp_path / f"{name}.pt")
        listed.append([str(case.directory), case.auto, str(tmp_path / f"{name}.pt")])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), json.dumps(listed)],
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "code"), "OMP_NUM_THREADS": "1"},
    )
    assert "all equal" in result.stdout, result.stderr[-3000:]


def test_saved_again_it_is_the_same_model_for_transformers_and_for_our_reader(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    for name in ("bert", "t5", "gpt2"):
        case = cases[name]
        model = load(case)
        learned = [module for module in model.modules() if type(module).__name__ == "LearnedActivation"]
        with torch.no_grad():
            next(learned[0].parameters()).add_(0.125)
        changed = run(model, case.inputs)
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        assert (tmp_path / name / MODELING_FILE).exists()
        assert float((changed - case.logits).abs().max()) > 1e-4
        again = run(load(case, directory=tmp_path / name), case.inputs)
        torch.testing.assert_close(again, changed, rtol=0, atol=0)
        torch.testing.assert_close(run(read_model(tmp_path / name), case.inputs), changed, rtol=1e-5, atol=1e-5)


def test_other_heads_have_the_converted_activations(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["bert"]
    masked = load(case)
    hidden = masked.bert(**case.inputs)[0]  # type: ignore[operator]
    base = load(case, "AutoModel")
    torch.testing.assert_close(base(**case.inputs)[0], hidden, rtol=0, atol=0)
    assert set(base.config.polytrope["activations"]) == {  # type: ignore[union-attr]
        f"encoder.layer.{layer}.intermediate.intermediate_act_fn" for layer in range(2)
    }
    classifier = load(case, "AutoModelForSequenceClassification")
    torch.testing.assert_close(classifier.bert(**case.inputs)[0], hidden, rtol=0, atol=0)  # type: ignore[operator]
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    back = load(case, "AutoModelForTokenClassification", tmp_path / "base")
    torch.testing.assert_close(back.bert(**case.inputs)[0], hidden, rtol=0, atol=0)  # type: ignore[operator]
    torch.testing.assert_close(read_model(tmp_path / "base")(**case.inputs)[0], hidden, rtol=1e-5, atol=1e-5)
    encoder = load(cases["t5"], "AutoModelForTextEncoding")  # which has no decoder
    expected = load(cases["t5"]).encoder(tokens())[0]  # type: ignore[operator]
    torch.testing.assert_close(encoder(tokens())[0], expected, rtol=0, atol=0)
    fresh = transformers.AutoModel.from_config(base.config, trust_remote_code=True)
    module = fresh.get_submodule("encoder.layer.0.intermediate.intermediate_act_fn")
    torch.testing.assert_close(module.coefficients, build_activation(ARCHITECTURES["bert"][3]).coefficients)


def test_activations_that_are_not_where_the_description_says_are_refused(cases: dict[str, Case]) -> None:
    case = cases["albert"]
    config = transformers.AutoConfig.from_pretrained(case.directory, trust_remote_code=True)
    name, entry = next(iter(config.polytrope["activations"].items()))
    config.polytrope = {"activations": {name.replace("layers.0", "layers.7"): entry}, "shared": {}}
    with pytest.raises(ValueError, match=r"no module `.*layers\.7"):
        transformers.AutoModelForMaskedLM.from_config(config, trust_remote_code=True)
    config.polytrope = {}
    with pytest.raises(ValueError, match="no entry `polytrope`"):
        transformers.AutoModelForMaskedLM.from_config(config, trust_remote_code=True)


def test_our_reader_runs_no_code_of_the_directory(cases: dict[str, Case], tmp_path: Path) -> None:
    import shutil

    case = cases["bert"]
    shutil.copytree(case.directory, tmp_path / "model")
    (tmp_path / "model" / MODELING_FILE).write_text("raise SystemExit('this was run')\n")
    torch.testing.assert_close(run(read_model(tmp_path / "model"), case.inputs), case.logits, rtol=0, atol=0)
    config = read_json(tmp_path / "model" / "config.json")
    next(iter(config["polytrope"]["activations"].values())).pop("config")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: the converted activations cannot be read"):
        read_model(tmp_path / "model")


def test_a_directory_with_the_former_description_is_read_and_replaced(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["bert"]
    model = read_model(case.directory)
    content = read_json(case.directory / "config.json")
    described = {name: entry["config"] for name, entry in content["polytrope"]["activations"].items()}
    (tmp_path / "config.json").write_text(json.dumps(original_settings(content)))
    (tmp_path / "activations.json").write_text(json.dumps({"format": 1, "activations": described}))
    weights = load_file(case.directory / "model.safetensors")
    learned = {name: tensor for name, tensor in weights.items() if name.endswith(".coefficients")}
    save_file(learned, tmp_path / "activations.safetensors")
    save_file(
        {name: weights[name] for name in set(weights) - set(learned)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    torch.testing.assert_close(run(read_model(tmp_path), case.inputs), case.logits, rtol=0, atol=0)
    for name in described:
        model.get_submodule(name).reset_parameters()  # type: ignore[operator]
    save_huggingface(tmp_path, model, described, case.source)
    torch.testing.assert_close(run(read_model(tmp_path), case.inputs), run(model, case.inputs), rtol=0, atol=0)


def test_one_activation_of_several_layers_stays_one(tmp_path: Path) -> None:
    model = write_bert(tmp_path / "bert")
    names = [f"encoder.layer.{layer}.intermediate.intermediate_act_fn" for layer in range(2)]
    replace_module(model, names[1], model.get_submodule(names[0]))
    configs = convert(model, {"name": "hermite", "degree": 3})
    assert list(configs) == names[:1]
    save_huggingface(tmp_path / "out", model, configs, tmp_path / "bert")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert loaded.get_submodule(names[0]) is loaded.get_submodule(names[1])
    torch.testing.assert_close(loaded(tokens())[0], model(tokens())[0], rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    torch.testing.assert_close(again(tokens())[0], model(tokens())[0], rtol=0, atol=0)


def test_the_tokenizer_is_the_one_of_the_architecture(tmp_path: Path) -> None:
    model = write_bert(tmp_path / "bert")
    save_huggingface(tmp_path / "out", model, convert(model, {"name": "hermite"}), tmp_path / "bert")
    before, after = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=True) for name in ("bert", "out")
    )
    assert type(after) is type(before)
    assert after("the cat sat").input_ids == before("the cat sat").input_ids


def test_a_model_that_draws_random_numbers_is_written(tmp_path: Path) -> None:
    sizes = {name: size for name, size in TEXT.items() if name != "vocab_size"} | {"image_size": 32, "patch_size": 8}
    decoder = {f"decoder_{name}": size for name, size in TEXT.items() if name != "vocab_size"}
    original = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes, **decoder))
    model = randomise(original, 0.05)
    save_huggingface(tmp_path / "out", model, convert(model, {"name": "hermite"}), None)
    assert (tmp_path / "out" / MODELING_FILE).exists()


@pytest.mark.parametrize(
    ("architecture", "auto", "inputs"),
    [("gpt2", "AutoModelForCausalLM", tokens()), ("convnext", "AutoModelForImageClassification", images())],
)
def test_models_of_this_package_written_for_transformers(
    tmp_path: Path, architecture: str, auto: str, inputs: torch.Tensor
) -> None:
    model = own_model(architecture, activation={"name": "hermite", "degree": 4, "interval": [-3, 3]})
    configs = {name: module.config() for name, module in model.named_modules() if is_learnable_activation(module)}  # type: ignore[operator]
    save_huggingface(tmp_path / "out", model, configs, None)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs).logits, model(inputs), rtol=1e-4, atol=1e-4)
        loaded.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(read_model(tmp_path / "again")(inputs), model(inputs), rtol=1e-5, atol=1e-5)
        base = transformers.AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
        assert base.config.polytrope["activations"]
    for kind, found in read_json(tmp_path / "out" / "config.json")["auto_map"].items():
        known = getattr(transformers, kind)
        original = getattr(transformers, found.partition(".Polytrope")[2])
        assert kind == "AutoConfig" or known._model_mapping[original.config_class] is original


FAMILIES: list[dict[str, Any]] = [
    {"name": "hermite", "degree": 16},
    {"name": "hermite", "degree": 5, "interval": [-2, 3], "num_parameters": 3},
    {"name": "chebyshev", "degree": 4, "num_parameters": 2, "dim": 1},
    {"name": "legendre", "degree": 4, "glu": True},
    {"name": "legendre", "degree": 6, "interval": [-2, 6], "variable": [2, 4]},
    {"name": "hermite", "degree": 4, "learnable_recurrence": True, "interval": [-2, 4], "variable": [1, 0.5]},
    {"name": "fourier", "degree": 3, "num_parameters": 2},
    {"name": "fourier", "degree": 3, "harmonic": True},
    {"name": "tropical", "degree": 5},
    {"name": "tropical_rational", "degree": 4},
    {"name": "rational", "degree": 5, "interval": [-3, 3]},
    {"name": "rational", "degree": 5, "denominator_degree": 0},
    {"name": "polyrelu", "degree": 3},
    {"name": "polynorm", "degree": 3, "epsilon": 1e-4},
    {"name": "piecewise_linear", "degree": 12, "num_parameters": 2},
    {"name": "affine", "base": "gelu_tanh", "num_parameters": 2},
    {"name": "rational_spline", "degree": 6, "num_parameters": 2},
    {"name": "composition", "degree": [7, 40], "domain": [-3, 5], "center": 0.0, "gate": True, "num_parameters": 2},
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: "-".join(str(value) for value in config.values()))
def test_the_code_beside_a_model_computes_every_family(config: dict[str, Any]) -> None:
    model = nn.Sequential(randomise(build_activation(config), 0.1))
    described = {"0": describe_activation(model[0], config)}
    check_functions(model, described)
    text = modeling_source("BertConfig", "bert", ["BertModel"], described)
    assert [line for line in text.splitlines() if "import polytrope" in line] == ["    import polytrope.ops"]
    for part in described["0"]["plain"]["parameters"]:
        assert list(model[0].get_parameter(part["name"]).shape) == part["shape"]
    options = described["0"]["plain"]["options"]
    if "interval" in options:
        options["interval"] = [-0.5, 0.5]
        with pytest.raises(ValueError, match="computes something else"):
            check_functions(model, described)


def test_everything_beside_the_weights_is_carried_over_with_its_mode(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = write_bert(source)
    files = {
        "README.md": "---\nlicence: mit\n---\n",
        "LICENSE": "MIT",
        "preprocessor_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "spiece.model": "pieces",
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
        "1_Pooling/config.json": json.dumps({"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}),
        "2_Dense/model.safetensors": "a layer of its own",
        "assets/picture.svg": "<svg/>",
        "run.sh": "#!/bin/sh\n",
    }
    of_the_model_before = {
        "pytorch_model.bin": "old",
        "onnx/model.onnx": "old",
        "optimizer.pt": "old",
        ".git/HEAD": "ref",
        "conversion.json": "{}",
    }
    for name, text in (files | of_the_model_before).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source / "run.sh").chmod(0o755)
    (source / "README.md").chmod(0o640)
    configs = convert(model, {"name": "hermite", "degree": 4})
    save_huggingface(tmp_path / "out", model, configs, source)
    for name, text in files.items():
        assert (tmp_path / "out" / name).read_text() == text
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == stat.S_IMODE((source / name).stat().st_mode)
    for name in of_the_model_before:
        assert not (tmp_path / "out" / name).exists()
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o644


def test_a_folder_of_sentence_transformers_stays_one(tmp_path: Path) -> None:
    import sentence_transformers
    from transformers import PreTrainedTokenizerFast

    source = tmp_path / "source"
    model = write_bert(source)
    write_tokenizer(source)
    loaded = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), pad_token="[PAD]", unk_token="[UNK]"
    )
    loaded.save_pretrained(source)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": False}))
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    configs = convert(model, {"name": "hermite", "degree": 4, "interval": [-3, 3]})
    save_huggingface(tmp_path / "out", model, configs, source)
    texts = ["the cat sat", "on a mat because of all the fish"]
    opened = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu", trust_remote_code=True)
    inputs = loaded(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        states, mask = model(**inputs)[0], inputs["attention_mask"][..., None]
    expected = (states * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(torch.from_numpy(opened.encode(texts)), expected, rtol=1e-4, atol=1e-5)


def test_any_configuration_can_name_an_activation(tmp_path: Path) -> None:
    from transformers.activations import ACT2FN

    known = dict(ACT2FN.items()) if "hermite3" not in ACT2FN else {}
    import polytrope.integrations.transformers as integration

    names = integration.names()
    assert not set(names) & set(known)
    assert all(ACT2FN._data[name] is kind for name, kind in known.items()) if hasattr(ACT2FN, "_data") else True
    config = transformers.AutoConfig.for_model("bert", **TEXT, hidden_act="rational5:gelu")
    model = transformers.AutoModel.from_config(config)
    module = model.get_submodule("encoder.layer.0.intermediate.intermediate_act_fn")
    assert is_learnable_activation(module)
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(module(x), nn.functional.gelu(x), rtol=0, atol=0.02)
    before = module.numerator.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(tokens())[0][..., 0].sum().backward()
    optimizer.step()
    assert not torch.equal(module.numerator, before)
    model.eval().save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        expected = model(tokens())[0]
        back = transformers.AutoModel.from_pretrained(tmp_path / "trained").eval()
        torch.testing.assert_close(back(tokens())[0], expected, rtol=0, atol=0)
        torch.testing.assert_close(read_model(tmp_path / "trained")(tokens())[0], expected, rtol=0, atol=0)
    # A checkpoint of GELU has no coefficients; they start as in a new model, not as memory happens to be.
    write_bert(tmp_path / "bert")
    started = transformers.AutoModel.from_pretrained(tmp_path / "bert", hidden_act="hermite3")
    module = started.get_submodule("encoder.layer.1.intermediate.intermediate_act_fn")
    torch.testing.assert_close(module.coefficients, build_activation("hermite3").coefficients)
    with pytest.raises(KeyError, match="hermite99"):
        transformers.AutoModel.from_config(transformers.AutoConfig.for_model("bert", **TEXT, hidden_act="hermite99"))


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": tokens()[index], "labels": tokens()[index]}


def test_the_trainer_trains_the_coefficients_and_saves_them(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["gpt2"]
    model = load(case)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "trainer"), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=1
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    trained = run(model.eval(), case.inputs)
    assert not torch.equal(trained, case.logits)
    name = "transformer.h.0.mlp.act.bias"
    assert not torch.equal(model.get_parameter(name), load(case).get_parameter(name))
    for directory in (tmp_path / "trainer" / "checkpoint-1",):
        torch.testing.assert_close(run(load(case, directory=directory), case.inputs), trained, rtol=0, atol=0)
        torch.testing.assert_close(run(read_model(directory), case.inputs), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "layers"), [("bert", ["query", "value"]), ("gpt2", ["c_attn"])])
def test_an_adapter_is_trained_on_a_converted_model_saved_and_merged(
    cases: dict[str, Case], tmp_path: Path, name: str, layers: list[str]
) -> None:
    import peft

    case = cases[name]
    settings = peft.LoraConfig(target_modules=layers, r=2, fan_in_fan_out=name == "gpt2")
    adapted = peft.get_peft_model(load(case), settings)
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], 0.1)
    with torch.no_grad():
        torch.testing.assert_close(
            run(adapted.eval(), case.inputs), case.logits, rtol=0, atol=0
        )  # it starts as nothing
    for _ in range(2):  # the first step moves one of the two factors alone
        adapted(**case.inputs, labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = run(adapted.eval(), case.inputs)
    assert float((expected - case.logits).abs().max()) > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(case), tmp_path / "adapter").eval()
    torch.testing.assert_close(run(again, case.inputs), expected, rtol=0, atol=0)
    merged = again.merge_and_unload()
    for key, weight in merged.state_dict().items():  # the coefficients are those of the conversion
        if "intermediate_act_fn" in key or ".act." in key:
            assert torch.equal(weight, load(case).state_dict()[key])
    merged.save_pretrained(tmp_path / "merged")
    for back in (load(case, directory=tmp_path / "merged"), read_model(tmp_path / "merged")):
        torch.testing.assert_close(run(back, case.inputs), expected, rtol=1e-4, atol=1e-5)
