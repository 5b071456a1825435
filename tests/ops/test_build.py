"""Compiling the kernels: once for many processes, for other instruction sets; and what a failure says."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from polytrope.ops import build

CHECK_BASELINE = """
import torch
from polytrope.ops import build, build_activation, kernels, native
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
assert native.cpu_library() is not None
x = torch.linspace(-3, 3, 1001)
for name in ("hermite", "fourier", "tropical_rational", "polynorm"):
    module = build_activation(name)
    exact = module.double()(x.double())
    torch.testing.assert_close(module.float()(x).double(), exact, rtol=1e-5, atol=1e-5)
print(build.cpu_library_path())
"""

USE_PREBUILT = """
import torch
from polytrope.ops import build, build_activation
x = torch.linspace(-3, 3, 1001)
module = build_activation("hermite")
torch.testing.assert_close(module(x).double(), module.double()(x.double()), rtol=1e-5, atol=1e-5)
print(build.__file__)
print(build.cpu_library_path())
"""


def compile_small(cache: str) -> tuple[str, int]:
    """A library of one source; its path and its inode."""
    os.environ["POLYTROPE_CACHE"] = cache
    compiler = build._find("CXX", "g++", "c++", "clang++")
    path = build._compiled("cpu", compiler, build.CPU_FLAGS, ("cpu_polynorm.cpp",))
    return str(path), path.stat().st_ino


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(compile_small, [str(tmp_path)] * 2)
    assert first == second
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".log", ".so"]


def test_each_machine_loads_the_library_of_its_own_instruction_set() -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK_BASELINE], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(build.cpu_library_path("DEFAULT"))


def test_a_compiler_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="false does not run"):
        build.cpu_library_path()


def test_a_failed_compilation_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTROPE_CACHE", str(tmp_path))
    compiler = build._find("CXX", "g++", "c++", "clang++")
    with pytest.raises(build.BuildError, match=r"failed, see .*\.log"):
        build._compiled("cpu", compiler, ["-std=c++17", "-Dmax_degree=#"], ("cpu_polynorm.cpp",))
    assert "error" in next(tmp_path.glob("*.log")).read_text()


def test_kernels_for_the_gpus_at_hand_are_compiled_unless_those_for_all_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = tmp_path / "nvcc"
    recorder.write_text('#!/bin/sh\nfor last; do :; done\n[ "$1" = --version ] || echo "$@" > "$last"\n')
    recorder.chmod(0o755)
    monkeypatch.setenv("NVCC", str(recorder))
    monkeypatch.setenv("POLYTROPE_CACHE", str(tmp_path / "cache"))

    def codes(library: Path) -> str:
        return library.read_text().partition(",code=")[2].split()[0]

    assert codes(build.cuda_library_path_for({"90"})) == "[sm_90,compute_90]"
    assert codes(build.cuda_library_path_for({"80"})) == "[sm_80,compute_80]"
    assert codes(build.cuda_library_path_for({"89", "90"})) == "[sm_80,sm_90,compute_80]"
    assert codes(build.cuda_library_path_for({"90"})) == "[sm_80,sm_90,compute_80]"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYTROPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=r"cannot write to .*; set POLYTROPE_CACHE"):
        build.cpu_library_path()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_wheel_carries_kernels_that_need_no_compiler(tmp_path: Path) -> None:
    """Built from a copy of the sources, quickly; used where no compiler is and the cache is empty."""
    root, copy = Path(__file__).parents[2], tmp_path / "source"
    for name in ("ops", "models", "pipeline", "infra"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(root / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    compiler = tmp_path / "quick-g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "POLYTROPE_CACHE": str(tmp_path / "cache")}
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(copy)], check=True, timeout=280, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux" in wheel.name
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    kernels = installed / "polytrope" / "ops" / "prebuilt"
    assert len(list(kernels.iterdir())) == len(build._levels())
    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "POLYTROPE_CACHE": str(tmp_path / "none"),
        "CXX": "absent",
    }
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", USE_PREBUILT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    used, library = done.stdout.split()
    assert Path(used).is_relative_to(installed)
    assert Path(library).parent == kernels
    assert not (tmp_path / "none").exists()
