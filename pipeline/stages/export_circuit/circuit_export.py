"""Measure the ranges, replace divisions, write model and circuit, count what lies outside, and check the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.checkpoint import load_model, read_description, save_model
from polytrope.models.circuit import (
    CircuitForm,
    activation_of,
    embed,
    reciprocal_of,
    refuse_other_parts,
    rms_norms,
    with_divisions,
    with_inverse_roots,
    with_reciprocals,
)
from polytrope.models.domains import DomainInputs, describe_outside, watching
from polytrope.models.factors import merge_factors
from polytrope.models.formats.onnx import save_onnx
from polytrope.models.formats.ring_graph import RingGraph, count, evaluate, read_ring_graph
from polytrope.models.gpt2 import GPT2
from polytrope.models.modes import measuring
from polytrope.models.parts.reciprocal import INVERSE_ROOT, RECIPROCAL, Form
from polytrope.pipeline.data.circuit_file import (
    CIRCUIT_FILE,
    CIRCUIT_ONNX,
    ActivationRange,
    CircuitRecord,
    Division,
    GraphCost,
    write_circuit,
)
from polytrope.pipeline.data.description import read_dataset
from polytrope.pipeline.data.lineage import read_origin, write_lineage
from polytrope.pipeline.data.model_inputs import read_tensors, refuse_other_data
from polytrope.pipeline.data.order import sample_indices
from polytrope.pipeline.data.reader import Reader, open_split
from polytrope.pipeline.data.records import finite
from polytrope.pipeline.data.training_file import recorded_failure
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, StageContext
from polytrope.pipeline.stages.export_circuit.parameters import (
    ExportCircuitParameters,
    InverseRootParameters,
    ReciprocalParameters,
)

_STEPS = 5
_COARSE = 0.01  # relative error of a reciprocal that is said
_OFF = 0.01  # of a position's spread of logits; what the file computes in float64 is nearer than that
_ROUNDING = 1e-4  # of the largest logit in float32


def write_circuit_of(
    context: StageContext, artifact: Artifact, dataset: Artifact, parameters: ExportCircuitParameters
) -> dict[str, float]:
    """Write the model, `circuit.onnx` and `circuit.json`; returns the metrics.

    Raises:
        UserError: a training that failed, a part that is no polynomial, data that do not fit, are none or give no
            finite range, a file that is not what the model computes.
    """
    torch.set_num_threads(parameters.threads)
    if (failure := recorded_failure(artifact.path)) is not None:
        raise UserError(f"inputs.model: the training of `{artifact.stage}` failed: {failure}", "export another one")
    about = read_description(artifact.path)
    description = read_dataset(dataset.path)
    unsure = refuse_other_data("model", artifact.path, about, description, dataset)
    if unsure is not None:
        context.message(unsure)
    model = load_model(artifact.path)
    if not isinstance(model, GPT2) or description.kind != "text":
        raise UserError(f"inputs.model: a {about['architecture']} has no circuit; only a gpt2 has one")
    for split, part in description.splits.items():
        if part.samples < 1:
            raise UserError(f"the dataset of `{dataset.stage}` has no {split} samples", "use a larger corpus")
    merge_factors(model)  # one matrix in place of two is one level less
    try:
        refuse_other_parts(model, divisions=True)
        with_divisions(model)
        return _export(context, model, artifact, dataset, description.sequence_length, parameters)
    except ValueError as error:
        raise UserError(f"export_circuit: {error}") from error


def _export(
    context: StageContext,
    model: GPT2,
    artifact: Artifact,
    dataset: Artifact,
    positions: int,
    parameters: ExportCircuitParameters,
) -> dict[str, float]:
    training, held_out = (open_split(dataset.path, name) for name in ("train", "validation"))
    samples = min(parameters.calibration_samples, len(training))
    context.progress(0, _STEPS, f"measuring ranges on {samples} samples")
    indices = sample_indices(0, 0, samples, len(training))
    calibration = [inputs for inputs, _ in _batches(training, indices, parameters.batch_size)]
    names = [f"transformer.h.{number}" for number in range(len(model.blocks))]
    blocks = list(zip(names, model.blocks, strict=True))
    divided = {f"{name}.attn.reciprocal": reciprocal_of(block) for name, block in blocks}
    roots = {f"{name}.inverse_root": norm.inverse_root for name, norm in rms_norms(model).items()}
    activations = {f"{name}.mlp.activation": activation_of(block) for name, block in blocks}
    activated = {name: activation for name, activation in activations.items() if activation is not None}
    denominators = _ranges(model, divided, calibration)
    squares = _ranges(model, roots, calibration)
    inputs = _ranges(model, activated, calibration)
    first = calibration[0][:1]
    with measuring(model):
        before = model(first)
    held = min(parameters.held_out_samples, len(held_out))
    context.progress(1, _STEPS, f"its loss on {held} samples")
    loss_with_divisions = _loss(model, held_out, held, parameters.batch_size)
    reciprocal, root = parameters.reciprocal, parameters.inverse_root
    divisions = [_division(name, ends, reciprocal, RECIPROCAL) for name, ends in denominators.items()]
    of_roots = [_division(name, ends, root, INVERSE_ROOT) for name, ends in squares.items()]
    _refuse_coarse(of_roots, root)
    domains = {number: division.domain for number, division in enumerate(divisions)}
    with_reciprocals(model, domains, reciprocal.degree, reciprocal.newton)
    if of_roots:
        with_inverse_roots(model, [division.domain for division in of_roots], root.degree, root.newton)
    context.progress(2, _STEPS, "writing the model")
    tokenizer = artifact.path if (artifact.path / "tokenizer.json").exists() else None
    save_model(context.output, model, tokenizer=tokenizer)
    context.progress(3, _STEPS, "writing the circuit")
    reach = {number: inputs[name] for number, name in enumerate(activations) if name in inputs}
    form = CircuitForm(model, reach, positions).eval()
    with torch.no_grad():
        embedded = embed(model, first)
    path = context.output / CIRCUIT_ONNX
    save_onnx(path, form, [embedded], ["x"], fixed=True)
    graph = read_ring_graph(path)
    computed = evaluate(graph, embedded.double().numpy())
    with measuring(model):
        _refuse_other_values(computed, model(first))
    deviation = _deviation(computed, before)
    context.progress(4, _STEPS, "counting what lies outside of the ranges")
    with watching(model) as seen:
        loss = _loss(model, held_out, held, parameters.batch_size)
    outside = describe_outside(seen)
    if outside is not None:
        context.message(outside)
    costs = {name: GraphCost(**asdict(cost)) for name, cost in count(graph).items()}
    record = CircuitRecord(
        format=1,
        positions=positions,
        width=model.config.n_embd,
        vocabulary=model.config.vocab_size,
        cost=costs.pop(""),
        layers=costs,
        largest_constant=_largest_constant(graph),
        deviation=deviation,
        divisions=[_with_rows(division, seen[f"{division.name}.polynomial"]) for division in [*divisions, *of_roots]],
        activations=[ActivationRange(name=name, minimum=low, maximum=high) for name, (low, high) in inputs.items()],
        calibration_samples=samples,
        held_out_samples=held,
        loss=loss,
        loss_with_divisions=loss_with_divisions,
    )
    for division in divisions:
        if division.relative_error > _COARSE:
            context.note(_coarse(division))
    write_circuit(context.output, record)
    write_lineage(context.output, read_origin(artifact.path).then(artifact.stage, artifact.digest))
    context.log_artifact(CIRCUIT_FILE)
    context.log_dataset("calibration", dataset.digest, str(dataset.path), {"samples": samples})
    context.progress(_STEPS, _STEPS, "")
    return record.metrics()


def _batches(reader: Reader, indices: np.ndarray, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets."""
    for start in range(0, len(indices), size):
        yield read_tensors(reader, indices[start : start + size])


def _loss(model: GPT2, reader: Reader, samples: int, size: int) -> float | None:
    """Nats per token of the first samples; None: no finite number."""
    total, tokens = 0.0, 0
    with measuring(model):
        for inputs, targets in _batches(reader, np.arange(samples), size):
            total += float(model(inputs, targets, reduction="sum").double())
            tokens += targets.numel()
    loss = total / tokens
    return loss if math.isfinite(loss) else None


def _ranges(model: nn.Module, modules: dict[str, nn.Module], batches: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Smallest and largest input of each module.

    Raises:
        ValueError: one that is not finite.
    """
    found = {name: DomainInputs((-float("inf"), float("inf"))) for name in modules}

    def add(name: str, arguments: tuple[Any, ...]) -> None:
        if not bool(torch.isfinite(arguments[0]).all()):
            raise ValueError(f"{name}: NaN or infinity on the calibration data; train it to an end")
        found[name].add(arguments[0])

    handles = [
        module.register_forward_pre_hook(lambda _module, arguments, name=name: add(name, arguments))
        for name, module in modules.items()
    ]
    try:
        with measuring(model):
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (seen.minimum, seen.maximum) for name, seen in found.items()}


def _deviation(computed: np.ndarray, logits: Tensor) -> float:
    """The largest one, relative to the largest logit."""
    size = max(torch.finfo(torch.float32).tiny, float(logits.abs().max()))
    return float(np.abs(computed - logits.double().numpy()).max()) / size


def _refuse_other_values(computed: np.ndarray, logits: Tensor) -> None:
    """Raise ValueError if the file gives other logits than the model with the same polynomials, but for rounding.

    A prediction depends on how far a position's logits are from one another, not on their size.

    Args:
        computed: `[1, positions, vocabulary]` float64 of the file.
        logits: the same of the model, float32.
    """
    given = logits.double().numpy()
    off = float(np.abs(computed - given).max())
    spread = float(np.ptp(given, axis=-1).max())
    largest = float(np.abs(given).max())
    if not off <= max(_OFF * spread, _ROUNDING * largest):
        raise ValueError(
            f"{CIRCUIT_ONNX} does not compute what the model does: its logits are off by {off:.3g}, and those of a "
            f"position are up to {spread:.3g} apart (the largest is {largest:.3g})"
        )


def _division(
    name: str, measured: tuple[float, float], chosen: ReciprocalParameters | InverseRootParameters, form: Form
) -> Division:
    """Before rows were counted."""
    domain = (measured[0] / chosen.margin, measured[1] * chosen.margin)
    return Division(
        name=name,
        measured=measured,
        domain=domain,
        relative_error=form.relative_error(chosen.degree, chosen.newton, *domain),
        inputs=0,
        outside=0,
        minimum=None,
        maximum=None,
    )


def _with_rows(division: Division, rows: DomainInputs) -> Division:
    counted = {"inputs": rows.inputs, "outside": rows.outside}
    return division.model_copy(update={**counted, "minimum": finite(rows.minimum), "maximum": finite(rows.maximum)})


def _refuse_coarse(roots: list[Division], chosen: InverseRootParameters) -> None:
    """Raise UserError for the first whose error is above `target_error`."""
    for root in roots:
        if root.relative_error > chosen.target_error:
            low, high = root.measured
            raise UserError(
                f"inverse_root.target_error: {chosen.target_error:g}, but `{root.name}` received {low:.3g} … {high:.3g}"
                f" in the calibration, where degree {chosen.degree} and {chosen.newton} Newton steps are off by up to "
                f"{100 * root.relative_error:.2g} % with the margin",
                "raise inverse_root.degree or newton, or train with a larger range_penalty.denominator",
            )


def _coarse(division: Division) -> str:
    low, high = division.domain
    return (
        f"`{division.name}` is off by up to {100 * division.relative_error:.2g} % on {low:.3g} … {high:.3g}: raise "
        "reciprocal.degree or newton, or train with a larger range_penalty.denominator"
    )


def _largest_constant(graph: RingGraph) -> float:
    """Of the numbers that are added or multiplied by, in absolute value."""
    numbers = [value for value in graph.constants.values() if value.dtype.kind == "f" and value.size]
    return max(float(np.abs(value).max()) for value in numbers)
