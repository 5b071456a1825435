"""Calls the CUDA kernels through ctypes, on the current stream; each kind only after it has agreed with the reference.

The first time that a family, degree, dtype and form is used on a device, `is_verified` runs it on a small input and
compares values and gradients with the float64 reference. What does not agree is never used: the reference runs instead,
after one line of warning.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from polytrope.ops import build, native, reference
from polytrope.ops.families import Family, Formula, parameter_count, result_shape
from polytrope.ops.packing import PLAIN, Packing

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The CUDA kernels, compiled now if they are not yet; None, after a line of warning, where that cannot be done."""
    if os.environ.get("POLYTROPE_KERNELS", "1") == "0" or not torch.cuda.is_available():
        return None
    print("polytrope: loading the CUDA kernels; compiling them the first time takes a minute", file=sys.stderr)
    try:
        return load(str(library_path()))
    except (build.BuildError, OSError) as error:
        warnings.warn(f"polytrope runs its slow reference activations on GPUs: {error}", RuntimeWarning, stacklevel=2)
        return None


def library_path() -> Path:
    """Of the kernels for this machine's GPUs, compiled if need be.

    Raises:
        BuildError: no compiler, or it failed.
    """
    devices = range(torch.cuda.device_count())
    return build.cuda_library_path_for({"{}{}".format(*torch.cuda.get_device_capability(index)) for index in devices})


def load(path: str) -> ctypes.CDLL:
    """A library of the interface in csrc/cuda.cu."""
    loaded = ctypes.CDLL(path)
    task = ctypes.POINTER(native.Task)
    loaded.polytrope_cuda_activation.argtypes = [task, *[ctypes.c_void_p] * 7]
    loaded.polytrope_cuda_workspace.argtypes = [task]
    loaded.polytrope_cuda_workspace.restype = ctypes.c_int64
    return loaded


class Kind(NamedTuple):
    """What a check of a kernel holds for."""

    device: int
    dtype: torch.dtype
    formula: Formula


def kind_of(index: int | None, dtype: torch.dtype, formula: Formula) -> Kind:
    """The kind of a call on the GPU of this index; None: the current one."""
    # Numbers that make a difference, whatever those of the caller are.
    formula = formula._replace(
        interval=(-0.9, 0.8) if formula.interval else (),
        dim=-1,
        epsilon=0.1 if formula.family == Family.POLYNORM else 0.0,
        variable=(0.1, 1.2) if formula.variable else (),
    )
    return Kind(torch.cuda.current_device() if index is None else index, dtype, formula)


def is_usable(index: int | None, dtype: torch.dtype, formula: Formula) -> bool:
    """Whether tensors of this dtype on this GPU go through a kernel; float64 never does."""
    return dtype in _TOLERANCES and library() is not None and is_verified(kind_of(index, dtype, formula))


def is_verified(kind: Kind) -> bool:
    """Whether the kernel agrees with the reference; found out at the first call."""
    known = _verified.get(kind)
    if known is None:
        if torch.cuda.is_current_stream_capturing():
            return False  # a check waits for the GPU, which a capture does not allow
        # A thread of its own: free of the caller's autocast, vmap, modes and streams.
        with ThreadPoolExecutor(1) as pool:
            known = _verified[kind] = pool.submit(_verify, *kind).result()
    return known


_verified: dict[Kind, bool] = {}


def _verify(device: int, dtype: torch.dtype, formula: Formula) -> bool:
    loaded = library()
    assert loaded is not None
    with torch.cuda.device(device):
        try:
            worst = largest_error(loaded, torch.device("cuda", device), dtype, formula)
        except RuntimeError as error:
            failure = str(error)
        else:
            if worst <= _TOLERANCES[dtype]:
                return True
            failure = f"it differs from the reference by {worst:.2g} of the largest value"
    kind = f"{Family(formula.family).name.lower()} {formula.degree}"
    name = torch.cuda.get_device_name(device)
    warnings.warn(
        f"polytrope: no CUDA kernel for {kind} in {dtype} on {name}, the reference runs: {failure}",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def largest_error(loaded: ctypes.CDLL, device: torch.device, dtype: torch.dtype, formula: Formula) -> float:
    """Largest difference between kernel and float64 reference in values and gradients, over the largest of each.

    One group of a length that vectors divide; two groups of a length that they do not, and of one that they do; groups
    of so few neighbours that a kernel goes down their columns, by vectors and one by one.
    """
    worst = 0.0
    for groups, shape in ((1, (3, 1024)), (2, (5, 74)), (2, (3, 80)), (2, (40, 8)), (3, (21, 9))):
        groups = 1 if formula.family == Family.POLYNORM else groups
        width, count = shape[1] * (2 if formula.gated else 1), parameter_count(formula)
        rows = torch.arange(groups, device=device, dtype=torch.float64)[:, None]
        parameters = 0.4 * torch.cos(1.7 * torch.arange(count, device=device, dtype=torch.float64) + rows) + 0.05
        parameters = possible(parameters, formula)
        place = torch.arange(shape[0] * width, device=device, dtype=torch.float64).view(shape[0], width)
        x = (1.05 * torch.sin(0.7318 * place)).to(dtype)
        leaves = (x.double().requires_grad_(), parameters.requires_grad_())
        exact = reference.evaluate(*leaves, formula)
        parts = [parameters.detach()]
        call = describe(loaded, x, parts, formula)
        found = forward(call, x, parts)
        seed = (
            torch.cos(0.31 * torch.arange(exact.numel(), device=device, dtype=torch.float64))
            .view(exact.shape)
            .to(dtype)
        )
        expected = (exact, *torch.autograd.grad(exact, leaves, seed.double()))
        x_gradient, part_gradients = backward(call, seed, x, parts)
        for ours, theirs in zip((found, x_gradient, *part_gradients), expected, strict=True):
            difference = (ours.double() - theirs.detach()).abs().max() / theirs.detach().abs().max().clamp(min=1e-30)
            worst = max(worst, float(difference) if bool(difference.isfinite()) else float("inf"))
    return worst


def possible(parameters: Tensor, formula: Formula) -> Tensor:
    """Packed parameters of the same size that the family can have: breakpoints rise, and so does a spline.

    Args:
        parameters: `[groups, parameter_count(formula)]`, any numbers of about 1.
    """
    if formula.family == Family.PIECEWISE_LINEAR:
        breaks = parameters[:, : formula.degree - 1].sort(dim=-1).values
        return torch.cat([breaks, parameters[:, formula.degree - 1 :]], dim=-1)
    if formula.family == Family.RATIONAL_SPLINE:
        steps = (parameters[:, :-1].square() + 0.3).unflatten(-1, (3, formula.degree + 1))
        places = steps[:, :2].cumsum(-1) * (2.0 / formula.degree) - 1.0
        return torch.cat([places.flatten(1), steps[:, 2], parameters[:, -1:]], dim=-1)
    return parameters


class Call(NamedTuple):
    """What is the same at every call with such tensors."""

    formula: Formula
    packing: Packing
    shape: torch.Size  # of the result
    layout: native.Layout
    task: native.Task
    workspace: int  # bytes that backward needs beside its tensors
    library: ctypes.CDLL
    kind: Kind


@functools.lru_cache(maxsize=1024)
def prepare(
    formula: Formula,
    packing: Packing,
    index: int,
    dtype: torch.dtype,
    shape: torch.Size,
    part_dtypes: tuple[torch.dtype, ...],
    part_shapes: tuple[torch.Size, ...],
    strides: native.Strides | None = None,
) -> Call | None:
    """A call on the GPU of this index, as `native.prepare`; None where there is no kernel for this dtype.

    Whether it `is_verified` is for the caller to ask.

    Raises:
        ValueError, TypeError: sizes or dtypes that do not belong together.
    """
    loaded = library() if dtype in _TOLERANCES else None
    if loaded is None:
        return None
    layout = native.find_layout(shape, strides, formula)
    task = native.make_task(formula, packing, dtype, shape, part_dtypes, part_shapes, layout.x)
    with torch.cuda.device(index):
        return _call(loaded, task, formula, packing, shape, layout, kind_of(index, dtype, formula))


def describe(
    loaded: ctypes.CDLL, x: Tensor, parts: Sequence[Tensor], formula: Formula, packing: Packing = PLAIN
) -> Call:
    """The call of a library for these tensors, whether or not it `is_verified`; as `native.prepare_for`.

    Raises:
        ValueError, TypeError: sizes or dtypes that do not belong together.
    """
    dtypes, shapes = tuple(part.dtype for part in parts), tuple(part.shape for part in parts)
    layout = native.find_layout(x.shape, native.strides_of(x), formula)
    task = native.make_task(formula, packing, x.dtype, x.shape, dtypes, shapes, layout.x)
    return _call(loaded, task, formula, packing, x.shape, layout, kind_of(x.get_device(), x.dtype, formula))


def _call(
    loaded: ctypes.CDLL,
    task: native.Task,
    formula: Formula,
    packing: Packing,
    shape: torch.Size,
    layout: native.Layout,
    kind: Kind,
) -> Call:
    size = loaded.polytrope_cuda_workspace(task)
    return Call(formula, packing, result_shape(shape, formula), layout, task, size, loaded, kind)


def forward(call: Call, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """F(x), as `native.forward` gives it; enqueued on the current stream.

    Args:
        call: prepared for tensors like these.
        x: any strides.
        parts: of the parameters, any strides.

    Raises:
        RuntimeError: no kernel for this family, or the launch failed.
    """
    strides, result_strides, returned = call.layout
    x = native.placed(x, strides)
    result = native.empty_for(x, call.shape, call.formula, result_strides)
    if result.numel() > 0:
        _run(call, None, _aligned(x), [part.contiguous() for part in parts], result, None, None)
    return result if returned is None else native.placed(result, returned)


def backward(
    call: Call, gradient: Tensor, x: Tensor, parts: Sequence[Tensor], *, frozen: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x and of the parts, as `native.backward` gives them; enqueued on the current stream.

    Args:
        call: prepared for tensors like these.
        gradient: of F(x), in its shape and dtype; any strides, as those of x and the parts.
        frozen: nobody wants the gradients of the parts, which are then not added up: an empty list.

    Raises:
        RuntimeError: no kernel for this family, or the launch failed.
    """
    strides, result_strides, returned = call.layout
    gradient, x = native.placed(gradient, result_strides), native.placed(x, strides)
    parts = [part.contiguous() for part in parts]
    x_gradient = torch.empty_like(x)
    if gradient.numel() == 0:
        part_gradients = [] if frozen else [torch.zeros_like(part) for part in parts]
    else:
        part_gradients = [] if frozen else [torch.empty_like(part) for part in parts]
        workspace = None if frozen else torch.empty(call.workspace, dtype=torch.uint8, device=x.device)
        _run(call, _aligned(gradient), _aligned(x), parts, x_gradient, workspace, None if frozen else part_gradients)
    return x_gradient if returned is None else native.placed(x_gradient, returned), part_gradients


def _run(
    call: Call,
    gradient: Tensor | None,
    x: Tensor,
    parts: Sequence[Tensor],
    result: Tensor,
    workspace: Tensor | None,
    part_gradients: Sequence[Tensor] | None,
) -> None:
    arguments = (
        call.task,
        None if gradient is None else gradient.data_ptr(),
        x.data_ptr(),
        native.addresses(parts),
        result.data_ptr(),
        None if workspace is None else workspace.data_ptr(),
        None if part_gradients is None else native.addresses(part_gradients),
    )
    if not x.is_cuda:  # the tests run the sources on a CPU
        _check(call.library.polytrope_cuda_activation(*arguments, None))
        return
    index = x.get_device()
    stream = torch._C._cuda_getCurrentRawStream(index)
    if index == torch.cuda.current_device():
        _check(call.library.polytrope_cuda_activation(*arguments, stream))
        return
    with torch.cuda.device(index):
        _check(call.library.polytrope_cuda_activation(*arguments, stream))


def _aligned(x: Tensor) -> Tensor:
    """A dense x as a kernel takes it: beginning at a multiple of 16 bytes."""
    return x.clone() if x.data_ptr() % 16 else x


def _check(status: int) -> None:
    if status:
        reasons = {1: "there is none for this family and dtype", 3: "the launch failed"}
        raise RuntimeError(f"CUDA kernel: {reasons.get(status, status)}")
