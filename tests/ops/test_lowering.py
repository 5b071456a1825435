"""Compiled activations are plain arithmetic: one graph, only x kept, values and gradients those of eager."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_support import CONFIGS, CONTROL, activation, inputs, label
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode

from polytrope.ops import Hermite, build_activation, kernels, lowering
from polytrope.ops.families import Family, Formula

OPERATORS = (  # for the compiler
    "fourier",
    "tropical",
    "tropical_rational",
    "rational",
    "polynorm",
    "piecewise_linear",
    "rational_spline",
)
MORE: list[dict[str, Any]] = [
    {"name": "legendre", "degree": 4, "num_parameters": 3, "interval": [-1.0, 1.5]},
    {"name": "chebyshev", "degree": 3, "num_parameters": 6, "dim": 1},
    {"name": "hermite", "degree": 4, "num_parameters": 2, "interval": [-1.0, 1.5], "glu": True},
    {"name": "polyrelu", "degree": 3, "interval": [-1.0, 1.5]},
    {"name": "hermite", "degree": 5, "glu": True},
]
COMPOSED: dict[str, Any] = {"name": "composition", "degree": [3, 20]}
LOWERED = [config for config in [*CONFIGS, *MORE] if config["name"] not in OPERATORS]


class Compiler:
    """A backend that keeps the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []

    def compile(self, function: Any, **options: Any) -> Any:
        torch._dynamo.reset()  # the limit of recompilations counts the modules of the other cases
        backend = aot_autograd(
            fw_compiler=lambda graph, _: self.forward.append(graph) or make_boxed_func(graph),  # type: ignore[func-returns-value]
            bw_compiler=lambda graph, _: self.backward.append(graph) or make_boxed_func(graph),  # type: ignore[func-returns-value]
            partition_fn=min_cut_rematerialization_partition,
        )
        return torch.compile(function, backend=backend, fullgraph=True, **options)

    def operators(self) -> set[str]:
        """Of polytrope, in all graphs."""
        nodes = [node for graph in (*self.forward, *self.backward) for node in graph.graph.nodes]
        return {node.target.name() for node in nodes if getattr(node.target, "namespace", "") == "polytrope"}


def gradients(module: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    seed = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    return list(torch.autograd.grad(y, [x, *module.parameters()], seed))


class Calls(TorchDispatchMode):
    """Remembers the calls of polytrope's operators: name, tensors, formula, results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Tensor, ...], Formula, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "polytrope":
            count = sum(isinstance(argument, Tensor) for argument in args)
            self.seen.append((func._opname, args[:count], kernels._formula(args[count:]), result))
        return result


ARITHMETIC = {"activation": lowering.forward, "activation_backward": lowering.backward}


def check_arithmetic(module: nn.Module, x: Tensor, tolerance: float) -> None:
    """Values and gradients of the operators against those of the arithmetic, as parts of the largest number."""
    with Calls() as calls:
        gradients(module, x, module(x))
    assert [name for name, *_ in calls.seen] == list(ARITHMETIC)
    for name, tensors, formula, expected in calls.seen:
        assert lowering.is_lowered(formula.family)
        found = ARITHMETIC[name](*tensors, formula)
        pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
        for ours, theirs in pairs:
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            largest = float(theirs.detach().abs().max())
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


@pytest.mark.parametrize("config", LOWERED, ids=label)
def test_the_arithmetic_is_that_of_the_kernels(config: dict[str, Any]) -> None:
    """Coefficients' gradients too. In bfloat16 the values are rounded once, so that they are the same numbers."""
    module, x = activation(config, torch.float32), inputs(4, 6, 12, dtype=torch.float32).requires_grad_()
    check_arithmetic(module, x, 2e-6)
    check_arithmetic(module, x.detach().bfloat16().requires_grad_(), 2e-6)
    check_arithmetic(module.double(), x.detach().double().requires_grad_(), 4e-15)


@pytest.mark.parametrize("config", LOWERED, ids=label)
def test_extremes_are_those_of_the_kernels(config: dict[str, Any]) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e20, -1e20, 1e8, -1e8, 1e6, -300.0, -0.0])
    module = activation({name: value for name, value in config.items() if name not in ("num_parameters", "dim")})
    with Calls() as calls:
        y = module.float()(x.requires_grad_())
        torch.autograd.grad(y.sum(), x)
    for name, tensors, formula, expected in calls.seen:
        found, exact = (
            result if name == "activation" else result[0] for result in (ARITHMETIC[name](*tensors, formula), expected)
        )
        torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-6, equal_nan=True)


COMPILED = [
    {"name": "hermite", "degree": 4, "interval": [-1.0, 1.5]},  # degree 8 is held above; compiling it is slow
    CONFIGS[5],
    CONFIGS[6],
    CONFIGS[13],
    CONFIGS[14],
    CONFIGS[16],
    CONFIGS[19],
    *MORE[:-1],
    CONTROL,
    COMPOSED,
]


@pytest.mark.parametrize("config", COMPILED, ids=label)
def test_one_graph_without_the_operator_that_keeps_x_alone_and_takes_dynamic_shapes(config: dict[str, Any]) -> None:
    module, compiler = activation(config, torch.float32), Compiler()
    is_long = config == COMPOSED  # its graph takes long to trace: once, with the numbers as they are
    compiled = compiler.compile(module, dynamic=not is_long)
    for shape in ((4, 6, 12),) if is_long else ((4, 6, 12), (5, 6, 24)):
        x = inputs(*shape, dtype=torch.float32).requires_grad_()
        y, expected = compiled(x), module(x)
        torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-6)
        for found, exact in zip(gradients(module, x, y), gradients(module, x, expected), strict=True):
            torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-5 * (1 + float(exact.abs().max())))
    assert len(compiler.forward) == len(compiler.backward) == 1
    if config["name"] in OPERATORS:
        assert compiler.operators() == {"polytrope::activation", "polytrope::activation_backward"}
        return
    assert compiler.operators() == set()
    if config in (CONTROL, COMPOSED):  # plain torch itself, in part
        return
    (output,) = (node for node in compiler.forward[0].graph.nodes if node.op == "output")
    kept = [node for node in output.args[0][1:] if isinstance(node.meta.get("val"), Tensor)]
    of_x = [node for node in kept if any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape)]
    assert len(of_x) == 1, of_x
    sums = [node for node in compiler.backward[0].graph.nodes if node.target is torch.ops.aten.sum.dim_IntList]
    assert all(node.meta["val"].dtype == torch.float64 for node in sums if node.meta["val"].dim() < 2)
    for node in sums:  # float32 adds up no more than is known when it is compiled
        (terms, dims), dtype = node.args[:2], node.meta["val"].dtype
        sizes = [terms.meta["val"].shape[dim] for dim in dims]
        assert dtype == torch.float64 or all(isinstance(size, int) for size in sizes), sizes


def test_sums_in_float32_are_of_dimensions_whose_size_is_fixed() -> None:
    module, compiler = Hermite(3), Compiler()
    x = inputs(3, 5, 64, dtype=torch.float32).requires_grad_()
    torch._dynamo.mark_dynamic(x, 1)
    y = compiler.compile(module)(x)
    torch.testing.assert_close(gradients(module, x, y), gradients(module, x, module(x)))
    sums = [node for node in compiler.backward[0].graph.nodes if node.target is torch.ops.aten.sum.dim_IntList]
    reduced = {(node.meta["val"].dtype, tuple(dim % 3 for dim in node.args[1])) for node in sums}
    assert reduced == {(torch.float32, (2,)), (torch.float64, (0, 1, 2))}


def test_coefficients_of_frozen_activations_have_no_sums() -> None:
    module, x = Hermite(3).requires_grad_(False), inputs(4, 6).requires_grad_()
    compiler = Compiler()
    torch.testing.assert_close(
        torch.autograd.grad(compiler.compile(module)(x).sum(), x)[0], torch.autograd.grad(module(x).sum(), x)[0]
    )
    assert compiler.operators() == set()
    assert not any("sum" in str(node.target) for node in compiler.backward[0].graph.nodes)


@pytest.mark.parametrize("config", [{"num_parameters": 4, "dim": 1}, {}], ids=label)
def test_channels_last_stays(config: dict[str, Any]) -> None:
    module = build_activation({"name": "hermite", "degree": 3} | config)
    x = inputs(2, 8, 4, 4, dtype=torch.float32).to(memory_format=torch.channels_last).requires_grad_()
    y, exact = Compiler().compile(module)(x), module(x)
    assert y.stride() == exact.stride()
    found, other = gradients(module, x, y), gradients(module, x, exact)
    assert found[0].stride() == other[0].stride()
    torch.testing.assert_close(found, other)


def test_the_compilers_caches_are_asked_for_this_arithmetic() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.append(graph.code)
        return graph

    torch._dynamo.reset()
    x = inputs(4, 6, dtype=torch.float32)
    module = Hermite(3)
    assert torch.equal(
        torch.compile(module, backend=backend)(x), module(x)
    )  # the kernels run it where nobody lowers it
    assert lowering.version() in seen[0]


def test_an_operator_that_does_not_name_its_arithmetic_stays_one() -> None:
    compiler, formula = Compiler(), Formula(Family.HERMITE, 2)
    parameters = torch.ones(1, 3, dtype=torch.float64)

    def raw(x: Tensor, *version: str) -> Tensor:
        result: Tensor = torch.ops.polytrope.activation(x, parameters, *kernels._listed(formula), *version)
        return result

    x = inputs(4, 6, dtype=torch.float32)
    for version in ((), ("of another time",)):
        torch.testing.assert_close(compiler.compile(raw)(x, *version), raw(x))
        assert compiler.operators() == {"polytrope::activation"}


def test_inductor_compiles_a_block_of_them_to_the_same_bits_each_time() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)  # what ran before drew other weights, and once a sum of cancelling numbers
    names = ("hermite", "chebyshev", "legendre", "polyrelu")
    parts = [
        build_activation({"name": name, "degree": 3} | ({"interval": [-2, 2]} if name == "hermite" else {}))
        for name in names
    ]
    block = nn.Sequential(nn.Linear(8, 32), *parts, nn.Linear(32, 8))
    x = inputs(16, 8, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(block, fullgraph=True)
    found = [gradients(block, x, compiled(x)) for _ in range(2)]
    for first, second, exact in zip(*found, gradients(block, x, block(x)), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, exact, rtol=1e-4, atol=1e-5)


LOADED = """
import sys, torch
from torch._inductor import aoti_load_package
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(aoti_load_package(sys.argv[1])(x), expected)
sys.exit("polytrope" in sys.modules)
"""


def test_an_exported_program_keeps_the_operator_and_aotinductor_needs_none(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 16), build_activation({"name": "hermite", "degree": 3, "interval": [-2, 2]}))
    x = inputs(4, 8, dtype=torch.float32)
    with torch.no_grad():
        for strict in (False, True):
            program = torch.export.export(module, (x,), strict=strict)
            assert "polytrope.activation" in str(program.graph)
            assert lowering.version() not in str(program.graph)
            assert "polytrope.activation" in str(program.run_decompositions().graph)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        torch.save((x, module(x)), tmp_path / "expected.pt")
    command = [sys.executable, "-c", LOADED, package, str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stderr


def test_every_family_is_lowered_or_among_those_that_stay() -> None:
    """What a new family does is chosen: the activations that are composed of others have no operator of their own."""
    for family in Family:
        name = family.name.lower()
        stays = name in (*OPERATORS, "harmonic")
        assert lowering.is_lowered(family) != stays
