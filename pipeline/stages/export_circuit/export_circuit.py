"""The `export_circuit` stage: a GPT-2 of sums and products, its divisions made polynomials, as ONNX of ring operators.

Parameters and flow; the work is in `polytrope.pipeline.stages.export_circuit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from polytrope.models import make_config
from polytrope.models.configurations import MODEL_KINDS, NO_ACTIVATION, ActivationConfig, activation_configs
from polytrope.models.convert_options import POLYNOMIALS
from polytrope.models.parts.settings import RMSNormSettings
from polytrope.pipeline.data.misfits import refuse_misfit
from polytrope.pipeline.data.promised import PromisedModel, expect, expect_data
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, StageContext, stage
from polytrope.pipeline.stages.export_circuit.parameters import ExportCircuitParameters

_NEEDED = {  # field of the model: the parts that are or become polynomials, and how they are asked for
    "attention": ({"power"}, "attention: {name: power, power: 2}"),
    "norm": ({"batch", "rms"}, "norm: batch or norm: rms"),
}


def promise(
    _parameters: ExportCircuitParameters, upstream: Mapping[str, Any], _resources: Resources, _directory: Path
) -> PromisedModel | None:
    """The model with polynomials for divisions; refuses one with parts that are none, and data it cannot take."""
    model = expect("inputs.model", upstream["model"], PromisedModel)
    refuse_misfit("inputs.dataset", model, expect_data("inputs.dataset", upstream["dataset"]))
    if model is None:
        return None
    if model.architecture != "gpt2":
        raise UserError(
            f"inputs.model: a {model.architecture} has no circuit; only a gpt2 has one", "name another model"
        )
    config = make_config(MODEL_KINDS[model.architecture].config, model.settings)
    found = {"attention": {part.name for part in config.attention_settings()}, "norm": {config.norm_settings().name}}
    for field, (names, way) in _NEEDED.items():
        for other in sorted(found[field] - names):
            raise UserError(
                f"inputs.model: the model has {field}: {other}, of which no circuit is written",
                f"train it with {way}",
            )
    for part in config.feedforward_settings():
        if (what := part.no_ring_operation) is not None:
            raise UserError(
                f"inputs.model: the model has feedforward: {part.name}, where {what} is no sum or product",
                "train it with feedforward: mlp, gated, quadratic or mu without layer norm",
            )
    if "activation" in model.settings:  # after a conversion, what they are is not known
        for entry in activation_configs(config.activation, config.n_layer):
            if (what := _no_circuit(entry)) is not None:
                raise UserError(
                    f"inputs.model: the model has activation: {what}",
                    "train it with activation: {name: hermite, degree: 3, init: stable}, and activation_options "
                    "without interval and per_channel, or convert it with polynomial_only",
                )
    # on which ranges the polynomials are, only the calibration tells
    attention = [replace(part, reciprocal=None).config() for part in config.attention_settings()]
    settings = {**model.settings, "attention": attention}
    if isinstance(norm := config.norm_settings(), RMSNormSettings):
        settings["norm"] = replace(norm, root=None).config()
    return replace(model, settings=settings, figures=())


def _no_circuit(activation: ActivationConfig) -> str | None:
    """Why an activation, as the model's settings have it, is not written as a circuit; None where it is."""
    options: dict[str, Any] = {"name": activation} if isinstance(activation, str) else activation
    given = str(options["name"])
    name = given.rstrip("0123456789")
    polynomial = name in (*POLYNOMIALS, "composition") or (
        name == "rational" and options.get("denominator_degree") == 0
    )
    if name != NO_ACTIVATION and not polynomial:
        return f"{given}, which is no polynomial"
    if options.get("interval") is not None:
        return f"{given} with an interval, which is no polynomial beyond it"
    if options.get("num_parameters", 1) > 1:
        return f"{given} with num_parameters, and coefficients per channel are not written as a circuit"
    return None


@stage(cpu_only=True, promise=promise)
def export_circuit(
    context: StageContext, model: Artifact, dataset: Artifact, parameters: ExportCircuitParameters
) -> dict[str, float]:
    """Replace divisions and roots by certified polynomials; write the model, `circuit.onnx` and `circuit.json`.

    `model`: a GPT-2 with `norm: batch` or `rms`, `attention: power`, polynomial activations. The ranges are measured on
    training samples of `dataset`; what lies outside of them is counted on validation samples.
    """
    from polytrope.pipeline.stages.export_circuit.circuit_export import write_circuit_of

    return write_circuit_of(context, model, dataset, parameters)
