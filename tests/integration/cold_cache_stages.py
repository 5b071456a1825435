"""Stages of a small run whose store is a bucket: data, a model, and an inner workflow."""

from __future__ import annotations

import json

from polytrope.pipeline.stage import Artifact, StageContext


def data(context: StageContext) -> None:
    (context.output / "dataset.json").write_text(json.dumps({"name": "ours", "splits": {"train": {"documents": 7}}}))
    context.log_dataset("ours", "d" * 36, "s3://ours", {"documents": 7})


def train(context: StageContext, dataset: Artifact, note: str = "") -> dict[str, float]:
    from polytrope.models.checkpoint import save_model
    from polytrope.models.gpt2 import GPT2, GPT2Config

    assert (dataset.path / "dataset.json").exists()
    config = GPT2Config(vocab_size=8, sequence_length=4, n_layer=1, n_head=1, n_embd=4)
    save_model(context.output, GPT2(config))
    (context.output / "page.html").write_text(f"<p>trained {note}</p>")
    context.log_artifact("page.html")
    return {"loss": 2.0}


def inner(context: StageContext) -> dict[str, float]:
    (context.output / "text").write_text("of the inner run")
    return {"inner": 1.0}
