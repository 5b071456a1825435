"""The `convert` stage on data sets of this pipeline: images as well as text, and no tokens of other words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_support import make_dataset

from polytrope.models import build_model
from polytrope.models.checkpoint import load_model, save_model
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, stage_context
from polytrope.pipeline.stages.convert.convert import convert
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.stages.shard.parameters import ShardImagesParameters
from polytrope.pipeline.stages.shard.shard_images import shard_images


def test_a_convnext_is_converted_on_the_images_it_was_trained_on(tmp_path: Path) -> None:
    data = stage_context(tmp_path / "digits", resources=Resources())
    shard_images(data, ShardImagesParameters())
    torch.manual_seed(0)
    sizes = {"depths": [1, 1], "dims": [8, 16], "patch_size": 1, "num_classes": 10, "in_channels": 1}
    model = build_model("convnext", {**sizes, "activation": "gelu"})
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model)
    context = stage_context(tmp_path / "convert", resources=Resources())
    digits = Artifact(data.output, "digest of the data", "digits")
    figures = convert(context, Artifact(tmp_path / "model", "digest", "train"), digits, ConvertParameters(degree=6))
    assert figures["layers"] == 2
    assert len(json.loads((context.output / "conversion.json").read_text())["layers"]) == 2
    converted = load_model(context.output)
    images = torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        difference = float((converted(images) - model.eval()(images)).abs().max())
    assert 0 < difference < 0.05


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset")
    (tmp_path / "model").mkdir()
    model = build_model("gpt2", {"vocab_size": 320, "sequence_length": 32, "n_layer": 1, "n_head": 2, "n_embd": 32})
    save_model(tmp_path / "model", model, tokenizer=dataset.path)
    (tmp_path / "model/tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": []}}')
    context = stage_context(tmp_path / "convert", resources=Resources())
    with pytest.raises(UserError, match="tokenizer is not the one of the dataset"):
        convert(context, Artifact(tmp_path / "model", "digest", "train"), dataset, ConvertParameters())
