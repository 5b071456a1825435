"""Calls the compiled kernels through ctypes: shapes and pointers in, tensors out."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from polytrope.ops.families import (
    MAX_DEGREE,
    WITH_VARIABLE,
    Family,
    Formula,
    largest_degree,
    parameter_count,
    result_shape,
)
from polytrope.ops.packing import Packing

DATA_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
MOST_PARTS, MOST_FACTORS = 4, 64


class NoKernelError(RuntimeError):
    """The operator has been called where its kernel is missing: no compiler, or kernels are turned off."""


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
        ("shift", ctypes.c_double),
        ("inverse_scale", ctypes.c_double),
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


_ADDRESSES = [struct.Struct(f"{count}P").pack for count in range(MOST_PARTS + 1)]


Strides = tuple[int, ...]
WITHOUT_INTERVAL = (
    Family.TROPICAL,
    Family.TROPICAL_RATIONAL,
    Family.PIECEWISE_LINEAR,
    Family.POLYNORM,
    Family.RATIONAL_SPLINE,
)


def check(formula: Formula, dtype: torch.dtype, shape: torch.Size, widths: Sequence[int], groups: int) -> None:
    """That a kernel with this formula stays inside its tables, an x of this shape and parts of these widths.

    Raises:
        ValueError: it would not.
        TypeError: a dtype that no kernel reads.
    """
    if dtype not in DATA_TYPES:
        raise TypeError(f"activations take float tensors (bfloat16, float16, float32, float64), got {dtype}")
    if formula.family not in list(Family):
        raise ValueError(f"family: expected 0 to {max(Family)}, got {formula.family}")
    family, dims = Family(formula.family), len(shape)
    largest = largest_degree(family.name.lower())
    if not 1 <= formula.degree <= largest:
        raise ValueError(f"coefficients: expected a degree from 1 to {largest}, got {formula.degree}")
    low, high = (1, MAX_DEGREE) if family == Family.RATIONAL else (0, 0)
    if not low <= formula.second_degree <= high:
        raise ValueError(f"denominator: expected a degree from {low} to {high}, got {formula.second_degree}")
    if formula.interval:
        ends = formula.interval
        if family in WITHOUT_INTERVAL or len(ends) != 2 or not -math.inf < ends[0] < ends[1] < math.inf:
            raise ValueError(f"interval: expected none, or finite lo < hi of a family that has one, got {list(ends)}")
    if formula.variable:
        numbers = formula.variable
        if family not in WITH_VARIABLE or len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
            raise ValueError(
                f"variable: expected none, or finite shift and scale > 0 of a polynomial, got {list(numbers)}"
            )
    if family == Family.POLYNORM and (dims == 0 or groups != 1 or formula.gated):
        raise ValueError("x: polynorm takes at least one dimension, one group of coefficients and no gate")
    if formula.gated and (dims == 0 or shape[-1] % 2 or formula.dim != -1):
        raise ValueError(f"x: with glu the last dimension holds two halves, got shape {list(shape)}, dim {formula.dim}")
    if groups > 1:
        if not -dims <= formula.dim < 0:
            raise ValueError(f"dim: expected {-dims} to -1 for x of shape {list(shape)}, got {formula.dim}")
        channels = shape[formula.dim] // (2 if formula.gated else 1)
        if channels % groups:
            raise ValueError(
                f"coefficients: {groups} groups do not divide the {channels} channels of dimension {formula.dim}"
            )
    if groups < 1 or sum(widths) != parameter_count(formula):
        raise ValueError(
            f"coefficients: expected {parameter_count(formula)} in each of at least one group, "
            f"got {sum(widths)} in each of {groups}"
        )


class Layout(NamedTuple):
    """How a call's tensors lie in memory, without a gap: None stands for contiguous."""

    x: Strides | None = None
    result: Strides | None = None
    returned: Strides | None = None  # PolyNorm where rows lie scattered: x and the like come and go with these strides


def find_layout(shape: torch.Size, strides: Strides | None, formula: Formula) -> Layout:
    """Of an x with these strides: as it lies where that is dense, else dense in the same order of dimensions."""
    if strides is None:
        return Layout()
    x = torch.empty_like(torch.empty_strided(shape, strides, device="meta"))
    if formula.family == Family.POLYNORM and shape[-1] > 1 and x.stride(-1) != 1:
        return Layout(returned=x.stride())
    return Layout(x.stride(), empty_result(x, formula).stride())


def strides_of(x: Tensor) -> Strides | None:
    """What `find_layout` and `prepare` take: None for a contiguous tensor."""
    return None if x.is_contiguous() else x.stride()


def empty_result(x: Tensor, formula: Formula) -> Tensor:
    """For F(x): dense, with its dimensions in the order of x's."""
    return torch.empty_like(x[..., : x.shape[-1] // 2] if formula.gated else x)


def empty_for(x: Tensor, shape: torch.Size, formula: Formula, strides: Strides | None) -> Tensor:
    """For F(x) of this shape and these strides (None: contiguous), x being placed as its layout says."""
    if strides is not None:
        return _empty(x, shape, strides)
    return x.new_empty(shape) if formula.gated else torch.empty_like(x)


def placed(x: Tensor, strides: Strides | None) -> Tensor:
    """The same numbers with these strides; x itself where it has them."""
    if strides is None:
        return x.contiguous()
    return x if x.stride() == strides else _empty(x, x.shape, strides).copy_(x)


def _empty(like: Tensor, shape: torch.Size, strides: Strides) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)


def make_problem(
    dtype: torch.dtype, shape: torch.Size, groups: int, formula: Formula, strides: Strides | None = None
) -> Problem:
    """The problem of a dense x with these strides; sizes as csrc/problem.h says, in the order of memory."""
    order = list(range(len(shape)))
    if strides is not None:
        order.sort(key=lambda dim: strides[dim], reverse=True)
    outer, inner = 1, shape.numel()
    if formula.family == Family.POLYNORM:
        # Rows lie side by side, or are single numbers, wherever their strides put them.
        outer, inner = math.prod(shape[:-1]), shape[-1]
    elif groups > 1 or formula.gated:
        at = order.index(len(shape) + (formula.dim if groups > 1 else -1))
        sizes = [shape[dim] for dim in order]
        outer, inner = math.prod(sizes[:at]), math.prod(sizes[at:]) // groups
    shift, scale = formula.variable or (0.0, 1.0)
    return Problem(
        formula.family,
        formula.degree,
        formula.second_degree,
        DATA_TYPES[dtype],
        bool(formula.interval or formula.variable),
        formula.gated,
        outer,
        groups,
        inner // 2 if formula.gated else inner,
        *(formula.interval or (-math.inf, math.inf)),
        shift,
        1.0 / scale,
        formula.epsilon,
    )


def make_task(
    formula: Formula,
    packing: Packing,
    dtype: torch.dtype,
    shape: torch.Size,
    part_dtypes: Sequence[torch.dtype],
    part_shapes: Sequence[torch.Size],
    strides: Strides | None = None,
) -> Task:
    """What a kernel computes for a dense x of this dtype, shape and strides and parts like these; see `prepare`.

    Raises:
        ValueError, TypeError: sizes or dtypes that do not belong together.
    """
    groups = packing.groups(part_shapes)
    widths = [part.numel() // groups for part in part_shapes]
    check(formula, dtype, shape, widths, groups)
    if any(part not in DATA_TYPES for part in part_dtypes):
        raise TypeError(f"coefficients: expected float tensors, got {', '.join(str(part) for part in part_dtypes)}")
    parts = Parts(
        len(part_shapes),
        (ctypes.c_int32 * MOST_PARTS)(*(DATA_TYPES[part] for part in part_dtypes)),
        (ctypes.c_int64 * MOST_PARTS)(*widths),
        bool(packing.factors),
        (ctypes.c_double * MOST_FACTORS)(*packing.factors),
    )
    return Task(make_problem(dtype, shape, groups, formula, strides), parts)


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
        return max((int(size.read_text(encoding="ascii").rstrip("K\n")) * 1024 for size in sizes), default=32 * 2**20)
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
    layout: Layout
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
    strides: Strides | None = None,
) -> Call:
    """A call for an x and parts of these dtypes and shapes.

    Args:
        dtype: of x; one of `DATA_TYPES`, as are those of the parts.
        shape: of x.
        part_dtypes: at most `MOST_PARTS`.
        part_shapes: as `packing` says.
        strides: of x, where it is not contiguous (`strides_of`).

    Raises:
        NoKernelError: there are no compiled kernels.
        ValueError, TypeError: sizes or dtypes that do not belong together.
    """
    layout = find_layout(shape, strides, formula)
    task = make_task(formula, packing, dtype, shape, part_dtypes, part_shapes, layout.x)
    library = cpu_library()
    if library is None:
        raise NoKernelError("polytrope has no compiled kernels here; polytrope.ops.functional does without")
    structure = _Call(task, last_level_cache(), _parallel_region())
    width = "float64" if dtype == torch.float64 else "float32"
    kind = "polynorm" if formula.family == Family.POLYNORM else width
    functions = (getattr(library, f"polytrope_{direction}_{kind}") for direction in ("forward", "backward"))
    return Call(formula, packing, result_shape(shape, formula), layout, structure, *functions)


def prepare_for(x: Tensor, parts: Sequence[Tensor], packing: Packing, formula: Formula) -> Call:
    """The call for these tensors."""
    dtypes, shapes = tuple(part.dtype for part in parts), tuple(part.shape for part in parts)
    return prepare(formula, packing, x.dtype, x.shape, dtypes, shapes, strides_of(x))


def forward(call: Call, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """F(x), of the shape `call.shape`, of x's dtype and dense, its dimensions in memory in the order of x's.

    Args:
        call: prepared for tensors like these.
        x: on the CPU, any strides.
        parts: of the parameters, any strides.

    Raises:
        RuntimeError: out of memory, or no kernel for this family and degree.
    """
    strides, result_strides, returned = call.layout
    x = x.contiguous() if strides is None else placed(x, strides)
    parts = [part.contiguous() for part in parts]
    whole = result_strides is None and not call.formula.gated
    result = torch.empty_like(x) if whole else empty_for(x, call.shape, call.formula, result_strides)
    if result.numel() > 0:
        status = call.forward(
            call.structure, x.data_ptr(), addresses(parts), result.data_ptr(), torch.get_num_threads()
        )
        _check(status, call)
    return result if returned is None else placed(result, returned)


def backward(
    call: Call, gradient: Tensor, x: Tensor, parts: Sequence[Tensor], *, frozen: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x and of the parts, in the shapes and dtypes of these; dense, that of x as `forward`'s result.

    Args:
        call: prepared for tensors like these.
        gradient: of F(x), in its shape and dtype; any strides, as those of x and the parts.
        frozen: nobody wants the gradients of the parts, which are then not computed: an empty list.

    Raises:
        RuntimeError: out of memory, or no kernel for this family and degree.
    """
    strides, result_strides, returned = call.layout
    gradient = gradient.contiguous() if result_strides is None else placed(gradient, result_strides)
    x = x.contiguous() if strides is None else placed(x, strides)
    parts = [part.contiguous() for part in parts]
    x_gradient = torch.empty_like(x)
    if gradient.numel() == 0:
        part_gradients = [] if frozen else [torch.zeros_like(part) for part in parts]
    else:
        part_gradients = [] if frozen else [torch.empty_like(part) for part in parts]
        status = call.backward(
            call.structure,
            gradient.data_ptr(),
            x.data_ptr(),
            addresses(parts),
            x_gradient.data_ptr(),
            None if frozen else addresses(part_gradients),
            torch.get_num_threads(),
        )
        _check(status, call)
    return x_gradient if returned is None else placed(x_gradient, returned), part_gradients


def addresses(tensors: Sequence[Tensor]) -> bytes:
    """Of each tensor's first element, as a C array."""
    return _ADDRESSES[len(tensors)](*map(Tensor.data_ptr, tensors))


def _check(status: int, call: Call) -> None:
    if status:
        raise RuntimeError(f"polytrope kernel of {call.formula}: {_FAILURES.get(status, status)}")
