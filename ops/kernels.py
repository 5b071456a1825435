"""The torch operators `polytrope::activation` and `polytrope::polynorm` with their shapes, autograd and vmap.

Only x (and the few packed parameters) is saved for backward. A second derivative goes through `reference.evaluate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polytrope.ops import cuda, native, reference
from polytrope.ops.families import Formula
from polytrope.ops.packing import PLAIN, Packing

_TAIL = "int family, int degree, int second_degree, float[] interval, int dim, bool gated"
_LIBRARY = torch.library.Library("polytrope", "DEF")
_LIBRARY.define(f"activation(Tensor x, Tensor parameters, {_TAIL}) -> Tensor")
_LIBRARY.define(f"activation_backward(Tensor gradient, Tensor x, Tensor parameters, {_TAIL}) -> (Tensor, Tensor)")
_LIBRARY.define("polynorm(Tensor x, Tensor parameters, float epsilon) -> Tensor")
_LIBRARY.define("polynorm_backward(Tensor gradient, Tensor x, Tensor parameters, float epsilon) -> (Tensor, Tensor)")


def has_kernel(device_type: str, index: int | None, dtype: torch.dtype, formula: Formula | str) -> bool:
    """Whether such a tensor goes through a compiled kernel; `formula` may be `cuda.POLYNORM`."""
    if device_type == "cpu":
        return native.cpu_library() is not None
    if device_type == "cuda":
        return cuda.is_usable(index, dtype, formula)
    return device_type == "meta"


# What `torch.compiler.assume_constant_result` does, without importing the compiler (2 s for each process).
has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _goes_through_kernel(x: Tensor, formula: Formula | str) -> bool:
    """torch.func.grad and jvp take no operator with its own backward: there, the reference runs."""
    if not has_kernel(x.device.type, x.device.index, x.dtype, formula):
        return False
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return True
    stack = torch._C._functorch.get_interpreter_stack() or []
    return all(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def _is_plain(*tensors: Tensor) -> bool:
    """Whether nothing but autograd looks at operators on these CPU tensors: no compiler, tracer, transform or mode."""
    batched = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched
    return (
        all(
            type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu and not batched(tensor) for tensor in tensors
        )
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


@functools.cache
def _constant(packing: Packing) -> Tensor | None:
    with torch.inference_mode(False):
        return packing.constant(torch.device("cpu"))


class _Direct(torch.autograd.Function):
    """The operator `activation` and the packing of its parameters in one node of the graph, without the dispatcher.

    Both cost a good part of a kernel's time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, formula: Formula, packing: Packing, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parts)
        ctx.formula, ctx.packing = formula, packing
        ctx.packed = packing.pack(parts, _constant(packing))
        return native.forward(x, ctx.packed, formula)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, *parts) = gradients, ctx.saved_tensors
        factors = _constant(ctx.packing)
        if torch.is_grad_enabled() or not _is_plain(gradient, x, *parts):
            backward, packed = torch.ops.polytrope.activation_backward, ctx.packing.pack(parts, factors)
            x_gradient, packed_gradient = backward(gradient, x, packed, *_listed(ctx.formula))
        else:
            x_gradient, packed_gradient = native.backward(gradient, x, ctx.packed, ctx.formula)
        return (x_gradient, None, None, *ctx.packing.unpack(packed_gradient, parts, factors))


def activate(x: Tensor, parameters: Tensor, formula: Formula) -> Tensor:
    """F(x), differentiable in x and the packed parameters; without a kernel, the reference."""
    return activate_parts(x, (parameters,), PLAIN, formula)


def activate_parts(x: Tensor, parts: Sequence[Tensor], packing: Packing, formula: Formula) -> Tensor:
    """`activate` with parameters that are still to be packed."""
    if not torch.compiler.is_compiling() and _is_plain(x, *parts) and has_kernel("cpu", None, x.dtype, formula):
        direct: Tensor = _Direct.apply(x, formula, packing, *parts)  # type: ignore[no-untyped-call]
        return direct
    parameters = packing.pack(parts, packing.constant(parts[0].device))
    if _goes_through_kernel(x, formula):
        result: Tensor = torch.ops.polytrope.activation(x, parameters, *_listed(formula))
        return result
    return reference.evaluate(x, parameters, formula)


def _listed(formula: Formula) -> tuple[Any, ...]:
    return (int(formula.family), *formula[1:3], list(formula.interval), formula.dim, formula.gated)


def _formula(arguments: tuple[Any, ...]) -> Formula:
    family, degree, second_degree, interval, dim, gated = arguments
    return Formula(family, degree, second_degree, tuple(interval), dim, gated)


def normalized_powers(x: Tensor, parameters: Tensor, epsilon: float) -> Tensor:
    """PolyNorm of x along its last dimension; `parameters`: b, a_1 … a_n."""
    if _goes_through_kernel(x, cuda.POLYNORM):
        result: Tensor = torch.ops.polytrope.polynorm(x, parameters, epsilon)
        return result
    return reference.polynorm(x, parameters, epsilon)


def _forward(x: Tensor, parameters: Tensor, *arguments: Any) -> Tensor:
    return native.forward(x, parameters, _formula(arguments))


def _backward(gradient: Tensor, x: Tensor, parameters: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return native.backward(gradient, x, parameters, _formula(arguments))


def _on_gpu(function: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """An operator's form on GPUs: a function of `cuda`, whose operator has `tensors` tensors before its options."""

    def run(*arguments: Any) -> Any:
        x, options = arguments[tensors - 2], arguments[tensors:]
        formula = _formula(options) if len(options) > 1 else cuda.POLYNORM
        if not cuda.is_usable(x.device.index, x.dtype, formula):
            raise RuntimeError(
                f"polytrope has no CUDA kernel for {formula} and {x.dtype}; polytrope.ops.functional does"
            )
        own = options if formula == cuda.POLYNORM else (formula,)
        with torch.cuda.device(x.device):
            return function(cuda.library(), cuda.current_stream(x), *arguments[:tensors], *own)

    return run


_LIBRARY.impl("activation", _forward, "CPU")
_LIBRARY.impl("activation_backward", _backward, "CPU")
_LIBRARY.impl("polynorm", native.polynorm_forward, "CPU")
_LIBRARY.impl("polynorm_backward", native.polynorm_backward, "CPU")
_LIBRARY.impl("activation", _on_gpu(cuda.forward, 2), "CUDA")
_LIBRARY.impl("activation_backward", _on_gpu(cuda.backward, 3), "CUDA")
_LIBRARY.impl("polynorm", _on_gpu(cuda.polynorm_forward, 2), "CUDA")
_LIBRARY.impl("polynorm_backward", _on_gpu(cuda.polynorm_backward, 3), "CUDA")


def _evaluate(x: Tensor, parameters: Tensor, *arguments: Any) -> Tensor:
    return reference.evaluate(x, parameters, _formula(arguments))


def _complete(name: str, evaluate: Callable[..., Tensor]) -> None:
    """What an operator and its backward need beyond their kernels: shapes, autograd, vmap.

    Args:
        name: of the operator; `{name}_backward` is the other one.
        evaluate: the reference, for second derivatives.
    """
    operator, backward = f"polytrope::{name}", f"polytrope::{name}_backward"

    def forward_fake(x: Tensor, _parameters: Tensor, *arguments: Any) -> Tensor:
        halved = name == "activation" and arguments[-1]
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2) if halved else x.shape)

    def backward_fake(_gradient: Tensor, x: Tensor, parameters: Tensor, *_arguments: Any) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), parameters.new_empty(parameters.shape)

    def differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        gradients = _operator(f"{name}_backward")(gradient, *ctx.saved_tensors, *ctx.arguments)
        return (*gradients, *[None] * len(ctx.arguments))

    def differentiate_twice(ctx: Any, x_seed: Tensor, parameter_seed: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            inputs = tuple(tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
            value = evaluate(*inputs[1:], *ctx.arguments)
            first = torch.autograd.grad(value, inputs[1:], inputs[0], create_graph=True)
            seeds = (x_seed, parameter_seed)
            second = torch.autograd.grad(first, inputs, seeds, allow_unused=True, materialize_grads=True)
        return (*second, *[None] * len(ctx.arguments))

    torch.library.register_fake(operator, forward_fake, lib=_LIBRARY)
    torch.library.register_fake(backward, backward_fake, lib=_LIBRARY)
    torch.library.register_autograd(operator, differentiate, setup_context=_saving(2), lib=_LIBRARY)
    torch.library.register_autograd(backward, differentiate_twice, setup_context=_saving(3), lib=_LIBRARY)
    torch.library.register_vmap(operator, _mapping(name, 2), lib=_LIBRARY)
    torch.library.register_vmap(backward, _mapping(f"{name}_backward", 3), lib=_LIBRARY)


def _operator(name: str) -> Any:
    return getattr(torch.ops.polytrope, name)


def _saving(tensors: int) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 (torch passes it by name)
        ctx.save_for_backward(*inputs[:tensors])
        ctx.arguments = inputs[tensors:]

    return setup_context


def _mapping(name: str, tensors: int) -> Callable[..., Any]:
    """vmap: one call for all of the batch where only x has a batch dimension, else one call for each of it."""

    def mapped(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        batched = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(arguments[:tensors], in_dims[:tensors], strict=True)
        ]
        others = arguments[tensors:]
        if tensors == 2 and in_dims[1] is None:
            return _operator(name)(batched[0], arguments[1], *others), 0
        parts = [_operator(name)(*one, *others) for one in zip(*batched, strict=True)]
        if tensors == 2:
            return torch.stack(parts), 0
        return tuple(torch.stack(gradients) for gradients in zip(*parts, strict=True)), (0, 0)

    return mapped


_complete("activation", _evaluate)
_complete("polynorm", reference.polynorm)
