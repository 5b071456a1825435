"""`polytrope.models.convert`: people's own modules and data, converted in one call, saved, and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from polytrope.models.calls import lift
from polytrope.models.conversion import layer_costs
from polytrope.models.convert import Conversion, convert
from polytrope.models.formats import read_model
from polytrope.models.inputs import forward
from polytrope.ops import is_learnable_activation


class Network(nn.Module):
    """A module and a function; the head shares its weight with the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.architecture = "gpt2"  # a name of this package, which makes it no model of it
        self.first = nn.Linear(8, 8)
        self.activation = nn.GELU()
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(F.silu(self.second(self.activation(self.first(x)))))}


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.layers(x if mask is None else x * mask)
        return found


@pytest.fixture
def x() -> Tensor:
    return torch.randn(96, 8, generator=torch.Generator().manual_seed(0))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.mark.parametrize("kind", ["loader", "tensors", "tuples", "dicts", "function", "one tensor", "iterator"])
def test_every_kind_of_data_gives_the_same_conversion(kind: str, x: Tensor) -> None:
    model = network().train()
    parts = list(x.split(32))
    labels = torch.zeros(32, dtype=torch.long)
    data: Any = {
        "loader": DataLoader(TensorDataset(x, torch.zeros(96)), batch_size=32),
        "tensors": parts,
        "tuples": [(part, labels) for part in parts],
        "dicts": [{"x": part.double()} for part in parts],
        "function": lambda module: [module(part) for part in parts] and None,
        "one tensor": x,
        "iterator": iter(parts),
    }[kind]
    conversion = convert(model, data, degree=8)
    assert [entry.target for entry in conversion.activations] == ["GELU", "silu()"]
    assert conversion.samples == (0 if kind == "function" else 96)
    assert 0 < conversion.difference < 5e-3
    assert conversion.activations[0].inputs["inputs"] == 96 * 8
    assert isinstance(model.activation, nn.GELU)  # a copy was converted
    assert model.training
    assert conversion.model.training
    wanted, found = model(x)["logits"], conversion.model(x)["logits"]
    assert (found - wanted).norm() < 5e-3 * wanted.norm()
    assert found is not wanted
    assert not torch.equal(found, wanted)


def test_the_data_is_read_until_there_are_enough_samples(x: Tensor) -> None:
    read: list[int] = []

    def batches() -> Any:
        for number, part in enumerate(x.split(32)):
            read.append(number)
            yield part

    assert convert(network(), batches(), degree=4, samples=40).samples == 64
    assert read == [0, 1]


def test_activations_are_rated_on_as_many_samples_as_asked_for_or_not_at_all(tmp_path: Path, x: Tensor) -> None:
    many = convert(network(), [x[:32], x[32:]], degree=4, rated_samples=96)
    few = convert(network(), [x[:32], x[32:]], degree=4)
    model = network()
    lift(model, many.selection.calls if many.selection else [])
    together = layer_costs(model, many.layers, [x], forward)
    for one, other in zip(many.activations, few.activations, strict=True):
        assert one.cost == pytest.approx(together[one.name], rel=1e-5)  # of two batches what it is of one
        assert one.cost != pytest.approx(other.cost, rel=1e-5)
    model = network()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    unrated = convert(model, [x[:64]], degree=4, rated_samples=0, in_place=True)
    without = len(calls)
    assert [entry.cost for entry in unrated.activations] == [None, None]
    assert unrated.difference > 0
    assert unrated.report().splitlines()[1].endswith("–")
    again = network()
    again.register_forward_hook(lambda *_: calls.append(1))
    convert(again, [x[:64]], degree=4, in_place=True)
    assert len(calls) - without == without + 4  # for gradients, the output before, and with each of two activations
    unrated.save(tmp_path / "out")
    assert Conversion.load(tmp_path / "out", Network()) == unrated


def test_a_long_step_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    said: list[tuple[int, str]] = []
    convert(network(), list(x.split(32)), degree=2, progress=lambda step, text: said.append((step, text)))
    assert [step for step, _ in said] == [0, 1, 2, 2, 2]  # nothing takes long here
    monkeypatch.setattr("polytrope.models.convert.SAID_EVERY", 0.0)
    convert(network(), list(x.split(32)), degree=2, progress=lambda step, text: said.append((step, text)))
    told = {(step, text.partition(", about")[0]) for step, text in said}  # how long depends on the machine
    assert {(0, f"looking for activations: {done} of 3 done") for done in (1, 2)} <= told
    assert {(1, f"calibrating: {done} of 3 done") for done in (1, 2)} <= told
    assert {(2, "fitting: 1 of 2 done"), (2, "rating: 1 of 2 done")} <= told


def test_a_conversion_is_saved_and_loaded_into_a_fresh_module(tmp_path: Path, x: Tensor) -> None:
    model = network()
    conversion = convert(model, [x], in_place=True, degree=6)
    assert conversion.model is model
    conversion.save(tmp_path / "out")
    fresh = Network()
    loaded = Conversion.load(tmp_path / "out", fresh)
    assert loaded == conversion
    assert loaded.model is fresh
    assert not fresh.training
    assert torch.equal(fresh(x)["logits"], model.eval()(x)["logits"])
    assert fresh.second.weight is fresh.first.weight
    assert sum(map(is_learnable_activation, fresh.modules())) == 2
    certificate = loaded.certificates["activation"]
    assert certificate["maximum"] >= certificate["rms"] > 0
    report = conversion.report()
    assert "GELU → hermite 6" in report
    assert f"{certificate['maximum']:.2e}" in report
    with pytest.raises(ValueError, match="give a fresh model too"):
        Conversion.load(tmp_path / "out")
    with pytest.raises(ValueError, match="holds a Network, the model is a Masked"):
        Conversion.load(tmp_path / "out", Masked())
    with pytest.raises(ValueError, match=r"Conversion\.load\(directory, model\)"):
        read_model(tmp_path / "out")


def test_what_cannot_be_told_is_asked_for(x: Tensor) -> None:
    labels = torch.ones(96, 1)
    with pytest.raises(ValueError, match=r"Masked\.forward takes 1 of them or more: which are its inputs\?"):
        convert(Masked(), [(x, labels)])
    told = convert(Masked(), [(x, labels)], degree=4, forward=lambda model, batch: model(batch[0]))
    assert [entry.name for entry in told.activations] == ["layers.1"]
    for data, message in (
        ([], "there is no batch in it"),
        (TensorDataset(x), "put it into a torch.utils.data.DataLoader"),
        ([{"y": x}], "unexpected keyword argument 'y'"),
        ([x[:, :3]], "cannot run on the calibration data"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(Masked(), data)
    with pytest.raises(ValueError, match="is an activation itself"):
        convert(nn.GELU(), [x])


def test_weights_that_do_not_come_back_as_they_were_are_not_written(x: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(x.shape[1], 4), nn.GELU())

    def restless(_module: nn.Module, state: dict[str, Any], *_arguments: Any) -> None:
        state["0.bias"] = torch.randn(4)

    conversion = convert(model, [x], degree=3)
    conversion.model.register_state_dict_post_hook(restless)
    with pytest.raises(ValueError, match=r"is not written: 0\.bias does not come back as it was"):
        conversion.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "hermit"}, r"^family: expected one of hermite, .*, auto, got 'hermit'"),
        ({"family": "auto"}, "^family: auto chooses by target_error"),
        ({"degree": 0}, "^degree: expected an integer from 1 to 16, got 0"),
        ({"target_error": 0.0}, "^target_error: expected a number > 0, got 0.0"),
        ({"coverage": 2.0}, "^coverage: expected a share above 0.5, at most 1, got 2.0"),
        ({"derivative_weight": -1.0}, "^derivative_weight: expected a number ≥ 0, got -1.0"),
        ({"samples": 0}, "^samples: expected at least 1, or None for all, got 0"),
        ({"rated_samples": -1}, "^rated_samples: expected at least 0, got -1"),
    ],
)
def test_wrong_options_are_refused_before_the_data_is_read(options: dict[str, Any], message: str) -> None:
    def data(_model: nn.Module) -> Any:
        raise AssertionError("read")

    with pytest.raises(ValueError, match=message):
        convert(network(), data, **options)


def test_a_conversion_in_place_that_fails_leaves_the_model_as_it_was(x: Tensor) -> None:
    model = network()
    names, before = [name for name, _ in model.named_modules()], model(x)["logits"]
    with pytest.raises(ValueError, match="reaches no error"):
        convert(model, [x], in_place=True, degree=2, target_error=1e-9)
    assert [name for name, _ in model.named_modules()] == names
    assert type(model) is Network
    assert "silu_call_1" not in repr(model)
    assert torch.equal(model(x)["logits"], before)
