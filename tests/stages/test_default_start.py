"""How a polynomial of a model that is trained starts where the file does not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

from polytrope.models import build_model
from polytrope.models.checkpoint import activation_modules
from polytrope.ops import LearnableActivation
from polytrope.pipeline.stages.train.activations import apply_activation_options
from polytrope.pipeline.stages.train.coefficient_rates import coefficient_multiple
from polytrope.pipeline.stages.train.parameters import ModelParameters

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 32, "sequence_length": 8}
START: dict[str, Any] = {"init": "gelu", "interval": [-2, 2]}


def settings_of(activation: Any, **options: Any) -> dict[str, Any]:
    return ModelParameters(**SIZES, activation=activation, activation_options=options or None).settings()


@pytest.mark.parametrize(
    ("activation", "options", "expected"),
    [
        ("hermite4", {}, {"name": "hermite", "degree": 4, **START}),
        ({"name": "hermite"}, {"per_channel": True}, {"name": "hermite", **START}),
        ({"name": "hermite", "interval": [-2, 3]}, {}, {"name": "hermite", "interval": [-2, 3], "init": "gelu"}),
        ({"name": "hermite", "interval": None}, {}, {"name": "hermite", "interval": None, "init": "stable"}),
        ({"name": "hermite", "init": "silu"}, {}, {"name": "hermite", "init": "silu", "interval": [-2, 2]}),
        ({"name": "hermite", "init": "silu", "interval": None}, {}, None),
        ({"name": "hermite", "init": "torchortho"}, {}, None),
        ("hermite3", {"init": "variance_preserving"}, None),
        ("hermite3", {"init": "relu"}, {"name": "hermite", "degree": 3, "interval": [-2, 2]}),
        ("hermite3", {"init": "identity"}, {"name": "hermite", "degree": 3, **START}),  # for splines
        ("legendre4", {"init": "torchortho"}, {"name": "legendre", "degree": 4, **START, "variable": [0.0, 2.0]}),
        ("hermite3", {"init": "torchortho"}, None),
        ("hermite3", {"interval": [-3, 3]}, {"name": "hermite", "degree": 3, "init": "gelu"}),
        ("chebyshev4", {}, {"name": "chebyshev", "degree": 4, **START, "variable": [0.0, 2.0]}),
        (
            {"name": "legendre", "interval": [-1, 3]},
            {},
            {"name": "legendre", "interval": [-1, 3], "init": "gelu", "variable": [1.0, 2.0]},
        ),
        ({"name": "chebyshev", "init": "stable"}, {}, None),
        ("fourier5", {}, None),
        ("gelu", {}, None),
    ],
)
def test_what_is_not_said_is_added_and_what_is_said_stays(
    activation: Any, options: dict[str, Any], expected: Any
) -> None:
    assert settings_of(activation, **options)["activation"] == (activation if expected is None else expected)


def test_what_a_recorded_benchmark_trained_says_its_start_and_interval_itself() -> None:
    """Figures of before there was a default are of these; a name alone would be another model now."""
    from benchmarks.train import HERMITE

    content = yaml.safe_load((ROOT / "workflows" / "grokking.yaml").read_text(encoding="utf-8"))
    matrices = [content["stages"][stage]["matrix"]["activation"] for stage in ("bases", "scales")]
    entries = [entry for matrix in matrices for entry in matrix if isinstance(entry, dict)]
    recorded = [{key: entry[key] for key in entry if key != "label"} for entry in entries if entry["name"] == "hermite"]
    for entry in (HERMITE, *recorded):
        assert entry["init"] == "variance_preserving"
        assert entry["interval"] is None
        assert settings_of(entry)["activation"] == entry
    assert len(recorded) == 3


def test_each_entry_of_a_list_starts_by_itself() -> None:
    entries = [{"layers": 0, "name": "gelu"}, {"layers": 1, "name": "hermite", "degree": 8}]
    assert settings_of(entries)["activation"] == [entries[0], {**entries[1], **START}]


@pytest.mark.parametrize("degree", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("name", ["hermite", "chebyshev", "legendre"])
def test_every_polynomial_starts_as_gelu_and_learns_ten_times_as_fast(name: str, degree: int) -> None:
    settings = settings_of(f"{name}{degree}")
    (module, _) = activation_modules(build_model("gpt2", apply_activation_options("gpt2", settings))).values()
    assert isinstance(module, LearnableActivation)
    assert coefficient_multiple(module) == 10
    x = torch.linspace(-2, 2, 201)
    with torch.no_grad():
        assert float((module(x) - F.gelu(x)).abs().max()) < {2: 0.13, 3: 0.13, 4: 0.016, 8: 3e-4, 16: 1e-6}[degree]
        assert float((module(2 * x) - F.gelu(2 * x)).abs().max()) < (0.8 if degree < 4 else 0.13)
