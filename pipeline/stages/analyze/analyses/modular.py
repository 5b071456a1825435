"""A network that adds modulo p: when it learned the rule, and how far it is from the network that is known to be best.

Of networks f(a, b)_c = Σ_i (u_i(a) + v_i(b))² w_i(c) the largest margin min (f_{a+b} - f_c) over the norm
Σ_i (‖u_i‖² + ‖v_i‖² + ‖w_i‖²)^{3/2} is √(2/27) / (√p (p - 1)), reached by neurons that are each a cosine of one
frequency, with all frequencies in use (Morwani, Edelman, Oncescu, Zhao, Kakade, Feature emergence via margin
maximization: case studies in algebraic tasks, 2023).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from polytrope.models.checkpoint import load_model
from polytrope.models.tangent import tangent_kernel
from polytrope.ops.spectra import hermite_coefficients
from polytrope.pipeline.data.analysis_file import AccuracyCurve, ModularFigures
from polytrope.pipeline.data.model_inputs import read_tensors
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.training_file import INITIAL, read_history
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.analyze.parameters import ModularOptions
from polytrope.pipeline.stages.analyze.subject import Subject

_LEARNED = 0.99  # of the pairs


@dataclass(frozen=True)
class Pairs:
    """Those of one split: rows `[n, 2p]` float64 of two one-hot vectors, and their sums modulo p, int64 `[n]`."""

    rows: torch.Tensor
    sums: torch.Tensor


def analyse_modular(subject: Subject, options: ModularOptions) -> ModularFigures:
    """Accuracies, the training's curve, frequencies of the neurons, margin, and the drift of the tangent kernel.

    Milliseconds, but for the drift: two gradients per kernel sample and class, a second for 64 samples of 31 classes.

    Raises:
        UserError: the data are not all pairs and their sums modulo p.
    """
    network = copy.deepcopy(subject.network).double()
    train, test = (read_pairs(subject.dataset, split) for split in ("train", "validation"))
    modulus = train.rows.size(1) // 2
    if len(train.sums) + len(test.sums) != modulus**2:
        raise UserError(f"modular: {len(train.sums) + len(test.sums)} pairs, and there are {modulus**2}", _OF_MODULAR)
    missing: list[str] = []
    curve = _curve(subject.model, missing)
    with torch.no_grad():
        outputs = [network(pairs.rows) for pairs in (train, test)]
    right = [
        float((found.argmax(1) == pairs.sums).double().mean())
        for found, pairs in zip(outputs, (train, test), strict=True)
    ]
    powers = _powers(network, modulus, missing)
    margin = None
    norm = _norm(network, modulus, missing)
    if norm is not None:
        margin = smallest_margin(torch.cat(outputs), torch.cat([train.sums, test.sums])) / norm
    rows = torch.cat([train.rows, test.rows])
    kept = torch.from_numpy(np.random.default_rng(0).permutation(len(rows))[: options.kernel_samples])
    return ModularFigures(
        modulus=modulus,
        train_accuracy=right[0],
        test_accuracy=right[1],
        curve=curve,
        memorised_step=None if curve is None else first_step(curve.steps, curve.train),
        generalised_step=None if curve is None else first_step(curve.steps, curve.test),
        concentrations=None if powers is None else concentrations(powers).tolist(),
        frequencies=None if powers is None else (powers.argmax(1) + 1).tolist(),
        concentration=None if powers is None else float(powers.max(1).sum() / powers.sum()),
        effective_frequencies=None if powers is None else effective_frequencies(powers),
        margin=margin,
        best_margin=best_margin(modulus),
        kernel_drift=_drift(subject.model, network, rows[kept], missing),
        missing=missing,
    )


_OF_MODULAR = "use a data set of `shard_numbers` with `source: {kind: modular}`"


def read_pairs(dataset: Path, split: str) -> Pairs:
    """All pairs of a split.

    Raises:
        UserError: rows that are not two one-hot vectors, with the sum of their numbers modulo p as the class.
    """
    reader = open_split(dataset, split)
    rows, classes = read_tensors(reader, np.arange(len(reader)))
    if rows.dim() == 2 and rows.size(1) % 2 == 0 and not classes.is_floating_point():
        halves = rows.double().unflatten(1, (2, -1))
        first, second = halves.argmax(dim=2).unbind(dim=1)
        one_hot = nn.functional.one_hot(halves.argmax(dim=2), halves.size(2)).double()
        if torch.equal(one_hot, halves) and torch.equal((first + second) % halves.size(2), classes):
            return Pairs(rows.double(), classes)
    raise UserError(f"modular: the {split} rows of this data set are no pairs and their sums modulo p", _OF_MODULAR)


def best_margin(modulus: int) -> float:
    """√(2/27) / (√p (p - 1)), the largest margin of any network of squares."""
    return math.sqrt(2.0 / 27.0) / (math.sqrt(modulus) * (modulus - 1))


def smallest_margin(outputs: torch.Tensor, classes: torch.Tensor) -> float:
    """min (f_c - max_{c'≠c} f_c') of outputs `[n, classes]`; below 0 where one is wrong."""
    own = outputs.gather(1, classes[:, None])
    others = outputs.scatter(1, classes[:, None], -math.inf).amax(dim=1, keepdim=True)
    return float((own - others).min())


def first_step(steps: list[int], accuracies: list[float]) -> int | None:
    """The first one at which 99 % of the pairs are right."""
    return next((step for step, accuracy in zip(steps, accuracies, strict=True) if accuracy >= _LEARNED), None)


def fourier_powers(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Σ over ±k of |û(k)|² + |v̂(k)|² for the frequencies k = 1 … ⌊p/2⌋, `[neurons, ⌊p/2⌋]` float64.

    Args:
        first, second: u and v, `[neurons, p]`. Frequency 0, their mean, tells nothing of a and b and is left out.
    """
    modulus = first.size(1)
    sizes = sum(torch.fft.rfft(part.double()).abs().square() for part in (first, second))
    assert isinstance(sizes, torch.Tensor)
    twice = torch.tensor([1.0 if 2 * k == modulus else 2.0 for k in range(1, modulus // 2 + 1)], dtype=torch.float64)
    powers: np.ndarray = (sizes[:, 1:] * twice).numpy()
    return powers


def concentrations(powers: np.ndarray) -> np.ndarray:
    """Of each neuron the share of its strongest frequency; 0 of one that has no power at all."""
    total = powers.sum(1)
    shares: np.ndarray = powers.max(1) / np.where(total > 0, total, 1.0)
    return shares


def effective_frequencies(powers: np.ndarray) -> float:
    """How many frequencies are in use: 1 / Σ s_k², with s_k the share of all power that frequency k has."""
    shares = powers.sum(0) / powers.sum()
    return float(1.0 / (shares**2).sum())


def _first_layer(network: nn.Module, modulus: int) -> nn.Linear | None:
    layer = network.blocks[0].layer  # type: ignore[index, union-attr]
    return layer if isinstance(layer, nn.Linear) and layer.in_features == 2 * modulus else None


def _powers(network: nn.Module, modulus: int, missing: list[str]) -> np.ndarray | None:
    layer = _first_layer(network, modulus)
    if layer is None:
        missing.append("frequencies: the first layer is not a dense one of the two one-hot vectors")
        return None
    powers = fourier_powers(*layer.weight.detach().split(modulus, dim=1))
    if not powers.sum() > 0.0:
        missing.append("frequencies: the first layer does not depend on the pair")
        return None
    return powers


def _norm(network: nn.Module, modulus: int, missing: list[str]) -> float | None:
    """The smallest Σ_i (‖u_i‖² + ‖v_i‖² + ‖w_i‖²)^{3/2} of networks with the same margins.

    A neuron u, v, w is the neuron λu, λv, w/λ², and the best λ gives 3√3/2 (‖u‖² + ‖v‖²) ‖w‖. The square's
    coefficient and the scale of the outputs are part of w. Means of u, v over a, b and of w over c change terms of a or
    b alone, or all outputs alike, and are taken out; so are the biases and the activation's lower terms. Terms of a or
    b alone raise no margin's mean over the pairs, so that the best margin is the best of these networks, too.
    """
    layer = _first_layer(network, modulus)
    blocks: Any = network.blocks
    if layer is None or len(blocks) != 1 or network.config.norm_settings().name != "none":  # type: ignore[union-attr, operator]
        missing.append("margin: known of one dense layer of the two one-hot vectors, without a norm")
        return None
    try:
        coefficients, truncated = hermite_coefficients(blocks[0].act)  # type: ignore[arg-type]
    except ValueError as error:
        missing.append(f"margin: {error}")
        return None
    if len(coefficients) != 3 or truncated != 0.0:
        missing.append("margin: the best one is known of activations that are polynomials of degree 2")
        return None
    square = float(coefficients[2]) / math.sqrt(2.0)
    scale = abs(square) * float(network.config.output_scale)  # type: ignore[union-attr, arg-type]
    inputs = sum(
        part.sub(part.mean(1, keepdim=True)).square().sum(1) for part in layer.weight.detach().split(modulus, 1)
    )
    head = network.head.weight.detach()  # type: ignore[union-attr, operator]
    outputs = (head - head.mean(0)).norm(dim=0)
    norm = 1.5 * math.sqrt(3.0) * scale * float((inputs * outputs).sum())
    if norm == 0.0:
        missing.append("margin: the network does not depend on the pair")
        return None
    return norm


def _curve(model: Path, missing: list[str]) -> AccuracyCurve | None:
    measured = [entry for entry in read_history(model) if "val/accuracy" in entry]
    if not measured or any("fit/accuracy" not in entry for entry in measured):
        missing.append("curve: the training has not measured its own pairs; train with fit_samples")
        return None
    return AccuracyCurve(
        steps=[int(entry["step"]) for entry in measured],
        train=[float(entry["fit/accuracy"]) for entry in measured],
        test=[float(entry["val/accuracy"]) for entry in measured],
    )


def _drift(model: Path, network: nn.Module, rows: torch.Tensor, missing: list[str]) -> float | None:
    """‖Θ - Θ_0‖ / ‖Θ_0‖ of the kernels on these rows."""
    if not (model / INITIAL).is_dir():
        missing.append("kernel_drift: the weights before training are not there; train with keep_initial: true")
        return None
    before = tangent_kernel(load_model(model / INITIAL).double(), rows)
    if not bool(before.any()):
        missing.append("kernel_drift: the kernel before training is 0, and nothing is relative to that")
        return None
    now = tangent_kernel(network, rows)
    return float((now - before).norm() / before.norm())
