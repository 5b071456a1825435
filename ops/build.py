"""Compiles the kernels into a per-user cache, once for all processes of a machine, or ahead of time.

A library is named by a hash of the sources, the compiler, its flags and the version of torch. The CPU kernels are
compiled once per instruction set and chosen by the machine they run on.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"  # in a wheel that was made where a compiler was (setup.py)
CPU_SOURCES = ("cpu_float32.cpp", "cpu_float64.cpp", "cpu_polynorm.cpp")
CUDA_SOURCES = (
    "cuda.cu",
    "cuda_polynomial.cu",
    "cuda_recurrence.cu",
    "cuda_waves.cu",
    "cuda_lines.cu",
    "cuda_quotients.cu",
    "cuda_polynorm.cu",
)
# Kernels are written in vectors, so -O3 makes them no faster; conversions of elements need the vectorizer.
CPU_FLAGS = (
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
CUDA_FLAGS = ("-std=c++17", "-O3", "-cudart=static", "-Xcompiler=-fPIC", "-Xptxas=-v")
CUDA_ARCHITECTURES = ("80", "90")
# Widest first: the name that torch gives to a CPU's capability (the first one: and its own test says yes), and flags.
# Clang and GCC prefer 256 bits on some machines; the kernels use explicit vectors of 512.
X86_LEVELS = {
    "AVX512_BF16": ("-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"),
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3", "-mtune=generic"),
    "DEFAULT": ("-march=x86-64", "-mtune=generic"),
}


class BuildError(RuntimeError):
    """No compiler, or it failed; one line that says so."""


def cache_directory() -> Path:
    """`$POLYTROPE_CACHE`, else `$XDG_CACHE_HOME/polytrope`, else `~/.cache/polytrope`."""
    named = os.environ.get("POLYTROPE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polytrope"


def build(verbose: bool = True, cuda: bool | str | Sequence[str] = False) -> list[Path]:
    """Compile the CPU kernels for every instruction set, and with `cuda` those for GPUs.

    Args:
        verbose: print each library as it is ready.
        cuda: True, or compute capabilities such as "90" or "80,90".

    Raises:
        BuildError: no compiler, or it failed.
    """
    built = [cpu_library_path(level) for level in _levels()]
    if cuda:
        named = cuda.split(",") if isinstance(cuda, str) else () if cuda is True else cuda
        built.append(cuda_library_path(tuple(named) or CUDA_ARCHITECTURES))
    if verbose:
        for path in built:
            print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return built


def prebuild(directory: Path) -> None:
    """Compile the CPU kernels for every instruction set and copy them to a new directory, as a wheel carries them."""
    libraries = {level: cpu_library_path(level) for level in _levels()}
    directory.mkdir(parents=True)
    for level, library in libraries.items():
        shutil.copy2(library, directory / _prebuilt_name(level))


def _levels() -> tuple[str, ...]:
    return tuple(X86_LEVELS) if platform.machine() == "x86_64" else ("DEFAULT",)


def _prebuilt_name(level: str) -> str:
    """Without the compiler: a machine that has none can tell whether the library is of its sources and its torch."""
    digest = _digest((torch.__version__, sys.platform, platform.machine()))
    return f"polytrope-cpu-{level}-{digest}.so"


def cpu_library_path(level: str | None = None) -> Path:
    """The library for an instruction set of `X86_LEVELS` (default: the best of this machine), compiled if need be."""
    level = level or best_level()
    prebuilt = PREBUILT / _prebuilt_name(level if level in _levels() else "DEFAULT")
    if prebuilt.exists():
        return prebuilt
    compiler = _find("CXX", "g++", "c++", "clang++")
    flags = list(CPU_FLAGS)
    if "clang" not in _version(compiler):
        flags.append("-Wno-psabi")
    if platform.machine() == "x86_64":
        flags += X86_LEVELS.get(level, X86_LEVELS["DEFAULT"])
    return _compiled("cpu", compiler, flags, CPU_SOURCES)


def best_level() -> str:
    """The name in `X86_LEVELS` of what this machine can run; `ATEN_CPU_CAPABILITY` lowers it as it does torch's own."""
    capability: str = torch.backends.cpu.get_cpu_capability()
    rounds = capability == "AVX512" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "AVX512_BF16" if rounds else capability


def cuda_library_path(architectures: Sequence[str] = CUDA_ARCHITECTURES, flags: Sequence[str] = ()) -> Path:
    """The CUDA library for these compute capabilities, and portable code for later ones, compiled if need be.

    All are assembled from one portable code of the lowest, which halves the time.
    """
    return _compiled("cuda", _nvcc(), [*_cuda_flags(architectures), *flags], CUDA_SOURCES)


def cuda_library_path_for(capabilities: Collection[str]) -> Path:
    """The CUDA library for GPUs of these compute capabilities.

    That of `build(cuda=True)`, if it is there; else one for no other GPUs, which compiles sooner.

    Args:
        capabilities: such as "90"; none, or one that is not of `CUDA_ARCHITECTURES`: the library for all.

    Raises:
        BuildError: no compiler, or it failed.
    """
    whole = _target("cuda", _nvcc(), _cuda_flags(CUDA_ARCHITECTURES))
    present = tuple(architecture for architecture in CUDA_ARCHITECTURES if architecture in capabilities)
    if whole.exists() or not present or len(present) < len(capabilities):
        return cuda_library_path()
    return cuda_library_path(present)


def _nvcc() -> str:
    return _find("NVCC", "nvcc", "/usr/local/cuda/bin/nvcc")


def _cuda_flags(architectures: Sequence[str]) -> list[str]:
    lowest = f"compute_{min(architectures, key=int)}"
    codes = ",".join([*(f"sm_{architecture}" for architecture in architectures), lowest])
    return [*CUDA_FLAGS, f"-gencode=arch={lowest},code=[{codes}]"]


def _find(variable: str, *candidates: str) -> str:
    named = os.environ.get(variable)
    for candidate in (named,) if named else candidates:
        found = shutil.which(candidate)
        if found:
            return found
    raise BuildError(f"no compiler found (looked for {named or ', '.join(candidates)}; set {variable})")


@functools.cache
def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{compiler} does not run: {error}") from None


def _target(kind: str, compiler: str, flags: Sequence[str]) -> Path:
    digest = _digest((_version(compiler), *flags, torch.__version__, sys.platform, platform.machine()))
    return cache_directory() / f"polytrope-{kind}-{digest}.so"


def _compiled(kind: str, compiler: str, flags: Sequence[str], sources: Sequence[str]) -> Path:
    target = _target(kind, compiler, flags)
    directory = target.parent
    if target.exists():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(compiler, flags, sources, target)
    except OSError as error:
        raise BuildError(f"cannot write to {directory} ({error.strerror}); set POLYTROPE_CACHE") from None
    return target


def _digest(parts: Sequence[str]) -> str:
    """Of these words and all sources."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: str, flags: Sequence[str], sources: Sequence[str], target: Path) -> None:
    """All sources at the same time, then the link."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source}.o" for source in sources]
        commands = [
            [
                compiler,
                *flags,
                "-c",
                str(SOURCES / source),
                "-o",
                str(to),
            ]
            for source, to in zip(sources, objects, strict=True)
        ]
        library = Path(scratch) / target.name
        link = [compiler, *flags, "-shared", *map(str, objects), "-o", str(library)]
        written: list[str] = []
        for stage in (commands, [link]):
            running = [_start(command) for command in stage]
            outputs = [process.communicate()[0] for process in running]
            log = target.with_suffix(".log")
            written.extend(outputs)
            log.write_text("\n".join(written))
            if any(process.returncode for process in running):
                raise BuildError(f"{compiler} failed, see {log}")
        os.replace(library, target)


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
