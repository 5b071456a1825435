"""The torch operator `polytrope::activation` with its shapes, autograd, vmap, and what a compiler makes of it.

Only x (and the few parameters) is saved for backward. Kernels give values and first derivatives; what differentiates
these again, forward mode and transforms of torch.func go through `reference.evaluate`, plain torch, which has
derivatives of every order and kind. Under torch.compile and AOTInductor, families that `lowering` has become plain
arithmetic; the operator is there until autograd has seen it, so that the backward pass is that arithmetic too.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad

from polytrope.ops import cuda, lowering, native, reference
from polytrope.ops.families import Formula
from polytrope.ops.packing import PLAIN, Packing

# The last two have defaults: programs exported before they came do not name them. `arithmetic` is the version of what
# torch.compile may make of the operator: its caches, which know the operator only, are asked for that one. Empty:
# nothing.
_TAIL = (
    "int family, int degree, int second_degree, float[] interval, int dim, bool gated, float epsilon, "
    'float[] variable=[], str arithmetic=""'
)
_LIBRARY = torch.library.Library("polytrope", "DEF")
_LIBRARY.define(f"activation(Tensor x, Tensor parameters, {_TAIL}) -> Tensor")
_LIBRARY.define(f"activation_backward(Tensor gradient, Tensor x, Tensor parameters, {_TAIL}) -> (Tensor, Tensor)")
# The first of these two, where nobody learns the parameters.
_LIBRARY.define(f"activation_slope(Tensor gradient, Tensor x, Tensor parameters, {_TAIL}) -> Tensor")


def has_kernel(device_type: str, index: int | None, dtype: torch.dtype, formula: Formula | None = None) -> bool:
    """Whether such a tensor goes through a compiled kernel. On a GPU that depends on the formula as well."""
    if device_type == "cpu":
        return native.cpu_library() is not None
    if device_type == "cuda":
        assert formula is not None
        return cuda.is_usable(index, dtype, formula)
    return device_type == "meta"


# What `torch.compiler.assume_constant_result` does, without importing the compiler (2 s for each process).
has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_transformed() -> bool:
    """Whether forward mode or a transform of torch.func but vmap is active: they take plain torch, no operator."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack)


# The compiler enters transforms as it traces, and compiles again where others are active.
_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _goes_through_kernel(x: Tensor, formula: Formula) -> bool:
    return not _is_transformed() and has_kernel(x.device.type, x.device.index, x.dtype, formula)


def _keys_of_plain_tensors(device: str) -> set[int]:
    """Dispatch keys of a dense tensor that is no view by negation or conjugation, and that no transform wraps."""
    with torch._C._DisableTorchDispatch():
        made = []
        for inference in (False, True):
            with torch.inference_mode(inference):
                made.append(torch.empty(0, device=device))
    return {torch._C._dispatch_keys(tensor).raw_repr() for tensor in made}


@functools.cache
def _keys_of_plain_gpu_tensors() -> set[int]:
    return _keys_of_plain_tensors("cuda")


# Looked up here, once: what is_plain and call_directly do is done in every call of an activation.
_PLAIN_TYPES, _PLAIN_KEYS = (Tensor, torch.nn.Parameter), _keys_of_plain_tensors("cpu")
_dispatch_keys = torch._C._dispatch_keys
_is_compiling = torch.compiler.is_compiling
_transforms_are_active = torch._C._are_functorch_transforms_active
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_get_tracing_state = torch._C._get_tracing_state


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing but autograd looks at operators on these tensors: no compiler, tracer, transform or mode.

    They are all on the CPU, or all on one GPU.
    """
    if _is_compiling() or _transforms_are_active() or forward_ad._current_level >= 0:
        return False
    if _count_dispatch_modes() or _get_tracing_state() is not None:
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TYPES:
            return False
    for tensor in tensors:
        if _dispatch_keys(tensor).raw_repr() not in _PLAIN_KEYS:
            return tensors[0].is_cuda and _are_plain_on_one_gpu(tensors)
    return True


def can_assert() -> bool:
    """Whether an operator that checks numbers is taken where `is_plain` is false: vmap and tracers to a file do not."""
    if _get_tracing_state() is not None:
        return False
    stack = torch._C._functorch.get_interpreter_stack() if _transforms_are_active() else None
    return all(level.key() != torch._C._functorch.TransformType.Vmap for level in stack or [])


can_assert._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _are_plain_on_one_gpu(tensors: Sequence[Tensor]) -> bool:
    keys, index = _keys_of_plain_gpu_tensors(), tensors[0].get_device()
    return all(tensor.get_device() == index and _dispatch_keys(tensor).raw_repr() in keys for tensor in tensors)


@functools.cache
def _constant(packing: Packing, device: torch.device) -> Tensor | None:
    with torch.inference_mode(False):
        return packing.constant(device)


class _Direct(torch.autograd.Function):
    """The operator `activation` and the packing of its parameters in one node of the graph, without the dispatcher.

    Once the kernels have been through large tensors, little of Python's own data is left in the cache, and each step
    here takes several times what it takes in a loop over small ones.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: native.Call | cuda.Call, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parts)
        ctx.call = call
        return native.forward(call, x, parts) if isinstance(call, native.Call) else cuda.forward(call, x, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, *parts), call = gradients, ctx.saved_tensors, ctx.call
        frozen = True not in ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or not is_plain(gradient, x, *parts):
            factors = _constant(call.packing, x.device)
            packed = call.packing.pack(parts, factors)
            x_gradient, packed_gradient = _pull_back(gradient, x, packed, _listed(call.formula), frozen)
            if packed_gradient is None:
                return (x_gradient, None, *[None] * len(parts))
            return (x_gradient, None, *call.packing.unpack(packed_gradient, parts, factors))
        if isinstance(call, native.Call):
            x_gradient, part_gradients = native.backward(call, gradient, x, parts, frozen=frozen)
        else:
            x_gradient, part_gradients = cuda.backward(call, gradient, x, parts, frozen=frozen)
        return (x_gradient, None, *([None] * len(parts) if frozen else part_gradients))


# F(x) of (x, call, *parts), for tensors that `is_plain` says yes to, where there is a kernel. It is not Function.apply
# of Python, which looks for transforms and for what they leave behind; so does `is_plain`.
call_directly: Callable[..., Tensor] = super(torch.autograd.Function, _Direct).apply


# Calls of each operator that the reference has answered in this process, because its kernel is missing here: on this
# device, for this dtype (float64 on a GPU), or of a program that was exported or traced where it was there.
fallbacks: Counter[str] = Counter()


def count_fallback(name: str) -> None:
    """One more call that plain torch has answered."""
    fallbacks[name] += 1


count_fallback._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the compiler counts once, as it traces


def activate(x: Tensor, parts: Sequence[Tensor], packing: Packing, formula: Formula) -> Tensor:
    """F(x), differentiable in x and the parts of its parameters: the operator, or without a kernel the reference."""
    _check_devices(x, parts)
    if _is_lowered(x, formula):
        parameters = packing.side_by_side(parts)
        compiled: Tensor = torch.ops.polytrope.activation(x, parameters, *_listed(formula), lowering.version())
        return compiled
    parameters = packing.pack(parts, packing.constant(x.device))
    if _goes_through_kernel(x, formula):
        result: Tensor = torch.ops.polytrope.activation(x, parameters, *_listed(formula))
        return result
    if not _is_transformed():
        count_fallback("activation")
    return reference.evaluate(x, parameters, formula)


def _is_lowered(x: Tensor, formula: Formula) -> bool:
    """Whether a compiler is about to get arithmetic. Not where there is a CUDA kernel, which adds up the gradients of
    coefficients in the pass that computes that of x; the compiler reads both tensors again for them, and again.
    """
    if not (lowering.is_lowered(formula.family) and _is_compiling()):
        return False
    if torch.compiler.is_exporting() or _is_transformed():
        return False
    return x.device.type != "cuda" or not has_kernel("cuda", x.device.index, x.dtype, formula)


def _listed(formula: Formula) -> tuple[Any, ...]:
    return (int(formula.family), *formula[1:3], list(formula.interval), *formula[4:7], list(formula.variable))


def _formula(arguments: Sequence[Any]) -> Formula:
    formula = Formula(*arguments[: len(Formula._fields)])
    return formula._replace(interval=tuple(formula.interval), variable=tuple(formula.variable))


def _forward(x: Tensor, parameters: Tensor, *arguments: Any) -> Tensor:
    parts = (parameters,)
    return native.forward(native.prepare_for(x, parts, PLAIN, _formula(arguments)), x, parts)


def _backward(gradient: Tensor, x: Tensor, parameters: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = _prepare_backward(gradient, x, parameters, arguments)
    x_gradient, (parameter_gradient,) = native.backward(call, gradient, x, (parameters,))
    return x_gradient, parameter_gradient


def _slope(gradient: Tensor, x: Tensor, parameters: Tensor, *arguments: Any) -> Tensor:
    call = _prepare_backward(gradient, x, parameters, arguments)
    return native.backward(call, gradient, x, (parameters,), frozen=True)[0]


def _prepare_backward(gradient: Tensor, x: Tensor, parameters: Tensor, arguments: Sequence[Any]) -> native.Call:
    call = native.prepare_for(x, (parameters,), PLAIN, _formula(arguments))
    _check_gradient(gradient, x, call.shape)
    return call


def _check_gradient(gradient: Tensor, x: Tensor, shape: torch.Size) -> None:
    if gradient.shape != shape or gradient.dtype != x.dtype or gradient.device != x.device:
        raise ValueError(
            f"gradient: expected {list(shape)} of {x.dtype} on {x.device}, as the result, "
            f"got {list(gradient.shape)} of {gradient.dtype} on {gradient.device}"
        )


def _check_devices(x: Tensor, parts: Sequence[Tensor]) -> None:
    for part in parts:
        if part.device != x.device:
            raise RuntimeError(
                f"x is on {x.device}, the parameters of its activation on {part.device}: move one of them"
            )


def _prepare_on_gpu(x: Tensor, parameters: Tensor, formula: Formula) -> cuda.Call:
    _check_devices(x, (parameters,))
    strides = native.strides_of(x)
    own = (parameters.dtype,), (parameters.shape,)
    call = cuda.prepare(formula, PLAIN, x.get_device(), x.dtype, x.shape, *own, strides)
    if call is None or not cuda.is_verified(call.kind):
        raise native.NoKernelError(f"polytrope has no CUDA kernel for {formula} and {x.dtype}")
    return call


def _forward_on_gpu(x: Tensor, parameters: Tensor, *arguments: Any) -> Tensor:
    return cuda.forward(_prepare_on_gpu(x, parameters, _formula(arguments)), x, (parameters,))


def _backward_on_gpu(gradient: Tensor, x: Tensor, parameters: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = _prepare_on_gpu(x, parameters, _formula(arguments))
    _check_gradient(gradient, x, call.shape)
    x_gradient, (parameter_gradient,) = cuda.backward(call, gradient, x, (parameters,))
    return x_gradient, parameter_gradient


def _slope_on_gpu(gradient: Tensor, x: Tensor, parameters: Tensor, *arguments: Any) -> Tensor:
    call = _prepare_on_gpu(x, parameters, _formula(arguments))
    _check_gradient(gradient, x, call.shape)
    return cuda.backward(call, gradient, x, (parameters,), frozen=True)[0]


def _forward_by_formula(x: Tensor, parameters: Tensor, *arguments: Any) -> Tensor:
    formula = _formula(arguments)
    return native.empty_result(x, formula).copy_(reference.evaluate(x, parameters, formula))


def _backward_by_formula(gradient: Tensor, x: Tensor, parameters: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    x_gradient, parameter_gradient = _pull_back_by_formula(gradient, x, parameters, arguments)
    return torch.empty_like(x).copy_(x_gradient), parameter_gradient


def _slope_by_formula(gradient: Tensor, x: Tensor, parameters: Tensor, *arguments: Any) -> Tensor:
    return _backward_by_formula(gradient, x, parameters, *arguments)[0]


def _falling_back(name: str, kernel: Callable[..., Any], by_formula: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel; where it is missing, the reference. Why it is missing has been said in a warning, once."""

    def run(*arguments: Any) -> Any:
        try:
            return kernel(*arguments)
        except native.NoKernelError:
            count_fallback(name)
        return by_formula(*arguments)

    return run


for _name, _on_cpu, _on_gpu, _by_formula in (
    ("activation", _forward, _forward_on_gpu, _forward_by_formula),
    ("activation_backward", _backward, _backward_on_gpu, _backward_by_formula),
    ("activation_slope", _slope, _slope_on_gpu, _slope_by_formula),
):
    _LIBRARY.impl(_name, _falling_back(_name, _on_cpu, _by_formula), "CPU")
    _LIBRARY.impl(_name, _falling_back(_name, _on_gpu, _by_formula), "CUDA")


def _stays_exported() -> bool:
    """Whether the program that is traced for export is to be one (`torch.export`, `run_decompositions`), not code.

    AOTInductor traces in the same mode, with the same decompositions. What tells them apart is that `torch.export`, for
    operators of Triton's, switches off what would write these out, which nobody could load elsewhere either
    (torch/export/_trace.py). Held by `test_an_exported_program_keeps_the_operator_and_aotinductor_needs_none`.
    """
    return not functorch_config.decompose_custom_triton_ops


def _lower(name: str, arithmetic: Callable[..., Any], tensors: int) -> None:
    """Let AOTAutograd, once autograd has seen the operator, put arithmetic in its place.

    torch.compile's caches know a graph by the operators in it, so that there the operator has to name this
    `arithmetic`. AOTInductor has no such caches. An exported program keeps the operator.
    """

    def rule(mode: Any, operator: Any, types: Any, arguments: Sequence[Any] = (), options: Any = None) -> Any:
        formula = _formula(arguments[tensors:])
        version = arguments[tensors + len(Formula._fields) :]
        is_wanted = not _stays_exported() if mode.export else tuple(version) == (lowering.version(),)
        if not (is_wanted and lowering.is_lowered(formula.family)):
            return mode.__torch_dispatch__(operator, types, arguments, options)
        with mode:
            return arithmetic(*arguments[:tensors], formula)

    torch.library.register_torch_dispatch(f"polytrope::{name}", FunctionalTensorMode, rule, lib=_LIBRARY)


def _forward_fake(x: Tensor, _parameters: Tensor, *arguments: Any) -> Tensor:
    return native.empty_result(x, _formula(arguments))


def _backward_fake(_gradient: Tensor, x: Tensor, parameters: Tensor, *_arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), parameters.new_empty(parameters.shape)


def _slope_fake(_gradient: Tensor, x: Tensor, _parameters: Tensor, *_arguments: Any) -> Tensor:
    return torch.empty_like(x)


def _pull_back(
    gradient: Tensor, x: Tensor, parameters: Tensor, arguments: Sequence[Any], frozen: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and, unless they are frozen, of the packed parameters, both differentiable in their turn."""
    if _is_transformed():
        x_gradient, parameter_gradient = _pull_back_by_formula(gradient, x, parameters, arguments)
        return x_gradient, None if frozen else parameter_gradient
    if frozen:
        return torch.ops.polytrope.activation_slope(gradient, x, parameters, *arguments), None
    x_gradient, parameter_gradient = torch.ops.polytrope.activation_backward(gradient, x, parameters, *arguments)
    return x_gradient, parameter_gradient


def _pull_back_by_formula(
    gradient: Tensor, x: Tensor, parameters: Tensor, arguments: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    formula = _formula(arguments)
    pull_back = torch.func.vjp(lambda x, parameters: reference.evaluate(x, parameters, formula), x, parameters)[1]
    x_gradient, parameter_gradient = pull_back(gradient)
    return x_gradient, parameter_gradient


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, parameters = ctx.saved_tensors
    gradients = _pull_back(gradient, x, parameters, ctx.arguments, not ctx.needs_input_grad[1])
    return (*gradients, *[None] * len(ctx.arguments))


def _differentiate_twice(ctx: Any, *seeds: Tensor) -> tuple[Any, ...]:
    """Of both operators with a gradient. What it computes with is plain torch, so it has derivatives in its turn."""

    def first(gradient: Tensor, x: Tensor, parameters: Tensor) -> tuple[Tensor, ...]:
        return _pull_back_by_formula(gradient, x, parameters, ctx.arguments)[: len(seeds)]

    second = torch.func.vjp(first, *ctx.saved_tensors)[1](seeds)
    return (*second, *[None] * len(ctx.arguments))


def _saving(tensors: int) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 (torch passes it by name)
        ctx.save_for_backward(*inputs[:tensors])
        ctx.arguments = inputs[tensors:]

    return setup_context


def _mapping(name: str, tensors: int) -> Callable[..., Any]:
    """vmap: one call for all of the batch where only x has a batch dimension, else one call for each of it."""

    def mapped(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        operator = getattr(torch.ops.polytrope, name)
        batched = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(arguments[:tensors], in_dims[:tensors], strict=True)
        ]
        others = arguments[tensors:]
        of_parameters = name == "activation_backward"
        if in_dims[tensors - 1] is None and not of_parameters:
            return operator(*batched[:-1], arguments[tensors - 1], *others), 0
        parts = [operator(*one, *others) for one in zip(*batched, strict=True)]
        if not of_parameters:
            return torch.stack(parts), 0
        return tuple(torch.stack(gradients) for gradients in zip(*parts, strict=True)), (0, 0)

    return mapped


for _name, _tensors, _fake, _derivative, _arithmetic in (
    ("activation", 2, _forward_fake, _differentiate, lowering.forward),
    ("activation_backward", 3, _backward_fake, _differentiate_twice, lowering.backward),
    ("activation_slope", 3, _slope_fake, _differentiate_twice, lowering.slope),
):
    _operator = f"polytrope::{_name}"
    torch.library.register_fake(_operator, _fake, lib=_LIBRARY)
    torch.library.register_autograd(_operator, _derivative, setup_context=_saving(_tensors), lib=_LIBRARY)
    torch.library.register_vmap(_operator, _mapping(_name, _tensors), lib=_LIBRARY)
    _lower(_name, _arithmetic, _tensors)
