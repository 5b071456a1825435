"""`polytrope convert` as people call it, and the `convert` stage as the engine calls it."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_support import (
    own_model,
    randomise,
    read_json,
    tokens,
    write_bert,
    write_texts,
)
from pydantic import ValidationError
from torch.nn.modules.module import register_module_forward_hook
from training_support import make_dataset

from polytrope.models.calibration import add, calibrate
from polytrope.models.checkpoint import load_model, save_model
from polytrope.models.conversion import fit_options
from polytrope.models.convert_options import FIT_OPTIONS
from polytrope.models.formats import read_model
from polytrope.models.inputs import forward
from polytrope.models.selection import select_activations
from polytrope.models.surgery import find_activations
from polytrope.ops import Hermite, build_activation, is_learnable_activation
from polytrope.ops.interpolate import FAMILIES
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.data.conversion_file import read_conversion
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, stage_context
from polytrope.pipeline.stages.convert.calibration_data import array_batches, text_batches, tokenizer_of
from polytrope.pipeline.stages.convert.convert import convert
from polytrope.pipeline.stages.convert.distillation import (
    distill,
    learned_activations,
    received,
    sentence_embeddings,
)
from polytrope.pipeline.stages.convert.parallel_calibration import calibrate_on_ray, calibrate_part
from polytrope.pipeline.stages.convert.parameters import ConvertParameters


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    write_bert(tmp_path / "bert")
    write_texts(tmp_path)
    return tmp_path / "bert"


def test_the_command_converts_a_model_and_leaves_the_original_as_it_was(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(bert)
    output = tmp_path / "converted"
    arguments = ["convert", str(bert), str(output), "--degree", "6", "--data", str(tmp_path / "texts.txt")]
    assert main([*arguments, "--exclude", "pooler.*", "--onnx", "--tables"]) == 0
    assert digests(bert) == before
    content = read_json(output / "conversion.json")
    assert [layer["degree"] for layer in content["layers"]] == [6, 6]
    assert sum(entry["share"] for entry in content["advice"]) == pytest.approx(1.0)
    assert "degree 8 would lower its error" in content["advice"][0]["advice"]
    printed = capsys.readouterr().out
    assert "encoder.layer.0.intermediate.intermediate_act_fn" in printed
    assert "what costs most" in printed
    page = (output / "conversion.html").read_text()
    assert page.count("<img") == 1
    assert "Certificates" in page
    assert (output / "plots" / "conversion-0.png").stat().st_size > 10_000
    assert (output / "model.onnx").stat().st_size > 1000
    assert len(list((output / "tables").glob("*.json"))) == 2
    original, converted = read_model(bert), read_model(output)
    batch = text_batches(tokenizer_of(output), ["the cat sat on a mat", "all the fish"], 2, 20, True)[0]
    with torch.no_grad():
        cosine = (sentence_embeddings(original, batch) * sentence_embeddings(converted, batch)).sum(-1)
    assert 0.99 < float(cosine.min()) < 1.0
    assert any(is_learnable_activation(module) for module in converted.modules())


def test_a_dry_run_prints_the_certificates_and_writes_nothing(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(tmp_path)
    data = ["--data", str(tmp_path / "texts.txt")]
    arguments = ["convert", str(bert), "--dry-run", "--json", "--target-error", "0.01", "--layers", "1", *data]
    with register_module_forward_hook(lambda *_: print("a library speaks")):
        assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "a library speaks" in printed.err
    content = json.loads(printed.out)
    assert [layer["name"] for layer in content["layers"]] == ["encoder.layer.1.intermediate.intermediate_act_fn"]
    assert content["layers"][0]["relative_error"] <= 0.01
    assert content["layers"][0]["certificate"]["maximum"] > 0
    assert main(["convert", str(bert), "--dry-run", "--json", "--family", "auto", "--target-error", "1e-5", *data]) == 0
    for layer in json.loads(capsys.readouterr().out)["layers"]:
        assert layer["relative_error"] <= 1e-5
        assert layer["family"] in FAMILIES
    assert digests(tmp_path) == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("options", [["--degree", "6"], ["--polynomial-only", "--depth", "3", "--domain=-0.1,0.1"]])
def test_what_is_printed_fits_a_terminal_of_eighty_columns(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", shown := Terminal())
    monkeypatch.setattr(sys, "stderr", warned := Terminal())
    assert main(["convert", str(bert), "--dry-run", *options, "--data", str(tmp_path / "texts.txt")]) == 0
    lines = [*shown.getvalue().splitlines(), *warned.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    layers = [f"encoder.layer.{number}.intermediate.intermediate_act_fn" for number in (0, 1)]
    text = shown.getvalue()
    heading = next(line for line in lines if line.startswith("encoder.layer.*.intermediate.intermediate_act_fn"))
    rows = lines[lines.index(heading) + 1 :][:2]
    if "--degree" in options:
        assert heading.endswith(": GELUActivation → hermite")
        assert [row.split()[:2] for row in rows] == [["0", "6"], ["1", "6"]]
        assert all(re.fullmatch(r"\d  6 +\S+ … \S+( +\d\.\d\de[+-]\d\d){4}", row) for row in rows)
        assert all(f"{rank}. {name}: " in text for rank, name in zip((1, 2), layers, strict=True)) or all(
            f"{rank}. {name}: " in text for rank, name in zip((2, 1), layers, strict=True)
        )
    else:
        assert re.search(r"^1  .* of \d+ \(\S+\)$", text, re.MULTILINE)
        assert "→ more calibration data (--samples)" in warned.getvalue()
    assert "pooler.activation (Tanh): " in text


def test_calibration_in_ray_tasks_counts_the_same(tmp_path: Path) -> None:
    model = own_model("gpt2")
    save_model(tmp_path / "model", model)
    found = find_activations(model)
    batches = [{"input_ids": part} for part in tokens().split(2)]
    here = calibrate(model, found, batches, forward)
    there = calibrate_on_ray(tmp_path / "model", {}, [entry.name for entry in found], batches, 2, None)
    assert list(here) == list(there)
    for name, measured in here.items():
        assert (measured.counts == there[name].counts).all()
        assert (measured.minimum, measured.maximum) == (there[name].minimum, there[name].maximum)
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "calibration.npy", tokens().numpy())
    outputs = [
        run_stage(tmp_path / f"{tasks}", tmp_path / "model", tmp_path / "data", batch_size=2, ray_tasks=tasks)
        for tasks in (0, 2)
    ]
    assert digests(outputs[0]) == digests(outputs[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}"], "OUTPUT is missing"),
        (["{model}", "{out}", "--dry-run"], "--dry-run writes nothing, and"),
        (["{model}", "{model}"], "exists and is not empty"),
        (["{model}", "{out}", "--layers", "7-9"], "leaves none of"),
        (["{model}", "{out}", "--layers", "one"], "--layers: expected 3, 0-5 or 6-"),
        (["{model}", "{out}", "--layers", "5-2"], "--layers: expected 3, 0-5 or 6-"),
        (["{model}", "{out}", "--set", "n_head"], "expected FIELD=VALUE"),
        (["{model}", "{out}", "--data", "{out}.txt"], "out.txt: there is no such file or directory"),
        (["{model}", "{out}", "--data", "{model}"], "cannot be read as text"),
        (["{model}", "{out}", "--data", "{nan}"], "an array of shape"),
        (
            ["{model}", "{out}", "--degree", "17"],
            "--degree: expected at most 16 (family rational_spline: 64 pieces) (got '17')",
        ),
        (["{model}", "{out}", "--degree", "0"], "--degree: expected at least 1, got '0'"),
        (["{model}", "{out}", "--samples", "0"], "--samples: expected at least 1, got '0'"),
        (["{model}", "{out}", "--target-error", "-1"], "--target-error: expected more than 0, got '-1'"),
        (["{model}", "{out}", "--coverage", "2"], "--coverage: expected at most 1, got '2'"),
        (
            ["{model}", "{out}", "--constraint", "ends", "--constraint", "middle"],
            "--constraint: expected ends, end_values or origin, got 'middle'",
        ),
        (["{model}", "{out}", "--family", "hermit"], "--family: expected hermite, "),
        (["{model}", "{out}", "--family", "auto"], "--target-error: family auto chooses by it: give target_error"),
        (["{model}", "--as-is", "--dry-run"], "--as-is fits nothing"),
        (["{model}", "{out}", "--as-is", "--layers", "0-"], "--as-is fits nothing, so --layers means nothing"),
        (["{model}", "{out}", "--as-is", "--rated-samples", "4"], "so --rated-samples means nothing"),
        (["{model}", "{out}", "--format", "own"], "own is for GPT-2, ConvNeXt, "),
        (["{model}", "{out}", "--type", "Swish"], "(GELUActivation): not of a type to convert"),
        (["{model}", "{out}", "--data", "{empty}"], "holds nothing"),
        (["{model}", "{out}", "--data", "{large}"], "cannot run on the calibration data"),
        (["{model}", "{out}", "--data", "{images}"], "cannot run on the calibration data"),
        (["{model}", "{out}", "--degree", "2", "--target-error", "1e-8"], "reaches no error"),
        (["{out}", "{out}2"], "there is no such file or directory"),
    ],
)
def test_mistakes_are_explained_and_nothing_is_written(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    arrays = {
        "nan": np.ones((2, 3)),
        "empty": np.zeros((0, 4), dtype=np.int64),
        "large": np.full((2, 4), 97),
        "images": np.zeros((2, 3, 8, 8), dtype=np.float32),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    before = digests(tmp_path)
    names = {"model": bert, "out": tmp_path / "out"} | {name: tmp_path / f"{name}.npy" for name in arrays}
    filled = [argument.format(**names) for argument in arguments]
    data = [] if "--data" in arguments else ["--data", str(tmp_path / "texts.txt")]
    assert main(["convert", *filled, *data]) == 2
    assert message in capsys.readouterr().err
    assert digests(tmp_path) == before


def test_a_path_that_is_missing_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from polytrope.pipeline.commands.cli import main; "
        f"assert main(['convert', {str(tmp_path / 'absent')!r}, {str(tmp_path / 'out')!r}]) == 2; "
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "absent: there is no such file or directory" in done.stderr


def test_a_tokenizer_that_is_truncated_is_named(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (bert / "tokenizer.json").read_bytes()
    (bert / "tokenizer.json").write_bytes(content[: len(content) // 2])
    assert main(["convert", str(bert), str(tmp_path / "out"), "--data", str(tmp_path / "texts.txt")]) == 2
    assert "tokenizer.json cannot be read" in capsys.readouterr().err


def test_a_failure_while_writing_leaves_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", own_model("gpt2", bias=False))
    np.save(tmp_path / "tokens.npy", tokens().numpy())
    before = digests(tmp_path)
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), "--data", str(tmp_path / "tokens.npy")]
    assert main(["convert", *arguments, "--format", "huggingface"]) == 2
    assert "transformers' GPT-2 has biases" in capsys.readouterr().err
    assert digests(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_onnx_that_fails_does_not_take_the_conversion_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", own_model("gpt2"))
    np.save(tmp_path / "calibration.npy", tokens().numpy())
    monkeypatch.setattr("polytrope.models.formats.onnx.TOLERANCE", -1.0)  # a check that nothing passes
    out = tmp_path / "out"
    arguments = [str(tmp_path / "model"), str(out), "--data", str(tmp_path / "calibration.npy"), "--tables", "--onnx"]
    assert main(["convert", *arguments]) == 1
    captured = capsys.readouterr()
    assert f"wrote {out}" in captured.out
    assert "model.onnx cannot be written: onnxruntime's output deviates" in captured.err
    assert {"conversion.json", "conversion.html", "model.safetensors", "model.json"} <= set(digests(out))
    assert not (out / "model.onnx").exists()
    assert is_learnable_activation(load_model(out).blocks[0].mlp.activation)
    stored = run_stage(tmp_path / "stage", tmp_path / "model", tmp_path, onnx=True)  # the stage's work is kept, too
    assert "onnxruntime's output deviates" in str(read_conversion(stored).onnx_failure)
    assert is_learnable_activation(load_model(stored).blocks[0].mlp.activation)
    noted = b"".join(path.read_bytes() for path in (tmp_path / "stage" / "events").iterdir())
    assert b"model.onnx cannot be written: onnxruntime's output deviates" in noted


def test_the_options_are_the_fields_of_the_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["convert", "--help"], ["convert", "model", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        for name, field in ConvertParameters.model_fields.items():
            if name in ("page", "register_as", "register_alias", "threads"):
                continue
            assert str(field.description) in shown
        for option in ("--constraint ends|end_values|origin", "--samples N", "--type", "--layers", "--ray N", "--onnx"):
            assert option in shown
        assert "(default 256)" in shown


@pytest.mark.parametrize(
    ("given", "first", "last"), [("6-", 6, sys.maxsize), ("0-5", 0, 5), (3, 3, 3), ("3", 3, 3), ([1, 2], 1, 2)]
)
def test_layers_are_one_a_range_or_all_from_one_on(given: Any, first: int, last: int) -> None:
    assert ConvertParameters(layers=given).layer_range() == (first, last)
    assert ConvertParameters().layer_range() is None


@pytest.mark.parametrize("given", ["-3", "a-b", "5-2", True, 1.5, "1-2-3", [1], ""])
def test_layers_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ValidationError, match="expected 3, 0-5 or 6-"):
        ConvertParameters(layers=given)


def test_a_target_error_alone_tries_all_degrees() -> None:
    for given, degree in (({}, 8), ({"target_error": 0.1}, 16), ({"target_error": 0.1, "degree": 4}, 4)):
        assert fit_options(**ConvertParameters(**given).model_dump(include=set(FIT_OPTIONS))).degree == degree
    family = ConvertParameters.model_json_schema()["properties"]["family"]["anyOf"][0]["enum"]
    assert family[:-1] == [name for name in FAMILIES if name in family]
    assert set(family) - {"auto"} == set(FAMILIES)


def test_a_state_dict_is_converted_with_what_its_refusal_asks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = own_model("gpt2", activation="gelu")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    np.save(tmp_path / "tokens.npy", tokens().numpy())
    arguments = ["convert", str(tmp_path / "model.pt"), str(tmp_path / "out"), "--data", str(tmp_path / "tokens.npy")]
    assert main(arguments) == 2
    assert "--set n_head=VALUE --set activation=VALUE" in capsys.readouterr().err
    assert main([*arguments, "--set", "n_head=2", "--set", "activation=gelu", "--layers", "1-"]) == 0
    converted = load_model(tmp_path / "out")
    assert [is_learnable_activation(block.mlp.activation) for block in converted.blocks] == [False, True]
    with torch.no_grad():
        assert 0 < float((converted(tokens()) - model(tokens())).abs().max()) < 0.5


def test_learned_activations_go_to_huggingface_onnx_and_tables_as_they_are(tmp_path: Path) -> None:
    model = own_model("gpt2", activation={"name": "hermite", "degree": 3})
    save_model(tmp_path / "model", model)
    np.save(tmp_path / "tokens.npy", tokens().numpy())
    before = digests(tmp_path / "model")
    arguments = ["--as-is", "--format", "huggingface", "--onnx", "--tables", "--data", str(tmp_path / "tokens.npy")]
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), *arguments]) == 0
    assert digests(tmp_path / "model") == before
    assert {"config.json", "modeling_polytrope.py", "model.onnx"} <= set(digests(tmp_path / "out"))
    table = read_json(tmp_path / "out" / "tables" / "transformer.h.1.mlp.activation.json")
    x = torch.linspace(table["low"], table["high"], len(table["values"]), dtype=torch.float64)
    activation = model.get_submodule("transformer.h.1.mlp.activation").double()
    with torch.no_grad():
        np.testing.assert_allclose(table["values"], activation(x).numpy(), atol=1e-9)
        model.float()
        torch.testing.assert_close(read_model(tmp_path / "out")(tokens()), model(tokens()), rtol=0, atol=0)


def test_images_with_nan_are_refused_by_the_layer_that_receives_them(tmp_path: Path) -> None:
    save_model(tmp_path / "model", own_model("convnext"))
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32))
    np.save(tmp_path / "images.npy", images)
    images[2, 0, 5, 5] = np.nan
    np.save(tmp_path / "broken.npy", images)
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "a"), "--data", str(tmp_path / "images.npy")]) == 0
    assert is_learnable_activation(load_model(tmp_path / "a").blocks[0].act)
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "b"), "--data", str(tmp_path / "broken.npy")]) == 2
    assert not (tmp_path / "b").exists()
    assert (
        sum(len(batch["pixel_values"]) for batch in array_batches(own_model("convnext"), tmp_path / "images.npy", 3, 4))
        == 4
    )


def run_stage(directory: Path, model: Path, dataset: Path, **parameters: Any) -> Path:
    context = stage_context(directory, stage="convert")
    metrics = convert(
        context, Artifact(model, "m", "model"), Artifact(dataset, "d", "data"), ConvertParameters(**parameters)
    )
    assert metrics["layers"] >= 1
    return context.output


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_stage_writes_the_same_bytes_every_time(tmp_path: Path, kind: str) -> None:
    if kind == "gpt2":
        save_model(tmp_path / "model", own_model("gpt2"))
        (tmp_path / "data").mkdir()
        np.save(tmp_path / "data" / "calibration.npy", tokens().numpy())
    else:
        write_bert(tmp_path / "model")
        (tmp_path / "data").mkdir()
        write_texts(tmp_path / "data").rename(tmp_path / "data" / "calibration.txt")
    options = {"degree": 6, "page": True, "onnx": True, "tables": True, "layers": (0, 0), "format": "huggingface"}
    first = run_stage(tmp_path / "1", tmp_path / "model", tmp_path / "data", **options)
    second = run_stage(tmp_path / "2", tmp_path / "model", tmp_path / "data", **options)
    assert digests(first) == digests(second)
    assert {"conversion.json", "conversion.html", "model.safetensors", "config.json", "model.onnx"} <= set(
        digests(first)
    )
    assert len(list((first / "tables").iterdir())) == len(read_json(first / "conversion.json")["layers"]) == 1
    layer = read_json(first / "conversion.json")["layers"][0]
    assert {"name", "target", "family", "degree", "interval", "certificate", "curve"} <= set(layer)
    assert len(layer["curve"]["x"]) == len(layer["curve"]["density"])
    read_model(first)


def test_the_stage_refuses_a_model_without_tokenizer_for_texts(tmp_path: Path) -> None:
    save_model(tmp_path / "model", own_model("gpt2"))
    (tmp_path / "data").mkdir()
    write_texts(tmp_path / "data").rename(tmp_path / "data" / "calibration.txt")
    with pytest.raises(UserError, match=r"no tokenizer.json"):
        run_stage(tmp_path / "1", tmp_path / "model", tmp_path / "data")


def test_functions_that_a_model_calls_are_converted_and_what_stays_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import RwkvConfig, RwkvModel

    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    original = randomise(RwkvModel(RwkvConfig(vocab_size=97, context_length=40, **sizes)), 0.05)
    original.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "tokens.npy", tokens().numpy())
    (tmp_path / "out").mkdir()  # an empty one is as good as none
    arguments = ["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--data", str(tmp_path / "tokens.npy")]
    assert main([*arguments, "--degree", "4", "--layers", "1-"]) == 0
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    printed = capsys.readouterr().out
    assert re.search(r"^blocks\.1\.feed_forward\.relu_call_1: relu\(\) → hermite\n1 +4 ", printed, re.MULTILINE)
    record = read_conversion(tmp_path / "out")
    assert [layer.name for layer in record.layers] == ["blocks.1.feed_forward.relu_call_1"]
    reasons = {entry.name: entry.reason for entry in record.left or []}
    assert reasons["blocks.0.feed_forward.relu_call_1"] == "in another layer"
    assert "mostly a gate" in reasons["blocks.1.attention.sigmoid_call_1"]
    assert all(f"{name} " in printed for name in reasons)
    converted = read_model(tmp_path / "out")
    with torch.no_grad():
        difference = float((converted(tokens())[0] - original(tokens())[0]).abs().max())
    assert 0 < difference < 0.05


def test_parts_of_a_calibration_make_modules_of_the_same_functions(tmp_path: Path) -> None:
    from ray import cloudpickle
    from transformers import RwkvConfig, RwkvModel

    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    RwkvModel(RwkvConfig(vocab_size=97, context_length=40, **sizes)).save_pretrained(tmp_path / "model")
    model, batches = read_model(tmp_path / "model"), [{"input_ids": part} for part in tokens().split(2)]
    selection = select_activations(model, batches, forward)
    whole = calibrate(model, selection.activations, batches, forward)
    names, calls = list(whole), cloudpickle.loads(cloudpickle.dumps(selection.calls))
    parts = [calibrate_part(str(tmp_path / "model"), {}, names, [batch], 1, calls) for batch in batches]
    summed = add(parts)
    assert names == [f"blocks.{number}.feed_forward.relu_call_1" for number in range(2)]
    assert all((summed[name].counts == whole[name].counts).all() for name in names)


def test_distillation_sees_what_an_activation_receives_by_keyword() -> None:
    class Keyword(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = Hermite(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.act(input=2 * x)
            return found

    model, x = Keyword(), torch.linspace(-1, 1, 9)
    assert torch.equal(received(model, {"x": x})[model.act], 2 * x)


def test_distillation_trains_the_coefficients_only_and_brings_the_model_closer(bert: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(bert), str(tmp_path / "out"), "--degree", "2", "--data", str(tmp_path / "texts.txt")]
    assert main(arguments) == 0
    teacher, student = read_model(bert), read_model(tmp_path / "out")
    frozen = {n: p.clone() for n, p in student.named_parameters() if n in dict(teacher.named_parameters())}
    texts = (tmp_path / "texts.txt").read_text().splitlines()
    batches = text_batches(tokenizer_of(bert), texts, 20, 20, True)
    # Whatever the coordinates of the coefficients and the straight lines, a step moves no activation further.
    first = copy.deepcopy(student)
    distill(teacher, first, batches, steps=1, learning_rate=1e-2)
    for (module, inputs), moved in zip(received(student, batches[0]).items(), learned_activations(first), strict=True):
        with torch.no_grad():
            step = float((moved(inputs) - module(inputs)).square().mean().sqrt())
        assert 0 < step <= 1e-2 * 3**0.5 * 1.001  # three coefficients
    losses = distill(teacher, student, batches, steps=40, learning_rate=1e-2)
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert len(learned_activations(student)) == 2  # the pooler's stays
    for name, parameter in student.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
            assert parameter.requires_grad
    with pytest.raises(ValueError, match="no learnable activation"):
        learned_activations(teacher)


class Routed(torch.nn.Module):
    """Two experts, of which the sign of the first number chooses, and a last layer."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList([build_activation(activation), build_activation(activation)])
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x[:, 0] > 0).long()
        found = torch.empty_like(x)
        for number, expert in enumerate(self.experts):
            found[chosen == number] = expert(x[chosen == number])
        output: torch.Tensor = self.head(found)
        return output


def test_what_distillation_cannot_be_relative_to_is_refused_by_name() -> None:
    torch.manual_seed(0)
    teacher, student = Routed("gelu"), Routed("hermite3")
    x = torch.randn(16, 4)
    for given in (x[x[:, 0] > 0], x[x[:, 0] <= 0]):  # no input: a learning rate of NaN
        idle = int(bool(given[0, 0] <= 0))
        with pytest.raises(ValueError, match=rf"activation `experts\.{idle}` receives nothing from the first batch"):
            distill(teacher, student, [{"x": given}, {"x": x}], steps=2)
    losses = distill(teacher, student, [{"x": x}, {"x": x[x[:, 0] > 0]}], steps=4)
    assert all(map(np.isfinite, losses))
    with torch.no_grad():
        teacher.head.weight.zero_()
        teacher.head.bias.zero_()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match="for batch 0 the teacher gives nothing but 0, and no error can be relative"):
        distill(teacher, student, [{"x": x}], steps=1)
    teacher.head.bias.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="for batch 0 the teacher gives NaN or infinity"):
        distill(teacher, student, [{"x": x}], steps=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_stage_calibrates_on_a_data_set_of_the_shard_stage(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data")
    save_model(tmp_path / "model", own_model("gpt2", vocab_size=257, sequence_length=32))
    output = run_stage(tmp_path / "1", tmp_path / "model", tmp_path / "data", degree=6, calibration_samples=12)
    layers = read_json(output / "conversion.json")["layers"]
    assert [layer["inputs"]["inputs"] for layer in layers] == [12 * 32 * 64] * 2
    assert is_learnable_activation(load_model(output).blocks[1].mlp.activation)
