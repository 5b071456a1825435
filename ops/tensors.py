"""An activation on tensors that are no dense tensors of one process: whatever `nn.GELU` takes."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import handle_torch_function, has_torch_function_unary

Function = Callable[..., Tensor]


def call(function: Function, x: Tensor, *parameters: Tensor, **options: Any) -> Tensor:
    """A function of a module on any x.

    DTensors are computed where their shards lie, and gradients of parameters are summed over the mesh; nested tensors
    by their values, or one by one. Fake tensors are computed in their mode, which need not be active. Whatever else
    defines `__torch_function__` sees one operator, `call_by_name`.

    Raises:
        ValueError: a nested tensor whose sizes differ along a dimension that the activation needs whole.
    """
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(x, distributed.DTensor):
        return _on_shards(function, x, parameters, options)
    if isinstance(x, Tensor) and x.is_nested:
        return _nested(function, x, parameters, options)
    if has_torch_function_unary(x):
        return call_by_name(f"{function.__module__}:{function.__qualname__}", x, *parameters, **options)
    fake_mode = getattr(x, "fake_mode", None)
    if isinstance(fake_mode, FakeTensorMode):
        with fake_mode:  # constants that are made on the way have to be fake as well
            return function(x, *parameters, **options)
    return function(x, *parameters, **options)


def call_by_name(name: str, x: Tensor, *parameters: Tensor, **options: Any) -> Tensor:
    """`call` of the function of this name, "module:function": what the proxies of `torch.fx` make one node of.

    They can trace that node again, and pickle it.
    """
    if has_torch_function_unary(x):
        result: Tensor = handle_torch_function(call_by_name, (x,), name, x, *parameters, **options)
        return result
    return call(pkgutil.resolve_name(name), x, *parameters, **options)


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy values, repeated for each group of channels, into a parameter, or into this process' shard of it."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    with torch.no_grad():
        if distributed is not None and isinstance(parameter, distributed.DTensor):
            whole = values.to(parameter.device).expand(parameter.shape)
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.copy_(distributed.distribute_tensor(whole, mesh, placements, src_data_rank=None))
        else:
            parameter.copy_(values.expand(parameter.shape))


def _whole_dimension(parameters: Sequence[Tensor], options: Mapping[str, Any]) -> int | None:
    """The dimension of x that must not be cut: of groups of channels, of two halves, of a norm; None: it may be any."""
    if options.get("glu") or "epsilon" in options:
        return -1
    grouped = any(parameter.dim() == 2 and len(parameter) > 1 for parameter in parameters)
    return int(options["dim"]) if grouped else None


def _on_shards(function: Function, x: Any, parameters: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

    mesh, whole = x.device_mesh, _whole_dimension(parameters, options)

    def stays(placement: Placement) -> bool:
        return type(placement) is Shard and (whole is None or (placement.dim - whole) % x.dim() != 0)

    placements = [placement if stays(placement) else Replicate() for placement in x.placements]
    x = x.redistribute(placements=placements)
    everywhere = [Replicate()] * mesh.ndim
    gradients = [Partial() if isinstance(placement, Shard) else Replicate() for placement in placements]
    local = []
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            parameter = DTensor.from_local(parameter, mesh, everywhere, run_check=False)
        local.append(parameter.redistribute(placements=everywhere).to_local(grad_placements=gradients))
    result = function(x.to_local(), *local, **options)
    shape = torch.Size((*x.shape[:-1], x.shape[-1] // 2)) if options.get("glu") else x.shape
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(result, mesh, placements, run_check=False, shape=shape, stride=strides)


def _nested(function: Function, x: Any, parameters: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    whole = _whole_dimension(parameters, options)
    if x.layout == torch.strided:
        parts = [function(part, *parameters, **options) for part in x.unbind()]
        return torch.nested.as_nested_tensor(parts)
    if whole is not None and (whole >= 0 or whole % x.dim() <= x._ragged_idx):
        raise ValueError(
            f"dim: expected a negative dimension behind the one of different sizes ({x._ragged_idx - x.dim()}) "
            f"in a nested tensor, got {whole}"
        )
    values = function(x.values(), *parameters, **options)
    return torch.nested.nested_tensor_from_jagged(
        values, offsets=x.offsets(), lengths=x.lengths(), jagged_dim=x._ragged_idx
    )
