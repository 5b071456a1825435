"""The tangent kernel of every activation, in closed form: which frequencies a layer learns, and how fast.

From n + 1 numbers, in milliseconds; of what is no polynomial from 65 coefficients by quadrature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polytrope.ops.spectra import circle_spectrum, deep_spectrum, hermite_coefficients
from polytrope.pipeline.data.analysis_file import KernelFigures, KernelLayer, mean_frequency
from polytrope.pipeline.stages.analyze.parameters import KernelOptions
from polytrope.pipeline.stages.analyze.subject import AnalysedActivation


def analyse_kernel(activations: Sequence[AnalysedActivation], options: KernelOptions) -> KernelFigures:
    """Coefficients and spectrum of each, and the spectrum of all one after the other."""
    layers: list[KernelLayer] = []
    known: list[np.ndarray] = []
    for entry in activations:
        measured = options.inputs == "measured"
        mean, deviation = (entry.inputs.mean, entry.inputs.deviation) if measured else (0.0, 1.0)
        common = {"name": entry.name, "activation": entry.title, "mean": mean, "deviation": deviation}
        try:
            if deviation == 0.0:
                raise ValueError("all its inputs are one number")
            coefficients, truncated = hermite_coefficients(entry.module, mean, deviation)
            spectrum = _of_trace_one(circle_spectrum(coefficients, options.frequencies), coefficients)
        except ValueError as error:
            layers.append(KernelLayer(**common, missing=str(error)))
            continue
        known.append(coefficients)
        layers.append(
            KernelLayer(
                **common,
                coefficients=coefficients.tolist(),
                truncated=truncated,
                spectrum=spectrum,
                mean_frequency=mean_frequency(spectrum),
            )
        )
    whole = None
    if len(known) == len(activations):
        total = deep_spectrum(known, options.frequencies)
        whole = [float(value) for value in total / _tangent_size(known)]
    return KernelFigures(layers=layers, spectrum=whole)


def _of_trace_one(spectrum: np.ndarray, coefficients: np.ndarray) -> list[float]:
    """Divided by the kernel at correlation 1, which is the sum of its eigenvalues.

    Raises:
        ValueError: the activation is 0 for every input.
    """
    trace = float((1.0 + np.arange(len(coefficients))) @ coefficients**2)
    if trace == 0.0:
        raise ValueError("it gives 0 for every input")
    return [float(value) for value in spectrum / trace]


def _tangent_size(layers: Sequence[np.ndarray]) -> float:
    """The deep kernel at correlation 1."""
    tangent = 1.0
    for coefficients in layers:
        squares = coefficients**2
        tangent = 1.0 + tangent * float(np.arange(len(squares)) @ squares) / float(squares.sum())
    return tangent
