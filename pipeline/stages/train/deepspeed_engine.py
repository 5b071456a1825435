"""DeepSpeed: lean import, configuration, engine, and whole weights out of shards."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.deepspeed_config import merge
from polytrope.pipeline.stages.train.optimization import parameter_groups
from polytrope.pipeline.stages.train.training_plan import TrainingPlan


def import_deepspeed(cpu: bool, compiles: bool = False) -> Any:
    """DeepSpeed without what training never uses.

    - Its autotuner imports mlflow if there is one (2.7 s of 3.2 s): mlflow is hidden during the import.
    - On CPU it compiles a shared-memory all-reduce (25 s, needs a compiler) that only `inference_all_reduce` calls:
      marked as not available, which is what DeepSpeed does itself on other platforms. Training uses gloo either way.
    - Without torch.compile (`compiles`), torch's compiler is not imported either (3 s): see `_leave_out_compiler`.
    """
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    if "deepspeed" not in sys.modules and "mlflow" not in sys.modules:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
        try:
            import deepspeed
        finally:
            del sys.modules["mlflow"]
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False}
    deepspeed.utils.logger.setLevel("WARNING")
    # All ranks draw the same weights from one seed or read one file; and it fails on parameters without dimensions.
    deepspeed.DeepSpeedEngine._broadcast_model = lambda _engine: None
    if not compiles:
        _leave_out_compiler()
    return deepspeed


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


def complete_configuration(plan: TrainingPlan) -> dict[str, Any]:
    """The plan's configuration, in which the stage fills in what it decides (contradictions were refused)."""
    parameters = plan.parameters
    decided: dict[str, Any] = {
        "train_batch_size": parameters.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": 0.0 if clips_itself(plan) else parameters.gradient_clipping,
        "zero_optimization": {"stage": plan.zero_stage},
        "bf16": {"enabled": parameters.precision == "bf16"},
        "fp16": {"enabled": parameters.precision == "fp16"},
    }
    defaults: dict[str, Any] = {
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return merge(merge(defaults, plan.deepspeed), decided)


def create_engine(plan: TrainingPlan, model: nn.Module, cpu: bool, *, universal: bool = False) -> Any:
    """The DeepSpeed engine around `model`, with torch's AdamW (fused: one pass over each flat partition).

    Args:
        universal: it will load a universal checkpoint.

    Raises:
        UserError: this device has not the arithmetic that the plan asks for.
    """
    deepspeed = import_deepspeed(cpu)
    parameters = plan.parameters
    if parameters.precision == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
        raise UserError(
            f"precision: DeepSpeed cannot train in fp16 on this {'CPU' if cpu else 'device'}", "use bf16 or fp32"
        )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, parameters),
        lr=parameters.learning_rate,
        betas=parameters.betas,
        eps=parameters.epsilon,
        fused=True,
    )
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={**complete_configuration(plan), "checkpoint": {"load_universal": universal}},
        dist_init_required=False,
    )
    if plan.zero_stage == 0 and parameters.precision == "bf16":
        _undo_empty_step(engine.optimizer)
    if cpu and plan.zero_stage == 1 and parameters.precision == "fp32" and not engine.optimizer.cpu_offload:
        exchange_gradients_and_weights(engine.optimizer)
    if parameters.compile:
        engine.compile()
    return engine


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
    """Let a ZeRO-1 optimizer on CPUs send each gradient and each weight once, in few messages.

    DeepSpeed 0.19.8 copies each gradient into a new bucket, from there into its partition and from there into a flat
    tensor, by a hook per parameter; over gloo it reduces all gradients on all ranks, and takes the norm tensor by
    tensor with a reduction per parameter group. For small models that is a good part of a step. Here gradients are
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
        squares = torch.linalg.vector_norm(received[0]).square()
        dist.all_reduce(squares, group=group)
        norm = squares.sqrt()
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


def clips_itself(plan: TrainingPlan) -> bool:
    """Whether `unsharded_gradient_norm` clips: DeepSpeed's own for this case fails on parameters without dimensions."""
    return plan.zero_stage == 0 and plan.parameters.precision == "fp32"


def unsharded_gradient_norm(engine: Any, clipping: float) -> float:
    """The global gradient norm before `engine.step()`, where no ZeRO optimizer computes it (stage 0).

    Args:
        clipping: scale the gradients down to this norm; 0: leave them.
    """
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if clipping > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clipping, norm)
    return float(norm)


def gradient_norm(engine: Any, unsharded: float) -> float:
    """The global gradient norm of the last step, before clipping; `unsharded` if DeepSpeed did not compute it."""
    norm = engine.get_global_grad_norm()
    return unsharded if norm is None else float(norm)


def full_weights(engine: Any, *, masters: bool = True) -> dict[str, Tensor]:
    """All weights in fp32 on every rank; a collective under ZeRO-3.

    Args:
        masters: take the fp32 master copies of a bf16 or fp16 training (gathered from their shards), not its weights.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    module = engine.module
    whole_in_module = engine.zero_optimization_stage() < 3 and not (engine.bfloat16_enabled() or engine.fp16_enabled())
    gather = masters and not whole_in_module
    unsharded: dict[int, Tensor] = {}
    if gather and engine.zero_optimization_stage() == 0:
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        unsharded = {id(weight): master for pair in groups for weight, master in zip(*pair, strict=True)}
    weights: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        whole = unsharded.get(id(parameter))
        if whole is None and gather:
            whole = safe_get_full_fp32_param(parameter)
        weights[name] = (parameter.detach() if whole is None else whole.detach()).float().cpu()
    for name, tensor in module.state_dict().items():
        if name not in weights and name not in getattr(module, "tied_weights", {}):
            weights[name] = tensor.detach().cpu()
    return weights
