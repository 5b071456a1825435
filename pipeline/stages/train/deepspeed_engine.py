"""DeepSpeed: lean import, configuration, engine, and whole weights out of shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train import patches
from polytrope.pipeline.stages.train.deepspeed_config import merge
from polytrope.pipeline.stages.train.optimization import parameter_groups
from polytrope.pipeline.stages.train.training_plan import TrainingPlan


def import_deepspeed(cpu: bool, compiles: bool = False) -> Any:
    """DeepSpeed without what training never uses.

    Its autotuner imports mlflow if there is one (2.7 s of 3.2 s): mlflow is hidden during the import. What is replaced
    in DeepSpeed itself stands in `patches`.
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

    deepspeed.utils.logger.setLevel("WARNING")
    patches.at_import(deepspeed, compiles)
    return deepspeed


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
    patches.on_engine(engine, cpu=cpu, zero_stage=plan.zero_stage, precision=parameters.precision)
    if parameters.compile:
        engine.compile()
    return engine


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


def full_weights(engine: Any, frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights and buffers in fp32, on the CPU; a collective where they are sharded.

    Of a bf16 or fp16 training these are the optimizer's fp32 masters, gathered from their shards.

    Args:
        frozen: the weights that do not learn, as they were before the engine was made: it may round or shard its own.
            Rank 0 has them; for the others what the engine holds is good enough.
    """
    module = engine.module
    weights = {name: tensor.float().cpu() for name, tensor in {**frozen, **master_weights(engine)}.items()}
    for name, tensor in module.state_dict().items():
        if name not in weights and name not in getattr(module, "tied_weights", {}):
            weights[name] = tensor.detach().cpu()
    return weights


def master_weights(engine: Any) -> dict[str, Tensor]:
    """The weights that the optimizer works on, whole, by name; a collective where they are sharded."""
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}
    narrow = engine.bfloat16_enabled() or engine.fp16_enabled()
    if engine.zero_optimization_stage() < 3 and not narrow:
        return {name: parameter.detach() for name, parameter in parameters.items()}
    unsharded: dict[int, Tensor] = {}
    if engine.zero_optimization_stage() == 0:
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        unsharded = {id(weight): master for pair in groups for weight, master in zip(*pair, strict=True)}
    weights: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        whole = unsharded.get(id(parameter))
        if whole is None:
            whole = safe_get_full_fp32_param(parameter)
        weights[name] = (parameter if whole is None else whole).detach()
    return weights
