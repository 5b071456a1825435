"""How much the tangent kernel of an MLP's configuration depends on the draw of its weights, by its width.

Of a wide network the kernel is the same for every draw (Jacot, Gabriel, Hongler, Neural Tangent Kernel, 2018); its
variance falls like 1 / width, so that the slope of the logarithms is -1. Random weights: what was learned is not in it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from polytrope.models import build_model
from polytrope.models.checkpoint import model_config
from polytrope.models.parts.feedforward import LinearAtStart
from polytrope.models.tangent import tangent_kernel
from polytrope.pipeline.data.analysis_file import WidthFigures
from polytrope.pipeline.data.model_inputs import read_tensors
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.analyze.parameters import WidthOptions, refuse_width
from polytrope.pipeline.stages.analyze.subject import Subject

_SEEDS = 100_003  # between those of a width and the next: torch's generator takes the lowest 32 bits of a seed


def analyse_width(subject: Subject, options: WidthOptions) -> WidthFigures:
    """Draw networks of every width and measure the kernel between the first two different validation rows.

    Milliseconds per draw: 600 networks of two layers in the default, seconds.

    Raises:
        UserError: the model is no MLP, has layers of functions, or all rows are equal.
    """
    refuse_width("the model", str(subject.network.architecture), vars(subject.network.config))
    rows = _two_rows(subject)
    config = {**model_config(subject.network), "outputs": 1, "loss": "mse", "output_scale": 1.0}
    layers = len(config["widths"])
    variances, errors = [], []
    for width in options.widths:
        entries = np.array(
            [
                _entry({**config, "widths": [width] * layers}, rows, (width * _SEEDS + draw) % 2**32)
                for draw in range(options.draws)
            ]
        )
        between = entries[:, 0] / math.sqrt(entries[:, 1].mean() * entries[:, 2].mean())
        centred = between - between.mean()
        variance = float((centred**2).sum() / (len(centred) - 1))
        variances.append(variance)
        # of the logarithm of a sample's variance, for any distribution with a fourth moment
        errors.append(max(0.0, float((centred**4).mean()) / variance**2 - 1.0) / len(centred))
    across = np.log(options.widths)
    across = across - across.mean()
    shares = across / float(across @ across)
    return WidthFigures(
        widths=options.widths,
        draws=options.draws,
        variances=variances,
        slope=float(shares @ np.log(variances)),
        slope_error=math.sqrt(float(shares**2 @ np.array(errors))),
    )


def _two_rows(subject: Subject) -> torch.Tensor:
    reader = open_split(subject.dataset, "validation")
    rows = read_tensors(reader, np.arange(len(reader)))[0]
    other = next((row for row in rows if not torch.equal(row, rows[0])), None)
    if other is None:
        raise UserError("width: all validation rows are equal, and a kernel is between two", "use more rows")
    return torch.stack([rows[0], other]).double()


def _entry(config: dict[str, object], rows: torch.Tensor, seed: int) -> tuple[float, float, float]:
    """Θ(x, x'), Θ(x, x), Θ(x', x') of one draw, for weights that are normal numbers over the root of their inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build_model("mlp", config).double().eval()
    model.start_for(float(rows.square().mean()))
    layers = ((f"{name}.weight", module) for name, module in model.named_modules() if isinstance(module, LinearAtStart))
    kernel = tangent_kernel(model, rows, {name: 1.0 / layer.in_features for name, layer in layers})
    return float(kernel[0, 1]), float(kernel[0, 0]), float(kernel[1, 1])
