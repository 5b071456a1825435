"""A model that another one is trained to be like: which of their blocks belong together, what cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS, residual_blocks
from polytrope.pipeline.data.conversion_file import read_conversion
from polytrope.pipeline.data.converted_layers import CONVERSION_FILE
from polytrope.pipeline.data.promised import PromisedModel
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.train.parameters import SHARDED, DistillationParameters

_OUTPUTS = {"text": "vocab_size", "images": "num_classes", "numbers": "outputs"}  # by what a model takes


def check_teacher(
    options: DistillationParameters, student: PromisedModel | None, teacher: PromisedModel, micro_batch: int
) -> None:
    """Refuse a teacher whose outputs or blocks cannot be compared with those of the model, as far as they are known.

    Args:
        micro_batch: samples that a worker computes at once, over which the variance of predicted numbers is taken.

    Raises:
        UserError: naming the parameter or the input.
    """
    if options.features:
        _blocks("inputs.teacher", teacher)
    one = teacher.settings.get("loss") == "mse" and teacher.settings.get("outputs") == 1
    if options.outputs and one and micro_batch == 1:
        raise UserError(
            "distillation: outputs: the teacher predicts one number (outputs: 1), and each worker computes one sample "
            "at once: one number has no variance that its error could be relative to",
            "set global_batch_size to at least twice the workers without a micro_batch_size of 1, or outputs: 0.0",
        )
    if student is None:
        return
    kind = MODEL_KINDS[teacher.architecture].data
    if options.outputs and kind == MODEL_KINDS[student.architecture].data:
        there, here = (model.settings.get(_OUTPUTS[kind]) for model in (teacher, student))
        if None not in (there, here) and there != here:
            raise UserError(
                f"distillation: outputs: the teacher has {there} ({_OUTPUTS[kind]}), the model {here}",
                "give the model as many, or name another teacher",
            )
    if options.perturbation and _layers(student) != _layers(teacher):
        raise UserError(
            f"distillation: perturbation: the teacher has {_layers(teacher)} blocks, the model {_layers(student)}: its "
            "layers are not those of the teacher, and a map may stand in one of them",
            "leave it out",
        )
    if not options.features:
        return
    own, others = _blocks("inputs.initial", student), _blocks("inputs.teacher", teacher)
    here, there = (getattr(_config(model), "patch_size", None) for model in (student, teacher))
    if here != there:
        raise UserError(
            f"distillation: features: the model has patch_size {here}, the teacher {there}: their states have other "
            "positions",
            "leave features out, or give the model the teacher's patch_size",
        )
    recorded = student.blocks_before == len(others)
    if options.blocks is None and len(own) != len(others) and not recorded:
        raise UserError(
            f"distillation: features: the teacher has {len(others)} blocks, the model {len(own)}, and nothing says "
            "which belong together",
            f"give blocks: {len(own)} numbers from 0 to {len(others) - 1}",
        )
    if options.blocks is not None and (len(options.blocks) != len(own) or options.blocks[-1] >= len(others)):
        raise UserError(
            f"distillation: blocks: {options.blocks} for {len(own)} blocks of the model and {len(others)} of the "
            "teacher",
            f"give {len(own)} numbers from 0 to {len(others) - 1}",
        )
    if options.blocks is not None or len(own) == len(others):
        _pairs(own, others, options.blocks or list(range(len(others))))


def matched_blocks(
    options: DistillationParameters, student: PromisedModel, teacher: PromisedModel, initial: Path | None
) -> list[tuple[str, str]]:
    """Names of all blocks of the model, and of those of the teacher that they are to be like; none without `features`.

    Args:
        initial: where the model's weights come from. Where it has fewer blocks than the teacher, the record of its
            conversion there says which are left.

    Raises:
        UserError: a pair of other widths, or of which nothing is known.
    """
    if not options.features:
        return []
    own, others = _blocks("inputs.initial", student), _blocks("inputs.teacher", teacher)
    numbers = options.blocks
    if numbers is None and len(own) != len(others):
        assert initial is not None  # `check_teacher` saw to it
        gone = read_conversion(initial).dropped
        assert gone is not None
        numbers = [number for number, name in enumerate(others) if name not in gone.blocks]
        if gone.total != len(others) or len(numbers) != len(own):
            raise UserError(
                f"distillation: features: {initial / CONVERSION_FILE} is about a model of {gone.total} blocks, of "
                f"which {', '.join(gone.blocks)} are gone, and the teacher has {len(others)}, the model {len(own)}",
                "name the model that was converted as the teacher, or give blocks",
            )
    return _pairs(own, others, range(len(others)) if numbers is None else numbers)


def _config(model: PromisedModel) -> Any:
    return make_config(MODEL_KINDS[model.architecture].config, model.settings)


def _layers(model: PromisedModel) -> int:
    return len(_config(model).activation_widths())


def _blocks(field: str, model: PromisedModel) -> dict[str, int]:
    try:
        return residual_blocks(_config(model))
    except ValueError as error:
        raise UserError(f"distillation: features: {field}: {error}", "leave features out") from error


def _pairs(own: dict[str, int], others: dict[str, int], numbers: Any) -> list[tuple[str, str]]:
    names = list(others)
    found = [(name, names[number]) for name, number in zip(own, numbers, strict=True)]
    for here, there in found:
        if own[here] != others[there]:
            raise UserError(
                f"distillation: features: `{here}` of the model adds to states of width {own[here]}, `{there}` of the "
                f"teacher to {others[there]}",
                "leave features out, or name a teacher of the same width",
            )
        if here.rpartition(".")[0] != there.rpartition(".")[0]:  # each stage of a ConvNeXt has half the positions
            raise UserError(
                f"distillation: features: `{here}` of the model and `{there}` of the teacher are in different stages, "
                "whose states have other positions",
                "leave features out, or give blocks that are in the same stages",
            )
    return found


def check_factors(options: DistillationParameters, student: PromisedModel, zero_stage: int) -> None:
    """Refuse a bound on factors that the model does not have, or that no worker could compute.

    Args:
        student: without `factors` among its settings nothing is known of them.

    Raises:
        UserError: naming the parameter.
    """
    if not options.perturbation:
        return
    if not student.settings.get("factors", True):
        raise UserError(
            "distillation: perturbation: `initial` has no factored layers, whose products could be kept near anything",
            "leave it out, or name a `convert` stage with `factorize`",
        )
    if zero_stage == 3:
        raise UserError(f"distillation: perturbation: {SHARDED.split(';')[0]}", "use a lower zero_stage")
