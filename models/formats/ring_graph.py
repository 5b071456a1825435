"""An ONNX file of sums and products as steps that numbers of any kind can run: floats, exact fractions, residues.

What a file may have is what arithmetic circuits have: sums, products, and what moves numbers about. Encrypted inference
and proofs read such files; the first operator of another kind is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
MERSENNE_61 = 2**61 - 1


@dataclass(frozen=True)
class Step:
    """One operator.

    Args:
        operator: its ONNX name.
        layer: the first part of its node's name: the module it was traced in.
        inputs: names of values; "" where an optional one is left out.
        output: the name of its value.
        attributes: as in the file.
    """

    operator: str
    layer: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class RingGraph:
    """The steps in order.

    Args:
        input, output: names of the values that come in and go out.
        shape: of the input.
        constants: by name, as they are in the file.
        steps: what is computed from them and the input; what follows from constants alone is a constant.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    constants: Mapping[str, Array]
    steps: list[Step]


@dataclass(frozen=True)
class Ring:
    """Numbers with sums and products.

    Args:
        number: what stands for a constant of the file, which is a fraction of powers of two.
        reduced: of what sums and products gave; an array.
        dtype: of arrays of them.
    """

    number: Callable[[Fraction], Any]
    reduced: Callable[[Array], Array]
    dtype: Any


FLOAT64 = Ring(float, lambda values: values, np.float64)
RATIONAL = Ring(lambda value: value, lambda values: values, object)


def prime_field(modulus: int = MERSENNE_61) -> Ring:
    """Residues modulo a prime: a fraction p / q is p times the inverse of q, so that results are those of fractions."""
    return Ring(
        lambda value: value.numerator * pow(value.denominator, -1, modulus) % modulus,
        lambda values: values % modulus,
        object,
    )


def read_ring_graph(path: Path) -> RingGraph:
    """The graph of an ONNX file with one input and one output of fixed shapes.

    Raises:
        ValueError: the first operator that is no sum, no product and moves no numbers, with its node; an input whose
            shape is not fixed, or more than one of them.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise ValueError(f"{path}: expected one input and one output, got {len(inputs)} and {len(graph.output)}")
    shape = tuple(int(size.dim_value) for size in inputs[0].type.tensor_type.shape.dim)
    steps: list[Step] = []
    for node in graph.node:
        if node.op_type not in _OPERATORS:
            raise ValueError(
                f"{path}: the first operator that is no sum, no product and moves no numbers is {node.op_type}, in "
                f"{node.name}"
            )
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(attributes["value"])
            continue
        step = Step(node.op_type, _layer(node.name), tuple(node.input), node.output[0], attributes)
        if all(name in constants for name in step.inputs if name):
            arguments = [constants[name] if name else None for name in step.inputs]
            constants[step.output] = _OPERATORS[step.operator](step.attributes, *arguments)
        else:
            steps.append(step)
    if 0 in shape:
        raise ValueError(f"{path}: expected an input of a fixed shape, got {list(shape)} with 0 for what is free")
    return RingGraph(inputs[0].name, graph.output[0].name, shape, constants, steps)


def _layer(name: str) -> str:
    """`block_0` of /model/block_0/attention/MatMul."""
    parts = [part for part in name.split("/")[:-1] if part and part != "model"]
    return parts[0] if parts else ""


def evaluate(graph: RingGraph, x: Array, ring: Ring = FLOAT64) -> Array:
    """The output for an input of the graph's shape, computed in a ring.

    Args:
        x: numbers of the ring, or floats, which are taken for the fractions that they are.
    """
    values: dict[str, Array] = {graph.input: _in_ring(x, ring) if x.dtype != object else x}
    kept: dict[str, Array] = {}
    for step in graph.steps:
        arguments = []
        for place, name in enumerate(step.inputs):
            if not name or place in _STRUCTURAL.get(step.operator, ()):
                arguments.append(graph.constants[name] if name else None)
            elif name in values:
                arguments.append(values[name])
            else:
                if name not in kept:
                    kept[name] = _in_ring(graph.constants[name], ring)
                arguments.append(kept[name])
        values[step.output] = ring.reduced(_OPERATORS[step.operator](step.attributes, *arguments))
    return values[graph.output]


def _in_ring(values: Array, ring: Ring) -> Array:
    if ring is FLOAT64:
        return values.astype(np.float64)
    flat = np.empty(values.size, dtype=ring.dtype)
    flat[:] = [ring.number(Fraction(float(value))) for value in values.ravel()]
    return flat.reshape(values.shape)


def _gemm(attributes: Mapping[str, Any], a: Array, b: Array, c: Array | None = None) -> Array:
    for name in ("alpha", "beta"):
        if attributes.get(name, 1.0) != 1.0:
            raise ValueError(f"Gemm with {name} {attributes[name]}")
    product: Array = (a.T if attributes.get("transA") else a) @ (b.T if attributes.get("transB") else b)
    return product if c is None else product + c


def _reshape(_attributes: Mapping[str, Any], x: Array, shape: Array) -> Array:
    sizes = [x.shape[place] if size == 0 else int(size) for place, size in enumerate(shape)]
    return x.reshape(sizes)


def _slice(
    _attributes: Mapping[str, Any],
    x: Array,
    starts: Array,
    ends: Array,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    places: list[Any] = [slice(None)] * x.ndim
    chosen = range(len(starts)) if axes is None else axes
    for index, axis in enumerate(chosen):
        places[int(axis)] = slice(int(starts[index]), int(ends[index]), None if steps is None else int(steps[index]))
    part: Array = x[tuple(places)]
    return part


def _axes(attributes: Mapping[str, Any], given: Array | None) -> tuple[int, ...]:
    found = attributes.get("axes") if given is None else given
    return tuple(int(axis) for axis in (() if found is None else found))


def _unsqueeze(attributes: Mapping[str, Any], x: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(x, _axes(attributes, axes))


def _squeeze(attributes: Mapping[str, Any], x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, _axes(attributes, axes) or None)


_Operator = Callable[..., Array]
_OPERATORS: dict[str, _Operator] = {
    "Add": lambda _attributes, a, b: a + b,
    "Sub": lambda _attributes, a, b: a - b,
    "Neg": lambda _attributes, a: -a,
    "Mul": lambda _attributes, a, b: a * b,
    "MatMul": lambda _attributes, a, b: a @ b,
    "Gemm": _gemm,
    "Reshape": _reshape,
    "Transpose": lambda attributes, x: x.transpose(attributes.get("perm")),
    "Slice": _slice,
    "Concat": lambda attributes, *parts: np.concatenate(parts, attributes["axis"]),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Identity": lambda _attributes, x: x,
    "Constant": lambda _attributes: np.empty(0),
}
# The places of arguments that say shapes and axes and are no numbers of the ring.
_STRUCTURAL = {"Reshape": (1,), "Slice": (1, 2, 3, 4), "Unsqueeze": (1,), "Squeeze": (1,)}


@dataclass(frozen=True)
class GraphCost:
    """What one evaluation costs.

    Args:
        depth: the most products of two variable (encrypted) factors that follow one another.
        levels: the same with products by constants other than 0 and ±1 counted too.
        degree: of the output as a polynomial of the input, by the product rule; an upper bound.
        products: of two variable factors.
        constant_products: of a variable factor and a constant other than 0 and ±1.
        additions: of anything.
    """

    depth: int
    levels: int
    degree: int
    products: int
    constant_products: int
    additions: int


@dataclass(frozen=True)
class _Reached:
    """What was needed to get to a variable value."""

    depth: int = 0
    levels: int = 0
    degree: int = 1


def count(graph: RingGraph) -> dict[str, GraphCost]:
    """The costs of every layer, and of all under the name "". `depth`, `levels` and `degree` are those reached there.

    Shapes are those of an evaluation with zeros, which is run.
    """
    totals: dict[str, list[int]] = {}
    furthest: dict[str, _Reached] = {}
    values: dict[str, Array] = {graph.input: np.zeros(graph.shape)}
    reached: dict[str, _Reached] = {graph.input: _Reached()}
    for step in graph.steps:
        arguments = [values.get(name, graph.constants.get(name)) if name else None for name in step.inputs]
        result = _OPERATORS[step.operator](step.attributes, *arguments)
        values[step.output] = result
        ways = [reached.get(name) for name in step.inputs]
        found = reached[step.output] = _follow(step, ways, arguments)
        total = totals.setdefault(step.layer, [0, 0, 0])
        for place, number in enumerate(_counts(step, ways, arguments, result.size)):
            total[place] += number
        before = furthest.get(step.layer, found)
        furthest[step.layer] = _Reached(
            max(before.depth, found.depth), max(before.levels, found.levels), max(before.degree, found.degree)
        )
    ends = {"": reached[graph.output], **furthest}
    totals[""] = [sum(total[place] for total in totals.values()) for place in range(3)]
    return {layer: GraphCost(end.depth, end.levels, end.degree, *totals[layer]) for layer, end in ends.items()}


def _multiplies(step: Step) -> bool:
    return step.operator in ("Mul", "MatMul", "Gemm")


def _free(factors: Array) -> Array:
    """Which of these constants cost nothing to multiply by."""
    return np.isin(factors, (0.0, 1.0, -1.0))


def _follow(step: Step, ways: Sequence[_Reached | None], arguments: Sequence[Any]) -> _Reached:
    known = [way for way in ways if way is not None]
    depth, levels = max(way.depth for way in known), max(way.levels for way in known)
    if not _multiplies(step):
        return _Reached(depth, levels, max(way.degree for way in known))
    first, second = ways[:2]
    if first is not None and second is not None:
        return _Reached(depth + 1, levels + 1, first.degree + second.degree)
    factors = arguments[0] if first is None else arguments[1]
    return _Reached(depth, levels + (not bool(_free(factors).all())), known[0].degree)


def _counts(step: Step, ways: Sequence[_Reached | None], arguments: Sequence[Any], size: int) -> tuple[int, int, int]:
    """Products of two variables, products by constants, additions.

    Args:
        size: numbers in the result.
    """
    if step.operator in ("Add", "Sub"):
        return 0, 0, size
    if not _multiplies(step):
        return 0, 0, 0
    left, right = arguments[:2]
    both = ways[0] is not None and ways[1] is not None
    if step.operator == "Mul":
        if both:
            return size, 0, 0
        factors = left if ways[0] is None else right
        return 0, int((~np.broadcast_to(_free(factors), np.broadcast_shapes(left.shape, right.shape))).sum()), 0
    if step.operator == "Gemm":
        left = left.T if step.attributes.get("transA") else left
        right = right.T if step.attributes.get("transB") else right
    added = size if len(arguments) > 2 else 0
    inner = left.shape[-1]
    if both:
        return size * inner, 0, size * (inner - 1) + added
    # Terms with a factor of 0 are left out. Each factor is used in as many results as the other side has vectors.
    factors, others = (left, right) if ways[0] is None else (right, left)
    uses = others.size // inner
    terms = int((factors != 0.0).sum()) * uses
    return 0, int((~_free(factors)).sum()) * uses, max(0, terms - size) + added
