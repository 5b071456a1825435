"""Compiled activations are plain arithmetic: one graph, both gradients, only x kept, the bits of eager within rounding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from activation_support import CONFIGS, CONTROL, activation, inputs, label
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from functorch.compile import make_boxed_func

from polytrope.ops import Hermite, build_activation, functional, kernels, lowering
from polytrope.ops.families import Family, Formula

OPERATORS = ("fourier", "polynorm", "piecewise_linear")  # what stays one for the compiler
MORE: list[dict[str, Any]] = [
    {"name": "legendre", "degree": 4, "num_parameters": 3, "interval": [-1.0, 1.5]},
    {"name": "chebyshev", "degree": 3, "num_parameters": 6, "dim": 1},
    {"name": "rational", "degree": 4, "num_parameters": 2, "interval": [-1.0, 1.5], "glu": True},
    {"name": "tropical_rational", "degree": 3, "num_parameters": 6},
    {"name": "polyrelu", "degree": 3, "interval": [-1.0, 1.5]},
    {"name": "hermite", "degree": 5, "glu": True},
]


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


@pytest.mark.parametrize("config", [*CONFIGS, *MORE, CONTROL], ids=label)
def test_one_graph_without_the_operator_that_keeps_x_alone_and_takes_dynamic_shapes(config: dict[str, Any]) -> None:
    module, compiler = activation(config, torch.float32), Compiler()
    compiled = compiler.compile(module, dynamic=True)
    for shape in ((4, 6, 12), (5, 6, 24)):
        x = inputs(*shape, dtype=torch.float32).requires_grad_()
        y = compiled(x)
        expected = module(x)
        torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-6)
        for found, exact in zip(gradients(module, x, y), gradients(module, x, expected), strict=True):
            torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-5 * (1 + float(exact.abs().max())))
    assert len(compiler.forward) == len(compiler.backward) == 1
    if config["name"] in OPERATORS:
        assert compiler.operators() == {"polytrope::activation", "polytrope::activation_backward"}
        return
    assert compiler.operators() == set()
    (output,) = (node for node in compiler.forward[0].graph.nodes if node.op == "output")
    kept = [node for node in output.args[0][1:] if isinstance(node.meta.get("val"), Tensor)]
    (of_x,) = (node for node in kept if node.meta["val"].dim() >= 3)
    assert of_x.op == "placeholder" or of_x.target is torch.ops.aten.alias.default
    sums = [node for node in compiler.backward[0].graph.nodes if node.target is torch.ops.aten.sum.dim_IntList]
    assert all(node.meta["val"].dtype == torch.float64 for node in sums if node.meta["val"].dim() < 2) 


@pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[14], CONFIGS[16], MORE[3]], ids=label)
def test_bfloat16_is_computed_in_float32_and_rounded_once(config: dict[str, Any]) -> None:
    module = activation(config, torch.float32)
    x = inputs(3, 6, 12, dtype=torch.bfloat16).requires_grad_()
    y, exact = Compiler().compile(module)(x), module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact) or float(((y - exact) / exact.abs().clamp(min=1e-3)).abs().max()) < 2**-7
    assert float((y != exact).float().mean()) < 0.01
    for found, other in zip(gradients(module, x, y), gradients(module, x, exact), strict=True):
        assert found.dtype == other.dtype
        torch.testing.assert_close(found.float(), other.float(), rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2], CONFIGS[6], CONFIGS[14], CONFIGS[15], CONFIGS[16]], ids=label)
def test_extremes_are_those_of_eager(config: dict[str, Any]) -> None:
    module = activation(config, torch.float32)
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e20, -1e20, 1e8, -1e8, 1e6, -300.0, 0.0, -0.0])
    compiled = Compiler().compile(module)
    torch.testing.assert_close(compiled(x), module(x), rtol=2e-5, atol=2e-6, equal_nan=True)
    x = x[7:].clone().requires_grad_()
    found, exact = (torch.autograd.grad(function(x).sum(), x)[0] for function in (compiled, module))
    torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-6)


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
    assert torch.equal(torch.compile(module, backend=backend)(x), module(x))  # the kernels run it where nobody lowers it
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
    names = ("hermite", "tropical", "rational", "polyrelu")
    parts = [build_activation({"name": name, "degree": 3} | ({"interval": [-2, 2]} if name == "hermite" else {})) for name in names]
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
        assert lowering.is_lowered(family, 3, 2 if name == "rational" else 0, torch.float32, "cpu") != stays
