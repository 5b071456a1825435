"""The CUDA kernels on a GPU: against the float64 reference, reproducible, in CUDA graphs, under torch.compile.

    pytest tests/gpu

`benchmarks.gpu_ops` runs these as well, and a part of them once more under compute-sanitizer.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

from activation_support import CONFIGS, activation, by_reference, inputs, label

from polytrope.ops import build_activation, cuda, native
from polytrope.ops.families import Family, Formula

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def kernels_are_loaded() -> None:
    assert cuda.library() is not None, "these tests are about the CUDA kernels; nvcc is needed"


def run(module: nn.Module, x: Tensor, seed: Tensor) -> list[Tensor]:
    """Value and gradients."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], seed)]


def launches(module: nn.Module, x: Tensor, seed: Tensor) -> list[str]:
    """Kernels and copies of a forward and a backward pass, the second of their kind."""
    run(module, x, seed)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(module, x, seed)
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("family", list(Family), ids=lambda family: family.name)
def test_every_kernel_agrees_with_the_reference(family: Family, degree: int, dtype: torch.dtype) -> None:
    for interval in ((), (-0.9, 0.8)) if family not in native.WITHOUT_INTERVAL else ((),):
        for gated in (False, True) if family != Family.POLYNORM else (False,):
            formula = Formula(family, degree, 4 if family == Family.RATIONAL else 0, interval, -1, gated)
            assert cuda.is_usable(None, dtype, formula)  # compares values and all gradients


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_modules_on_the_gpu_give_what_they_give_on_the_cpu(config: dict[str, Any]) -> None:
    x, seed = inputs(67, 1000, dtype=torch.float32), inputs(1000, 67, dtype=torch.float32).t()
    expected = run(activation(config), x.double(), seed.double())
    found = run(activation(config, torch.float32).cuda(), x.cuda(), seed.cuda())
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"num_parameters": 96}, (33, 96)),
        ({"num_parameters": 48}, (5, 7, 96)),
        ({"num_parameters": 3}, (33, 96)),
        ({"num_parameters": 96, "interval": [-1.0, 1.0]}, (1000, 96)),
        ({"num_parameters": 3072}, (4000, 3072)),
        ({"num_parameters": 256}, (700, 3072)),
        ({"num_parameters": 7}, (5000, 7)),
        ({"num_parameters": 96, "glu": True}, (1000, 192)),
        ({"num_parameters": 6, "dim": 1}, (4, 6, 5, 7)),
        ({"num_parameters": 6, "dim": 1}, (40, 6, 128)),
        ({"num_parameters": 48, "glu": True}, (100, 96)),
        ({"glu": True}, (3, 2, 2000)),
    ],
    ids=str,
)
def test_groups_and_gates(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(7)
    module = build_activation({"name": "hermite", "degree": 3} | options)
    with torch.no_grad():
        module.coefficients.add_(0.1 * torch.randn(module.coefficients.shape))  # type: ignore[operator, arg-type, union-attr]
    x = torch.randn(shape)
    seed = torch.randn(module(x).shape)
    expected = run(module.double(), x.double(), seed.double())
    found = run(module.float().cuda(), x.cuda(), seed.cuda())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("config", [CONFIGS[0], {"name": "fourier", "degree": 6}, CONFIGS[2]], ids=label)
def test_a_forward_is_one_launch_and_a_backward_two(config: dict[str, Any]) -> None:
    module = activation(config, torch.float32).cuda()
    x, seed = (torch.randn(64, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    launched = launches(module, x, seed)
    assert len(launched) == 3, launched


@pytest.mark.parametrize("options", [{}, {"interval": [-1.0, 1.0]}], ids=str)
@pytest.mark.parametrize("degree", [3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_columns_of_channels(degree: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Against float64; the same bits every time."""
    config = {"name": "hermite", "degree": degree, "num_parameters": 768} | options
    module = activation(config, torch.float32).cuda()
    x, seed = (torch.randn(2000, 768, device="cuda", dtype=dtype) for _ in range(2))
    first, again = run(module, x, seed), run(module, x, seed)
    expected = run(activation(config).cuda(), x.double(), seed.double())
    for found, same, exact in zip(first, again, expected, strict=True):
        assert torch.equal(found, same)
        worst = float((found.double() - exact).abs().max() / exact.abs().max())
        assert worst <= (1e-4 if found.dtype == torch.float32 else 1e-2)


def test_the_columns_of_channels_take_as_many_launches() -> None:
    """As one function for all, and no copy. Apart: under compute-sanitizer torch's profiler sees nothing."""
    module = activation({"name": "hermite", "degree": 3, "num_parameters": 768}, torch.float32).cuda()
    x, seed = (torch.randn(2000, 768, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    launched = launches(module, x, seed)
    assert len(launched) == 3, launched


def test_tensors_that_begin_anywhere() -> None:
    module, base = activation(CONFIGS[0], torch.float32).cuda(), torch.randn(2, 3 * 501 + 3, device="cuda").bfloat16()
    x, seed = (row[3:].view(3, 501) for row in base)
    assert x.data_ptr() % 16
    for ours, theirs in zip(run(module, x, seed), run(module, x.clone(), seed.clone()), strict=True):
        assert torch.equal(ours, theirs)


def test_parameters_elsewhere_are_refused() -> None:
    module = activation(CONFIGS[0], torch.float32)
    with pytest.raises(RuntimeError, match="x is on cuda:0, the parameters of its activation on cpu"):
        module(torch.zeros(8, device="cuda"))
    with pytest.raises(RuntimeError, match="x is on cpu, the parameters of its activation on cuda:0"):
        module.cuda()(torch.zeros(8))


def test_float64_goes_through_the_reference_and_is_exact() -> None:
    module, x = activation(CONFIGS[0]).cuda(), inputs(5, 4).cuda().requires_grad_()
    torch.testing.assert_close(module(x), by_reference(module, x), rtol=0, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_gradients_are_bitwise_the_same_every_time(config: dict[str, Any]) -> None:
    module = activation(config, torch.float32).cuda()
    x, seed = (torch.randn(1024, 3072, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    first = run(module, x, seed)
    for _ in range(3):
        for found, expected in zip(run(module, x, seed), first, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_a_cuda_graph_replays_forward_and_backward(config: dict[str, Any]) -> None:
    module = activation(config, torch.float32).cuda()
    x, seed = (torch.randn(64, 512, device="cuda") for _ in range(2))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(module, x, seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(module, x, seed)
    for value in (0.5, -1.5):
        x.fill_(value).add_(torch.linspace(-1, 1, 512, device="cuda"))
        graph.replay()
        for found, expected in zip(captured, run(module, x, seed), strict=True):
            assert torch.equal(found, expected)


def test_work_is_enqueued_on_the_current_stream() -> None:
    module, side = activation(CONFIGS[0], torch.float32).cuda(), torch.cuda.Stream()
    module(torch.zeros(8, device="cuda"))
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x = torch.full((1 << 20,), 1.5, device="cuda")
        y = module(x)
    side.synchronize()
    torch.testing.assert_close(y, by_reference(module, x))


def test_more_elements_than_31_bits_count() -> None:
    count = 2**31 + 4096
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    module = activation(CONFIGS[0], torch.float32).cuda()
    x = torch.zeros(count, device="cuda", dtype=torch.bfloat16).requires_grad_()
    with torch.no_grad():
        x[-4096:] = 1.25
    y = module(x)
    y.backward(torch.ones_like(y))
    few = torch.tensor([0.0, 1.25], device="cuda", dtype=torch.bfloat16).requires_grad_()
    value = module(few)
    (slope,) = torch.autograd.grad(value.sum(), few)
    for at, expected in ((0, 0), (count - 4097, 0), (count - 4096, 1), (count - 1, 1)):
        assert y[at] == value[expected]
        assert x.grad is not None
        assert x.grad[at] == slope[expected]


@pytest.mark.parametrize("config", CONFIGS[:2], ids=label)
def test_compile_makes_one_graph(config: dict[str, Any]) -> None:
    module = nn.Sequential(nn.Linear(64, 64), activation(config, torch.float32), nn.Linear(64, 64)).cuda()
    x = torch.randn(8, 64, device="cuda")
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x), rtol=1e-4, atol=1e-4)


def test_autocast_gives_the_dtype_of_the_layers() -> None:
    module = nn.Sequential(nn.Linear(64, 64), activation(CONFIGS[0], torch.float32)).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = module(torch.randn(8, 64, device="cuda"))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module[1].coefficients.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_verified", {})
    monkeypatch.setattr(cuda, "largest_error", lambda *_: 0.5)
    module, x = activation(CONFIGS[0], torch.float32).cuda(), torch.randn(8, device="cuda")
    with pytest.warns(RuntimeWarning, match="no CUDA kernel for hermite 3"):
        y = module(x)
    torch.testing.assert_close(y, by_reference(module, x), rtol=0, atol=0)


def test_a_network_has_the_same_gradients_every_time_where_that_is_asked_for() -> None:
    """In a process of its own, as a worker of `train` does it: embedding, attention, norms, activation, loss."""
    done = subprocess.run([sys.executable, "-c", DETERMINISTIC], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


DETERMINISTIC = """
from polytrope.pipeline.stages.train.worker_process import compute_deterministically
compute_deterministically()
import torch
from polytrope.models import build_model
activation = {"name": "hermite", "degree": 4, "init": "gelu", "interval": [-4, 4]}
sizes = {"n_layer": 2, "n_head": 4, "n_embd": 256, "vocab_size": 1000, "sequence_length": 512, "activation": activation}
model = build_model("gpt2", sizes).cuda().bfloat16()
tokens = torch.randint(0, 1000, (16, 513), device="cuda")
found = []
for _ in range(4):
    model.zero_grad()
    model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
    found.append([parameter.grad.clone() for parameter in model.parameters()])
assert all(torch.equal(one, first) for other in found[1:] for one, first in zip(other, found[0], strict=True))
"""
