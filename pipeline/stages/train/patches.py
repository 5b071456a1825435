"""What is replaced in DeepSpeed, and in torch for its sake: for which versions, why, and what it buys.

Outside `VERSIONS` nothing is replaced and DeepSpeed runs as it is. `UPSTREAM` holds digests of the sources that these
patches were written for: tests/stages/test_patches.py fails when an upgrade changes one of them.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

VERSIONS = ((0, 19), (0, 20))  # from the first, below the second
UPSTREAM = {
    "deepspeed.runtime.engine:DeepSpeedEngine._broadcast_model": (
        "56eea8df0dbf0c18f163c20b223166a50a4b1bb0bb67e1f822665f007b673eb5"
    ),
    "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer.initialize_optimizer_states": (
        "59c37209d79fa8b22744858721a120fe5985a0b9fb92a9ead4a8b18cc2431e51"
    ),
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.reduce_gradients": (
        "385b8e94b1d3cee7e7392bc30eed43051c7025eab3887492d5a75bf31ccedaeb"
    ),
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.scaled_global_norm": (
        "63c6a6fe100c4e4920efb081b642a7473bca628c7f98516044f77a0ea7334471"
    ),
    "deepspeed.runtime.utils:all_gather_dp_groups": (
        "87c5e3c4215b81943e6498bcf166b63dd5cd007103256b86eb154d9fc2d93f34"
    ),
    "torch.optim.adamw:AdamW.step": ("56edd31e55c3bdc5dfa8db4c334eb812fc1727872b6878831e8974b3496062ff"),
}


def applies(version: str) -> bool:
    """Whether this version of DeepSpeed is one that the patches are for."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and VERSIONS[0] <= (int(found[1]), int(found[2])) < VERSIONS[1]


def source_digest(name: str) -> str:
    """sha256 (hex) of the source of `module:attribute.attribute`."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    return hashlib.sha256(inspect.getsource(inspect.unwrap(found)).encode()).hexdigest()


def at_import(deepspeed: Any, compiles: bool) -> None:
    """Right after the import.

    - On CPU DeepSpeed compiles a shared-memory all-reduce (25 s, needs a compiler) that only `inference_all_reduce`
      calls: marked as not available, which is what DeepSpeed does itself on other platforms. Training uses gloo anyway.
    - Its broadcast of the weights is left out: all ranks draw the same from one seed, or read one file.
    - Without torch.compile (`compiles`), torch's compiler is not imported either (3 s): see `_leave_out_compiler`.
    """
    if not applies(deepspeed.__version__):
        return
    from deepspeed import ops

    ops.__compatible_ops__ = {**ops.__compatible_ops__, "deepspeed_shm_comm": False}
    deepspeed.DeepSpeedEngine._broadcast_model = lambda _engine: None
    if not compiles:
        _leave_out_compiler()


def on_engine(engine: Any, *, cpu: bool, zero_stage: int, precision: Literal["fp32", "bf16", "fp16"]) -> None:
    """Right after an engine was made."""
    import deepspeed

    if not applies(deepspeed.__version__):
        return
    if zero_stage == 0 and precision == "bf16":
        _undo_empty_step(engine.optimizer)
    alone = engine.dp_world_size == 1 and engine.gradient_accumulation_steps() == 1
    suited = (cpu and precision == "fp32") or (alone and precision != "fp16")
    if zero_stage == 1 and suited and _hands_over(engine.optimizer):
        exchange_gradients_and_weights(engine.optimizer)


def _hands_over(optimizer: Any) -> bool:
    """Whether an optimizer of ZeRO-1 takes gradients from `grad`, on the device. `data_types.grad_accum_dtype` says
    that they are added up elsewhere, and for bf16 in fp32 DeepSpeed takes another class of optimizer.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return False
    return not (optimizer.cpu_offload or optimizer.use_grad_accum_attribute)


def _leave_out_compiler() -> None:
    """Spare the import of torch's compiler, which is most of a worker's start, to processes that compile nothing.

    Three places import it unasked: DeepSpeed's Muon optimizer decorates its kernels with `torch.compile`; the methods
    of torch's optimizers that are hidden from the compiler fetch the wrapper that hides them; and `step` tells the
    compiler where to break a graph.
    """
    original = torch.compile
    torch.compile = lambda *_, **__: lambda function: function  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = original  # type: ignore[assignment]
    for method in vars(torch.optim.Optimizer).values():
        function = getattr(method, "__wrapped__", None)
        if function is not None and not hasattr(function, "__dynamo_disable"):
            setattr(function, "__dynamo_disable", function)  # where `torch._disable_dynamo` keeps that wrapper
    torch.optim.AdamW.step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))  # type: ignore[method-assign]


def _undo_empty_step(optimizer: Any) -> None:
    """Start from the weights and an empty state.

    DeepSpeed 0.19.8's optimizer for bf16 without sharding allocates its state by a step on gradients of zero, which
    decays the fp32 masters once and leaves Adam's bias correction one step ahead.
    """
    optimizer.optimizer.state.clear()
    for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for master, weight in zip(masters, weights, strict=True):
            master.data.copy_(weight.data)


def exchange_gradients_and_weights(optimizer: Any) -> None:
    """Let a ZeRO-1 optimizer on CPUs, or without others, send each gradient and each weight once, in few messages.

    DeepSpeed 0.19.8 copies each gradient into a new bucket, from there into its partition and from there into a flat
    tensor, by a hook per parameter; over gloo it reduces all gradients on all ranks, and looks for infinities and takes
    the norm tensor by tensor with a reduction per parameter group. For small models that is a good part of a step, and
    a fast GPU waits for it: on an H200, 24 ms of the 83 of a step of GPT-2 124M
    (benchmarks/results/gpu-train-2026-11-27.json). Here gradients are
    copied once, into one buffer of a row per rank; each rank gets its row from all others and averages it (always in
    the order of ranks: bit for bit the same); and the norm is one reduction. The new weights go straight into place.
    """
    import deepspeed.comm as dist
    from deepspeed.runtime.zero import stage_1_and_2

    group = optimizer.dp_process_group
    workers = dist.get_world_size(group=group)
    flats = optimizer.bit16_groups_flat  # of each group, padded so that all partitions are equally long
    sizes = [flat.numel() // workers for flat in flats]
    sent = torch.zeros(workers, sum(sizes), dtype=flats[0].dtype, device=flats[0].device)
    received = torch.empty_like(sent) if workers > 1 else sent
    own = received[0].split(sizes)
    rows = [row.split(sizes) for row in sent]
    parameters: list[nn.Parameter] = []
    pieces: list[list[tuple[int, Tensor]]] = []  # of each parameter: where they begin, where they go
    for number, (flat, members) in enumerate(zip(flats, optimizer.bit16_groups, strict=True)):
        for parameter in members:
            offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            parameters.append(parameter)
            pieces.append(_pieces(offset, parameter.numel(), sizes[number], [row[number] for row in rows]))

    def reduce_gradients(pipeline_parallel: bool = False) -> None:
        assert not pipeline_parallel
        gradients: list[Tensor] = []
        targets: list[Tensor] = []
        for parameter, parts in zip(parameters, pieces, strict=True):
            flattened = None if parameter.grad is None else parameter.grad.reshape(-1)
            for start, target in parts:
                if flattened is None:
                    target.zero_()
                else:
                    gradients.append(flattened.narrow(0, start, target.numel()) if len(parts) > 1 else flattened)
                    targets.append(target)
            parameter.grad = None
        torch._foreach_copy_(targets, gradients)
        if workers > 1:
            dist.all_to_all_single(received, sent, group=group)
            for row in received[1:]:
                received[0].add_(row)
            received[0].div_(workers)
        for number, partition in enumerate(own):
            optimizer.averaged_gradients[number] = _Partition([partition])
        optimizer._epilogue_ran_this_backward = True

    def scaled_global_norm(norm_type: float = 2) -> Tensor:
        assert norm_type == 2
        squares = torch.linalg.vector_norm(received[0], dtype=torch.float64).square()
        dist.all_reduce(squares, group=group)
        norm = squares.sqrt().float()
        return torch.where(norm.isfinite(), norm, torch.full_like(norm, torch.inf))  # as DeepSpeed's: infinity is bad

    for hook in optimizer._grad_acc_hooks:  # `engine.backward` reduces when backward is done
        hook.remove()
    optimizer._coalesce_grad_reduction = True
    optimizer.reduce_gradients = reduce_gradients
    optimizer.scaled_global_norm = scaled_global_norm
    stage_1_and_2.all_gather_dp_groups = _gather_partitions


class _Partition(list[Tensor]):
    """A rank's averaged gradients of a group, in the way DeepSpeed says that they are flat already."""

    @property
    def flat_partition(self) -> Tensor:
        return self[0]


def _pieces(offset: int, length: int, size: int, targets: list[Tensor]) -> list[tuple[int, Tensor]]:
    """What of a parameter `[offset, offset + length)` lies in each partition of `size`: its start there, its place."""
    parts = []
    for number, target in enumerate(targets):
        start, end = max(offset, number * size), min(offset + length, (number + 1) * size)
        if start < end:
            parts.append((start - offset, target.narrow(0, start - number * size, end - start)))
    return parts


def _gather_partitions(*, partitioned_param_groups: list[list[Tensor]], dp_process_group: list[Any], **_: Any) -> None:
    """Every rank sends its partitions to all others, all at once; they arrive where they belong."""
    import torch.distributed as dist

    waiting: list[Any] = []
    for number, (partitions, group) in enumerate(zip(partitioned_param_groups, dp_process_group, strict=True)):
        rank = dist.get_rank(group)
        others = [other for other in range(len(partitions)) if other != rank]
        for other in others:
            waiting.append(dist.irecv(partitions[other], group=group, group_src=other, tag=number))
        for other in others:
            waiting.append(dist.isend(partitions[rank], group=group, group_dst=other, tag=number))
    for work in waiting:
        work.wait()
