"""Calls the compiled kernels through ctypes: shapes and pointers in, tensors out."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytrope.ops.families import Formula

DATA_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
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
    )


def make_problem(x: Tensor, groups: int, formula: Formula) -> Problem:
    """The problem of a contiguous x; sizes as csrc/problem.h says."""
    elements = x.numel() // (2 if formula.gated else 1)
    if groups > 1:
        inner = math.prod(x.shape[formula.dim :]) // (2 if formula.gated else 1) // groups
        outer = math.prod(x.shape[: formula.dim])
    elif formula.gated:
        outer, inner = math.prod(x.shape[:-1]), x.shape[-1] // 2
    else:
        outer, inner = 1, elements
    low, high = formula.interval or (0.0, 0.0)
    return Problem(
        formula.family,
        formula.degree,
        formula.second_degree,
        DATA_TYPES[x.dtype],
        bool(formula.interval),
        formula.gated,
        outer,
        groups,
        inner,
        low,
        high,
    )


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
    pointer = ctypes.c_void_p
    problem = ctypes.POINTER(Problem)
    for width in (32, 64):
        getattr(library, f"polytrope_forward_float{width}").argtypes = [problem, *[pointer] * 3, ctypes.c_int, pointer]
        getattr(library, f"polytrope_backward_float{width}").argtypes = [problem, *[pointer] * 5, ctypes.c_int, pointer]
    rows = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_double)
    library.polytrope_polynorm_forward.argtypes = [*rows, *[pointer] * 3, ctypes.c_int, pointer]
    library.polytrope_polynorm_backward.argtypes = [*rows, *[pointer] * 5, ctypes.c_int, pointer]
    return library


@functools.cache
def _parallel_region() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime of torch, so that both share one pool of threads."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def forward(x: Tensor, parameters: Tensor, formula: Formula) -> Tensor:
    """F(x), contiguous."""
    x, parameters = x.contiguous(), parameters.double().contiguous()
    shape = (*x.shape[:-1], x.shape[-1] // 2) if formula.gated else x.shape
    result = torch.empty(shape, dtype=x.dtype)
    if result.numel() > 0:
        problem = make_problem(x, len(parameters), formula)
        _call(f"polytrope_forward_float{_width(x)}", problem, x, parameters, result)
    return result


def backward(gradient: Tensor, x: Tensor, parameters: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the packed parameters, in the dtypes of these; contiguous."""
    gradient, x, wide = gradient.contiguous(), x.contiguous(), parameters.double().contiguous()
    x_gradient = torch.empty(x.shape, dtype=x.dtype)
    parameter_gradient = torch.empty(parameters.shape, dtype=torch.float64)
    if gradient.numel() == 0:
        parameter_gradient.zero_()
    else:
        problem = make_problem(x, len(parameters), formula)
        name = f"polytrope_backward_float{_width(x)}"
        _call(name, problem, gradient, x, wide, x_gradient, parameter_gradient)
    return x_gradient, parameter_gradient.to(parameters.dtype)


def polynorm_forward(x: Tensor, parameters: Tensor, epsilon: float) -> Tensor:
    """b + sum_k a_k x^k / rms(x^k) over the last dimension; `parameters`: b, a_1 … a_n, float64."""
    x, parameters = x.contiguous(), parameters.double().contiguous()
    result = torch.empty(x.shape, dtype=x.dtype)
    if x.numel() > 0:
        _call("polytrope_polynorm_forward", *_matrix(x, parameters, epsilon), x, parameters, result)
    return result


def polynorm_backward(gradient: Tensor, x: Tensor, parameters: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the parameters, in the dtypes of these."""
    gradient, x, wide = gradient.contiguous(), x.contiguous(), parameters.double().contiguous()
    x_gradient = torch.empty(x.shape, dtype=x.dtype)
    parameter_gradient = torch.zeros(parameters.shape, dtype=torch.float64)
    if x.numel() > 0:
        sizes = _matrix(x, parameters, epsilon)
        _call("polytrope_polynorm_backward", *sizes, gradient, x, wide, x_gradient, parameter_gradient)
    return x_gradient, parameter_gradient.to(parameters.dtype)


def _matrix(x: Tensor, parameters: Tensor, epsilon: float) -> tuple[int | float, ...]:
    columns = x.shape[-1]
    return DATA_TYPES[x.dtype], x.numel() // columns, columns, len(parameters) - 1, epsilon


def _width(x: Tensor) -> int:
    return 64 if x.dtype == torch.float64 else 32


def _call(name: str, *arguments: Any) -> None:
    library = cpu_library()
    assert library is not None
    numbers = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    status = getattr(library, name)(*numbers, torch.get_num_threads(), _parallel_region())
    if status:
        raise RuntimeError(f"polytrope kernel {name}: {_FAILURES.get(status, status)}")
