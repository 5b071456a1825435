"""Model files: what is saved is what is loaded, in equal bytes, with activations as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, read_description, save_model

GPT2 = {"vocab_size": 64, "sequence_length": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}


def test_a_saved_model_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("gpt2", {**GPT2, "activation": ["gelu", {"name": "hermite", "degree": 4}]}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.transformer["wte"].weight  # type: ignore[index, union-attr]
    assert read_description(tmp_path)["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        torch.manual_seed(0)
        save_model(tmp_path / name, build_model("convnext", {"depths": [1], "dims": [8], "num_classes": 3}))
    for file in ("model.json", "model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_replaced_activation_is_saved_as_it_is_now(tmp_path: Path) -> None:
    from polytrope.ops import build_activation

    model = build_model("gpt2", {**GPT2, "activation": "gelu"}).eval()
    model.blocks[1].mlp.activation = build_activation({"name": "hermite", "degree": 5})  # type: ignore[index, union-attr]
    save_model(tmp_path, model)
    assert read_description(tmp_path)["config"]["activation"][0] == "gelu"
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(tokens), model(tokens))


def test_the_tokenizer_travels_with_the_model(tmp_path: Path) -> None:
    dataset, first, second = (tmp_path / name for name in ("dataset", "first", "second"))
    dataset.mkdir()
    entry = {"kind": "bpe", "vocab_size": 64}
    (dataset / "dataset.json").write_text(json.dumps({"format": 1, "tokenizer": entry}))
    (dataset / "tokenizer.json").write_text('{"model": {}}')
    model = build_model("gpt2", GPT2)
    save_model(first, model, tokenizer=dataset)
    save_model(second, model, tokenizer=first)
    for directory in (first, second):
        assert read_description(directory)["tokenizer"] == entry
        assert (directory / "tokenizer.json").read_text() == '{"model": {}}'


def test_what_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model directory"):
        load_model(tmp_path)
    save_model(tmp_path, build_model("gpt2", GPT2))
    description = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**description, "config": {**GPT2, "n_layer": 3}}))
    with pytest.raises(ValueError, match="weights do not fit"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(description))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**description, "format": 3}))
    with pytest.raises(ValueError, match="format 3, this version reads 1 and 2"):
        load_model(tmp_path)
