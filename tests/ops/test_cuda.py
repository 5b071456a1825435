"""The CUDA kernels without a GPU: they compile for both architectures, and their own source gives the right numbers.

`cuda_on_cpu/emulator.h` runs the sources thread by thread on the CPU, through the C interface and the Python calls that
tensors on a GPU take, against the float64 reference. What only a GPU can show is in tests/gpu.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_code
from polytrope.ops import build, cuda, functional, native, reference
from polytrope.ops.families import Family, Formula, parameter_count, result_shape
from polytrope.ops.packing import PLAIN

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs the CUDA toolkit (nvcc and its headers)")


@pytest.mark.timeout(900)
def test_the_cuda_kernels_compile_for_both_architectures_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    log = build.cuda_library_path(flags=["-DPOLYTROPE_FEW_DEGREES"]).with_suffix(".log").read_text()
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, re.S
    )
    assert {architecture for _, architecture, _, _ in kernels} == {"sm_80", "sm_90"}
    unrolled = [entry for entry in kernels if re.search(r"Li[1-9]", entry[0]) and "Li0ELi0E" not in entry[0]]
    assert len(unrolled) >= 40
    assert sum("columns" in name for name, *_ in unrolled) >= 36
    with capsys.disabled():
        print("\nCUDA kernels: registers and bytes spilled")
        for name, architecture, spilled, registers in sorted(kernels):
            print(f"  {architecture} {readable(name)}: {registers}, {spilled}")
    assert all(int(spilled) <= 16 for _, _, spilled, _ in unrolled)


def test_what_the_benchmark_of_the_machine_code_replaces_is_in_the_sources() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in build.SOURCES.iterdir())
    assert [old for old, _ in gpu_code.FEW + gpu_code.FIXED if old not in text] == []


def readable(name: str) -> str:
    kind = re.search(r"(forward|backward|finish)_(kernel|rows|columns)", name)
    families = "Polynomial|Hermite|Chebyshev|Legendre|Fourier|Harmonic|TropicalRational|Tropical|PiecewiseLinear|"
    families += "RationalSpline|Rational|PolyReLU"
    family, degree = re.search(families, name), re.search(r"Li(\d+)E", name)
    form = re.search(r"FormE(\d)", name)
    assert kind is not None, name
    parts = [family.group() if family else "PolyNorm", kind.group(1)]
    if kind.group(2) == "columns":
        owned = re.search(r"Li(\d)ELb(\d)E", name)
        parts.append("per channel" + (f" ({owned.group(1)} a thread)" if owned else ""))
        if owned and owned.group(2) == "1":
            parts.append("with tails")
    if degree:
        parts.append(f"degree {degree.group(1)}" if degree.group(1) != "0" else "any degree")
    if form:
        parts.append(("", "with tails", "general")[int(form.group(1))])
    return " ".join(parts)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA sources for the CPU, blocks of 64 threads, 8 of them at most for groups."""
    assert NVCC is not None
    folder = tmp_path_factory.mktemp("emulated")
    plan = subprocess.run([NVCC, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.M)
    headers = Path(top.group(1) if top else "") / "include"
    if not (headers / "cuda_bf16.h").exists():
        pytest.skip(f"no CUDA headers in {headers}")
    launch = re.compile(r"(\w+(?:<[\w, ]+>)?)\s*<<<(.+?), (\w+), 0, [\w.]+>>>\(([^;]*)\);", re.S)
    emulator = Path(__file__).parent / "cuda_on_cpu" / "emulator.h"
    running = []
    for path in sorted(build.SOURCES.iterdir()):
        text = launch.sub(r"emulator::launch(\2, \3, [&] { \1(\4); });", path.read_text())
        # Beside the highest degree, one whose channels a thread takes eight at a time.
        every_degree = "<Hermite, Polynomial, 1, 8>"
        assert (every_degree in text) == (path.name == "cuda_polynomial.cu")
        text = text.replace(every_degree, "<Hermite, Polynomial, 3, 3>")
        assert "<<<" not in text
        target = folder / path.name
        target.write_text(text)
        if path.suffix == ".cu":
            command = [
                "g++",
                "-std=c++17",
                "-O0",
                "-w",
                "-fPIC",
                "-DPOLYTROPE_CUDA_THREADS=64",
                "-DPOLYTROPE_FEW_DEGREES",
                "-DPOLYTROPE_CUDA_ROWS=8",
            ]
            command += [f"-I{headers}", "-include", str(emulator), "-x", "c++", "-c", str(target), "-o", f"{target}.o"]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        error = process.communicate()[1]
        assert process.returncode == 0, error[-3000:]
    library = folder / "emulated.so"
    subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, folder.glob("*.o")), "-o", str(library)], check=True)
    return cuda.load(str(library))


CASES = [
    *(Formula(family, degree) for family in Family if family != Family.RATIONAL for degree in (3, 6)),
    Formula(Family.RATIONAL, 5, 4),
    Formula(Family.RATIONAL, 3, 5, (-1.0, 0.9)),
    Formula(Family.HERMITE, 3, 0, (-0.9, 0.8)),
    Formula(Family.POLYNOMIAL, 8),
    Formula(Family.POLYNOMIAL, 8, 0, (-0.9, 0.8)),
    Formula(Family.POLYRELU, 4, 0, (-0.9, 0.8)),
    Formula(Family.TROPICAL, 8),
    Formula(Family.HERMITE, 5, 0, (-0.9, 0.8), -1, True),
    Formula(Family.FOURIER, 4, 0, (-0.9, 0.8)),
    Formula(Family.LEGENDRE, 8, 0, (), -1, True),
    Formula(Family.PIECEWISE_LINEAR, 40),
    Formula(Family.RATIONAL_SPLINE, 8, 0, (), -1, True),
    Formula(Family.RATIONAL_SPLINE, 64),
    Formula(Family.CHEBYSHEV, 16),
    Formula(Family.CHEBYSHEV, 8, 0, (-0.9, 0.8), variable=(0.1, 1.2)),
    Formula(Family.HERMITE, 5, 0, (), -1, True, variable=(-0.1, 0.7)),
    Formula(Family.LEGENDRE, 6, variable=(0.1, 1.2)),
    Formula(Family.POLYNORM, 3, epsilon=0.1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_agree_with_the_reference(emulated: ctypes.CDLL, dtype: torch.dtype) -> None:
    for formula in CASES:
        assert cuda.largest_error(emulated, torch.device("cpu"), dtype, formula) <= cuda._TOLERANCES[dtype], formula


@pytest.mark.parametrize(
    ("shape", "dim", "groups", "gated"),
    [
        ((2, 6, 16), -2, 3, False),
        ((3, 4, 5), -3, 3, False),
        ((7, 12), -1, 12, False),
        ((9, 12), -1, 6, False),
        ((50, 3, 104), -2, 3, False),
        ((9000,), -1, 1, False),
        ((2, 20), -1, 20, False),
        ((40, 24), -1, 6, True),
        ((40, 96), -1, 3, True),
        ((40, 2, 50), -1, 1, True),
    ],
)
def test_groups_lie_where_they_should(
    emulated: ctypes.CDLL, shape: tuple[int, ...], dim: int, groups: int, gated: bool
) -> None:
    formula = Formula(Family.POLYNOMIAL, 2, 0, (), dim, gated)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    seed = torch.randn(result_shape(x.shape, formula), generator=torch.Generator().manual_seed(2))
    parameters = torch.randn(groups, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    call = native.prepare_for(x, [parameters], PLAIN, formula)
    own = cuda.describe(emulated, x, [parameters], formula)
    torch.testing.assert_close(
        cuda.forward(own, x, [parameters]), native.forward(call, x, [parameters]), rtol=1e-5, atol=1e-5
    )
    found, again, expected = (
        (x_gradient, parameter_gradient)
        for x_gradient, (parameter_gradient,) in (
            cuda.backward(own, seed, x, [parameters]),
            cuda.backward(own, seed, x, [parameters]),
            native.backward(call, seed, x, [parameters]),
        )
    )
    for ours, same, theirs in zip(found, again, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(ours, same)


@pytest.mark.parametrize("family", [Family.HERMITE, Family.RATIONAL, Family.TROPICAL_RATIONAL], ids=str)
def test_the_columns_of_channels(emulated: ctypes.CDLL, family: Family) -> None:
    """Several blocks side by side and under each other; a width that vectors divide, and one that they do not."""
    generator = torch.Generator().manual_seed(1)
    for interval in ((), (-0.9, 0.8)) if family != Family.TROPICAL_RATIONAL else ((),):
        for rows, channels, groups in ((37, 544, 544), (1, 64, 32), (150, 8, 8), (90, 7, 7), (41, 96, 4)):
            formula = Formula(family, 3, 2 if family == Family.RATIONAL else 0, interval)
            x, seed = (torch.randn(rows, channels, generator=generator).bfloat16() for _ in range(2))
            parameters = torch.randn(groups, parameter_count(formula), generator=generator)
            call, own = (
                native.prepare_for(x, [parameters], PLAIN, formula),
                cuda.describe(emulated, x, [parameters], formula),
            )
            values = (cuda.forward(own, x, [parameters]), native.forward(call, x, [parameters]))
            torch.testing.assert_close(*values, rtol=1e-2, atol=1e-2)
            (found, [sums]), (again, [same]), (exact, [exact_sums]) = (
                cuda.backward(own, seed, x, [parameters]),
                cuda.backward(own, seed, x, [parameters]),
                native.backward(call, seed, x, [parameters]),
            )
            torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(sums, exact_sums, rtol=1e-4, atol=1e-4)
            assert torch.equal(found, again)
            assert torch.equal(sums, same)
            assert torch.equal(cuda.backward(own, seed, x, [parameters], frozen=True)[0], found)


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize(
    "formula",
    [
        Formula(Family.HERMITE, 3, 0, (-0.5, 0.75)),
        Formula(Family.HERMITE, 3, 0, (-0.5, 0.75), variable=(0.1, 1.2)),
        Formula(Family.HERMITE, 3, variable=(0.1, 1.2)),
        Formula(Family.POLYRELU, 4, 0, (0.0, 0.75)),  # slopes of both sides differ at this end
        Formula(Family.RATIONAL, 5, 4, (0.0, 0.75)),
    ],
    ids=str,
)
def test_beyond_an_interval(emulated: ctypes.CDLL, formula: Formula, groups: int) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)) * 2
    x[0, :6] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.75, -0.5, 0.0])
    x[1, :2] = torch.tensor([1e30, -1e30])
    parameters = torch.randn(groups, parameter_count(formula), generator=torch.Generator().manual_seed(2))
    call, own = native.prepare_for(x, [parameters], PLAIN, formula), cuda.describe(emulated, x, [parameters], formula)
    values = (cuda.forward(own, x, [parameters]), native.forward(call, x, [parameters]))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5, equal_nan=True)
    seed = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    (found, _), (expected, _) = (
        module.backward(c, seed, x, [parameters]) for module, c in ((cuda, own), (native, call))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    x = x[2:].contiguous()
    call, own = native.prepare_for(x, [parameters], PLAIN, formula), cuda.describe(emulated, x, [parameters], formula)
    found_sums, exact_sums = (
        module.backward(c, seed[2:].contiguous(), x, [parameters])[1][0] for module, c in ((cuda, own), (native, call))
    )
    torch.testing.assert_close(found_sums, exact_sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [Family.FOURIER, Family.HARMONIC, Family.TROPICAL_RATIONAL], ids=str)
def test_parameters_come_in_parts(emulated: ctypes.CDLL, family: Family) -> None:
    generator = torch.Generator().manual_seed(1)
    x, seed = (torch.randn(5, 24, generator=generator) for _ in range(2))
    sizes = {Family.FOURIER: (0, 6, 6, 6), Family.HARMONIC: (0, 0, 6, 6), Family.TROPICAL_RATIONAL: (7, 7, 7, 7)}[
        family
    ]
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    parts = [
        torch.randn(3, *((size,) if size else ()), generator=generator).to(dtype)
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]
    shapes = tuple(part.shape for part in parts)
    formula, packing = functional.describe(family, x.dtype, x.shape, shapes, -1, None, False, 0.0)
    call, own = native.prepare_for(x, parts, packing, formula), cuda.describe(emulated, x, parts, formula, packing)
    torch.testing.assert_close(cuda.forward(own, x, parts), native.forward(call, x, parts), rtol=1e-4, atol=1e-4)
    (found, found_parts), (expected, expected_parts) = (
        cuda.backward(own, seed, x, parts),
        native.backward(call, seed, x, parts),
    )
    for ours, theirs in zip((found, *found_parts), (expected, *expected_parts), strict=True):
        assert ours.shape == theirs.shape
        rounding = max(1e-4, float(torch.finfo(theirs.dtype).eps))  # a sum may fall on the other side of a half
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=1e-4)


def test_tensors_that_begin_anywhere_and_long_rows(emulated: ctypes.CDLL) -> None:
    base = torch.randn(2 * 1501 + 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    x, parameters = base[3:].view(2, 1501), torch.tensor([[0.1, 0.7, -0.2, 0.3]], dtype=torch.float64)
    assert x.data_ptr() % 16
    for formula in (Formula(Family.POLYNORM, 3, epsilon=0.1), Formula(Family.HERMITE, 3)):
        call = cuda.describe(emulated, x, [parameters], formula)
        found, exact = cuda.forward(call, x, [parameters]), reference.evaluate(x.double(), parameters, formula)
        torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)


def test_another_number_of_parameters_is_refused(emulated: ctypes.CDLL) -> None:
    with pytest.raises(ValueError, match="expected 4 in each of at least one group, got 3"):
        cuda.describe(emulated, torch.zeros(8), [torch.zeros(1, 3)], Formula(Family.HERMITE, 3))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("interval", [(), (-40.0, 50.0)])
@pytest.mark.parametrize("groups", [1, 3])
def test_rational_far_from_zero(emulated: ctypes.CDLL, groups: int, interval: tuple[float, ...], gated: bool) -> None:
    for degree, second in ((5, 4), (3, 5)):
        formula = Formula(Family.RATIONAL, degree, second, interval, -1, gated)
        generator = torch.Generator().manual_seed(1)
        parameters = torch.randn(groups, degree + 1 + second, generator=generator, dtype=torch.float64)
        x = torch.randn(40, 3 * 42 * (2 if gated else 1), generator=generator)
        x[::7, ::3] *= 20
        x[:, 1] = torch.logspace(1, 8, 40)
        seed = torch.randn(result_shape(x.shape, formula), generator=generator)
        call, own = (
            native.prepare_for(x, [parameters], PLAIN, formula),
            cuda.describe(emulated, x, [parameters], formula),
        )
        torch.testing.assert_close(
            cuda.forward(own, x, [parameters]), native.forward(call, x, [parameters]), rtol=1e-4, atol=1e-5
        )
        (found, [found_sums]), (expected, [sums]) = (
            cuda.backward(own, seed, x, [parameters]),
            native.backward(call, seed, x, [parameters]),
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (found_sums - sums).abs().max() <= 1e-4 * sums.abs().max()
        assert torch.equal(cuda.backward(own, seed, x, [parameters], frozen=True)[0], found)


@pytest.mark.parametrize("center", [10.0, -1e5])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("family", [Family.RATIONAL_SPLINE, Family.PIECEWISE_LINEAR], ids=str)
def test_pieces_far_from_zero(emulated: ctypes.CDLL, family: Family, groups: int, center: float) -> None:
    formula = Formula(family, 8)
    generator = torch.Generator().manual_seed(1)
    parameters = torch.randn(groups, parameter_count(formula), generator=generator, dtype=torch.float64)
    parameters = cuda.possible(parameters, formula)
    if family == Family.RATIONAL_SPLINE:
        parameters[:, :9] += center
    else:
        parameters[:, :7] += center
        parameters[:, 7:15] -= parameters[:, 15:] * center
    x = (3 * torch.randn(40, 96, generator=generator, dtype=torch.float64) + center).float()
    seed = torch.randn(40, 96, generator=generator)
    leaves = (x.double().requires_grad_(), parameters.requires_grad_())
    exact = reference.evaluate(*leaves, formula)
    call = cuda.describe(emulated, x, [parameters], formula)
    found = cuda.forward(call, x, [parameters.detach()])
    assert (found - exact).abs().max() < 1e-6 * exact.abs().max()
    expected = torch.autograd.grad(exact, leaves, seed.double())
    x_gradient, [sums] = cuda.backward(call, seed, x, [parameters.detach()])
    for mine, right in zip((x_gradient, sums), expected, strict=True):
        assert (mine.double() - right).abs().max() <= 5e-6 * right.abs().max()


@pytest.mark.parametrize("degree", [3, 8])
@pytest.mark.parametrize("columns", [64, 1501])
def test_polynorm_keeps_its_highest_powers(emulated: ctypes.CDLL, columns: int, degree: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, seed = torch.randn(7, columns, generator=generator), torch.randn(7, columns, generator=generator)
    x *= torch.tensor([1.0, 300.0, 1e5, 1e-9, 1e9, 0.0, 1e3])[:, None]
    parameters, formula = torch.linspace(0.5, -1.0, degree + 1)[None], Formula(Family.POLYNORM, degree, epsilon=1e-6)
    leaves = (x.double().requires_grad_(), parameters.double().requires_grad_())
    exact = reference.evaluate(*leaves, formula)
    call = cuda.describe(emulated, x, [parameters], formula)
    torch.testing.assert_close(cuda.forward(call, x, [parameters]).double(), exact, rtol=1e-5, atol=1e-5)
    x_gradient, [gradient] = cuda.backward(call, seed, x, [parameters])
    expected, sums = torch.autograd.grad(exact, leaves, seed.double())
    for mine, right in zip(x_gradient, expected, strict=True):
        assert (mine.double() - right).abs().max() <= 1e-4 * right.abs().max()
    assert (gradient.double() - sums).abs().max() <= 1e-4 * sums.abs().max()
    assert torch.equal(cuda.backward(call, seed, x, [parameters], frozen=True)[0], x_gradient)


def test_maxima_with_nan_and_at_infinity(emulated: ctypes.CDLL) -> None:
    x = torch.tensor([0.5, float("inf"), -float("inf"), 3e38, -1.0, 2.0, 0.0, 1.0])
    for family, count in ((Family.TROPICAL, 7), (Family.TROPICAL_RATIONAL, 28)):
        formula, parameters = Formula(family, 6), torch.linspace(1.0, -1.0, count, dtype=torch.float64)[None]
        call, own = (
            native.prepare_for(x, [parameters], PLAIN, formula),
            cuda.describe(emulated, x, [parameters], formula),
        )
        torch.testing.assert_close(cuda.forward(own, x, [parameters]), native.forward(call, x, [parameters]))
        found, exact = (
            module.backward(c, torch.ones(8), x, [parameters])[0] for module, c in ((cuda, own), (native, call))
        )
        torch.testing.assert_close(found, exact)
        assert found[1].isfinite()
        parameters[0, count // 2] = float("nan")
        assert cuda.forward(own, x, [parameters]).isnan().all()
        assert cuda.backward(own, torch.ones(8), x, [parameters])[0].isnan().all()


@pytest.mark.parametrize("groups", [1, 12, 3])
def test_channels_last_stays_so(emulated: ctypes.CDLL, groups: int) -> None:
    formula = Formula(Family.HERMITE, 3, dim=-3 if groups > 1 else -1)
    x = torch.randn(2, 12, 5, 9, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    seed = torch.randn(2, 12, 5, 9, generator=torch.Generator().manual_seed(2))
    parameters = torch.randn(groups, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    call, own = native.prepare_for(x, [parameters], PLAIN, formula), cuda.describe(emulated, x, [parameters], formula)
    found, expected = cuda.forward(own, x, [parameters]), native.forward(call, x, [parameters])
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (gradient, [sums]), (exact, [exact_sums]) = (
        cuda.backward(own, seed, x, [parameters]),
        native.backward(call, seed, x, [parameters]),
    )
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums, exact_sums, rtol=1e-4, atol=1e-4)
    assert torch.equal(cuda.backward(own, seed, x, [parameters], frozen=True)[0], gradient)
