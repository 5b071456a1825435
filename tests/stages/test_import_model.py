"""A workflow starts from a checkpoint on disk: `import_model`, and the stages that take its result."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from training_support import make_dataset

from polytrope import load_workflow, run
from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.formats import read_model
from polytrope.models.formats.huggingface import save_huggingface
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.data.promised import PromisedBuiltModel, PromisedForeignModel
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, load_stage, stage_context
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.stages.import_model.import_model import fingerprint
from polytrope.pipeline.stages.import_model.parameters import ImportModelParameters
from polytrope.pipeline.stages.train.training_plan import _read_model
from polytrope.pipeline.workflow.graph import build_graph
from polytrope.pipeline.workflow.keys import explain, key_components, stage_key

SIZES = {"vocab_size": 257, "sequence_length": 32, "n_layer": 1, "n_head": 2, "n_embd": 16, "activation": "gelu_tanh"}


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("gpt2", SIZES).eval()


def write_bert(directory: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=97, **sizes)).save_pretrained(directory)


def imported(directory: Path, path: Path, **parameters: Any) -> Path:
    definition = load_stage("import_model")
    context = stage_context(directory)
    summary = definition.call(context, ImportModelParameters(path=str(path), **parameters), {})
    assert summary["parameters"] > 100
    return context.output


@pytest.mark.parametrize("kind", ["own", "huggingface", "state"])
def test_every_format_of_a_gpt2_becomes_a_model_that_stages_read(tmp_path: Path, kind: str) -> None:
    model, path = gpt2(), tmp_path / "checkpoint"
    config = {}
    if kind == "own":
        save_model(path, model)
    elif kind == "huggingface":
        save_huggingface(path, model, {}, None)
    else:
        path = tmp_path / "weights.safetensors"
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.tied_weights}
        save_file(state, path)
        config = {"n_head": 2, "activation": "gelu_tanh"}
        with pytest.raises(UserError, match=r"config: \{n_head: VALUE, activation: VALUE\}"):
            imported(tmp_path / "asks", path)
    output = imported(tmp_path / kind, path, config=config)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load_model(output)(tokens), model(tokens))
    initial = _read_model("initial", Artifact(output, "digest", "pretrained"))
    assert (initial.architecture, initial.settings["n_embd"]) == ("gpt2", 16)


def test_another_architecture_stays_one_of_transformers_and_train_says_why_it_refuses(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    (tmp_path / "bert" / "LICENSE").write_text("free")
    output = imported(tmp_path / "out", tmp_path / "bert")
    assert (output / "LICENSE").read_text() == "free"
    assert type(read_model(output)).__name__ == "BertModel"
    with pytest.raises(UserError, match=r"`initial` \(pretrained\) holds no model that can be trained: .*transformers"):
        _read_model("initial", Artifact(output, "digest", "pretrained"))


@pytest.mark.parametrize(
    ("path", "message"),
    [("nothing", "no such file or directory"), ("empty", "the directory is empty"), ("texts", "no model directory")],
)
def test_what_is_no_checkpoint_is_refused_by_its_field(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    stage = imported if path == "texts" else None
    with pytest.raises(UserError, match=rf"path: .*{message}"):
        _ = (
            stage(tmp_path / "out", tmp_path / path)
            if stage
            else fingerprint(ImportModelParameters(path=path), tmp_path)
        )


def test_the_content_of_the_files_decides(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    parameters = ImportModelParameters(path="bert")
    before = fingerprint(parameters, tmp_path)
    os.utime(tmp_path / "bert" / "config.json", (1, 1))
    (tmp_path / "bert" / ".cache").write_text("hidden")
    assert fingerprint(parameters, tmp_path) == before
    shutil.copytree(tmp_path / "bert", tmp_path / "elsewhere" / "bert")
    assert fingerprint(parameters, tmp_path / "elsewhere") == before
    weights = tmp_path / "bert" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(parameters, tmp_path) != before


def test_a_workflow_converts_and_evaluates_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = "hub/models--owner--gpt2-small/snapshots/0123456789"  # as Hugging Face's client keeps a download
    save_huggingface(tmp_path / cached, gpt2(), {}, None)
    (tmp_path / "checkpoint").symlink_to(cached)
    data = make_dataset(tmp_path / "data").path
    (tmp_path / "import_stages.py").write_text(
        "import shutil\nfrom polytrope.pipeline.stage import StageContext, stage\n"
        "def data(context: StageContext, path: str) -> None:\n"
        "    shutil.copytree(path, context.output, dirs_exist_ok=True)\n"
    )
    (tmp_path / "flow.yaml").write_text(
        "name: flow\n"
        "stages:\n"
        "  pretrained: {uses: import_model, with: {path: checkpoint}}\n"
        f"  text: {{uses: 'import_stages:data', with: {{path: {data}}}}}\n"
        "  converted:\n"
        "    uses: convert\n"
        "    inputs: {model: pretrained, dataset: text}\n"
        "    with: {degree: 6, calibration_samples: 8}\n"
        "  evaluated:\n"
        "    uses: evaluate\n"
        "    inputs: {dataset: text, models: {before: pretrained, after: converted}}\n"
        "    with: {samples: 2, sample_tokens: 0, activation_samples: 0, drift: {after: before}}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run(load_workflow(tmp_path / "flow.yaml"), executor="local", tracking=False)  # raises unless it succeeds
    sys.modules.pop("import_stages", None)
    assert abs(result["evaluated"].metrics["after/kl_divergence"]) < 0.01
    assert result["converted"].metrics["layers"] == 1
    assert main(["card", "--output", "card.md"]) == 0
    front = yaml.safe_load((tmp_path / "card.md").read_text().split("---")[1])
    assert front["base_model"] == "owner/gpt2-small"


FINE_TUNING = """
name: flow
stages:
  pretrained: {{uses: import_model, with: {{path: {path}}}}}
  text:
    uses: shard
    with: {{source: {{kind: files, paths: [corpus.txt]}}, tokenizer: {{kind: bytes}}, sequence_length: {length}}}
  next:
    uses: {uses}
    inputs: {inputs}
    with: {parameters}
"""


def planned(directory: Path, path: str, uses: str, *, length: int = 32, parameters: str = "{}") -> Any:
    """The stages as a plan knows them: nothing runs."""
    (directory / "corpus.txt").write_text("one\ntwo\n")
    model = {"train": "initial: pretrained", "convert": "model: pretrained", "evaluate": "models: {a: pretrained}"}
    (directory / "flow.yaml").write_text(
        FINE_TUNING.format(
            path=path, uses=uses, length=length, parameters=parameters, inputs=f"{{dataset: text, {model[uses]}}}"
        )
    )
    return build_graph(load_workflow(directory / "flow.yaml"))


TRAIN = "{steps: 1, global_batch_size: 2, learning_rate: 0.001}"


def test_a_plan_knows_the_sizes_of_a_checkpoint(tmp_path: Path) -> None:
    save_model(tmp_path / "own", gpt2())
    save_huggingface(tmp_path / "huggingface", gpt2(), {}, None)
    for path in ("own", "huggingface"):
        stages = planned(tmp_path, path, "train", parameters=TRAIN)
        promised = stages["pretrained"].promise
        assert promised.architecture == "gpt2"
        assert promised.settings.items() >= {**SIZES, "bias": True, "n_layer": 1}.items()
        assert stages["next"].promise.settings["n_embd"] == 16
        with pytest.raises(UserError, match=r"inputs\.initial: .* sequences \(33 tokens\) are longer .*: 32\)"):
            planned(tmp_path, path, "train", length=33, parameters=TRAIN)
        with pytest.raises(UserError, match=r"layers: 1- goes beyond the last layer: the model has 1"):
            planned(tmp_path, path, "convert", parameters="{layers: 1-}")
        as_huggingface = planned(tmp_path, path, "convert", parameters="{format: huggingface}")
        assert as_huggingface["next"].promise == PromisedForeignModel("gpt2")


def test_a_plan_knows_that_another_architecture_is_for_convert_alone(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    stages = planned(tmp_path, "bert", "convert")
    assert stages["pretrained"].promise == stages["next"].promise == PromisedForeignModel("bert")
    with pytest.raises(UserError, match=r"format: own is for gpt2, convnext, mlp, and the model will be a bert"):
        planned(tmp_path, "bert", "convert", parameters="{format: own}")
    for uses, parameters in (("train", TRAIN), ("evaluate", "{}")):
        with pytest.raises(UserError, match=r"takes a model, and the stage makes a model of transformers"):
            planned(tmp_path, "bert", uses, parameters=parameters)


def test_a_plan_refuses_a_description_that_cannot_be_read_and_promises_nothing_where_weights_decide(
    tmp_path: Path,
) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    assert planned(tmp_path, "weights.safetensors", "train", parameters=TRAIN)["pretrained"].promise is None
    for name, content, words in (
        ("model.json", '{"format": 1, "architecture": "bert", "config": {}}', "unknown architecture `bert`"),
        ("model.json", '{"format": 1, "architecture": "gpt2", "config": {"n_embd": 15}}', "must be a multiple"),
        ("model.json", "{", "cannot be read"),
        ("config.json", '{"model_type": "gpt2", "n_inner": 7}', "n_inner"),
    ):
        directory = tmp_path / f"damaged-{words.split()[-1].strip(chr(96))}"
        directory.mkdir()
        (directory / name).write_text(content)
        with pytest.raises(UserError, match=rf"with\.path.*{words}"):
            planned(tmp_path, directory.name, "train", parameters=TRAIN)


NETWORK = """
import torch
from torch import nn
from import_test_parts import SCALE

class Classifier(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, width), nn.GELU(), nn.Linear(width, 3)
    def forward(self, features, scale=SCALE):
        return scale * self.last(self.act(self.first(features)))

def small_gpt2(**options):
    from polytrope.models import build_model
    return build_model("gpt2", options)

def bert():
    from transformers import BertConfig, BertModel
    return BertModel(BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=32))

def nothing():
    return 3
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with a module of its own, its weights as a trainer keeps them, and data to calibrate on."""
    (tmp_path / "import_test_models.py").write_text(NETWORK)
    (tmp_path / "import_test_parts.py").write_text("SCALE = 2.0\n")
    (tmp_path / "import_test_stages.py").write_text(
        "import numpy\nfrom polytrope.pipeline.stage import StageContext\n"
        "def data(context: StageContext) -> None:\n"
        "    generator = numpy.random.default_rng(0)\n"
        "    numpy.save(context.output / 'calibration.npy', generator.normal(size=(64, 4)).astype('float32'))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("import_test_")]:
        del sys.modules[name]


def classifier(width: int = 16) -> torch.nn.Module:
    import import_test_models

    torch.manual_seed(0)
    return import_test_models.Classifier(width).eval()


FACTORY = """
name: flow
stages:
  pretrained:
    uses: import_model
    with: {{path: weights.pt, factory: "{factory}", options: {options}}}
  data: {{uses: "import_test_stages:data"}}
  converted: {{uses: convert, inputs: {{model: pretrained, dataset: data}}, with: {{degree: 8}}}}
"""
AGAIN = """
  again: {uses: convert, inputs: {model: converted, dataset: data}, with: {types: [Hermite]}}
"""


def factory_flow(directory: Path, factory: str = "import_test_models:Classifier", options: str = "{width: 16}") -> Path:
    (directory / "flow.yaml").write_text(FACTORY.format(factory=factory, options=options))
    return directory / "flow.yaml"


def keys(flow: Path) -> dict[str, str]:
    """Of the stages, as if nothing were known of their inputs."""
    graph = build_graph(load_workflow(flow))
    return {name: stage_key(key_components(node, dict.fromkeys(node.inputs, "d"))) for name, node in graph.items()}


def test_a_module_of_ones_own_is_imported_and_converted(project: Path) -> None:
    model = classifier()
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, project / "weights.pt")
    flow = factory_flow(project)
    result = run(load_workflow(flow), executor="local", tracking=False)
    x = torch.linspace(-1, 1, 20).reshape(5, 4)
    read = read_model(result["pretrained"].path, model=classifier())
    converted = read_model(result["converted"].path, model=classifier())
    made = {
        "model": Artifact(result["converted"].path, "c", "converted"),
        "dataset": Artifact(result["data"].path, "d", "data"),
    }
    context = stage_context(project / "again")
    load_stage("convert").call(context, ConvertParameters(family="rational", degree=5, types=["Hermite"]), made)
    again = read_model(context.output, model=classifier())
    with torch.no_grad():
        assert torch.equal(read(x), model(x))
        assert type(converted.act).__name__ == "Hermite"
        assert 0 < float((converted(x) - model(x)).abs().max()) < 0.01
        assert type(again.act).__name__ == "Rational"
        assert 0 < float((again(x) - model(x)).abs().max()) < 0.02
    assert result["pretrained"].metrics["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "where"),
    [({"rate": math.nan}, "rate: nan"), ({"sizes": [{"width": 4, "gain": -math.inf}]}, r"sizes\.0\.gain: -inf")],
)
def test_options_that_json_does_not_have_are_refused_by_their_names(options: dict[str, Any], where: str) -> None:
    with pytest.raises(ValueError, match=rf"options\n.*{where} is no number that JSON has"):
        ImportModelParameters(path="weights.pt", factory="package:function", options=options)


def test_the_code_of_a_factory_is_in_the_keys_of_all_that_build_the_model(project: Path) -> None:
    torch.save(classifier().state_dict(), project / "weights.pt")
    flow = factory_flow(project)
    flow.write_text(flow.read_text() + AGAIN)
    graph = build_graph(load_workflow(flow))
    factory = "import_test_models:Classifier"
    assert {node.promise for name, node in graph.items() if name != "data"} == {PromisedBuiltModel(factory)}
    for name in ("pretrained", "converted", "again"):
        assert {"import_test_models.py", "import_test_parts.py"} <= set(graph[name].whole_code.files)
    assert "import_test_models.py" not in graph["data"].whole_code.files
    before = keys(flow)
    # What the factory imports decides the result of all that build the model, and of nothing else.
    (project / "import_test_parts.py").write_text("SCALE = 3.0\n")
    after = keys(flow)
    assert {name for name in before if before[name] != after[name]} == {"pretrained", "converted", "again"}
    lines = explain(
        key_components(graph["pretrained"], {}), key_components(build_graph(load_workflow(flow))["pretrained"], {})
    )
    assert lines == ["code of import_test_parts.py changed"]
    (project / "import_test_parts.py").write_text("SCALE = 2.0  # the same\n")
    assert keys(flow) == before


def test_a_factory_may_give_a_model_that_can_be_trained_or_one_of_transformers(project: Path, tmp_path: Path) -> None:
    model = gpt2()
    torch.save({"model": model.state_dict()}, project / "weights.pt")
    output = imported(
        tmp_path / "own", project / "weights.pt", factory="import_test_models:small_gpt2", options=dict(SIZES)
    )
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load_model(output)(tokens), model(tokens))
    assert _read_model("initial", Artifact(output, "digest", "pretrained")).architecture == "gpt2"
    import import_test_models

    theirs = import_test_models.bert().eval()
    save_file(theirs.state_dict(), project / "bert.safetensors")
    output = imported(tmp_path / "theirs", project / "bert.safetensors", factory="import_test_models:bert")
    with torch.no_grad():
        assert torch.equal(read_model(output)(tokens)[0], theirs(tokens)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factory": "import_test_models:Clasifier"}, r"with\.factory: .*no function `Clasifier`"),
        ({"factory": "import_test_model:build"}, r"with\.factory: there is no module `import_test_model`"),
        ({"factory": "import_test_models"}, r"with\.factory: expected package\.module:function"),
        ({"factory": "import_test_models:Classifier", "config": {"n_head": 2}}, r"with\.config: .*use options"),
        ({"options": {"width": 3}}, r"with\.options: .*there is none"),
        ({"path": "own", "factory": "import_test_models:Classifier"}, r"with\.factory: .*model\.json says how"),
    ],
)
def test_a_factory_that_cannot_be_is_refused_by_the_plan(project: Path, changes: dict[str, Any], message: str) -> None:
    torch.save(classifier().state_dict(), project / "weights.pt")
    (project / "own").mkdir()
    (project / "own" / "model.json").write_text("{}")
    stages = {"pretrained": {"uses": "import_model", "with": {"path": "weights.pt", **changes}}}
    (project / "flow.yaml").write_text(yaml.safe_dump({"name": "flow", "stages": stages}))
    with pytest.raises(UserError, match=message):
        build_graph(load_workflow(project / "flow.yaml"))


def test_options_that_json_does_not_keep_are_refused() -> None:
    with pytest.raises(ValueError, match="expected texts, numbers, lists"):
        ImportModelParameters(path="weights.pt", factory="models:build", options={"sizes": [{"first": (1, 2)}]})


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("Classifier", {}, r"options: .*missing a required argument: 'width'"),
        ("Classifier", {"widht": 4}, r"options: .*unexpected keyword argument|missing a required argument"),
        (
            "Classifier",
            {"width": 8},
            r"the weights do not fit the model: first\.weight is \[16, 4\], the model's is \[8, 4\]",
        ),
        ("nothing", {}, r"gives a int"),
        ("small_gpt2", {}, r"the weights are not those of the GPT2: they begin with first\.weight"),
    ],
)
def test_weights_and_options_that_do_not_fit_are_refused(
    project: Path, tmp_path: Path, factory: str, options: dict[str, Any], message: str
) -> None:
    torch.save(classifier().state_dict(), project / "weights.pt")
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "out", project / "weights.pt", factory=f"import_test_models:{factory}", options=options)


def test_code_outside_of_the_key_is_not_run_and_other_stages_say_what_they_take(project: Path, tmp_path: Path) -> None:
    torch.save(classifier().state_dict(), project / "weights.pt")
    factory = {"factory": "import_test_models:Classifier", "options": {"width": 16}}
    output = imported(tmp_path / "out", project / "weights.pt", **factory)
    pretrained = Artifact(output, "digest", "pretrained")
    with pytest.raises(UserError, match=r"`initial` \(pretrained\) holds no model that can be trained: .*build_model"):
        _read_model("initial", pretrained)
    context = dataclasses.replace(stage_context(tmp_path / "convert"), modules=frozenset({"other"}))
    with pytest.raises(UserError, match="whose code is no part of its key"):
        load_stage("convert").call(
            context, ConvertParameters(), {"model": pretrained, "dataset": Artifact(project, "digest", "data")}
        )
    with pytest.raises(ValueError, match="whose class it does not have"):
        read_model(output)
    factory_flow(project).write_text(
        factory_flow(project).read_text().replace("with: {degree: 8}", "with: {ray_tasks: 2}")
    )
    with pytest.raises(UserError, match=r"with\.ray_tasks: the model is built by import_test_models:Classifier"):
        build_graph(load_workflow(project / "flow.yaml"))
