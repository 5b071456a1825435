"""The training loop of one rank: the same function under Ray Train and in local processes."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from polytrope.models import build_model, find_architecture
from polytrope.models.adapters import Adapted, AdapterSettings, adapter_parameters, add_adapters
from polytrope.models.checkpoint import load_weights, save_model
from polytrope.models.linearized import LinearizedModel
from polytrope.models.losses import make_loss
from polytrope.models.parts.ranges import RangePenalty, penalise_ranges
from polytrope.ops import kernels
from polytrope.pipeline.data.training_file import INITIAL, Training, write_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import StageContext
from polytrope.pipeline.stages.train.activations import apply_activation_options, options_without_effect
from polytrope.pipeline.stages.train.basis_start import measure_basis
from polytrope.pipeline.stages.train.batches import Batch, Prefetcher, as_weights, validation_batches
from polytrope.pipeline.stages.train.best_weights import load_best, save_best
from polytrope.pipeline.stages.train.deepspeed_engine import (
    clips_itself,
    create_engine,
    full_weights,
    gradient_norm,
    import_deepspeed,
    master_weights,
    unsharded_gradient_norm,
)
from polytrope.pipeline.stages.train.imitation import Imitation, make_imitation
from polytrope.pipeline.stages.train.modality import Modality, make_modality
from polytrope.pipeline.stages.train.numbers_start import start_for_rows
from polytrope.pipeline.stages.train.optimization import coefficient_rates, learning_rate_factor, set_learning_rate
from polytrope.pipeline.stages.train.trainable import ADAPTERS, COEFFICIENTS, RATES, freeze, learns_of
from polytrope.pipeline.stages.train.training_metrics import (
    Meter,
    MetricsLog,
    Stopwatch,
    gather,
    human,
    peak_memory,
    rank_metrics,
    watch_activations,
)
from polytrope.pipeline.stages.train.training_plan import Diverged, TrainingPlan
from polytrope.pipeline.stages.train.training_state import CheckpointWriter, Progress, choose_checkpoint, restore
from polytrope.pipeline.stages.train.weight_average import WeightAverage

Objective = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]  # of inputs and targets: loss, its terms

SPIKE_WINDOW = 32  # steps whose median gradient norm a spike is measured against


def train_rank(plan: TrainingPlan, context: StageContext, rank: int, device: torch.device) -> None:
    """Train to the end and, on rank 0, write the model. Continues from the newest valid checkpoint."""
    parameters = plan.parameters
    on_cpu = device.type == "cpu"
    import_deepspeed(on_cpu, parameters.compile)
    _seed(parameters.seed)
    model, adapted = _create_model(plan)
    for group, field in RATES.items():
        given = getattr(parameters, field)
        if rank == 0 and given is not None and not learns_of(group, model, plan.architecture):
            context.message(f"{field} ({given:g}) has no effect: none of the {group} parameters learns")
    if rank == 0 and (unused := options_without_effect(plan.architecture, plan.model)):
        context.message(f"activation_options: without effect: {unused}")
    sizes = sizes_of(model)  # now: ZeRO-3 leaves nothing of most parameters here
    frozen, initial = {}, {}
    if rank == 0:  # which writes the model
        if parameters.keep_initial:
            whole = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
            initial = adapted.merged(whole, model)
        frozen = {name: weight.detach() for name, weight in model.named_parameters() if not weight.requires_grad}
        if isinstance(model, LinearizedModel):
            frozen |= model.frozen_state()
    chosen = choose_checkpoint(context, rank, plan.workers, plan.zero_stage)
    engine = create_engine(plan, model, on_cpu, universal=chosen is not None and chosen.universal)
    average = None
    if parameters.ema_decay is not None:
        average = WeightAverage(model, parameters.ema_decay, lambda: master_weights(engine))
    imitation = make_imitation(plan, engine.module, device)  # now: building it draws random numbers
    _seed((parameters.seed * 1_000_003 + 1 + rank) % 2**63)  # dropout differs between ranks
    progress = restore(engine, average, chosen, context, rank, plan.workers)
    modality = make_modality(plan, rank, pin=not on_cpu)
    prefetcher = Prefetcher(
        lambda step: modality.train_step(data_position(step, plan.skipped_batches)),
        progress.step,
        plan.steps,
        parameters.data_threads,
    )
    run = _Run(plan, context, rank, device, engine, average, frozen, progress, modality, prefetcher, imitation)
    try:
        while progress.step < plan.steps:
            run.step()
    except Diverged as error:
        if parameters.on_divergence != "record":
            raise
        if rank == 0:
            _write_failure(plan, context.output, sizes, progress, error)
        dist.barrier()  # every rank sees the same gradient norm, so all are here
        return
    finally:
        prefetcher.close()
    weights = run.weights()
    if rank == 0:
        if 0 < progress.best_step < plan.steps:
            weights = load_best(run.best_directory, progress.best_step)
        _write_result(plan, context.output, model, adapted.merged(weights, model), sizes, progress)
        if initial:
            save_model(context.output / INITIAL, model, tokenizer=plan.dataset, weights=initial)
    dist.barrier()
    run.checkpoints.finish()


class _Run:
    """The objects of a running training, and one step of it."""

    def __init__(
        self,
        plan: TrainingPlan,
        context: StageContext,
        rank: int,
        device: torch.device,
        engine: Any,
        average: WeightAverage | None,
        frozen: dict[str, Tensor],
        progress: Progress,
        modality: Modality,
        prefetcher: Prefetcher,
        imitation: Imitation | None,
    ) -> None:
        self.plan, self.context, self.rank, self.device = plan, context, rank, device
        self.engine, self.average, self.frozen = engine, average, frozen
        self.progress, self.modality = progress, modality
        self.prefetcher, self.meter, self.metrics = prefetcher, Meter(), MetricsLog(context, rank)
        self.objective = partial(_loss if imitation is None else imitation.loss, engine)
        parameters = plan.parameters
        self.checkpoints = CheckpointWriter(
            context,
            rank,
            plan.workers,
            parameters.keep_checkpoints,
            parameters.asynchronous_checkpoints,
            parameters.collective_timeout,
        )
        self.best_directory = self.checkpoints.root / "best"
        self.stopwatch = Stopwatch(device)

    def step(self) -> None:
        """One optimizer step, and what is due after it: metrics, validation, checkpoint."""
        plan, parameters, progress = self.plan, self.plan.parameters, self.progress
        factor = learning_rate_factor(
            progress.step, plan.steps, parameters.warmup_steps, parameters.minimum_learning_rate
        )
        set_learning_rate(self.engine.optimizer.param_groups, factor)
        watched: dict[str, float] = {}
        every = parameters.statistics_every
        watch = _due(every, progress.step + 1) or (every > 0 and progress.step == 0)
        with watch_activations(self.engine.module, watched) if watch else contextlib.nullcontext():
            clipping = parameters.gradient_clipping if clips_itself(plan) else 0.0
            batches = self.prefetcher.next_step()
            losses, norm, units = _train_step(
                self.engine, self.objective, batches, self.device, clipping, self.stopwatch
            )
        stop_if_diverged(plan, progress, losses["loss"], norm)
        if self.average is not None:
            self.average.update()
        progress.step += 1
        progress.sums = {name: progress.sums.get(name, 0.0) + value for name, value in losses.items()}
        progress.summed_steps += 1
        self.meter.add(units * plan.workers)
        last = progress.step == plan.steps
        logs = last or _due(parameters.log_every, progress.step)
        if watched:
            progress.history.append({"step": progress.step, **watched})
            self.metrics.log(watched, progress.step)
        if logs:
            self._log_training(factor, norm)
        if last or _due(parameters.validation_every, progress.step):
            self._log_validation()
        if logs:
            self.metrics.finished(progress.step)
        if _due(parameters.checkpoint_every, progress.step) and not last:
            self.checkpoints.save(self.engine, progress, self.average)
            self.meter.restart()

    def weights(self) -> dict[str, Tensor]:
        """What the model would be now: whole, fp32, averaged if `ema_decay` is set; a collective under ZeRO-3."""
        weights = full_weights(self.engine, self.frozen)
        if self.average is not None:
            averages = self.average.averages.items()
            weights |= {name: tensor.cpu() for name, tensor in averages if name not in self.frozen}
        return weights

    def _log_training(self, factor: float, norm: float) -> None:
        plan, progress = self.plan, self.progress
        rate, seconds = self.meter.read()
        wait, self.prefetcher.wait_seconds = self.prefetcher.wait_seconds, 0.0
        forward, steps, names = self.stopwatch.read(), progress.summed_steps, list(progress.sums)
        own = [forward / steps, wait / steps, *(progress.sums[name] / steps for name in names)]
        ranks = gather(own, plan.workers, self.device)
        progress.sums, progress.summed_steps = {}, 0
        values = {
            **{f"train/{name}": sum(row[index] for row in ranks) / plan.workers for index, name in enumerate(names, 2)},
            "learning_rate": plan.parameters.learning_rate * factor,
            **coefficient_rates(self.engine.optimizer.param_groups),
            "gradient_norm": norm,
        }
        progress.history.append({"step": progress.step, **values})
        observed = {
            f"{self.modality.unit}_per_second": rate,
            "data_wait_fraction": min(1.0, wait / seconds),
            "peak_memory": peak_memory(self.device),
            "activation_fallbacks": float(kernels.fallbacks.total()),
            **rank_metrics([row[0] for row in ranks], [row[1] for row in ranks]),
        }
        if plan.parameters.peak_flops:
            flops = self.modality.flops_per_unit(self.engine.module)
            observed["mfu"] = rate * flops / (plan.parameters.peak_flops * plan.workers)
        self.metrics.log({**values, **observed}, progress.step)
        if self.rank == 0:
            message = f"loss {values['train/loss']:.3f} · {human(rate)} {self.modality.unit}/s"
            self.context.progress(progress.step, plan.steps, message)

    def _log_validation(self) -> None:
        with self.average.applied() if self.average else contextlib.nullcontext():
            values = validate(self.plan, self.modality, self.engine.module, self.rank, self.device)
        progress = self.progress
        progress.history.append({"step": progress.step, **values})
        self.metrics.log(values, progress.step)
        if self.plan.parameters.result == "best" and values["val/loss"] < progress.best_loss:
            progress.best_loss, progress.best_step = values["val/loss"], progress.step
            weights = self.weights()
            if self.rank == 0:
                save_best(self.best_directory, progress.step, weights)
        self.meter.restart()


def validate(
    plan: TrainingPlan, modality: Modality, module: nn.Module, rank: int, device: torch.device
) -> dict[str, float]:
    """`val/loss` (per token or image), and what else is measured of text or images, over the first validation samples.

    With `fit_samples` also `fit/loss`, … over the first training samples. The same on every rank.
    """
    parameters = plan.parameters
    samples = min(parameters.validation_samples, modality.validation_samples)
    module.eval()
    with torch.no_grad():
        values = _measure(plan, modality, module, rank, device, "val", modality.validation_batch, samples)
        if parameters.fit_samples:
            samples = min(parameters.fit_samples, modality.train_samples)
            values |= _measure(plan, modality, module, rank, device, "fit", modality.train_batch, samples)
    module.train()
    return values


def _measure(
    plan: TrainingPlan,
    modality: Modality,
    module: nn.Module,
    rank: int,
    device: torch.device,
    prefix: str,
    load: Callable[[np.ndarray], Batch],
    samples: int,
) -> dict[str, float]:
    """Means over the first `samples` samples that `load` gives, named `prefix/…`."""
    sums: dict[str, Tensor] = {}
    for (inputs, targets), counted in validation_batches(load, samples, rank, plan.workers, plan.micro_batch_size):
        measured = modality.measure(module, (as_weights(inputs.to(device), module), targets.to(device)), counted)
        for name, value in measured.items():
            sums[name] = sums.get(name, torch.zeros(())) + value.double().cpu()
    names = sorted(sums)
    total = torch.stack([sums[name] for name in names]).to(device)
    dist.all_reduce(total)
    totals = dict(zip(names, total.tolist(), strict=True))
    return {f"{prefix}/{name}": totals[name] / totals["count"] for name in names if name != "count"}


def data_position(step: int, skipped: list[int]) -> int:
    """Which global batch of the stream step number `step` trains on: the step-th that is not skipped."""
    position = step
    for batch in sorted(skipped):
        position += batch <= position
    return position


def stop_if_diverged(plan: TrainingPlan, progress: Progress, loss: float, norm: float) -> None:
    """Raise `Diverged` on NaN, infinity or a gradient spike. The gradient norm is global: all ranks decide alike.

    With fp16 a gradient overflow is the loss scaler's business, which skips the step and lowers the scale.
    """
    batch = data_position(progress.step, plan.skipped_batches)
    step = progress.step + 1
    if not math.isfinite(norm) and plan.parameters.precision != "fp16":
        raise Diverged(f"step {step} (batch {batch}): gradient norm is {norm}, loss {loss}", batch)
    limit = plan.parameters.gradient_spike
    if limit is not None and math.isfinite(norm):
        median = statistics.median(progress.recent_norms) if len(progress.recent_norms) >= SPIKE_WINDOW else math.inf
        if norm > limit * median:
            raise Diverged(
                f"step {step} (batch {batch}): gradient norm {norm:.3g} is more than {limit:g} × the recent "
                f"median {median:.3g}",
                batch,
            )
        progress.recent_norms = [*progress.recent_norms, norm][-SPIKE_WINDOW:]


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def _create_model(plan: TrainingPlan) -> tuple[nn.Module, Adapted]:
    try:
        model = build_model(plan.architecture, apply_activation_options(plan.architecture, plan.model))
        if plan.initial is not None:
            from safetensors.torch import load_file

            load_weights(model, load_file(plan.initial / "model.safetensors"))
            if plan.parameters.activation_basis is not None:
                measure_basis(model, plan)
        elif find_architecture(plan.architecture).data == "numbers":
            start_for_rows(model, plan.dataset)
        if plan.parameters.range_penalty is not None:
            penalise_ranges(model, RangePenalty(**plan.parameters.range_penalty.numbers()))
    except (ValueError, TypeError) as error:
        raise UserError(f"the model cannot be built: {error}", "see `with: model:` of this stage") from error
    model.train()
    model.set_activation_checkpointing(plan.parameters.activation_checkpointing)  # type: ignore[operator]
    if plan.parameters.loss is not None:
        model.training_loss = make_loss(**plan.parameters.loss.model_dump())  # type: ignore[assignment]
    adapted = Adapted()
    if (adapters := plan.parameters.adapters) is not None:
        try:
            adapted = add_adapters(model, AdapterSettings(**adapters.model_dump()))
        except ValueError as error:
            raise UserError(str(error), "see `with: adapters:` of this stage") from error
    learning = plan.parameters.trainable or (None if adapters is None else [ADAPTERS])
    if learning is not None:
        freeze(model, plan.architecture, learning)
    if plan.parameters.activation_basis is not None and not learns_of(COEFFICIENTS, model, plan.architecture):
        raise UserError(
            f"activation_basis: measured: trainable is {learning}, and nothing learns in that basis",
            f"name {COEFFICIENTS} under `trainable` too, or leave activation_basis out",
        )
    if plan.parameters.augmentation is not None:
        model.label_smoothing = plan.parameters.augmentation.label_smoothing  # type: ignore[assignment]
    if plan.parameters.linearize:
        try:
            model = LinearizedModel(model)
        except ValueError as error:
            raise UserError(f"linearize: {error}", "see `trainable` of this stage") from error
    return model, adapted


def sizes_of(model: nn.Module) -> dict[str, int]:
    """How large the model is: `parameters`, without adapters, and `trainable_parameters` where not all learn."""
    added = adapter_parameters(model)
    number = sum(weight.numel() for weight in model.parameters()) - sum(weight.numel() for weight in added)
    learning = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return {"parameters": number} | ({"trainable_parameters": learning} if added or learning < number else {})


def _loss(engine: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch on the device, which has no other terms."""
    return engine(as_weights(inputs, engine.module), targets), {}


def _train_step(
    engine: Any,
    objective: Objective,
    micro_batches: list[Batch],
    device: torch.device,
    clipping: float,
    stopwatch: Stopwatch,
) -> tuple[dict[str, float], float, int]:
    """One optimizer step.

    Args:
        objective: of inputs and targets, what becomes small, and the terms it has.
        clipping: the gradient norm to clip to here, where DeepSpeed does not; 0: none.
        stopwatch: measures the forward passes.

    Returns:
        This rank's mean `loss` and those of its terms, the global gradient norm before clipping, the tokens (or images)
        this rank saw.
    """
    losses: list[dict[str, Tensor]] = []
    units, unsharded = 0, math.nan
    for inputs, targets in micro_batches:
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with stopwatch:
            loss, terms = objective(inputs, targets)
        engine.backward(loss)
        if engine.is_gradient_accumulation_boundary() and not engine.zero_optimization():
            unsharded = unsharded_gradient_norm(engine, clipping)
        engine.step()
        losses.append({"loss": loss.detach(), **terms})
        units += inputs.size(0) if inputs.is_floating_point() else inputs.numel()
    means = [float(torch.stack([found[name] for found in losses]).double().mean()) for name in losses[0]]
    return dict(zip(losses[0], means, strict=True)), gradient_norm(engine, unsharded), units


def _write_result(
    plan: TrainingPlan,
    output: Path,
    model: nn.Module,
    weights: dict[str, Tensor],
    sizes: dict[str, int],
    progress: Progress,
) -> None:
    """The model artifact: deterministic files, without times or hosts."""
    save_model(output, model, tokenizer=plan.dataset, weights=weights)
    final: dict[str, float] = {}
    for entry in progress.history:
        if progress.best_step and entry["step"] > progress.best_step:
            break  # `result: best`: the figures are those of the weights
        final.update({name: value for name, value in entry.items() if name.startswith(("train/", "val/", "fit/"))})
    samples = plan.steps * plan.parameters.global_batch_size
    summary = {
        "format": 1,
        "architecture": plan.architecture,
        **sizes,
        "steps": plan.steps,
        "samples": samples,
        **final,
        **({"result_step": progress.best_step} if progress.best_step else {}),
        "val/best_loss": min(entry["val/loss"] for entry in progress.history if "val/loss" in entry),
    }
    if find_architecture(plan.architecture).data == "text":
        summary["tokens"] = samples * int(plan.facts["sequence_length"])
    if plan.skipped_batches:
        summary["skipped_batches"], summary["rollbacks"] = len(plan.skipped_batches), plan.skip_reasons
    write_training(output, Training.model_validate(summary), progress.history)


def _write_failure(
    plan: TrainingPlan, output: Path, sizes: dict[str, int], progress: Progress, error: Diverged
) -> None:
    """The artifact of a training that diverged: what was logged until then and what happened, but no weights."""
    summary = {
        "format": 1,
        "architecture": plan.architecture,
        **sizes,
        "steps": progress.step,
        "failure": f"diverged at {error}",
    }
    write_training(output, Training.model_validate(summary), progress.history)
