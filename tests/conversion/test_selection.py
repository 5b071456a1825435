"""What is chosen, what stays, and what is said where nothing is found."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.convert import convert
from polytrope.models.formats.states import load_tensors
from polytrope.models.surgery import find_activations
from polytrope.ops import is_learnable_activation

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Bump(nn.Module):
    """An activation of no known class, made of no known function."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(-x * x)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(8, 8), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.activation(input=self.layer(x))
        return found


class Slopes(nn.Module):
    """A function with a tensor for slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.slopes = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(self.layer(x), self.slopes)


def network(*modules: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *modules)


def test_an_activation_that_is_called_by_keyword_runs_converted() -> None:
    converted = convert(ByKeyword(), [X], degree=4).model
    assert is_learnable_activation(converted.activation)
    assert converted(X).shape == X.shape


@pytest.mark.parametrize(
    "kind",
    [nn.SELU, nn.CELU, nn.PReLU, nn.Softsign, nn.Hardtanh, nn.LogSigmoid],
)
def test_rarer_activations_of_torch_are_found(kind: Callable[[], nn.Module]) -> None:
    model = network(kind(), nn.Linear(8, 2))
    conversion = convert(model, [X], degree=6)
    assert [entry.name for entry in conversion.activations] == ["1"]
    assert 0 < conversion.activations[0].relative_error < 0.05


def test_gelu_of_bloom_is_found() -> None:
    from transformers.models.bloom.modeling_bloom import BloomGelu

    assert len(convert(network(BloomGelu()), [X], degree=6).activations) == 1


def test_slopes_in_a_call_stay_and_say_so() -> None:
    with pytest.raises(ValueError, match=r"slopes` in the call is a tensor"):
        convert(Slopes(), [X])


def test_nothing_found_says_what_there_is_and_what_would_take_it() -> None:
    with pytest.raises(ValueError, match=r"Linear × 1, Bump × 1, LayerNorm × 1\.\n.*types=\['Bump'\] \(--type\)"):
        convert(network(Bump(), nn.LayerNorm(8), nn.Identity()), [X])
    assert len(convert(network(Bump()), [X], degree=4, types=["Bump"]).activations) == 1
    with pytest.raises(ValueError, match="A class of your own is taken by its name"):
        convert(network(nn.LayerNorm(8)), [X])
    message = (
        r"1 \(Sigmoid\): Sigmoid is mostly a gate; .*\ntypes=\['Sigmoid'\] \(--type\) takes them, or include=\['1'\]"
    )
    with pytest.raises(ValueError, match=message):
        convert(network(nn.Sigmoid()), [X])


def test_a_model_that_is_converted_already_says_so() -> None:
    model = convert(network(nn.GELU(), nn.Linear(8, 8), nn.SiLU()), [X], degree=4, types=["GELU"]).model
    with pytest.raises(
        ValueError, match=r"no classical activation: its 2 are learned already \(1, 3\), by a training or a conv"
    ):
        convert(convert(model, [X], degree=4).model, [X])
    left = convert(model, [X], degree=5).left
    assert [(entry.name, entry.reason) for entry in left] == [
        ("1", "learned already (hermite 4); it stays unless its type or its name is asked for")
    ]
    again = convert(model, [X], degree=8, types=["Hermite"])
    assert [(entry.name, entry.target) for entry in again.activations] == [("1", "Hermite")]


@pytest.mark.parametrize("kind", ["GELU", "gelu", "quick_gelu", "QuickGELU"])
def test_a_type_is_written_as_anybody_would(kind: str) -> None:
    from transformers.activations import QuickGELUActivation

    class QuickGELU(QuickGELUActivation):  # type: ignore[misc, no-untyped-call]
        pass

    model = network(nn.GELU(), QuickGELU())
    assert [entry.name for entry in find_activations(model, types=[kind])] == ["2" if "uick" in kind else "1"]


def test_an_error_keeps_all_its_lines(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(ValueError, match=r"weights\.pt") as raised:
        load_tensors(tmp_path / "weights.pt")
    assert str(raised.value.__cause__) in str(raised.value)

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(f"the first line\nand the second of {len(x)}")

    with pytest.raises(ValueError, match="the first line\nand the second of 8"):
        convert(network(Failing()), [X])


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("include", ["1", "4.*"], "include: `4.*` is the name of no activation; there are: 1, 3, 4"),
        ("exclude", ["poler.*"], "exclude: `poler.*` is the name of no activation; there are: 1, 3, 4"),
        (
            "types",
            ["GELU", "SiLu", "RELU"],
            "types: `RELU` is the type of no activation; there are: GELU, Sigmoid, SiLU",
        ),
        ("layers", (0, 5), "layers: 5 is the number of no layer; there are: 0 to 4"),
    ],
)
def test_a_selection_that_is_true_of_nothing_is_refused_with_what_there_is(
    option: str, given: Any, message: str
) -> None:
    model = network(nn.GELU(), nn.Linear(8, 8), nn.Sigmoid(), nn.SiLU())
    for select in (
        lambda **options: convert(model, [X], **options),
        lambda **options: find_activations(model, **options),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            select(**{option: given})


def test_a_selection_may_name_what_stays() -> None:
    model = network(nn.GELU(), nn.Linear(8, 8), nn.Sigmoid())
    options: dict[str, Any] = {"include": ["1"], "exclude": ["3"], "types": ["gelu"], "layers": (1, sys.maxsize)}
    assert convert(model, [X], degree=4, **options).certificates.keys() == {"1"}
    assert [entry.name for entry in find_activations(model, **options)] == ["1"]
