"""Compiles the kernels into a per-user cache, once for all processes of a machine, or ahead of time.

A library is named by a hash of the sources, the compiler and its flags; no source includes a header of torch, so that
one library serves every version. It ends with a checksum of itself: one that a crash or a full disk cut short is
compiled again, where loading it would kill the process. The CPU kernels are compiled once per instruction set and
chosen by the machine they run on.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
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

Compiler = tuple[str, ...]  # a command, maybe behind another one: ccache g++
_SEAL = b"\npolytrope sha256 "  # and 64 digits, at the end of a library, where a loader does not look


class BuildError(RuntimeError):
    """No compiler, or it failed; one line that says so."""


def cache_directory() -> Path:
    """`$POLYTROPE_CACHE`, else `$XDG_CACHE_HOME/polytrope`, else `~/.cache/polytrope`.

    A user without a home (a container under a number that no account has) gets a directory of their own in the one for
    temporary files.

    Raises:
        BuildError: somebody else could have put a library into that one.
    """
    named = os.environ.get("POLYTROPE_CACHE")
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polytrope"
    except RuntimeError:
        own = Path(tempfile.gettempdir()) / f"polytrope-{os.getuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        found = own.lstat()
    except OSError as error:
        raise BuildError(f"cannot write to {own} ({error.strerror}); set POLYTROPE_CACHE") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BuildError(f"{own} is not a directory that only this user can write to; set POLYTROPE_CACHE")
    return own


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
    """Without the compiler: a machine that has none can tell whether the library is of its sources."""
    digest = _digest((sys.platform, platform.machine()))
    return f"polytrope-cpu-{level}-{digest}.so"


def cpu_library_path(level: str | None = None) -> Path:
    """The library for an instruction set of `X86_LEVELS` (default: the best of this machine), compiled if need be."""
    level = level or best_level()
    prebuilt = PREBUILT / _prebuilt_name(level if level in _levels() else "DEFAULT")
    if _is_whole(prebuilt):
        return prebuilt
    try:
        return _compiled_for(level)
    except BuildError as error:
        damaged = f"{prebuilt} is damaged, install polytrope again; " if prebuilt.exists() else ""
        raise BuildError(f"{damaged}{error}") from None


def _compiled_for(level: str) -> Path:
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
    of_all = _target("cuda", _nvcc(), _cuda_flags(CUDA_ARCHITECTURES))
    if _is_whole(of_all):
        return of_all
    present = tuple(architecture for architecture in CUDA_ARCHITECTURES if architecture in capabilities)
    if not present or len(present) < len(capabilities):
        return cuda_library_path()
    return cuda_library_path(present)


def _nvcc() -> Compiler:
    return _find("NVCC", "nvcc", "/usr/local/cuda/bin/nvcc")


def _cuda_flags(architectures: Sequence[str]) -> list[str]:
    lowest = f"compute_{min(architectures, key=int)}"
    codes = ",".join([*(f"sm_{architecture}" for architecture in architectures), lowest])
    return [*CUDA_FLAGS, f"-gencode=arch={lowest},code=[{codes}]"]


def _find(variable: str, *candidates: str) -> Compiler:
    named = os.environ.get(variable)
    for candidate in (named,) if named else candidates:
        # A path with spaces is one word; `ccache g++` is two, a command and what it runs.
        words = (candidate,) if shutil.which(candidate) else tuple(shlex.split(candidate))
        found = shutil.which(words[0]) if words else None
        if found:
            return (found, *words[1:])
    raise BuildError(f"no compiler found (looked for {named or ', '.join(candidates)}; set {variable})")


@functools.cache
def _version(compiler: Compiler) -> str:
    try:
        return subprocess.run(
            [*compiler, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{shlex.join(compiler)} does not run: {error}") from None


def _target(kind: str, compiler: Compiler, flags: Sequence[str]) -> Path:
    digest = _digest((_version(compiler), *flags, sys.platform, platform.machine()))
    return cache_directory() / f"polytrope-{kind}-{digest}.so"


def _compiled(kind: str, compiler: Compiler, flags: Sequence[str], sources: Sequence[str]) -> Path:
    target = _target(kind, compiler, flags)
    directory = target.parent
    if _is_whole(target):
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(target):
                _compile(compiler, flags, sources, target)
    except OSError as error:
        raise BuildError(f"cannot write to {directory} ({error.strerror}); set POLYTROPE_CACHE") from None
    return target


def _seal(library: Path) -> None:
    """Append the checksum, and wait until all is on the disk: a name must not outlive what it stands for."""
    with open(library, "r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(_SEAL + digest.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _is_whole(library: Path) -> bool:
    """Whether the library is there as it was sealed."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    body, mark, digest = content.rpartition(_SEAL)
    return bool(mark) and hashlib.sha256(body).hexdigest().encode() + b"\n" == digest


def _digest(parts: Sequence[str]) -> str:
    """Of these words and all sources."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: Compiler, flags: Sequence[str], sources: Sequence[str], target: Path) -> None:
    """All sources at the same time, then the link."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source}.o" for source in sources]
        commands = [
            [
                *compiler,
                *flags,
                "-c",
                str(SOURCES / source),
                "-o",
                str(to),
            ]
            for source, to in zip(sources, objects, strict=True)
        ]
        library = Path(scratch) / target.name
        link = [*compiler, *flags, "-shared", *map(str, objects), "-o", str(library)]
        written: list[str] = []
        for stage in (commands, [link]):
            running = [_start(command) for command in stage]
            outputs = [process.communicate()[0] for process in running]
            log = target.with_suffix(".log")
            written.extend(outputs)
            log.write_text("\n".join(written), encoding="utf-8")
            if any(process.returncode for process in running):
                raise BuildError(f"{shlex.join(compiler)} failed, see {log}")
        _seal(library)
        os.replace(library, target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
