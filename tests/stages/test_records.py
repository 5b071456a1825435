"""The JSON files that stages leave each other: what was written is read, what is not that is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polytrope.models.changes import DroppedBlocks, EqualizedLayer, FactoredLayer, Factorization, Left, UnchangedLayer
from polytrope.pipeline.data.conversion_file import read_conversion, write_conversion
from polytrope.pipeline.data.evaluation_file import read_evaluation
from polytrope.pipeline.data.lineage import read_lineage
from polytrope.pipeline.data.records import OpenRecord, read_record, write_record
from polytrope.pipeline.data.speed_file import read_speed
from polytrope.pipeline.data.training_file import Training, read_history, read_training, write_training
from polytrope.pipeline.errors import UserError

TRAINING = {"format": 1, "architecture": "gpt2", "parameters": 10, "steps": 3, "samples": 12, "tokens": 96}


def test_a_training_comes_back_with_metrics_of_any_name_and_without_what_json_cannot_say(tmp_path: Path) -> None:
    training = Training.model_validate({**TRAINING, "val/loss": 2.5, "train/loss": math.nan, "rollbacks": ["step 2"]})
    write_training(tmp_path, training, [{"step": 1, "train/loss": math.inf}, {"step": 3, "val/loss": 2.5}])
    written = json.loads((tmp_path / "training.json").read_text())
    assert written == {**TRAINING, "val/loss": 2.5, "train/loss": None, "rollbacks": ["step 2"]}  # nothing unset
    read = read_training(tmp_path)
    assert read is not None
    assert read.figures() == {"parameters": 10, "steps": 3, "samples": 12, "tokens": 96, "val/loss": 2.5}
    assert read.failure is None
    assert read_history(tmp_path) == [{"step": 1, "train/loss": None}, {"step": 3, "val/loss": 2.5}]


def test_a_model_from_elsewhere_has_no_training(tmp_path: Path) -> None:
    assert read_training(tmp_path) is None
    assert read_history(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "read", "content", "words"),
    [
        ("evaluation.json", read_evaluation, None, "cannot be read: No such file"),
        ("evaluation.json", read_evaluation, {"format": 2}, "format: Input should be 1"),
        ("speed.json", read_speed, {"format": 1, "protocol": {}}, r"protocol\.device: Field required"),
        ("conversion.json", read_conversion, {"layers": [{"name": "a"}]}, r"layers\.0\.target: Field required"),
        ("training.json", read_training, {**TRAINING, "steps": "many"}, "steps: Input should be a valid integer"),
        ("history.json", read_history, "[{", "cannot be read"),
        ("lineage.json", read_lineage, {"samples": "many"}, "samples: Input should be a valid integer"),
        ("conversion.json", read_conversion, '{"layers": [', "JSON: Invalid JSON"),
    ],
)
def test_a_file_that_is_something_else_is_refused_with_its_field(
    tmp_path: Path, name: str, read: Callable[[Path], Any], content: Any, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path)
    assert str(tmp_path / name) in caught.value.message
    assert "name a" in str(caught.value.hint)


def test_a_conversion_from_before_comes_back_as_what_python_has(tmp_path: Path) -> None:
    layer: dict[str, Any] = {
        "name": "a",
        "inputs": 8,
        "outputs": 4,
        "input_rank": 3,
        "output_rank": 2,
        "rank": 1,
        "relative_error": 0.1,
    }
    rounded = {"name": "b", "inputs": 8, "outputs": 4, "exponent": 0.5, "relative_error": 0.1, "uniform_error": 0.2}
    stays = {"name": "c", "reason": "excluded"}
    equal: dict[str, Any] = {"name": "d", "rows": "a", "columns": None, "smallest": 0.5, "largest": 2}
    content = {
        "format": 1,
        "layers": [],
        "left": [{"name": "e", "kind": "Tanh", "place": "Pooler", "count": None, "reason": "excluded"}],
        "dropped": {
            "blocks": ["h.1"], "into": "h.0.out", "total": 3, "distances": {"h.0": 0.5},
            "relative_error": 0.1, "relative_error_without": 0.2,
        },
        "factorization": {"energy": 0.999, "layers": [layer], "left": [stays]},
        "quantization": {
            "bits": 4, "per": "row", "layers": [rounded], "left": [stays], "equalized": [equal], "unequalized": [stays],
            "bytes_before": 128, "bytes_after": 16,
        },
        "size": {"before": 32, "after": 12, "difference": 0.1},
    }  # fmt: skip
    (tmp_path / "conversion.json").write_text(json.dumps(content))
    found = read_conversion(tmp_path)
    assert found.left == [Left("e", "Tanh", "Pooler", None, "excluded")]
    assert found.dropped == DroppedBlocks(("h.1",), "h.0.out", 3, {"h.0": 0.5}, 0.1, 0.2)
    expected = FactoredLayer("a", 8, 4, 3, 2, 1, 0.1)
    assert found.factorization == Factorization(0.999, (expected,), (UnchangedLayer("c", "excluded"),))
    assert found.metrics()["utilisation"] == 2 / 4
    assert found.quantization is not None
    assert found.quantization.equalized == (EqualizedLayer("d", "a", None, 0.5, 2.0),)
    write_conversion(tmp_path, found)
    layer["largest_change"] = None
    equal |= dict.fromkeys(("rows_before", "rows_after", "columns_before", "columns_after"))
    assert json.loads((tmp_path / "conversion.json").read_text()) == content
    content["quantization"]["per"] = "column"  # type: ignore[index]
    (tmp_path / "conversion.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"quantization\.per: Input should be 'row' or 'tensor'"):
        read_conversion(tmp_path)


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", OpenRecord.model_validate({"b": 3, "c": 3.0}))
    assert (tmp_path / "a.json").read_text() == '{\n "b": 3,\n "c": 3.0\n}\n'
    assert read_record(tmp_path / "a.json", OpenRecord, "").model_dump() == {"b": 3, "c": 3.0}
