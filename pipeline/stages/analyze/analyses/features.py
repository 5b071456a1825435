"""What the blocks of a network give: its dimension, the rank in use, and from where on the last features are there.

The dimension is TwoNN (Facco, d'Errico, Rodriguez, Laio, Estimating the intrinsic dimension of datasets by a minimal
neighborhood information, 2017). How much a block tells of the last one is linear predictive information (Xu, Zhao,
Song, Stewart, Ermon, A theory of usable information under computational constraints, 2020), as feature complexity sums
it over the layers (Fel et al., Understanding Visual Feature Reliance through the Lens of Complexity, 2024; the sum of
unexplained shares is ours: it has no infinity at the last block).
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytrope.models.factorize import utilised_rank
from polytrope.pipeline.data.analysis_file import FeatureFigures, FeatureLayer
from polytrope.pipeline.stages.analyze.parameters import FeaturesOptions
from polytrope.pipeline.stages.analyze.subject import Subject, block_outputs

_RIDGE = 1e-6  # times the mean variance of the features
_SINGULAR = 1e-13  # an eigenvalue below this share of the largest is rounding


def analyse_features(subject: Subject, options: FeaturesOptions) -> FeatureFigures:
    """One pass over the samples; a Gram matrix and the distances between `neighbours` vectors per block: seconds."""
    outputs = block_outputs(subject)
    missing: list[str] = []
    last = outputs[-1]
    layers = []
    for number, vectors in enumerate(outputs, start=1):
        name = f"block {number}"
        told: tuple[float, float] | None = None
        if number < len(outputs):
            if len(vectors) < 4 * vectors.size(1):
                missing.append(
                    f"{name}: {len(vectors)} vectors are too few to tell how much {vectors.size(1)} features say of "
                    "the last block; raise `samples`"
                )
            else:
                told = linear_information(vectors, last)
                if told is None:
                    missing.append(f"{name}: the features of the last block are constant: there is nothing to tell")
        dimension = intrinsic_dimension(vectors, options.neighbours)
        if dimension is None:
            missing.append(f"{name}: fewer than three different vectors, or all equally far apart, have no dimension")
        rank = utilised_rank(torch.linalg.eigvalsh(vectors.T @ vectors), options.energy)
        layers.append(
            FeatureLayer(
                name=name,
                vectors=len(vectors),
                width=vectors.size(1),
                dimension=dimension,
                rank=rank,
                utilisation=rank / vectors.size(1),
                condition=condition_number(vectors),
                information=None if told is None else told[0],
                unexplained=None if told is None else told[1],
            )
        )
    shares = [layer.unexplained for layer in layers[:-1] if layer.unexplained is not None]
    complete = len(shares) == len(layers) - 1 > 0
    return FeatureFigures(layers=layers, complexity=sum(shares) / len(shares) if complete else None, missing=missing)


def intrinsic_dimension(vectors: Tensor, most: int) -> float | None:
    """TwoNN: (N - 1) / Σ ln(r₂ / r₁), r the distances to a vector's two nearest neighbours; equal vectors count once.

    Args:
        vectors: `[n, width]` float64.
        most: vectors, evenly spaced among them, that are compared.

    Returns:
        None where fewer than three differ, or each has its two nearest equally far away.
    """
    different = torch.unique(vectors, dim=0)
    if len(different) < 3:
        return None
    places = torch.linspace(0, len(different) - 1, min(most, len(different))).round().long()
    chosen = different[places]
    distances = torch.cdist(chosen, chosen, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.topk(3, largest=False).values[:, 1:]
    ratios = float((nearest[:, 1] / nearest[:, 0]).log().sum())
    return (len(chosen) - 1) / ratios if ratios > 0.0 else None


def condition_number(vectors: Tensor) -> float | None:
    """The largest eigenvalue of the covariance of `[n, width]` by the smallest; None where this is 0, or n is 1."""
    if len(vectors) < 2:
        return None
    values = torch.linalg.eigvalsh(torch.cov(vectors.T).reshape(vectors.size(1), -1))
    return float(values[-1] / values[0]) if values[0] > _SINGULAR * values[-1] else None


def linear_information(vectors: Tensor, targets: Tensor) -> tuple[float, float] | None:
    """(mean of -ln(1 - R²)/2 in nats, mean of 1 - R²) over the targets' features that are not constant.

    Args:
        vectors, targets: `[n, width]` float64 each; every second row fits the ridge regression, the others tell R². An
            R² below 0 counts as 0, and so does that of constant vectors.

    Returns:
        None where all features of the targets are constant.
    """
    fitted, asked = slice(0, None, 2), slice(1, None, 2)
    centre, middle = vectors[fitted].mean(0), targets[fitted].mean(0)
    x, y = vectors[fitted] - centre, targets[fitted] - middle
    gram = x.T @ x
    ridge = _RIDGE * float(gram.diagonal().mean())
    if ridge > 0.0:
        weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), x.T @ y)
    else:
        weights = torch.zeros(x.size(1), y.size(1), dtype=x.dtype)
    y = targets[asked] - middle
    left = (y - (vectors[asked] - centre) @ weights).square().sum(0)
    whole = (targets[asked] - targets[asked].mean(0)).square().sum(0)
    varies = whole > 0.0
    if not varies.any():
        return None
    unexplained = (left[varies] / whole[varies]).clamp(torch.finfo(left.dtype).eps, 1.0)
    return float(-0.5 * unexplained.log().mean()), float(unexplained.mean())
