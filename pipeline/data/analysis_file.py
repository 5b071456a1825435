"""`analysis.json`: what the `analyze` stage computed of its models and the inputs of their activations."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Literal

from pydantic import Field

from polytrope.pipeline.data.records import Record, read_record, write_record

ANALYSIS_FILE = "analysis.json"


class InputStatistics(Record):
    """What an activation receives: how many numbers, their moments and extremes."""

    count: int
    mean: float
    deviation: float
    minimum: float
    maximum: float


class MomentFigures(Record):
    """E[F²], E[F'²], and the slope at q = 1 of q → E[F(√q z)²] (`polytrope.ops.moments.Moments`)."""

    value: float
    derivative: float
    slope: float | None = None


class FixedVariance(Record):
    """A variance that the map keeps; `basin`: from where it leads there, None where it leads away."""

    variance: float
    slope: float
    basin: tuple[float, float] | None


class VarianceCurve(Record):
    """The map at some variances; `keeps_all`: it keeps every one."""

    variances: list[float]
    images: list[float]
    fixed_points: list[FixedVariance]
    keeps_all: bool


class SlopeBound(Record):
    """The largest slope over the inputs that occur, and the bound of the block's MLP that follows from it.

    Args:
        constant: max |F'| on [low, high], reached `at`.
        method: `roots` of the second derivative, exact, or `search`.
        tails: slopes of the tangents beyond the interval, where F goes on along these.
        linear_norms: spectral norms of the linear layers before and after.
        bound: product of all, of the MLP on inputs that stay in [low, high]; None without such layers.
    """

    constant: float
    at: float
    low: float
    high: float
    method: Literal["roots", "search"]
    tails: tuple[float, float] | None
    linear_norms: list[float]
    bound: float | None


class Symmetry(Record):
    """max |difference| / max |F| on [-3, 3]: of F(-x) to -F(x), of F(-x) to F(x), of F(2.5 x) to 2.5 F(x). 0: exact."""

    odd: float
    even: float
    scaling: float


class SignalLayer(Record):
    """One activation; `missing`: why some of the figures are not there."""

    name: str
    activation: str
    inputs: InputStatistics
    measured: MomentFigures | None = None
    standard: MomentFigures | None = None
    variance_map: VarianceCurve | None = None
    slope: SlopeBound | None = None
    symmetry: Symmetry | None = None
    missing: str | None = None


class SignalFigures(Record):
    """Sizes of signals: moments, map of variances, Lipschitz constants and symmetries of every activation."""

    layers: list[SignalLayer]

    def metrics(self) -> dict[str, float]:
        """The worst layer's figures."""
        slopes = [layer.standard.slope for layer in self.layers if layer.standard and layer.standard.slope is not None]
        constants = [layer.slope.constant for layer in self.layers if layer.slope is not None]
        bounds = [layer.slope.bound for layer in self.layers if layer.slope and layer.slope.bound is not None]
        found = {"largest_variance_slope": slopes, "largest_lipschitz": constants, "largest_mlp_bound": bounds}
        return {name: max(values) for name, values in found.items() if values}


class KernelLayer(Record):
    """One activation; `missing`: why it has no kernel.

    Args:
        mean, deviation: of the normal distribution of its inputs that the kernel is for.
        coefficients: c_k of the orthonormal Hermite polynomials; of a polynomial all, so that nothing is above them.
        truncated: the share of E[F²] above them.
        spectrum: eigenvalues of the tangent kernel on the circle by frequency, of a trace of 1.
        mean_frequency: weighted by them.
    """

    name: str
    activation: str
    mean: float
    deviation: float
    coefficients: list[float] | None = None
    truncated: float | None = None
    spectrum: list[float] | None = None
    mean_frequency: float | None = None
    missing: str | None = None


class KernelFigures(Record):
    """The kernel of every activation, and `spectrum` of all, one after the other, where each has one."""

    layers: list[KernelLayer]
    spectrum: list[float] | None

    def metrics(self) -> dict[str, float]:
        """The mean frequency, over the layers, and that of all of them one after the other."""
        known = [layer.mean_frequency for layer in self.layers if layer.mean_frequency is not None]
        figures = {"mean_frequency": statistics.fmean(known)} if known else {}
        return figures | ({} if self.spectrum is None else {"network_mean_frequency": mean_frequency(self.spectrum)})


class AccuracyCurve(Record):
    """Shares of the training's own pairs and of the others that were right, by step; equally long."""

    steps: list[int]
    train: list[float]
    test: list[float]


class ModularFigures(Record):
    """What a network that adds modulo p has learned; `missing`: what is None, and why.

    Args:
        train_accuracy, test_accuracy: shares of the pairs that are right at the end.
        memorised_step, generalised_step: the first measured ones at which 99 % of them were; None: never.
        frequencies, concentrations: of each neuron of the first layer its strongest frequency, and the share that it
            has of the neuron's power; 1 is a pure cosine.
        concentration: their mean, weighted by power.
        effective_frequencies: how many are in use.
        margin, best_margin: the smallest margin over the norm, and the largest one there can be.
        kernel_drift: ‖Θ - Θ_0‖ / ‖Θ_0‖ of the tangent kernel at the end and before training.
    """

    modulus: int
    train_accuracy: float
    test_accuracy: float
    curve: AccuracyCurve | None
    memorised_step: int | None
    generalised_step: int | None
    frequencies: list[int] | None
    concentrations: list[float] | None
    concentration: float | None
    effective_frequencies: float | None
    margin: float | None
    best_margin: float
    kernel_drift: float | None
    missing: list[str]

    def metrics(self) -> dict[str, float]:
        """What is there; `delay` is from memory to rule in steps, `margin_share` that of the best margin."""
        memorised, generalised = self.memorised_step, self.generalised_step
        found: dict[str, float | None] = {
            "train_accuracy": self.train_accuracy,
            "test_accuracy": self.test_accuracy,
            "memorised_step": memorised,
            "generalised_step": generalised,
            "delay": None if memorised is None or generalised is None else generalised - memorised,
            "concentration": self.concentration,
            "effective_frequencies": self.effective_frequencies,
            "margin_share": None if self.margin is None else self.margin / self.best_margin,
            "kernel_drift": self.kernel_drift,
        }
        return {name: float(value) for name, value in found.items() if value is not None}


class WidthFigures(Record):
    """Variances of the tangent kernel between two rows over draws of the weights, by width.

    Args:
        widths: of all layers.
        draws: networks per width.
        variances: of Θ(x, x') over the root of the means of Θ(x, x) and Θ(x', x').
        slope: of their logarithm against that of the width, by least squares.
        slope_error: its standard error.
    """

    widths: list[int]
    draws: int
    variances: list[float]
    slope: float
    slope_error: float

    def metrics(self) -> dict[str, float]:
        """The slope and its error."""
        return {"slope": self.slope, "slope_error": self.slope_error}


class FeatureLayer(Record):
    """What one block gives.

    Args:
        vectors, width: how many were seen, and their size.
        dimension: intrinsic, by the ratio of the distances to the two nearest neighbours.
        rank: singular values of the vectors that have the share `energy` of all squares; `utilisation`: of `width`.
        condition: the largest eigenvalue of their covariance by the smallest; None: the smallest is 0.
        information: of the last block's features, the mean of -ln(1 - R²)/2 in nats, R² of what a linear map of this
            block tells of other vectors than it was fitted to. None for the last block itself.
        unexplained: the mean of 1 - R².
    """

    name: str
    vectors: int
    width: int
    dimension: float | None
    rank: int
    utilisation: float
    condition: float | None
    information: float | None
    unexplained: float | None


class FeatureFigures(Record):
    """What the blocks give; `complexity`: the mean of `unexplained` over the blocks before the last."""

    layers: list[FeatureLayer]
    complexity: float | None
    missing: list[str]

    def metrics(self) -> dict[str, float]:
        """Of the last block, of the worst one, and means."""
        found = {
            "last_dimension": self.layers[-1].dimension,
            "utilisation": statistics.fmean(layer.utilisation for layer in self.layers),
            "largest_condition": max((layer.condition for layer in self.layers if layer.condition), default=None),
            "complexity": self.complexity,
        }
        return {name: value for name, value in found.items() if value is not None}


class MergedUnits(Record):
    """Units up to `distance` apart joined: how many are `left` in each MLP, their share of all, and the loss then; None
    if it is not finite."""

    distance: float
    left: list[int]
    share: float
    loss: float | None


class MergingFigures(Record):
    """MLPs (`names`) whose like units are joined; `loss` is that of the model as it is."""

    names: list[str]
    units: list[int]
    loss: float
    merged: list[MergedUnits]
    missing: list[str]

    def metrics(self) -> dict[str, float]:
        """Shares and losses by distance."""
        found = {"loss": self.loss}
        for entry in self.merged:
            distance = _distance(entry.distance)
            found[f"share_{distance}"] = entry.share
            if entry.loss is not None:
                found[f"loss_{distance}"] = entry.loss
        return found


def _distance(number: float) -> str:
    """With as many digits as tell it from all others, `0` and not `0.0`."""
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


class ArithmeticFigures(Record):
    """The loss with exact products by weights and with piecewise affine ones; `products`: how many of these."""

    products: int
    loss: float
    piecewise_loss: float | None
    missing: list[str]

    def metrics(self) -> dict[str, float]:
        """Both losses."""
        found = {"loss": self.loss}
        return found if self.piecewise_loss is None else {**found, "piecewise_loss": self.piecewise_loss}


class BilinearLayer(Record):
    """What one block gives, rebuilt from products of two linear functions.

    Args:
        vectors, width: how many were seen, and their size.
        latents: products f = (Lx) ∘ (Rx).
        error: mean of ‖Σ f_j sym(l_j r_jᵀ) - xxᵀ‖² over vectors of length 1 that nothing was fitted to.
        principal_error: the same of as many principal components of the xxᵀ as have no more numbers;
            `principal_components`: how many.
        linear_error: of as many components as there are latents.
        density: mean Hoyer density of the latents: 0 where one alone is not 0, 1 where all are equally large.
        squareness: mean of |l·r| / (‖l‖‖r‖) weighted by the latents' squares: 1 is the square of a linear function.
        eigenvalues: both of each sym(l rᵀ), the latent with the largest mean square first.
    """

    name: str
    vectors: int
    width: int
    latents: int
    error: float
    principal_error: float
    principal_components: int
    linear_error: float
    density: float
    squareness: float
    eigenvalues: list[tuple[float, float]]


class BilinearFigures(Record):
    """Bilinear autoencoders of what the blocks give."""

    layers: list[BilinearLayer]
    missing: list[str]

    def metrics(self) -> dict[str, float]:
        """Means over the blocks."""
        names = ("error", "principal_error", "linear_error", "density", "squareness")
        return {name: statistics.fmean(getattr(layer, name) for layer in self.layers) for name in names if self.layers}


class RankLayer(Record):
    """A linear layer: directions of its inputs and outputs in use, the smaller of both, its share of min(inputs,
    outputs), and the numbers that two factors of that rank have less; 0 where they are no smaller."""

    name: str
    inputs: int
    outputs: int
    input_rank: int
    output_rank: int
    rank: int
    utilisation: float
    saved: int


class RankFigures(Record):
    """The linear layers, the share `energy` of whose squares counts; `parameters`: of the whole model, by `saved` fewer
    if they were factored."""

    energy: float
    layers: list[RankLayer]
    parameters: int
    saved: int
    missing: list[str]

    def metrics(self) -> dict[str, float]:
        """The mean utilisation, and the share of the parameters that factors would save."""
        found = {"saved_share": self.saved / self.parameters}
        if self.layers:
            found["utilisation"] = statistics.fmean(layer.utilisation for layer in self.layers)
        return found


class AnalysedModel(Record):
    """One model: what each analysis found, or the `failure` that left nothing.

    Args:
        failures: by analysis, why it found nothing where others did.
    """

    stage: str
    digest: str
    failure: str | None = None
    failures: dict[str, str] = Field(default_factory=dict)
    signal: SignalFigures | None = None
    kernel: KernelFigures | None = None
    modular: ModularFigures | None = None
    width: WidthFigures | None = None
    features: FeatureFigures | None = None
    merging: MergingFigures | None = None
    arithmetic: ArithmeticFigures | None = None
    bilinear: BilinearFigures | None = None
    rank: RankFigures | None = None

    def metrics(self) -> dict[str, float]:
        """`signal/largest_lipschitz`, `kernel/mean_frequency`, …"""
        return {
            f"{analysis}/{name}": value
            for analysis in type(self).model_fields
            if hasattr(figures := getattr(self, analysis), "metrics")
            for name, value in figures.metrics().items()
        }


class AnalysedData(Record):
    """The data set, and how many of its validation samples were used."""

    name: str
    digest: str
    samples: int


class Analysis(Record):
    """All models on one data set."""

    format: Literal[1] = 1
    dataset: AnalysedData
    models: dict[str, AnalysedModel]

    def spectra(self) -> dict[str, list[float]]:
        """By label, of all activations one after the other; where one has no kernel, nothing."""
        return {
            label: model.kernel.spectrum
            for label, model in self.models.items()
            if model.kernel is not None and model.kernel.spectrum is not None
        }

    def accuracies(self) -> dict[str, tuple[list[int], list[float], list[float]]]:
        """By label: steps, and the accuracies on training and other pairs then."""
        curves = {label: model.modular and model.modular.curve for label, model in self.models.items()}
        return {label: (curve.steps, curve.train, curve.test) for label, curve in curves.items() if curve}

    def variance_maps(self) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
        """By label and layer: variances and what they become."""
        found = {
            label: {
                layer.name: (layer.variance_map.variances, layer.variance_map.images)
                for layer in model.signal.layers
                if layer.variance_map is not None
            }
            for label, model in self.models.items()
            if model.signal is not None
        }
        return {label: layers for label, layers in found.items() if layers}


def mean_frequency(spectrum: list[float]) -> float:
    """Of a spectrum on the circle, where every frequency but 0 has two eigenvectors; 0 where all eigenvalues are."""
    weights = [value * (2 if frequency else 1) for frequency, value in enumerate(spectrum)]
    total = sum(weights)
    return sum(frequency * weight for frequency, weight in enumerate(weights)) / total if total else 0.0


def write_analysis(directory: Path, analysis: Analysis) -> None:
    """Write `analysis.json`."""
    write_record(directory / ANALYSIS_FILE, analysis)


def read_analysis(directory: Path) -> Analysis:
    """Read `analysis.json`.

    Raises:
        UserError: not there, damaged, or of another version.
    """
    return read_record(directory / ANALYSIS_FILE, Analysis, "name an `analyze` stage")
