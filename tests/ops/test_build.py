"""Compiling the kernels: once for many processes, for other instruction sets; and what a failure says."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from polytrope.ops import build, build_activation

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
torch.__version__ = "9.9.9+cu999"  # not the one that the wheel was made with
from polytrope.ops import build, build_activation
x = torch.linspace(-3, 3, 1001)
module = build_activation("hermite")
torch.testing.assert_close(module(x).double(), module.double()(x.double()), rtol=1e-5, atol=1e-5)
print(build.__file__)
print(build.cpu_library_path())
"""


RUN_PROGRAMS = """
import sys, warnings
import torch
from polytrope.ops import build_activation, kernels
folder = sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in ("hermite", "fourier", "polynorm"):
        expected = torch.load(f"{folder}/{name}.pt")
        programs = torch.jit.load(f"{folder}/{name}.traced"), torch.export.load(f"{folder}/{name}.pt2").module()
        for program in programs:
            x = expected["x"].clone().requires_grad_()
            y = program(x)
            torch.testing.assert_close(y, expected["y"])
            gradients = torch.autograd.grad(y.sum(), [x, *program.parameters()])
            torch.testing.assert_close(gradients, expected["gradients"], rtol=1e-4, atol=1e-4)
            assert y.stride() == expected["y"].stride()
            with torch.no_grad():
                program(x)
assert kernels.fallbacks == {"activation": 12, "activation_backward": 6}, kernels.fallbacks
build_activation("hermite3")(x)  # a module counts as well
assert kernels.fallbacks["activation"] == 13, kernels.fallbacks
said = [str(warning.message) for warning in caught if "polytrope" in str(warning.message)]
assert len(said) == 1, said
assert "slow reference activations: no compiler found" in said[0]
try:
    torch.ops.polytrope.activation(x, torch.ones(1, 3, dtype=torch.float64), 1, 40, 0, [], -1, False, 0.0)
except ValueError:
    print("done")
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


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A library of one source, as it lies in a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYTROPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Path(compile_small(os.environ["POLYTROPE_CACHE"])[0]).read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2] + b"\0" * (len(whole) - len(whole) // 2),
        lambda whole: whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:],
        lambda _: b"",
    ],
    ids=["half", "one byte short", "half zeros", "one bit", "empty"],
)
def test_a_damaged_library_is_not_loaded(damage: Any, sealed: bytes, tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(damage(sealed))
    assert not build._is_whole(library)
    library.write_bytes(sealed)
    assert build._is_whole(library)


def test_a_truncated_library_in_the_cache_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTROPE_CACHE", str(tmp_path))
    path = Path(compile_small(str(tmp_path))[0])
    whole, before = path.read_bytes(), path.stat().st_ino
    path.write_bytes(whole[: len(whole) // 2])
    again, inode = compile_small(str(tmp_path))
    assert again == str(path)
    assert inode != before  # renamed into its place, never written there: who has loaded the old one keeps it
    assert build._is_whole(path)
    assert ctypes.CDLL(again).polytrope_forward_polynorm
    assert compile_small(str(tmp_path)) == (again, inode)


def test_a_library_serves_every_version_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for source in build.SOURCES.iterdir():
        included = re.findall(r"#include *[<\"]([^>\"]+)", source.read_text())
        assert not [header for header in included if re.match(r"torch|ATen|c10|caffe2|Python|pybind11", header)], source
    names = build._prebuilt_name("AVX2"), build.cpu_library_path()
    monkeypatch.setattr(torch, "__version__", "9.9.9+cu999")
    assert (build._prebuilt_name("AVX2"), build.cpu_library_path()) == names


def test_a_user_without_a_home_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_account(_: int) -> None:
        raise KeyError("uid not found")

    for variable in ("HOME", "POLYTROPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert build.cache_directory() == Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache" / "polytrope"
    monkeypatch.setattr(pwd, "getpwuid", no_account)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"polytrope-{os.getuid()}"
    assert build.cache_directory() == own
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    with pytest.raises(build.BuildError, match=r"only this user can write to; set POLYTROPE_CACHE"):
        build.cache_directory()
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(build.BuildError, match=r"only this user can write to; set POLYTROPE_CACHE"):
        build.cache_directory()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_compiler_may_stand_behind_another_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, spaced = tmp_path / "ccache", tmp_path / "my compilers" / "g++"
    spaced.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/calls\nexec "$@"\n')
    spaced.write_text('#!/bin/sh\nexec g++ "$@"\n')
    for script in (launcher, spaced):
        script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{launcher} g++ -DEXTRA=1")
    compiler = build._find("CXX")
    assert compiler == (str(launcher), "g++", "-DEXTRA=1")
    monkeypatch.setenv("POLYTROPE_CACHE", str(tmp_path / "cache"))
    assert build._is_whole(Path(compile_small(str(tmp_path / "cache"))[0]))
    assert (tmp_path / "calls").read_text().split() == ["g++"] * 3  # its version, one source, the link
    monkeypatch.setenv("CXX", str(spaced))
    assert build._find("CXX") == (str(spaced),)
    monkeypatch.setenv("CXX", "no-such-launcher g++")
    with pytest.raises(build.BuildError, match=r"no compiler found \(looked for no-such-launcher g\+\+; set CXX\)"):
        build._find("CXX")


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_programs_with_the_operator_run_where_no_compiler_is(tmp_path: Path) -> None:
    x = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    for name in ("hermite", "fourier", "polynorm"):
        module = build_activation(name)
        torch.jit.trace(module, x).save(tmp_path / f"{name}.traced")
        torch.export.save(torch.export.export(module, (x,)), tmp_path / f"{name}.pt2")
        y = module(x.requires_grad_())
        gradients = torch.autograd.grad(y.sum(), [x, *module.parameters()])
        x = x.detach()
        torch.save({"x": x, "y": y.detach(), "gradients": gradients}, tmp_path / f"{name}.pt")
    environment = os.environ | {"POLYTROPE_CACHE": str(tmp_path / "none"), "CXX": "absent"}
    command = [sys.executable, "-c", RUN_PROGRAMS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "done"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_wheel_carries_kernels_that_need_no_compiler(wheel: Path, tmp_path: Path) -> None:
    """Used where no compiler is and the cache is empty."""
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
