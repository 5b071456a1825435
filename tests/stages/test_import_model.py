"""A workflow starts from a checkpoint on disk: `import_model`, and the stages that take its result."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from training_support import make_dataset

from polytrope import load_workflow, run
from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.formats import read_model
from polytrope.models.formats.huggingface import save_huggingface
from polytrope.pipeline.data.promised import PromisedForeignModel
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, load_stage, stage_context
from polytrope.pipeline.stages.import_model.import_model import fingerprint
from polytrope.pipeline.stages.import_model.parameters import ImportModelParameters
from polytrope.pipeline.stages.train.training_plan import _read_initial
from polytrope.pipeline.workflow.graph import build_graph

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
    assert summary["parameters"] > 1000
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
    initial = _read_initial(Artifact(output, "digest", "pretrained"))
    assert (initial.architecture, initial.settings["n_embd"]) == ("gpt2", 16)


def test_another_architecture_stays_one_of_transformers_and_train_says_why_it_refuses(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    (tmp_path / "bert" / "LICENSE").write_text("free")
    output = imported(tmp_path / "out", tmp_path / "bert")
    assert (output / "LICENSE").read_text() == "free"
    assert type(read_model(output)).__name__ == "BertModel"
    with pytest.raises(UserError, match=r"`initial` \(pretrained\) holds no model that can be trained: .*transformers"):
        _read_initial(Artifact(output, "digest", "pretrained"))


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
    save_model(tmp_path / "checkpoint", gpt2())
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
    with pytest.raises(UserError, match=r"format: own is for gpt2 and convnext, and the model will be a bert"):
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
