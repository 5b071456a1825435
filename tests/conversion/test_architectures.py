"""A slice of the table in docs/conversion.md: found, converted with an effect, and equal when loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.architectures import BEGIN, END, PAGE, RESULTS, Row, architectures, measure, table
from polytrope.models.convert import convert
from polytrope.models.formats import read_model


@pytest.mark.parametrize(
    ("name", "found", "converted", "calls"),
    [
        ("GPT-2", 2, 2, 0),  # of transformers, not this package's own
        ("Whisper", 6, 6, 2),
        ("Gemma 2", 5, 2, 0),  # soft caps stay
        ('`nn.TransformerEncoder`, "relu"', 2, 2, 2),
        ("one module for several layers", 1, 1, 0),
    ],
)
def test_a_model_of_the_table(tmp_path: Path, name: str, found: int, converted: int, calls: int) -> None:
    row = measure(architectures()[name](), tmp_path / "converted")
    assert (row.found, row.converted, row.calls) == (found, converted, calls)
    assert row.before is not None
    assert row.after is not None
    assert row.before < 1e-6 < row.after < 0.05
    assert row.reload == "equal"


def test_functions_that_became_modules_are_trained_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForSpeechSeq2Seq

    row = architectures()["Whisper"]()
    batch = row.inputs()
    convert(row.build().eval(), [batch], degree=4).save(tmp_path / "converted")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "converted", trust_remote_code=True).eval()
    coefficients = model.model.encoder.gelu_call_1.coefficients
    model(**batch).logits.sum().backward()
    assert coefficients.grad.abs().sum() > 0
    with torch.no_grad():
        coefficients += 0.01
        wanted = model(**batch).logits
        model.save_pretrained(tmp_path / "trained")
        again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "trained", trust_remote_code=True)
        assert torch.equal(again(**batch).logits, wanted)
        assert torch.equal(read_model(tmp_path / "trained")(**batch).logits, wanted)
        headless = AutoModel.from_pretrained(tmp_path / "trained", trust_remote_code=True)
        assert torch.equal(headless(**batch)[0], model.model(**batch)[0])


def test_the_page_has_the_table_of_the_last_measurement() -> None:
    content = json.loads((RESULTS / "architectures.json").read_text())
    rows = [Row(**row) for row in content["rows"]]
    assert [row.architecture for row in rows] == list(architectures())
    assert len(rows) >= 25
    assert all(row.failure is None and row.reload == "equal" and (row.after or 0) > 0 for row in rows)
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == table(rows).strip()
