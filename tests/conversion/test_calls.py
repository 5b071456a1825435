"""Activations that a model calls as functions are seen, listed and converted; nothing is left in silence."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.calibration import calibrate
from polytrope.models.calls import FUNCTIONS, lift, observe_calls
from polytrope.models.conversion import FitOptions, apply, fit_layers, layer_costs, prove
from polytrope.models.rewriting import FunctionalActivation, sites_of
from polytrope.models.selection import Selection, select_activations
from polytrope.models.surgery import Choice, describe_activations, restore_activations


def run(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(batch)
    return output if isinstance(output, Tensor) else output[0]


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


def swiglu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def around(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    return around


class Parent(nn.Module):
    def finish(self, x: Tensor) -> Tensor:
        return x


class Everything(Parent):
    """Every way to call a function that people have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.narrow = nn.Linear(4, 8)
        self.__private = nn.Linear(8, 8)
        self.slope = 0.1
        self.activation = F.gelu

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        count = 3
        x = F.relu(self.layers[0](x))
        x = torch.relu(self.__private(x)) + F.relu(self.layers[1](F.relu(x)))
        x = self.layers[2](x).relu()
        x = sum([F.silu(layer(x)) for layer in self.layers[:count]])
        x = self.helper(x)
        x = new_gelu(x)
        x = F.leaky_relu(x, self.slope)
        F.elu(x, inplace=True)
        x.relu_()
        x = self.activation(self.layers[5](x))
        x = x * torch.sigmoid(self.layers[4](x)) + torch.tanh(x)
        x = self.narrow(swiglu(x))
        return super().finish(
            F.gelu(
                x,
                approximate="tanh",
            )
        )

    def helper(self, x: Tensor) -> Tensor:
        return self.layers[4](F.mish(input=x))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Everything(), Everything()).eval()


def inputs() -> Tensor:
    return 3 * torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


def converted(model: nn.Module, x: Tensor, **choice: Any) -> Selection:
    selection = select_activations(model, [x], run, Choice(**choice))
    measured = calibrate(model, selection.activations, [x], run)
    fits = fit_layers(selection.activations, measured, FitOptions("rational", 3))
    layer_costs(model, fits, [x], run)
    apply(model, fits)
    prove(model, [entry.name for entry in selection.activations], x, run)
    return selection


def test_every_kind_of_call_is_found_and_becomes_a_module_that_computes_the_same() -> None:
    model, x = network(), inputs()
    before, keys = run(model, x), list(model.state_dict())
    selection = select_activations(model, [x], run)
    names = sorted(entry.name.removeprefix("0.") for entry in selection.activations if entry.name.startswith("0."))
    assert names == [
        *("elu_call_1", "gelu_call_1", "gelu_call_2", "leaky_relu_call_1", "mish_call_1", "new_gelu_call_1"),
        *("relu_call_1", "relu_call_2", "relu_call_3", "relu_call_4", "relu_call_5", "relu_call_6", "silu_call_1"),
    ]
    assert len(selection.activations) == 2 * len(names)
    assert torch.equal(run(model, x), before)
    assert list(model.state_dict()) == keys
    called = {call.name: call for call in selection.calls}
    assert called["0.silu_call_1"].count == 3
    assert called["1.leaky_relu_call_1"].module.arguments == (0.1,)
    assert called["0.mish_call_1"].place.startswith("Everything.helper, line ")
    left = {entry.name: entry.reason for entry in selection.left}
    assert list(left) == [f"{owner}.{call}" for owner in "01" for call in ("sigmoid_call_1", "tanh_call_1", "silu()")]
    assert "stays unless" in left["0.sigmoid_call_1"]
    assert "in a call of `swiglu`" in left["0.silu()"]


def test_a_conversion_is_copied_pickled_compiled_exported_and_restored_from_its_description() -> None:
    model, x = network(), inputs()
    before = run(model, x)
    selection = converted(model, x, exclude=["1.*"])
    after = run(model, x)
    assert not torch.equal(before, after)
    assert isinstance(model[0], Everything)
    assert not sites_of(model[1])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
        torch.compile(model, fullgraph=True, backend="eager"),
        torch.export.export(model, (x,)).module(),
        torch.export.export(model, (x,), strict=True).module(),
    ):
        assert torch.equal(run(other, x), after)
    with torch.no_grad():
        copy.deepcopy(model)[0].relu_call_1.numerator.mul_(2)
    assert torch.equal(run(model, x), after)
    description = json.loads(json.dumps(describe_activations(model)))
    assert list(description) == [entry.name for entry in selection.activations]
    fresh = network()
    restore_activations(fresh, description)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, x), after)
    model[0](x).sum().backward()  # the other one, as it was, cannot: it works in place
    assert all(parameter.grad is not None for parameter in model[0].relu_call_6.parameters())


def test_a_source_that_has_changed_since_is_refused() -> None:
    model, x = network(), inputs()
    converted(model, x)
    description = describe_activations(model)
    description["0.relu_call_1"]["call"]["source"] = "0" * 64
    with pytest.raises(ValueError, match=r"`0.relu_call_1`: Everything.forward is another one than at the conversion"):
        restore_activations(network(), description)


def test_gates_are_converted_if_asked_for() -> None:
    model, x = network(), inputs()
    selection = converted(model, x, types=["Tanh"])
    assert [entry.name for entry in selection.activations] == ["0.tanh_call_1", "1.tanh_call_1"]
    selection = converted(network(), x, include=["0.sigmoid*"])
    assert [entry.name for entry in selection.activations] == ["0.sigmoid_call_1"]


class Mixed(nn.Module):
    """One activation is a module, one a function, one a class of somebody's own, one a gate of a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.activation = nn.ReLU()
        self.own = OwnSwish()
        self.cell = Cell()
        self.pooler = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.pooler(self.cell(self.own(F.gelu(self.second(self.activation(self.first(x)))))))


class OwnSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.update = nn.Sigmoid(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) * self.update(x)


def test_no_part_of_a_model_is_left_in_silence() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    selection = converted(model, inputs())
    assert [entry.name for entry in selection.activations] == ["activation", "own", "gelu_call_1"]
    assert {entry.name: entry.reason.partition(";")[0] for entry in selection.left} == {
        "cell.gate": "Sigmoid is mostly a gate",
        "cell.update": "a gate beside a sigmoid",
        "pooler.1": "part of a pooler or a head",
    }


class Inline(nn.Module):
    """Formulas written out, other arguments each time, arguments that are computed, an unused result."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        x = x * 0.5 * (1.0 + torch.erf(x / 1.41421))
        for slope in (0.1, 0.2):
            x = F.leaky_relu(x, slope)
        x = F.leaky_relu(x, 0.1 + 0.2)
        F.silu(x)
        return F.hardtanh(*(x,))


def test_what_cannot_be_made_a_module_says_why() -> None:
    calls, own = observe_calls(Inline(), [inputs()], run)
    assert not own
    reasons = {(call.kind, call.place[-2:]): call.obstacle for call in calls}
    assert sorted(str(reason) for reason in reasons.values()) == [
        "`0.1 + 0.2` in the call is computed there",
        "it is a part of a formula; make that a function or a module of its own",
        "it is called with other arguments each time",
        "its arguments are unpacked in the call",
        "its result is not used",
    ]
    with pytest.raises(ValueError, match="cannot be made a module: it"):
        lift(Inline(), calls[:1])
    with pytest.raises(ValueError, match=r"(?s)leaves none of 5 activations.*Inline.forward, line \d+.*unpacked"):
        select_activations(Inline(), [inputs()], run)


class Overridden(Everything):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_calls_that_a_subclass_hides_or_another_tool_wraps_are_listed() -> None:
    model = nn.Sequential(Overridden(), Everything(), Everything()).eval()
    forward = model[1].forward
    model[1].forward = lambda x: forward(x)
    calls, _ = observe_calls(model, [inputs()], run)
    reasons = {call.owner: {c.obstacle for c in calls if c.owner == call.owner and c.kind == "relu"} for call in calls}
    assert reasons["0"] == {"it is called by Everything.forward, which Overridden overrides"}
    assert reasons["1"] == {"another tool put a `forward` into the module"}
    assert reasons["2"] == {None}
    assert vars(model[1])["forward"](inputs()).shape == (32, 8)
    assert "forward" not in vars(model[2])


@pytest.mark.parametrize("activation", ["gelu", "relu", F.gelu])
def test_torchs_encoder_layer_with_a_function_is_converted_in_evaluation_mode_too(activation: Any) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation=activation, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(4, 6, 16)
    before = run(model, x)
    selection = converted(model, x)
    assert [entry.name.rpartition(".")[0] for entry in selection.activations] == ["layers.0", "layers.1"]
    after = run(model, x)
    assert float((after - before).abs().max()) > 1e-5  # a quotient is close to a ReLU
    assert torch.allclose(after, run(model.train(), x), atol=1e-5)


def test_functions_of_the_table_are_seen_as_torch_hands_them_over() -> None:
    class One(nn.Module):
        def __init__(self, function: Callable[..., Tensor]) -> None:
            super().__init__()
            self.layer, self.function = nn.Linear(4, 4), function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self.layer(x))

    x = torch.randn(3, 4)
    functions = {**FUNCTIONS, F.tanh: "tanh", F.sigmoid: "sigmoid"}
    del functions[F.prelu]  # its slopes are a tensor
    for function, kind in functions.items():
        (call,), _ = observe_calls(One(function), [x], run)
        assert call.kind == kind
        assert call.count == 1
        if kind != "erf":
            assert isinstance(call.module, FunctionalActivation)


def test_models_of_transformers_with_functions_are_converted_whole() -> None:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    model = WhisperEncoder(WhisperConfig(num_mel_bins=8, max_source_positions=10, **sizes)).eval()
    x = torch.randn(2, 8, 20)
    before = run(model, x)
    selection = converted(model, x)
    names = {entry.name for entry in selection.activations}
    assert names == {"gelu_call_1", "gelu_call_2", "layers.0.activation_fn"}
    assert not selection.left
    assert 0 < float((run(model, x) - before).norm() / before.norm()) < 0.01
    assert type(model).__name__ == "WhisperEncoder"
