"""Plots of the pages on activations and parts, drawn with the package's own modules and fits: no curve is copied."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from polytrope.models.configurations import MLPConfig
from polytrope.models.mlp import MLP
from polytrope.models.parts.attention import causal_means, even_power
from polytrope.models.parts.feedforward import QuadraticLinear
from polytrope.models.parts.kan import basis
from polytrope.models.parts.mixer import build_mixer
from polytrope.models.parts.mu import MuLayer
from polytrope.models.parts.pade import PadeLinear
from polytrope.models.parts.pi import PiLinear
from polytrope.models.parts.polynomial_mixer import CausalPolynomialMixer
from polytrope.models.parts.reciprocal import root_error
from polytrope.models.parts.settings import (
    KANSettings,
    MuSettings,
    PadeSettings,
    PiSettings,
    PolynomialMixerSettings,
    read_part,
)
from polytrope.ops import build_activation
from polytrope.ops.functional import chebyshev, hermite, legendre
from polytrope.ops.interpolate import Fit, fit
from polytrope.ops.modules import LEARNABLE
from polytrope.ops.spectra import circle_spectrum, hermite_coefficients
from polytrope.ops.variance_map import LARGEST, SMALLEST, variance_map

# family → options of its module, degrees of the fits to GELU (none: the family is not fitted)
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "hermite": ({"degree": 3}, (4, 6, 8)),
    "chebyshev": ({"degree": 3}, (4, 6, 8)),
    "legendre": ({"degree": 3}, (4, 6, 8)),
    "fourier": ({"degree": 5}, (2, 3, 5)),
    "tropical": ({"degree": 5}, (2, 4, 8)),
    "tropical_rational": ({"degree": 6}, (2, 4, 6)),
    "rational": ({"degree": 5}, (3, 4)),
    "polyrelu": ({"degree": 3}, (2, 3, 5)),
    "piecewise_linear": ({"degree": 8}, ()),
    "polynorm": ({"degree": 3}, ()),
    "rational_spline": ({"degree": 8}, (4, 8, 16)),
}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
INTERVAL = (-4.0, 4.0)
SPAN = (-6.0, 6.0)


STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "polytrope"}


def part_plots() -> dict[str, str]:
    """Name → SVG, of the pages on parts of models."""
    with plt.rc_context(STYLE):
        return {
            "attention": _attention(),
            "quadratic": _quadratic(),
            "pade": _pade(),
            "mu": _mu(),
            "max_plus": _max_plus(),
            "mixer": _polynomial_mixer(),
            "inverse_root": _inverse_root(),
            "kan": _kan(),
            "pi": _pi(),
            "siren": _siren(),
        }


def analysis_plots() -> dict[str, str]:
    """Name → SVG, of the page on analyses."""
    with plt.rc_context(STYLE):
        return {"spectra": _spectra(), "variances": _variances(), "grokking": _grokking()}


def all_plots() -> dict[str, str]:
    """Name → SVG, of the pages on activations."""
    with plt.rc_context(STYLE):
        families = {name: _family(name) for name in FAMILIES}
        return {**families, "bases": _bases(), "tails": _tails(), "errors": _errors()}


def initializations(name: str) -> list[str]:
    """The named starts of a family in any degree."""
    family = LEARNABLE[name]
    starts = [start for start in family.starts if start != "siren"]
    return [*starts, *(["torchortho"] if family.published else [])]


@functools.cache
def gelu_fit(family: str, degree: int) -> Fit:
    """The fit to GELU that plots and tables show: Sobolev least squares on `INTERVAL`."""
    return fit("gelu", family, degree, interval=INTERVAL)


def value_and_slope(module: Callable[[Tensor], Tensor], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F and F' of an elementwise module."""
    inputs = torch.from_numpy(x).requires_grad_()
    value = module(inputs)
    (slope,) = torch.autograd.grad(value.sum(), inputs)
    return value.detach().numpy(), slope.numpy()


def _grid(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 601)


def _logarithmic(axis: Any) -> None:
    """Decades in plain text: mathematical text is slow to set."""
    axis.set_yscale("log")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))


def _describe(axis: Any, across: str, up: str = "") -> None:
    """Names of the axes, a grid and the legend of what was drawn."""
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=6)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    count = len(figure.axes)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(0.5 / width, 0.4 / height, 1 - 0.1 / width, 1 - 0.25 / height, 0.18 if count > 1 else 0)
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def _family(name: str) -> str:
    """Initial value and slope; where the family is fitted, fits to GELU and their errors."""
    options, degrees = FAMILIES[name]
    figure, axes = plt.subplots(1, 3 if degrees else 2, figsize=(9, 2.8))
    x = _grid(-3.5, 3.5)
    for init, style in zip(initializations(name), ("-", "--", ":"), strict=False):
        module = build_activation({"name": name, **options, "init": init}).double()
        if name == "polynorm":
            value, slope = _row_of_normals(module, x)
        else:
            value, slope = value_and_slope(module, x)
        axes[0].plot(x, value, style, color="C0", label=f"F, {init}")
        if len(axes) == 3:
            axes[0].plot(x, slope, style, color="C1", label=f"F′, {init}")
        else:
            axes[1].plot(x, slope, style, color="C1", label=f"F′, {init}")
    axes[0].set_title(f"initial {name.replace('_', ' ')}, degree {options['degree']}")
    if not degrees:
        axes[1].set_title("its slope")
    else:
        _fits(name, degrees, axes[1], axes[2])
    for axis in axes:
        _describe(axis, "x")
    return _svg(figure)


def _fits(name: str, degrees: tuple[int, ...], curves: Any, errors: Any) -> None:
    x = _grid(*SPAN)
    gelu = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    curves.plot(x, gelu, color="black", linewidth=0.8, label="GELU")
    for degree in degrees:
        value, _ = gelu_fit(name, degree).curve(x)
        curves.plot(x, value, label=f"degree {degree}")
        errors.plot(x, np.abs(value - gelu) + 1e-12, label=f"degree {degree}")
    for axis in (curves, errors):
        axis.axvspan(*INTERVAL, color="black", alpha=0.04)
    _logarithmic(errors)
    errors.set_ylim(1e-7, 10)
    curves.set_ylim(-1.5, 6.5)
    curves.set_title("fitted to GELU on [-4, 4]")
    errors.set_title("|F - GELU|")


def _row_of_normals(module: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PolyNorm is not elementwise: x beside many normal numbers in one row, which fix the root mean squares."""
    normals = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    rows = torch.cat([torch.from_numpy(x)[:, None], normals.expand(len(x), -1)], dim=1).requires_grad_()
    value = module(rows)[:, 0]
    (slope,) = torch.autograd.grad(value.sum(), rows)
    return value.detach().numpy(), slope[:, 0].numpy()


def _bases() -> str:
    """The basis polynomials of degree 0…4, from the functions with a single coefficient of 1."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6))
    titles = {hermite: "Heₖ(x) / k!", chebyshev: "Tₖ(x)", legendre: "Pₖ(x)"}
    for axis, (function, title) in zip(axes, titles.items(), strict=True):
        bound = 3.0 if function is hermite else 1.0
        x = _grid(-bound, bound)
        for k in range(5):
            coefficients = torch.zeros(5, dtype=torch.float64)
            coefficients[k] = 1.0
            axis.plot(x, function(torch.from_numpy(x), coefficients).numpy(), label=f"k = {k}")
        axis.set_title(title)
        axis.grid(alpha=0.25)
        axis.set_xlabel("x")
    axes[0].legend(fontsize=6)
    return _svg(figure)


def _tails() -> str:
    """The same polynomial with and without tangent lines outside its interval."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    x = _grid(-7.0, 7.0)
    found = gelu_fit("hermite", 8)
    module: Any = found.build(torch.float64)
    bare = hermite(torch.from_numpy(x), module.coefficients.detach()).numpy()
    axis.plot(x, torch.nn.functional.gelu(torch.from_numpy(x)).numpy(), color="black", linewidth=0.8, label="GELU")
    axis.plot(x, bare, "--", label="polynomial alone")
    axis.plot(x, module(torch.from_numpy(x)).detach().numpy(), label="with tangents outside [-4, 4]")
    axis.axvspan(*INTERVAL, color="black", alpha=0.04)
    axis.set_ylim(-10, 10)
    _describe(axis, "x")
    return _svg(figure)


def _errors() -> str:
    """Largest error on the interval against the number of learnable numbers, all fitted families."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    degrees = {
        "fourier": (2, 3, 5),
        "rational": (3, 4),
        "polyrelu": (2, 3, 5),
        "tropical": (2, 4, 8),
        "tropical_rational": (2, 4, 6),
        "rational_spline": (1, 2, 4, 6, 8),
    }
    for name, (_, fitted) in FAMILIES.items():
        if not fitted or name in ("chebyshev", "legendre"):
            continue
        fits = [gelu_fit(name, degree) for degree in degrees.get(name, (2, 4, 6, 8, 10, 12))]
        counts = [len(item.coefficients) for item in fits]
        axis.plot(counts, [item.certificate.maximum for item in fits], "o-", markersize=3, label=name)
    _logarithmic(axis)
    _describe(axis, "learnable numbers", "largest |F - GELU| on [-4, 4]")
    return _svg(figure)


def _spectra() -> str:
    """Tangent kernels of activations at the start: eigenvalues on the circle, of trace 1."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    for name in ("hermite3", "hermite8", "fourier5", "gelu", "relu"):
        coefficients, _ = hermite_coefficients(build_activation(name))
        trace = float((1 + np.arange(len(coefficients))) @ coefficients**2)
        spectrum = circle_spectrum(coefficients, 12) / trace
        axis.plot(np.where(spectrum > 1e-14, spectrum, np.nan), marker="o", markersize=3, label=name)
    axis.set_yscale("log")
    _describe(axis, "frequency on the circle", "eigenvalue")
    return _svg(figure)


def _variances() -> str:
    """Maps of variances of activations at the start, and the line of variances that stay."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    starts = {
        "hermite3, init: variance_preserving": {"name": "hermite", "degree": 3, "init": "variance_preserving"},
        "hermite3, init: stable": {"name": "hermite", "degree": 3, "init": "stable"},
        "fourier5": "fourier5",
        "tropical5": "tropical5",
    }
    for title, start in starts.items():
        found = variance_map(build_activation(start))
        axis.plot(found.variances, found.images, label=title)
    axis.plot([SMALLEST, LARGEST], [SMALLEST, LARGEST], color="black", linewidth=0.8, linestyle="--")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(SMALLEST, LARGEST)
    _describe(axis, "variance of the inputs", "of the outputs")
    return _svg(figure)


def _grokking() -> str:
    """Accuracies of the first seed of the benchmark, and its steps to the rule by the scale of the outputs."""
    record = json.loads((RESULTS / "grokking.json").read_text(encoding="utf-8"))
    figure, (curves, scales) = plt.subplots(1, 2, figsize=(9, 3.2))
    for index, (name, curve) in enumerate(record["curves"].items()):
        curves.plot(curve["steps"], curve["test"], color=f"C{index}", label=name)
        curves.plot(curve["steps"], curve["train"], color=f"C{index}", linewidth=0.6, linestyle=":")
    curves.set_xscale("log")
    curves.set_title(f"accuracy, seed {record['seeds'][0]}; dotted: on the training pairs")
    names = list(next(iter(record["scales"].values())))
    for name in names:
        found = [(float(scale), rows[name].get("generalised_step", [])) for scale, rows in record["scales"].items()]
        points = [(scale, step) for scale, steps in found for step in steps if step is not None]
        (line,) = scales.plot(*zip(*points, strict=True), "o", markersize=3, label=name)
        means = [(scale, np.mean(steps)) for scale, steps in found if steps and None not in steps]
        scales.plot(*zip(*means, strict=True), color=line.get_color(), linewidth=0.8)
    scales.set_xscale("log")
    scales.set_title("step at which 99 % of the other pairs are right")
    _describe(curves, "step")
    _describe(scales, "scale α of the outputs")
    return _svg(figure)


def _attention() -> str:
    """Entropy of the weights of standard normal scores, over that of equal weights."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    lengths = [4, 8, 16, 32, 64, 128, 256]
    scores = torch.randn(500, lengths[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def entropy(weights: Tensor) -> float:
        return float(-torch.xlogy(weights, weights).sum(-1).mean()) / float(np.log(weights.size(-1)))

    def power_weights(length: int, power: int) -> Tensor:
        means, denominators = causal_means(even_power(scores[:, None, :length], power))
        return (means / denominators)[:, 0]

    axis.plot(lengths, [entropy(scores[:, :length].softmax(-1)) for length in lengths], color="black", label="softmax")
    for power in (2, 4):
        values = [entropy(power_weights(length, power)) for length in lengths]
        axis.plot(lengths, values, label=f"power {power}, bare (α = 1, β = 0)")
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 1)
    _describe(axis, "visible tokens T", "entropy / ln T")
    return _svg(figure)


def _quadratic() -> str:
    return _degrees([QuadraticLinear(8, 8, bias=True, square=True).double() for _ in range(3)], 0.4)


def _mu() -> str:
    layers = [MuLayer(8, MuSettings(), bias=True, epsilon=1e-6).double() for _ in range(3)]
    return _degrees([torch.nn.Sequential(layer, torch.nn.Linear(32, 8).double()) for layer in layers], 0.35)


def _degrees(layers: list[torch.nn.Module], size: float) -> str:
    """Chebyshev coefficients along a line through stacks of layers of width 8 with random weights of this deviation."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    generator, width = torch.Generator().manual_seed(0), 8
    with torch.no_grad():
        for layer in layers:
            for weight in layer.parameters():
                weight.copy_(size * torch.randn(weight.shape, generator=generator))
        for depth in (1, 2, 3):
            sizes = _sizes_along_a_line(torch.nn.Sequential(*layers[:depth]), width)
            axis.plot(sizes, "o-", markersize=3, label=f"layers: {depth}")
    _logarithmic(axis)
    _describe(axis, "degree along a line", "largest coefficient")
    return _svg(figure)


def _pade() -> str:
    """One Padé neuron of one input whose denominator has a zero, and the quotient that it is made of."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    layer = PadeLinear(1, 1, bias=True, settings=PadeSettings())
    x = torch.linspace(-3.0, 3.0, 601)[:, None]
    slope, constant, square, below = 0.5, 0.4, 0.3, 1.0
    with torch.no_grad():
        for weight, value in ((layer.weight, slope), (layer.bias, constant), (layer.numerator, square)):
            weight.fill_(value)
        axis.plot(x, layer(x), color="black", linestyle="dotted", label="B = 0")
        layer.denominator.fill_(below)
        quotient = (constant + slope * x + square * x**2) / (1.0 + below * x)
        axis.plot(x, torch.where(quotient.abs() < 4.0, quotient, torch.nan), label="P₂ / Q₁")
        axis.plot(x, layer(x), label="pade")
    axis.set_ylim(-4.0, 4.0)
    _describe(axis, "x", "y")
    return _svg(figure)


def _sizes_along_a_line(layer: Callable[[Tensor], Tensor], width: int, points: int = 16) -> np.ndarray:
    """Of the Chebyshev coefficients of t → layer(u + t v) on [-1, 1], the largest over the outputs, relative."""
    angles = (np.arange(points) + 0.5) * np.pi / points
    start, direction = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    line = start + torch.from_numpy(np.cos(angles))[:, None] * direction
    sizes = np.abs(np.cos(np.outer(np.arange(points), angles)) @ layer(line).numpy()).max(1)
    return np.asarray(sizes / sizes.max() + 1e-17)


def _kan() -> str:
    """The functions of every basis."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6))
    x = torch.linspace(-4.5, 4.5, 601, dtype=torch.float64)
    for axis, (name, degree) in zip(
        axes, {"hermite": 4, "fourier": 2, "tropical": 4, "spline": 6}.items(), strict=True
    ):
        for number, values in enumerate(basis(x, KANSettings(basis=name, degree=degree)), start=1):
            axis.plot(x, values, label=f"B{number}")
        axis.set_ylim(-4, 6)
        axis.set_title(f"{name}, degree {degree}")
        _describe(axis, "x")
    return _svg(figure)


def _pi() -> str:
    """Chebyshev coefficients along a line through products of layers."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for degree in (2, 4, 6):
            layer = PiLinear(8, 8, PiSettings(degree=degree)).double()
            axis.plot(_sizes_along_a_line(layer, 8), "o-", markersize=3, label=f"N = {degree}")
    _logarithmic(axis)
    _describe(axis, "degree along a line", "largest coefficient")
    return _svg(figure)


def _siren() -> str:
    """Variances of what the sines of a fresh network are given, and those of normal numbers."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    angles = torch.arange(1000) * (2 * torch.pi / 1000)
    sine = {"name": "fourier", "degree": 1, "init": "siren"}
    layers = range(2, 8)
    with torch.no_grad(), torch.random.fork_rng():
        for width in (64, 512):
            torch.manual_seed(0)
            x, found = torch.stack((angles.cos(), angles.sin()), dim=1), []
            for block in MLP(MLPConfig(inputs=2, widths=[width] * 7, activation=sine)).blocks:
                found.append(900 * float(block.layer(x).square().mean()))
                x = block(x)
            axis.plot(layers, found[1:], "o-", markersize=3, label=f"width {width}")
    expected = [1.0]
    while len(expected) < len(layers):
        expected.append(1.0 - float(np.exp(-2.0 * expected[-1])))
    axis.plot(layers, expected, "--", color="black", label="normal numbers")
    axis.set_ylim(0.5, 1.3)
    _describe(axis, "layer", "variance of 30 (W x + b)")
    return _svg(figure)


def _max_plus() -> str:
    """A row of pixels, equal in all rows, and what the three forms make of it."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    places = np.arange(48)
    row = torch.tensor(np.sin(places / 3.0) * 2.0 * np.exp(-(((places - 24) / 16.0) ** 2)) + 3.0 * (places == 36))
    image = row.expand(1, 1, 48, 48)
    axis.plot(places, row, color="black", linewidth=0.8, label="x")
    with torch.no_grad():
        for form in ("max", "min", "difference"):
            mixed = build_mixer(read_part("mixer", {"name": "max_plus", "form": form}), 1)(image)
            axis.plot(places, mixed[0, 0, 24], label=form)
    _describe(axis, "pixel", "value")
    return _svg(figure)


def _inverse_root() -> str:
    """Largest relative error of 1/√m by degree, on ranges of three ratios, without and with a step of Newton's."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    degrees = range(1, 33)
    for number, ratio in enumerate((4, 16, 100)):
        for newton, style in ((0, "-"), (1, "--")):
            errors = [root_error(degree, newton, 1.0, float(ratio)) for degree in degrees]
            label = f"b / a = {ratio}" if newton == 0 else None
            axis.plot(degrees, errors, style, color=f"C{number}", label=label)
    axis.set_ylim(1e-8, 1.0)
    _logarithmic(axis)
    _describe(axis, "degree (dashed: and one step of Newton's)", "largest relative error")
    return _svg(figure)


def _polynomial_mixer() -> str:
    """Chebyshev coefficients along a line through mixers of degree 2 and 3."""
    figure, axis = plt.subplots(figsize=(5, 2.8))
    generator, points = torch.Generator().manual_seed(0), 12
    start, direction = torch.randn(2, 1, 12, 8, dtype=torch.float64, generator=generator)
    angles = (np.arange(points) + 0.5) * np.pi / points
    with torch.no_grad():
        for degree in (2, 3):
            mixer = CausalPolynomialMixer(PolynomialMixerSettings(degree=degree, reach=4), 8, bias=True).double()
            for weight in mixer.parameters():
                weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))
            values = np.stack([mixer(start + np.cos(angle) * direction).flatten().numpy() for angle in angles])
            sizes = np.abs(np.cos(np.outer(np.arange(points), angles)) @ values).max(1)
            axis.plot(sizes / sizes.max() + 1e-17, "o-", markersize=3, label=f"degree {degree}")
    _logarithmic(axis)
    _describe(axis, "degree along a line", "largest coefficient")
    return _svg(figure)
