"""Learnable activations where nn.GELU works: sharded, nested, fake and meta tensors, tracers, counters, old states."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_support import CONFIGS, CONTROL, activation, inputs, label
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import polytrope.ops
from polytrope.ops import LearnableActivation, build_activation

MORE: list[dict[str, Any]] = [
    {"name": "rational", "degree": 1},
    {"name": "hermite", "degree": 3, "num_parameters": 4},
    {"name": "fourier", "degree": 3, "num_parameters": 2},
    {"name": "fourier", "degree": 3, "glu": True},
    {"name": "composition", "degree": [3, 20], "gate": True},
]
ALL = [*CONFIGS, CONTROL, *MORE]


def on_two_processes(rank: int, rendezvous: str) -> None:
    """DTensor in every placement, FSDP2 from the meta device, DDP: all against one process."""
    import torch.distributed as distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    x = inputs(5, 3, 8, dtype=torch.float32)  # five rows: shards of different sizes
    for config in ALL:
        whole = build_activation(config)
        expected = whole(x)
        expected.square().sum().backward()
        for placement in (Shard(0), Shard(2), Replicate(), Partial()):
            module = build_activation(config)
            if isinstance(placement, Partial):
                sharded = DTensor.from_local(x / 2, mesh, [placement], run_check=False)
            else:
                sharded = distribute_tensor(x, mesh, [placement])
            y = module(sharded)
            torch.testing.assert_close(y.full_tensor(), expected.detach())
            y.square().sum().backward()
            for own, other in zip(module.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4)

        with torch.device("meta"):
            block = nn.Sequential(nn.Linear(8, 8), build_activation(config))
        fully_shard(block, mesh=mesh)
        block.to_empty(device="cpu")
        for part in block:
            part.reset_parameters()  # type: ignore[operator]
        for own, other in zip(block[1].parameters(), whole.parameters(), strict=True):
            assert torch.equal(own.full_tensor(), other), config  # type: ignore[attr-defined]
        block(x).sum().backward()
        torch.optim.AdamW(block.parameters()).step()

        replica = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), build_activation(config)))
        for _ in range(2):  # the second pass finds parameters that the first one left without a gradient
            replica(x).sum().backward()

    module = build_activation("fourier")
    sharded = distribute_tensor(x, mesh, [Shard(0)])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(sharded)
    torch.testing.assert_close(compiled.full_tensor(), module(x))
    distributed.destroy_process_group()


def test_sharded_and_replicated_training(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.multiprocessing.spawn(on_two_processes, (str(tmp_path / "rendezvous"),), nprocs=2)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("config", ALL, ids=label)
def test_every_parameter_can_be_sharded_and_gets_a_gradient(config: dict[str, Any]) -> None:
    module = build_activation(config)
    module(inputs(3, 8, dtype=torch.float32)).sum().backward()
    for parameter in module.parameters():
        assert parameter.dim() >= 1
        assert parameter.numel() >= 1
        assert parameter.grad is not None


def as_saved_before(module: nn.Module) -> dict[str, Any]:
    """The state in the shapes that it had once: one number had no dimension of its own."""
    groups = getattr(module, "num_parameters", 1)
    single = {"bias", "frequency"}
    state = {
        name: tensor.reshape([groups] if groups > 1 else []) if name in single else tensor
        for name, tensor in module.state_dict().items()
    }
    if module.config() == {"name": "rational", "degree": 1}:  # type: ignore[operator]
        state["denominator"] = torch.zeros(0)
    return state


@pytest.mark.parametrize("config", ALL, ids=label)
def test_states_saved_before_parameters_had_a_dimension_load(config: dict[str, Any]) -> None:
    module = activation(config, torch.float32)
    before, x = as_saved_before(module), inputs(3, 8, dtype=torch.float32)
    kept = {name: tensor.shape for name, tensor in before.items()}
    again = nn.Sequential(build_activation(config))
    again.load_state_dict({f"0.{name}": tensor for name, tensor in before.items()}, strict=True)
    assert torch.equal(again(x), module(x))
    assert {name: tensor.shape for name, tensor in before.items()} == kept
    if config.get("harmonic"):
        assert kept["bias"] == kept["frequency"] == torch.Size([])


@pytest.mark.parametrize("config", ALL, ids=label)
def test_a_module_that_was_made_without_memory_is_right_once_it_is_reset(config: dict[str, Any]) -> None:
    x = inputs(3, 8, dtype=torch.float32)
    with torch.device("meta"):
        module = build_activation(config)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert isinstance(module, LearnableActivation)
    module.to_empty(device="cpu").reset_parameters()  # type: ignore[operator]
    assert torch.equal(module(x), build_activation(config)(x))
    other = activation(config, torch.float32)  # loaded instead of reset
    with torch.device("meta"):
        loaded = build_activation(config)
    loaded.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert torch.equal(loaded(x), other(x))
    other.reset_parameters()  # type: ignore[operator]
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("config", ALL, ids=label)
def test_device_and_dtype_of_the_parameters(config: dict[str, Any]) -> None:
    wide = build_activation(config | {"dtype": torch.float64})
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    torch.testing.assert_close(wide(inputs(3, 8)).float(), build_activation(config)(inputs(3, 8).float()))
    assert all(parameter.is_meta for parameter in build_activation(config | {"device": "meta"}).parameters())
    assert wide.config() == build_activation(config).config()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["hermite", "fourier", "piecewise_linear", "polynorm"])
def test_a_start_that_imitates_is_computed_outside_of_any_mode(name: str) -> None:
    config = {"name": name, "degree": 4, "init": "gelu"}
    expected = build_activation(config)
    with torch.device("meta"):
        module = build_activation(config)
    module.to_empty(device="cpu").reset_parameters()  # type: ignore[operator]
    for own, other in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(own, other)
    with FakeTensorMode():
        assert build_activation(config)(torch.randn(3, 8)).shape == (3, 8)


def test_modules_and_fits_import_each_other_one_way() -> None:
    code = "import sys, polytrope.ops; sys.exit('polytrope.ops.interpolate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
    for path in (Path(polytrope.ops.__file__).parent / "fitting").glob("*.py"):
        assert "ops.modules" not in path.read_text(), path
    assert "interpolate import" not in (Path(polytrope.ops.__file__).parent / "modules.py").read_text()


def test_knots_keep_their_places_in_bfloat16() -> None:
    x = torch.tensor([-3.3, 0.1, 0.3, 2.2])
    module = build_activation({"name": "piecewise_linear", "degree": 7, "interval": [-3.3, 3.1]})
    rounded = copy.deepcopy(module).bfloat16()
    with torch.no_grad():
        module.values.copy_(rounded.values)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(rounded(x), module(x))
    assert torch.equal(rounded.knots, module.knots)  # type: ignore[arg-type]
    assert rounded.bfloat16().float().double().knots.dtype == torch.float64  # type: ignore[union-attr]
    assert "knots" not in module.state_dict()


@pytest.mark.parametrize("config", ALL, ids=label)
def test_symbolic_tracing_makes_one_node(config: dict[str, Any]) -> None:
    block, x = nn.Sequential(nn.Linear(8, 8), build_activation(config)), inputs(3, 8, dtype=torch.float32)
    traced = torch.fx.symbolic_trace(block)
    assert [node.op for node in traced.graph.nodes].count("call_function") == 1
    assert torch.equal(traced(x), block(x))
    assert torch.equal(pickle.loads(pickle.dumps(traced))(x), block(x))
    traced(x).sum().backward()
    assert block[1].get_parameter(next(iter(block[1].state_dict()))).grad is not None


@pytest.mark.parametrize("config", ALL, ids=label)
def test_fake_tensors_in_and_outside_of_their_mode(config: dict[str, Any]) -> None:
    with FakeTensorMode() as mode:
        module = build_activation(config)
        module(torch.randn(3, 8)).sum().backward()
    width = 4 if config.get("glu") else 8
    assert module(mode.from_tensor(torch.randn(3, 8))).shape == (3, width)


@pytest.mark.parametrize("config", ALL, ids=label)
def test_counting_operations(config: dict[str, Any]) -> None:
    counts = []
    for module in (build_activation(config), nn.GELU()):
        block = nn.Sequential(nn.Linear(8, 8), module)
        with FlopCounterMode(display=False) as counter:
            block(torch.randn(4, 8)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("config", ALL, ids=label)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(config: dict[str, Any], layout: torch.layout) -> None:
    parts = [inputs(2, 8, dtype=torch.float32), inputs(5, 8, dtype=torch.float32)]
    module, other = build_activation(config), build_activation(config)
    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    y = module(x)
    assert y.layout == layout
    for found, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(found, other(part))
    torch.nested.to_padded_tensor(y, 0.0).sum().backward()
    torch.cat([other(part) for part in parts]).sum().backward()
    for own, expected in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)
    if layout is torch.jagged and not config.get("glu"):
        assert (x + y).shape == x.shape  # the same sizes, not only equal ones


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_compile_into_one_graph() -> None:
    torch._dynamo.reset()
    module = build_activation("hermite")
    x = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=torch.jagged)
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found.values(), module(x).values())


def test_groups_along_the_dimension_of_different_sizes_are_refused() -> None:
    x = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(4, 4)], layout=torch.jagged)
    for dim in (-2, 1, 0):
        with pytest.raises(ValueError, match=r"dim: expected a negative dimension behind"):
            build_activation({"name": "hermite", "degree": 3, "num_parameters": 2, "dim": dim})(x)
