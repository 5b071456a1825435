"""Calls the compiled kernels through ctypes: shapes and pointers in, tensors out."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from polytrope.ops.families import Family, Formula, result_shape
from polytrope.ops.packing import Packing

DATA_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
MOST_PARTS, MOST_FACTORS = 4, 64
_FAILURES = {1: "no kernel for this family and degree", 2: "out of memory"}


class Problem(ctypes.Structure):
    """`Problem` of csrc/problem.h."""

    _fields_ = (
        ("family", ctypes.c_int32),
        ("degree", ctypes.c_int32),
        ("second_degree", ctypes.c_int32),
        ("data_type", ctypes.c_int32),
        ("tails", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("outer", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("low", ctypes.c_double),
        ("high", ctypes.c_double),
        ("epsilon", ctypes.c_double),
    )


class Parts(ctypes.Structure):
    """`Parts` of csrc/problem.h."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("types", ctypes.c_int32 * MOST_PARTS),
        ("sizes", ctypes.c_int64 * MOST_PARTS),
        ("scaled", ctypes.c_int32),
        ("factors", ctypes.c_double * MOST_FACTORS),
    )


class Task(ctypes.Structure):
    """`Task` of csrc/problem.h."""

    _fields_ = (("problem", Problem), ("parts", Parts))


class _Call(ctypes.Structure):
    """`Call` of csrc/cpu_call.h."""

    _fields_ = (
        ("task", Task),
        ("cache_size", ctypes.c_int64),
        ("parallel_region", ctypes.c_void_p),
    )


_Addresses = ctypes.c_void_p * MOST_PARTS


def make_problem(dtype: torch.dtype, shape: torch.Size, groups: int, formula: Formula) -> Problem:
    """The problem of a contiguous x; sizes as csrc/problem.h says."""
    outer, inner = 1, shape.numel()
    if groups > 1:
        outer, inner = math.prod(shape[: formula.dim]), math.prod(shape[formula.dim :]) // groups
    elif formula.gated or formula.family == Family.POLYNORM:
        outer, inner = math.prod(shape[:-1]), shape[-1]
    return Problem(
        formula.family,
        formula.degree,
        formula.second_degree,
        DATA_TYPES[dtype],
        bool(formula.interval),
        formula.gated,
        outer,
        groups,
        inner // 2 if formula.gated else inner,
        *(formula.interval or (0.0, 0.0)),
        formula.epsilon,
    )


def make_task(
    formula: Formula,
    packing: Packing,
    dtype: torch.dtype,
    shape: torch.Size,
    part_dtypes: Sequence[torch.dtype],
    part_shapes: Sequence[torch.Size],
) -> Task:
    """What a kernel computes for a contiguous x of this dtype and shape and parts like these; see `prepare`."""
    groups = packing.groups(part_shapes)
    parts = Parts(
        len(part_shapes),
        (ctypes.c_int32 * MOST_PARTS)(*(DATA_TYPES[part] for part in part_dtypes)),
        (ctypes.c_int64 * MOST_PARTS)(*(part.numel() // groups for part in part_shapes)),
        bool(packing.factors),
        (ctypes.c_double * MOST_FACTORS)(*packing.factors),
    )
    return Task(make_problem(dtype, shape, groups, formula), parts)


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """The CPU kernels, compiled now if they are not yet; None with a one-line warning where that cannot be done."""
    from polytrope.ops import build

    if os.environ.get("POLYTROPE_KERNELS", "1") == "0":
        return None
    try:
        library = ctypes.CDLL(str(build.cpu_library_path()))
    except (build.BuildError, OSError) as error:
        warnings.warn(f"polytrope runs its slow reference activations: {error}", RuntimeWarning, stacklevel=2)
        return None
    call, pointer = ctypes.POINTER(_Call), ctypes.c_void_p
    for kind in ("float32", "float64", "polynorm"):
        getattr(library, f"polytrope_forward_{kind}").argtypes = [call, *[pointer] * 3, ctypes.c_int]
        getattr(library, f"polytrope_backward_{kind}").argtypes = [call, *[pointer] * 5, ctypes.c_int]
    return library


@functools.cache
def last_level_cache() -> int:
    """Bytes of this machine's largest cache; 32 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    try:
        return max((int(size.read_text().strip().removesuffix("K")) * 1024 for size in sizes), default=32 * 2**20)
    except (OSError, ValueError):
        return 32 * 2**20


@functools.cache
def _parallel_region() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime of torch, so that both share one pool of threads."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


class Call(NamedTuple):
    """What is the same at every call with such tensors."""

    formula: Formula
    packing: Packing
    shape: torch.Size  # of the result
    structure: ctypes.Structure
    forward: Callable[..., int]
    backward: Callable[..., int]


@functools.lru_cache(maxsize=1024)
def prepare(
    formula: Formula,
    packing: Packing,
    dtype: torch.dtype,
    shape: torch.Size,
    part_dtypes: tuple[torch.dtype, ...],
    part_shapes: tuple[torch.Size, ...],
) -> Call:
    """A call for an x and parts of these dtypes and shapes, which fit the formula.

    Args:
        dtype: of x; one of `DATA_TYPES`, as are those of the parts.
        shape: of x.
        part_dtypes: at most `MOST_PARTS`.
        part_shapes: as `packing` says.

    Raises:
        RuntimeError: there are no compiled kernels.
    """
    library = cpu_library()
    if library is None:
        raise RuntimeError("polytrope has no compiled kernels here; polytrope.ops.functional does without")
    task = make_task(formula, packing, dtype, shape, part_dtypes, part_shapes)
    structure = _Call(task, last_level_cache(), _parallel_region())
    width = "float64" if dtype == torch.float64 else "float32"
    kind = "polynorm" if formula.family == Family.POLYNORM else width
    functions = (getattr(library, f"polytrope_{direction}_{kind}") for direction in ("forward", "backward"))
    return Call(formula, packing, result_shape(shape, formula), structure, *functions)


def prepare_for(x: Tensor, parts: Sequence[Tensor], packing: Packing, formula: Formula) -> Call:
    """The call for these tensors."""
    dtypes, shapes = tuple(part.dtype for part in parts), tuple(part.shape for part in parts)
    return prepare(formula, packing, x.dtype, x.shape, dtypes, shapes)


def forward(call: Call, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """F(x), contiguous, of the shape `call.shape` and of x's dtype.

    Args:
        call: prepared for tensors like these.
        x: on the CPU, any strides.
        parts: of the parameters, any strides.

    Raises:
        RuntimeError: out of memory, or no kernel for this family and degree.
    """
    x, parts = x.contiguous(), [part.contiguous() for part in parts]
    result = x.new_empty(call.shape)
    if result.numel() > 0:
        status = call.forward(
            call.structure, x.data_ptr(), addresses(parts), result.data_ptr(), torch.get_num_threads()
        )
        _check(status, call)
    return result


def backward(call: Call, gradient: Tensor, x: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x and of the parts, in the shapes and dtypes of these; contiguous.

    Args:
        call: prepared for tensors like these.
        gradient: of F(x), in its shape and dtype; any strides, as those of x and the parts.

    Raises:
        RuntimeError: out of memory, or no kernel for this family and degree.
    """
    gradient, x, parts = gradient.contiguous(), x.contiguous(), [part.contiguous() for part in parts]
    x_gradient = torch.empty_like(x)
    if gradient.numel() == 0:
        return x_gradient, [torch.zeros_like(part) for part in parts]
    part_gradients = [torch.empty_like(part) for part in parts]
    status = call.backward(
        call.structure,
        gradient.data_ptr(),
        x.data_ptr(),
        addresses(parts),
        x_gradient.data_ptr(),
        addresses(part_gradients),
        torch.get_num_threads(),
    )
    _check(status, call)
    return x_gradient, part_gradients


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Of each tensor's first element, as a C array."""
    return _Addresses(*[tensor.data_ptr() for tensor in tensors])


def _check(status: int, call: Call) -> None:
    if status:
        raise RuntimeError(f"polytrope kernel of {call.formula}: {_FAILURES.get(status, status)}")
