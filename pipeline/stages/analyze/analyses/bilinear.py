"""Bilinear autoencoders of what the blocks of a network give: latents that are quadratic forms of rank 2.

f = (Lx) ∘ (Rx) of vectors x of length 1, decoded by its own weights into the square: Σ_j f_j sym(l_j r_jᵀ) ≈ xxᵀ
(Dooms, Gauderis, Finding Manifolds With Bilinear Autoencoders, 2025). With G = ((LLᵀ) ∘ (RRᵀ) + (LRᵀ) ∘ (RLᵀ)) / 2 the
squared error is fᵀGf - 2‖f‖² + 1, in which no D × D matrix per vector stands. The density is Hoyer's (Non-negative
Matrix Factorization with Sparseness Constraints, 2004). The comparison with principal components is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polytrope.pipeline.data.analysis_file import BilinearFigures, BilinearLayer
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.analyze.parameters import BilinearOptions
from polytrope.pipeline.stages.analyze.subject import Subject, block_outputs

_MOST = 10**12  # products of a fit that are not too many to wait for
_SMALLEST = 1e-12  # an eigenvalue below this share of the largest is rounding


def analyse_bilinear(subject: Subject, options: BilinearOptions) -> BilinearFigures:
    """A fit per block, seconds for a width of 64; wider than about 200, lower `latents` or `vectors`.

    Raises:
        UserError: no block has vectors that one can be fitted to.
    """
    layers, missing = [], []
    for number, outputs in enumerate(block_outputs(subject), start=1):
        found = _layer(f"block {number}", outputs, options)
        if isinstance(found, str):
            missing.append(found)
        else:
            layers.append(found)
    if not layers:
        raise UserError("; ".join(missing))
    return BilinearFigures(layers=layers, missing=missing)


def _layer(name: str, outputs: Tensor, options: BilinearOptions) -> BilinearLayer | str:
    """The figures of one block, or why it has none."""
    if not bool(outputs.isfinite().all()):
        return f"{name}: bilinear: it gives numbers that are not finite"
    outputs = outputs[outputs.abs().amax(1) > 0.0]  # 0 has no direction
    places = torch.linspace(0, len(outputs) - 1, min(options.vectors, len(outputs))).round().long()
    chosen = outputs[places] / outputs[places].abs().amax(1, keepdim=True)
    chosen = chosen / chosen.norm(dim=1, keepdim=True)
    fitted, asked = chosen[0::2], chosen[1::2]
    if len(asked) < 2:
        return f"{name}: bilinear: {len(outputs)} vectors other than 0 are too few; raise `samples`"
    width = chosen.size(1)
    latents = 4 * width if options.latents is None else options.latents
    products = 3 * options.steps * latents * (4 * latents * width + len(fitted) * (latents + 2 * width))
    if products > _MOST:
        return (
            f"{name}: bilinear: {latents} latents of {width} features on {len(fitted)} vectors are {products:.1e} "
            f"products, more than {_MOST:.0e}; lower `latents`, `vectors` or `steps`"
        )
    left, right = fit_autoencoder(fitted, latents, options)
    features = encode(left, right, asked)
    if not bool(features.isfinite().all()):
        return f"{name}: bilinear: the fit is not finite; lower `learning_rate`"
    # n vectors have no more than n components
    components = min(max(1, 2 * latents * width // (width * (width + 1) // 2)), len(fitted))
    order = features.square().mean(0).argsort(descending=True, stable=True)
    squares = features.square().sum(0)
    lengths = left.norm(dim=1) * right.norm(dim=1)
    cosines = ((left * right).sum(1).abs() / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).clamp(max=1.0)
    return BilinearLayer(
        name=name,
        vectors=len(outputs),
        width=width,
        latents=latents,
        error=float(squared_errors(left, right, features).mean()),
        principal_error=float(principal_errors(fitted, asked, components).mean()),
        principal_components=components,
        linear_error=float(principal_errors(fitted, asked, latents).mean()),
        density=float(hoyer_density(features).mean()),
        squareness=float((cosines * squares).sum() / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)),
        eigenvalues=[(float(low), float(high)) for low, high in latent_eigenvalues(left, right)[order]],
    )


def fit_autoencoder(vectors: Tensor, latents: int, options: BilinearOptions) -> tuple[Tensor, Tensor]:
    """L and R `[latents, width]` by Adam on all vectors at once, from orthogonal matrices of the seed.

    Args:
        vectors: `[n, width]` float64, of length 1.
    """
    generator = torch.Generator().manual_seed(options.seed)
    left, right = (
        torch.nn.init.orthogonal_(torch.empty(latents, vectors.size(1), dtype=vectors.dtype), generator=generator)
        for _ in range(2)
    )
    weights = [left.requires_grad_(), right.requires_grad_()]
    optimizer = torch.optim.Adam(weights, lr=options.learning_rate)
    for _ in range(options.steps):
        features = encode(left, right, vectors)
        loss = squared_errors(left, right, features).mean()
        if options.sparsity > 0.0:
            loss = loss + options.sparsity * hoyer_density(features).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return left.detach(), right.detach()


def encode(left: Tensor, right: Tensor, vectors: Tensor) -> Tensor:
    """(Lx) ∘ (Rx), `[n, width]` to `[n, latents]`."""
    return (vectors @ left.T) * (vectors @ right.T)


def squared_errors(left: Tensor, right: Tensor, features: Tensor) -> Tensor:
    """‖Σ_j f_j sym(l_j r_jᵀ) - xxᵀ‖² of the features of vectors of length 1, `[n, latents]` to `[n]`."""
    crossed = left @ right.T
    gram = 0.5 * ((left @ left.T) * (right @ right.T) + crossed * crossed.T)
    return ((features @ gram) * features).sum(1) - 2.0 * features.square().sum(1) + 1.0


def hoyer_density(features: Tensor) -> Tensor:
    """(‖f‖₁ / ‖f‖₂ - 1) / (√m - 1) of every row of `[n, m]`: 1 where all are equally large, 0 where one is not 0, and
    where all are.

    1 where m is.
    """
    if features.size(1) == 1:
        return torch.ones(len(features), dtype=features.dtype)
    lengths = features.norm(dim=1)
    ratio = features.abs().sum(1) / lengths.clamp(min=torch.finfo(features.dtype).tiny)
    density: Tensor = (ratio - 1.0).clamp(min=0.0) / (features.size(1) ** 0.5 - 1.0)
    return density


def principal_errors(fitted: Tensor, asked: Tensor, components: int) -> Tensor:
    """‖P xxᵀ - xxᵀ‖² with P the projection on the first principal components of the squares of other vectors.

    They are not centred, as the autoencoder has no bias. Squares are never formed: the inner product of xxᵀ and yyᵀ is
    (x·y)².

    Args:
        fitted, asked: `[n, width]` and `[k, width]` of length 1, float64.

    Returns:
        `[k]`.
    """
    values, vectors = torch.linalg.eigh((fitted @ fitted.T).square())
    values, vectors = values[-components:], vectors[:, -components:]
    known = values > _SMALLEST * values[-1]
    seen = (asked @ fitted.T).square() @ vectors[:, known]
    errors: Tensor = 1.0 - (seen.square() / values[known]).sum(1)
    return errors.clamp(min=0.0)


def latent_eigenvalues(left: Tensor, right: Tensor) -> Tensor:
    """(l·r ± ‖l‖‖r‖) / 2 of every sym(l rᵀ), the smaller first, `[latents, 2]`: all others are 0."""
    inner = (left * right).sum(1)
    lengths = left.norm(dim=1) * right.norm(dim=1)
    return torch.stack([inner - lengths, inner + lengths], dim=1) / 2.0
