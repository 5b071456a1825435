"""Measuring a model leaves it as it is, blames it for nothing it did not do, and a conversion has an effect."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.models.calibration import Calibration, calibrate
from polytrope.models.conversion import FitOptions, apply, fit_layers, layer_costs, prove
from polytrope.models.convert import convert as convert_model
from polytrope.models.modes import evaluation_mode
from polytrope.models.surgery import find_activations, replace_module
from polytrope.ops import build_activation
from polytrope.ops.fitting.targets import resolve_target, sample
from polytrope.ops.interpolate import fit
from polytrope.pipeline.stages.convert.conversion_record import describe


def run(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(batch)


def convert(model: nn.Module, batch: Tensor, degree: int = 4) -> list[str]:
    found = find_activations(model)
    apply(model, fit_layers(found, calibrate(model, found, [batch], run), FitOptions(degree=degree)))
    return [entry.name for entry in found]


def test_every_submodule_keeps_its_own_mode_also_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    model[1].eval()
    model[3].eval()
    flags = [module.training for module in model.modules()]
    x = torch.randn(16, 8)
    state = copy.deepcopy(model.state_dict())
    found = find_activations(model)
    fits = fit_layers(found, calibrate(model, found, [x], run), FitOptions(degree=3))
    layer_costs(model, fits, [x], run)
    prove(model, ["2"], x, run)
    with pytest.raises(ValueError, match="cannot run on the calibration data"):
        calibrate(model, found, [torch.randn(2, 5)], run)
    with pytest.raises(RuntimeError), evaluation_mode(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


class Experts(nn.Module):
    """In some batches an expert gets nothing, and is called with a tensor [0, 16]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(x[chosen == number])
        return out


def test_an_expert_without_tokens_is_no_error_unless_it_never_gets_one() -> None:
    model, batches = Experts().eval(), [torch.randn(3, 16) for _ in range(20)]
    seen = calibrate(model, find_activations(model), batches, run)
    assert sum(entry.total for entry in seen.values()) == 20 * 3 * 32
    nn.init.constant_(model.router.bias, 0)
    with torch.no_grad():
        model.router.bias[2] = 100
    with pytest.raises(ValueError, match=r"never reaches: experts.0.1, experts.1.1, experts.3.1"):
        calibrate(model, find_activations(model), batches, run)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(input=x)


class Catching(nn.Module):
    """Turns every error of its activation into zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.activation(x)
        except ValueError:
            return torch.zeros_like(x)


def test_an_activation_called_by_keyword_is_measured_and_what_a_hook_finds_passes_through_no_model() -> None:
    x = torch.randn(5, 7)
    model = ByKeyword()
    assert calibrate(model, find_activations(model), [x], run)["activation"].total == 35
    catching = Catching()
    with pytest.raises(ValueError, match="activation `activation` receives NaN or infinity"):
        calibrate(catching, find_activations(catching), [torch.full((2, 2), torch.inf)], run)


def test_a_compiled_model_that_ran_before_is_measured_and_runs_converted() -> None:
    torch.manual_seed(0)
    model = torch.compile(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), backend="eager")
    x = torch.randn(16, 4)
    before = run(model, x)
    (name,) = convert(model, x, 2)
    with torch.no_grad():
        assert torch.equal(model(x), model._orig_mod(x))
    assert not torch.equal(run(model, x), before)
    prove(model, [name], x, run)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish])
def test_an_activation_that_works_in_place_is_fitted_like_one_that_does_not(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    results = []
    for inplace in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 64), kind(inplace=inplace), nn.Linear(64, 4))
        with torch.no_grad():
            model[0].weight.mul_(3)
        found = find_activations(model)
        options = FitOptions(degree=16, target_error=0.02)
        (entry,) = fit_layers(found, calibrate(model, found, [x], run), options)
        inputs = run(model[0], x).double()
        wanted = kind()(inputs.clone())
        reached = float((run(entry.fit.build(torch.float64), inputs) - wanted).norm() / wanted.norm())
        assert reached == pytest.approx(entry.relative_error, rel=0.15)
        assert entry.relative_error <= 0.02
        curve = describe(entry).curve.model_dump()
        np.testing.assert_allclose(curve["target"], kind()(torch.tensor(curve["x"], dtype=torch.float64)), rtol=1e-12)
        results.append((entry.fit.config, entry.relative_error, curve["x"]))
    assert results[0] == results[1]


class ReadsWhatWasWritten(nn.Module):
    """An activation in place, and the tensor that it wrote to."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)
        if way != "function":
            self.act = nn.SiLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        if self.way == "function":
            y = F.silu(h, inplace=True)
            return self.down(y + h)
        if self.way == "for its effect":
            self.act(h)
            return self.down(h)
        return self.down(self.act(h) + h if self.way == "read again" else self.act(h))


@pytest.mark.parametrize(
    ("way", "name"), [("read again", "act"), ("for its effect", "act"), ("function", "silu_call_1"), ("result", "")]
)
def test_an_activation_whose_input_is_read_after_it_wrote_there_is_refused(way: str, name: str) -> None:
    torch.manual_seed(0)
    model, x = ReadsWhatWasWritten(way), [torch.randn(16, 8) for _ in range(3)]
    if not name:
        assert convert_model(model, x, degree=12).difference < 0.01
        return
    before = model(x[0])
    with pytest.raises(ValueError, match=f"^`{name}`: works in place, and the model reads what it wrote"):
        convert_model(model, x, degree=12)
    assert torch.equal(model(x[0]), before)


def test_a_target_never_writes_to_what_it_is_given() -> None:
    points = np.linspace(-2.0, 2.0, 9)
    inputs = torch.from_numpy(points.copy())
    for target in (nn.ReLU(inplace=True), torch.relu_, "relu"):
        function = resolve_target(target)
        function(inputs)
        sample(function, points)
        assert torch.equal(inputs, torch.linspace(-2.0, 2.0, 9, dtype=torch.float64))


def test_hooks_of_the_user_are_called_by_the_model_alone() -> None:
    calls: list[torch.dtype] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    model[1].register_forward_hook(lambda _module, inputs, _output: calls.append(inputs[0].dtype))
    model[1].register_forward_pre_hook(lambda _module, inputs: calls.append(inputs[0].dtype))
    x = torch.randn(8, 4)
    found = find_activations(model)
    seen = calibrate(model, found, [x], run)
    assert calls == [torch.float32] * 2  # the model ran once
    fit_layers(found, seen, FitOptions(degree=3, target_error=0.9))
    assert len(calls) == 2
    assert len(model[1]._forward_hooks) == 1


class DroppingGELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.01, self.training)


@pytest.mark.parametrize("module", [DroppingGELU(), nn.RReLU()])
def test_an_activation_that_is_random_in_training_is_refused(module: nn.Module) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"{type(module).__name__} does something else in training"):
        fit(module, "hermite", 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert fit(nn.GELU(), "hermite", 4).certificate.rms > 0


def test_torchs_own_encoder_layer_uses_the_new_activation_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation=nn.GELU(), batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(4, 10, 32)
    padding = torch.zeros(4, 10, dtype=torch.bool)
    padding[:, 8:] = True
    before = run(model, x)
    found = find_activations(model)
    fits = fit_layers(found, calibrate(model, found, [x], run), FitOptions(degree=2))
    costs = layer_costs(model, fits, [x], run)
    assert min(costs.values()) > 1e-4
    assert model.layers[0].activation_relu_or_gelu == 2  # as it was
    assert model.use_nested_tensor
    apply(model, fits)
    evaluation = run(model, x)
    padded = model(x, src_key_padding_mask=padding).detach()[:, :8]
    model.train()
    training = run(model, x)
    assert float((evaluation - before).abs().max()) > 1e-3
    assert torch.allclose(evaluation, training, atol=1e-5)
    assert torch.allclose(padded, model(x, src_key_padding_mask=padding).detach()[:, :8], atol=1e-5)
    assert prove(model, [entry.name for entry in found], x, run) == {entry.name: 1 for entry in found}


class Stubborn(nn.Module):
    """Computes its activation itself in evaluation mode, and keeps no record that could be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x) if self.training else nn.functional.gelu(x)


def test_a_conversion_without_effect_is_an_error_that_names_it() -> None:
    x = torch.randn(6, 5)
    model = nn.Sequential(nn.Linear(5, 5), Stubborn())
    with pytest.raises(ValueError, match=r"never reaches: 1.activation"):
        calibrate(model, find_activations(model), [x], run)
    replace_module(model, "1.activation", build_activation("hermite3"))
    with pytest.raises(
        ValueError, match=r"`1.activation`: converted without effect: .* 0 times .*, 1 times in training"
    ):
        prove(model, ["1.activation"], x, run)


class Keeping(nn.Module):
    """Refers to its activation outside the module tree."""

    def __init__(self) -> None:
        super().__init__()
        activation = nn.GELU()
        self.activation = activation
        self.in_a_list = [activation]
        self.in_a_dict = {"a": [activation]}
        self.in_a_tuple = (activation, 1)
        self.method = activation.forward
        object.__setattr__(self, "hidden", activation)

    def forward(self, x: Tensor) -> Tensor:
        first = self.in_a_tuple[0](self.in_a_list[0](self.in_a_dict["a"][0](x)))
        return self.hidden(self.method(first))


def test_references_outside_the_module_tree_follow() -> None:
    model = Keeping()
    held = model.in_a_list
    new = build_activation("hermite3")
    replace_module(model, "activation", new)
    assert model.in_a_list is held
    assert held == [new]
    assert model.hidden is new
    x = torch.randn(3)
    assert torch.equal(model(x), new(new(new(new(new(x))))))


def test_coefficients_survive_a_model_on_the_meta_device_and_go_where_their_neighbours_are() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    module = build_activation("hermite3")
    before = module.coefficients.detach().clone()
    replace_module(model, "1", module)
    assert torch.equal(model[1].coefficients.detach(), before)
    split = nn.ModuleDict({"a": nn.Linear(2, 2, device="meta"), "b": nn.Sequential(nn.Linear(2, 2), nn.GELU())})
    replace_module(split, "b.1", build_activation("hermite3"))
    assert split["b"][1].coefficients.device.type == "cpu"


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0, 300.0])
def test_bins_follow_the_scale_of_the_data(scale: float) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * scale
    measured = Calibration.of(x)
    points, counts = measured.measure()
    assert 500 < len(points) < 4000
    assert counts.sum() + len(measured.held_out) == 100_000
    mean_square = counts @ points**2 / counts.sum()
    assert mean_square == pytest.approx(float((x.double() ** 2).mean()), rel=0.01)
    for fraction in (0.01, 0.5, 0.9):
        exact = float(np.quantile(x.numpy(), fraction))
        assert measured.quantile(fraction) == pytest.approx(exact, rel=0.01, abs=0.005 * scale)


def test_raw_inputs_are_kept_in_any_order_of_the_parts() -> None:
    x = torch.randn(30_000, generator=torch.Generator().manual_seed(3)).bfloat16()
    parts = [Calibration.of(part) for part in x.split(7000)]
    forwards, backwards = parts[0], parts[-1]
    for part in parts[1:]:
        forwards = forwards + part
    for part in parts[-2::-1]:
        backwards = backwards + part
    assert np.array_equal(forwards.held_out, backwards.held_out)
    assert len(forwards.held_out) == 2048
    assert set(forwards.held_out) <= set(x.double().tolist())
    assert float(forwards.held_out.mean()) == pytest.approx(0.0, abs=0.1)
    assert forwards.dtypes == {torch.bfloat16}
