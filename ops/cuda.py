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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from polytrope.ops import build, native, reference
from polytrope.ops.families import Family, Formula, parameter_count, result_shape

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
    pointer = ctypes.c_void_p
    problem = ctypes.POINTER(native.Problem)
    loaded.polytrope_cuda_activation.argtypes = [problem, *[pointer] * 7]
    loaded.polytrope_cuda_workspace.argtypes = [problem, ctypes.c_int]
    loaded.polytrope_cuda_workspace.restype = ctypes.c_int64
    return loaded


def is_usable(index: int | None, dtype: torch.dtype, formula: Formula) -> bool:
    """Whether tensors of this dtype on this GPU go through a kernel; float64 never does."""
    if dtype not in _TOLERANCES or library() is None:
        return False
    device = torch.cuda.current_device() if index is None else index
    # Numbers that make a difference, whatever those of the caller are.
    interval, epsilon = (-0.9, 0.8) if formula.interval else (), 0.1 if formula.family == Family.POLYNORM else 0.0
    formula = formula._replace(interval=interval, dim=-1, epsilon=epsilon)
    if (device, dtype, formula) not in _verified and torch.cuda.is_current_stream_capturing():
        return False  # a check waits for the GPU, which a capture does not allow
    if (device, dtype, formula) not in _verified:
        # A thread of its own: free of the caller's autocast, vmap, modes and streams.
        with ThreadPoolExecutor(1) as pool:
            _verified[device, dtype, formula] = pool.submit(_verify, device, dtype, formula).result()
    return _verified[device, dtype, formula]


_verified: dict[tuple[int, torch.dtype, Formula], bool] = {}


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

    One group of a length that vectors divide, and two groups of a length that they do not.
    """
    worst = 0.0
    for groups, shape in ((1, (3, 1024)), (2, (5, 74))):
        groups = 1 if formula.family == Family.POLYNORM else groups
        width, count = shape[1] * (2 if formula.gated else 1), parameter_count(formula)
        rows = torch.arange(groups, device=device, dtype=torch.float64)[:, None]
        parameters = 0.4 * torch.cos(1.7 * torch.arange(count, device=device, dtype=torch.float64) + rows) + 0.05
        if formula.family == Family.PIECEWISE_LINEAR:
            parameters[:, : formula.degree - 1] = parameters[:, : formula.degree - 1].sort(dim=-1).values
        place = torch.arange(shape[0] * width, device=device, dtype=torch.float64).view(shape[0], width)
        x = (1.05 * torch.sin(0.7318 * place)).to(dtype)
        leaves = (x.double().requires_grad_(), parameters.requires_grad_())
        exact = reference.evaluate(*leaves, formula)
        found = forward(loaded, 0, x, parameters.detach(), formula)
        seed = (
            torch.cos(0.31 * torch.arange(exact.numel(), device=device, dtype=torch.float64))
            .view(exact.shape)
            .to(dtype)
        )
        expected = (exact, *torch.autograd.grad(exact, leaves, seed.double()))
        gradients = backward(loaded, 0, seed, x, parameters.detach(), formula)
        for ours, theirs in zip((found, *gradients), expected, strict=True):
            difference = (ours.double() - theirs.detach()).abs().max() / theirs.detach().abs().max().clamp(min=1e-30)
            worst = max(worst, float(difference) if bool(difference.isfinite()) else float("inf"))
    return worst


def current_stream(x: Tensor) -> int:
    """The stream that torch uses on x's device now, as a number."""
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def forward(loaded: ctypes.CDLL, stream: int, x: Tensor, parameters: Tensor, formula: Formula) -> Tensor:
    """F(x), contiguous; enqueued on the stream."""
    x = _aligned(x)
    result = x.new_empty(result_shape(x.shape, formula))
    if result.numel() > 0:
        _activation(loaded, stream, None, x, parameters, formula, result, None)
    return result


def backward(
    loaded: ctypes.CDLL, stream: int, gradient: Tensor, x: Tensor, parameters: Tensor, formula: Formula
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the packed parameters, in the dtypes of these; enqueued on the stream."""
    gradient, x = _aligned(gradient), _aligned(x)
    x_gradient = torch.empty_like(x)
    parameter_gradient = torch.zeros_like(parameters, dtype=torch.float64, memory_format=torch.contiguous_format)
    if gradient.numel() > 0:
        _activation(loaded, stream, gradient, x, parameters, formula, x_gradient, parameter_gradient)
    return x_gradient, parameter_gradient.to(parameters.dtype)


def _activation(
    loaded: ctypes.CDLL,
    stream: int,
    gradient: Tensor | None,
    x: Tensor,
    parameters: Tensor,
    formula: Formula,
    result: Tensor,
    parameter_gradient: Tensor | None,
) -> None:
    problem = native.make_problem(x.dtype, x.shape, len(parameters), formula)
    wide = parameters.double().contiguous()
    size = loaded.polytrope_cuda_workspace(problem, gradient is not None)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    tensors = (gradient, x, wide, result, workspace, parameter_gradient)
    _check(loaded.polytrope_cuda_activation(problem, *map(_address, tensors), stream))


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, beginning at a multiple of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(status: int) -> None:
    if status:
        reasons = {1: "there is none for this family and dtype", 3: "the launch failed"}
        raise RuntimeError(f"CUDA kernel: {reasons.get(status, status)}")
