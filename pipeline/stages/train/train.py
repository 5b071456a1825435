"""The `train` stage: train or fine-tune a model with DeepSpeed on the workers the workflow grants.

Parameters and flow; the work is in `polytrope.pipeline.stages.train`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS
from polytrope.pipeline.data.lineage import Lineage, read_origin, write_lineage
from polytrope.pipeline.data.misfits import misfit, refuse_misfit
from polytrope.pipeline.data.promised import PromisedModel, PromisedTangent, PromisedText, expect, expect_data
from polytrope.pipeline.data.training_file import figure_names, read_training
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, stage
from polytrope.pipeline.stages.train.activations import apply_activation_options
from polytrope.pipeline.stages.train.batch_statistics import check_batch_statistics
from polytrope.pipeline.stages.train.deepspeed_config import read_configuration, zero_stage_of
from polytrope.pipeline.stages.train.measured_basis import settings_in_measured_basis
from polytrope.pipeline.stages.train.numbers_options import check_of_numbers, predicts_numbers
from polytrope.pipeline.stages.train.parameters import ModelParameters, TrainParameters, check_heeded, split_batch
from polytrope.pipeline.stages.train.teacher import check_factors, check_teacher


def check(parameters: TrainParameters, upstream: Mapping[str, Any]) -> None:
    """Refuse a training without a model, or with two."""
    fine_tuning = upstream.get("initial") is not None
    if parameters.model is None and not fine_tuning:
        raise UserError(
            "model: missing, and there is no `initial` input",
            "describe the model under `with: model:`, or name one under `inputs: initial:` to fine-tune it",
        )
    if parameters.model is not None and fine_tuning:
        raise UserError(
            "model: with an `initial` input, the architecture comes from `initial`",
            "remove `model` to fine-tune, or `initial` to train from scratch",
        )
    taught = upstream.get("teacher") is not None
    if parameters.distillation is not None and not taught:
        raise UserError(
            "distillation: there is no `teacher` input", "name the model that is to be imitated: `inputs: teacher:`"
        )
    if parameters.distillation is None and taught:
        raise UserError(
            "inputs.teacher: nothing is learned from it",
            "say what under `with: distillation:`, such as {outputs: 1.0}, or remove it",
        )


def promise(
    parameters: TrainParameters, upstream: Mapping[str, Any], resources: Resources, directory: Path
) -> PromisedModel | PromisedTangent | None:
    """The model that will be trained; refuses what does not fit the data set or the workers."""
    micro, accumulation = split_batch(parameters, resources.workers)
    data = expect_data("inputs.dataset", upstream["dataset"])
    if isinstance(data, PromisedText) and parameters.augmentation is not None:
        given = ", ".join(sorted(f"`{name}`" for name in parameters.augmentation.model_fields_set))
        raise UserError(f"augmentation: {given}: for images, and this dataset holds text", "leave it out")
    if parameters.model is None:
        model = expect("inputs.initial", upstream["initial"], PromisedModel)
        refuse_misfit("inputs.initial", model, data)
    else:
        model = PromisedModel(parameters.model.architecture, {**parameters.model.settings(), "factors": {}})
        found = None if data is None else misfit(model, data)
        if found is not None:
            raise UserError(f"model.{found.setting or 'architecture'}: {found.text}", found.hint)
    teacher = expect("inputs.teacher", upstream.get("teacher"), PromisedModel)
    refuse_misfit("inputs.teacher", teacher, data)
    if parameters.distillation is not None and teacher is not None:
        check_teacher(parameters.distillation, model, teacher, micro)
    if model is None:
        return None
    if parameters.distillation is not None and parameters.distillation.perturbation:
        check_factors(
            parameters.distillation, model, zero_stage_of(read_configuration(parameters, directory), parameters)
        )
    if parameters.activation_basis is not None:
        model = replace(model, settings=settings_in_measured_basis(model.architecture, model.settings))
    check_heeded(model.architecture, model.settings, parameters)
    check_batch_statistics(model.architecture, model.settings, parameters, accumulation)
    trained = model if data is None else model.trained_on(data)
    check_of_numbers(trained.architecture, trained.settings, parameters)
    kind = MODEL_KINDS[model.architecture].data
    names = figure_names(
        kind,
        predicts_numbers=predicts_numbers(trained.settings),
        fit=parameters.fit_samples > 0,
        terms=() if parameters.distillation is None else parameters.distillation.weights(),
    )
    if parameters.model is not None:
        trained = replace(trained, settings=_with_activations(trained, parameters.model))
    promised = replace(trained, figures=names, blocks_before=None)
    return PromisedTangent(promised) if parameters.linearize else promised


def _with_activations(model: PromisedModel, given: ModelParameters) -> dict[str, Any]:
    """The settings with the activations that the model will have, also where none are given."""
    settings = dict(model.settings)
    settings["activation"] = make_config(MODEL_KINDS[model.architecture].config, settings).activation
    options = given.activation_options
    settings["activation_options"] = None if options is None else options.model_dump()
    return apply_activation_options(model.architecture, settings)


def fingerprint(parameters: TrainParameters, directory: Path) -> dict[str, str]:
    """The DeepSpeed configuration, which is part of the result's identity. Refuses contradictions."""
    import hashlib

    content = json.dumps(read_configuration(parameters, directory), sort_keys=True)
    return {"deepspeed": hashlib.sha256(content.encode()).hexdigest()}


@stage(
    parallel=True,
    check=check,
    promise=promise,
    fingerprint=fingerprint,
)
def train(
    context: StageContext,
    dataset: Artifact,
    parameters: TrainParameters,
    initial: Artifact | None = None,
    teacher: Artifact | None = None,
) -> dict[str, float]:
    """Train a model on `dataset`, or fine-tune `initial`, and write the final weights; with `teacher` so that it comes
    close to that model.
    """
    from polytrope.pipeline.stages.train.training_plan import make_plan
    from polytrope.pipeline.stages.train.workers import run_workers

    check(parameters, {"initial": initial, "teacher": teacher})
    plan = make_plan(context, dataset, initial, parameters, teacher)
    context.log_dataset("train", dataset.digest, str(dataset.path), plan.dataset_profile)
    context.log_params(plan.facts)
    origin = None if initial is None else read_origin(initial.path)  # now: it may be damaged
    taught = None if teacher is None else read_origin(teacher.path)
    run_workers(context, plan)
    training = read_training(context.output)
    assert training is not None  # rank 0 has written it
    samples = training.samples or 0
    lineage = Lineage(samples=samples, tokens=training.tokens)
    if initial is not None and origin is not None:
        lineage = origin.then(initial.stage, initial.digest, samples, training.tokens)
    if teacher is not None and taught is not None:
        lineage = lineage.taught_by(teacher.stage, teacher.digest, taught)
    write_lineage(context.output, lineage)
    if parameters.register_as and training.failure is None:
        context.log_model(".", name=parameters.register_as, alias=parameters.register_alias)
    context.log_params(training.counts())
    return training.metrics()
