"""The `convert` stage: replace a model's classical activations by learnable ones, fitted on the inputs they really see.

Parameters and flow; the mathematics is in `polytrope.ops.interpolate`, the work in `polytrope.pipeline.stages.convert`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from polytrope.models import make_config
from polytrope.models.configurations import (
    CLASSICAL,
    FIXED,
    MODEL_KINDS,
    NO_ACTIVATION,
    activation_configs,
    block_series,
    without_blocks,
)
from polytrope.models.convert_options import POLYNOMIALS, possible_cuts
from polytrope.models.quadratic import quadratic_feedforward
from polytrope.pipeline.data.lineage import read_origin, write_lineage
from polytrope.pipeline.data.misfits import refuse_misfit
from polytrope.pipeline.data.promised import (
    AnyPromisedModel,
    PromisedBuiltModel,
    PromisedForeignModel,
    PromisedModel,
    expect_data,
    expect_model,
)
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, stage
from polytrope.pipeline.stages.convert.parameters import ConvertParameters


def promise(
    parameters: ConvertParameters, upstream: Mapping[str, Any], _resources: Resources, _directory: Path
) -> AnyPromisedModel | None:
    """The converted model; refuses data or layers that the model cannot have, and activations that are so already."""
    model = expect_model("inputs.model", upstream["model"])
    data = expect_data("inputs.dataset", upstream["dataset"])
    if isinstance(model, PromisedBuiltModel) and parameters.ray_tasks:
        raise UserError(
            f"ray_tasks: the model is built by {model.factory}, and Ray tasks read models that their files describe",
            "leave it out",
        )
    if model is None or not isinstance(model, PromisedModel):  # what it takes, only the model itself knows
        if isinstance(model, PromisedForeignModel) and parameters.format == "own":
            raise UserError(
                f"format: own is for {', '.join(MODEL_KINDS)}, and the model will be a {model.model_type} of "
                "transformers",
                "leave it out",
            )
        if isinstance(model, PromisedForeignModel) and parameters.linear is not None:
            raise UserError(
                f"linear: quadratic layers are for {', '.join(MODEL_KINDS)}, and the model will be a "
                f"{model.model_type} of transformers",
                "leave it out; GPT-2 and ConvNeXt become models of this package by the stage `import_model`",
            )
        return model
    refuse_misfit("inputs.dataset", model, data)
    if parameters.format == "huggingface" and MODEL_KINDS[model.architecture].data == "numbers":
        raise UserError(f"format: transformers has no {model.architecture}", "leave it out")
    if parameters.factorize is not None and parameters.format == "huggingface":
        raise UserError(
            f"factorize: transformers has no {model.architecture} with factored layers, and format is huggingface",
            "leave format out",
        )
    smaller = _with_fewer_blocks(model, parameters)
    if parameters.drop_blocks is None:
        model = replace(model, blocks_before=None)
    else:
        whole = make_config(MODEL_KINDS[model.architecture].config, model.settings)
        model = replace(model, blocks_before=len(whole.activation_widths()))
    config = make_config(MODEL_KINDS[model.architecture].config, model.settings if smaller is None else smaller)
    layers, numbers = parameters.layer_range(), config.layer_numbers()
    if layers is not None and (layers[0] >= numbers or sys.maxsize > layers[1] >= numbers):
        raise UserError(
            f"layers: {parameters.layers} goes beyond the last layer: the model has {numbers}, counted from 0",
            f"expected numbers from 0 to {numbers - 1}",
        )
    known = dict(model.settings if smaller is None else smaller)
    if parameters.linear is not None:
        try:
            known["feedforward"] = quadratic_feedforward(config)
        except ValueError as error:
            raise UserError(str(error), "leave linear out, or convert another model") from error
    if parameters.quantize is not None and parameters.quantize.equalize:
        if config.norm_settings().activates:
            raise UserError(
                f"quantize: equalize: norm: {config.norm_settings().name} divides what an activation gives by the "
                "deviation of its inputs, which a scale would change",
                "leave equalize out; per: row needs none",
            )
        if "activation" in known:
            _refuse_idle_scales(activation_configs(config.activation, len(config.activation_widths())))
        known.pop("activation", None)  # it gets coefficients per channel where it takes up scales
    if parameters.replacement() is None:
        return _promised(model, known if smaller is not None else None, parameters)
    blocks = len(config.activation_widths())
    names = {_name(entry) for entry in activation_configs(config.activation, blocks)} - {NO_ACTIVATION}
    unknown = "activation" not in known  # after a conversion, or with options of their own
    if not names and not (unknown and config.norm_settings().activates):
        raise UserError(
            "inputs.model: the model has feedforward: mu in every block, and no activation to convert"
            if not config.norm_settings().activates
            else "inputs.model: the model has norm: evonorm, and no activation to convert but the sigmoid inside",
            "convert a model with activations",
        )
    if names and not (names & {*FIXED} or parameters.types or parameters.include):
        listed = ", ".join(sorted(names))
        raise UserError(
            f"types: the model's activations are learned already ({listed}), and such stay unless they are named",
            f"convert a model with a classical activation ({', '.join(CLASSICAL)}), or fit these again: "
            f"types: [{listed}]",
        )
    # which activations it has then depends on what is found in it
    known.pop("activation", None)
    return _promised(model, known if smaller is not None else None, parameters)


def _refuse_idle_scales(activations: Sequence[Any]) -> None:
    """Refuse equalisation where no activation takes up a scale.

    Raises:
        UserError: all are others.
    """
    names = [_name(entry) for entry in activations]
    lines = [not (isinstance(entry, dict) and entry.get("interval") is not None) for entry in activations]
    if any(name == "relu" or (name in POLYNOMIALS and whole) for name, whole in zip(names, lines, strict=True)):
        return
    raise UserError(
        f"quantize: equalize: no activation takes up a scale: the model has {', '.join(dict.fromkeys(names))}, and "
        f"relu does, or {', '.join(POLYNOMIALS)} without an interval",
        "leave equalize out; per: row needs none",
    )


def _promised(
    model: PromisedModel, settings: Mapping[str, Any] | None, parameters: ConvertParameters
) -> AnyPromisedModel | None:
    """The converted model; nothing is known of one whose blocks are not known."""
    if parameters.format == "huggingface":
        return PromisedForeignModel(model.architecture)
    if settings is None:
        return None
    known = dict(settings)
    if parameters.factorize is not None or parameters.drop_blocks is not None:
        known.pop("factors", None)  # new ranks are known afterwards, and so are the numbers of the blocks that stay
    return replace(model, settings=known, figures=())


def _with_fewer_blocks(model: PromisedModel, parameters: ConvertParameters) -> Mapping[str, Any] | None:
    """The model's settings after `drop_blocks`; None where only calibration tells which blocks go, and they differ.

    Raises:
        UserError: blocks that cannot go.
    """
    if parameters.drop_blocks is None:
        return model.settings
    options = parameters.drop_blocks.options()
    config = make_config(MODEL_KINDS[model.architecture].config, model.settings)
    try:
        lengths = block_series(config)
        cuts = possible_cuts(lengths, options)
    except ValueError as error:
        raise UserError(str(error), "leave drop_blocks out, or drop others") from error
    parts = config.feedforward_settings()
    befores = [sum(lengths[:row]) + after for row, after in cuts]
    able = [before for before in befores if parts[before].ends_linear]
    if not able:
        raise UserError(
            f"drop_blocks: block {befores[0]} has feedforward: {parts[befores[0]].name}; only a linear layer can take "
            "in a map",
            "leave drop_blocks out, or drop others",
        )
    found = []
    for before in able:
        first = before + 1
        changed = without_blocks(config, range(first, first + options.number))
        sizes = {"n_layer", "depths"} & set(type(config).__dataclass_fields__)
        found.append({name: getattr(changed, name) for name in set(model.settings) | sizes})
    return found[0] if all(entry == found[0] for entry in found) else None


def imports(_parameters: ConvertParameters, upstream: Mapping[str, Any]) -> dict[str, str]:
    """The factory of a model of the project's own, which builds the model here as well."""
    model = upstream["model"]
    return {"inputs.model": model.factory} if isinstance(model, PromisedBuiltModel) else {}


def _name(activation: Any) -> str:
    name = str(activation.get("name") if isinstance(activation, dict) else activation)
    return name.rstrip("0123456789")


@stage(cpu_only=True, promise=promise, imports=imports)
def convert(
    context: StageContext, model: Artifact, dataset: Artifact, parameters: ConvertParameters
) -> dict[str, float]:
    """Calibrate on training samples, fit every layer, write the converted model and `conversion.json`; or drop blocks,
    put linear layers in two factors, make them quadratic, round their weights.

    `model`: of a train or import_model stage, or a Hugging Face directory. `dataset`: of a shard, shard_images or
    shard_numbers stage, or a directory with `calibration.txt` (one text per line), `calibration.npy` (images, token
    ids, or what a module of your own takes first) or `calibration.npz` (the model's inputs by name).
    """
    from polytrope.models.domains import describe_outside
    from polytrope.models.formats.module import read_factory
    from polytrope.pipeline.data.factories import build_module
    from polytrope.pipeline.stages.convert.calibration_data import dataset_batches
    from polytrope.pipeline.stages.convert.polynomials import outside_of_record
    from polytrope.pipeline.stages.convert.work import Source, convert_model

    try:
        factory = read_factory(model.path)
        source = Source(
            model.path,
            lambda network: dataset_batches(network, model.path, dataset.path, parameters, context.message),
            title=f"Conversion to {parameters.title()}",
            factory=factory,
            build=None if factory is None else partial(build_module, context, factory),
        )
        outcome = convert_model(source, parameters, context.output, lambda step, text: context.progress(step, 3, text))
    except ValueError as error:
        raise UserError(f"convert: {error}") from error
    if outcome.onnx_failure is not None:  # the conversion is whole without it
        context.note(f"model.onnx cannot be written: {outcome.onnx_failure}")
    if outcome.onnx is not None and outcome.onnx.reason is not None:
        context.note(f"model.onnx: {outcome.onnx.limits()}")
    assert outcome.record is not None  # there is an output
    outside = None if outcome.record.polynomial is None else describe_outside(outside_of_record(outcome.record))
    if outside is not None:
        context.message(outside)
    write_lineage(context.output, read_origin(model.path).then(model.stage, model.digest))
    context.log_artifact("conversion.json")
    if parameters.page:
        context.log_artifact("conversion.html")
    context.log_dataset("calibration", dataset.digest, str(dataset.path), {"samples": outcome.samples})
    if parameters.register_as:
        context.log_model(".", name=parameters.register_as, alias=parameters.register_alias)
    return outcome.record.metrics()
