"""Which operators of an ONNX file belong to polynomial activations: additions and multiplications, or it is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch import nn

from polytrope.models.formats.plain import POLYNOMIAL_LABEL
from polytrope.ops import Composition

ACTIVATION_OPERATORS = frozenset({"Add", "Mul", "Constant", "Identity"})
# What arithmetic circuits have beside: products with weights, sums, and what moves numbers about.
RING_OPERATORS = ACTIVATION_OPERATORS | frozenset(
    {"Sub", "Neg", "MatMul", "Gemm", "Conv", "ReduceSum", "ReduceMean", "GlobalAveragePool", "AveragePool"}
    | {"Reshape", "Transpose", "Concat", "Slice", "Gather", "Pad", "Cast", "Squeeze", "Unsqueeze", "Expand", "Flatten"}
    | {"Shape", "ConstantOfShape", "Range", "Split"}
)


def check_polynomial(path: Path, model: nn.Module) -> dict[str, int] | None:
    """Check that the polynomials of the model that was written to `path` are sums and products there.

    Args:
        model: the one that `onnx.save_onnx` has written, where nodes of polynomials are labelled.

    Returns:
        How often each operator occurs elsewhere that is no sum or product and moves no numbers: LayerNormalization,
        Softmax, …; None if the model has no polynomials without tangents.

    Raises:
        ValueError: the first operator of an activation that is neither Add nor Mul, or an activation without nodes.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, Composition)]
    if not names:
        return None
    import onnx

    rest: Counter[str] = Counter()
    seen: set[str] = set()
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        owner = _owner(node.name)
        if owner is None:
            rest.update([node.op_type] if node.op_type not in RING_OPERATORS else [])
            continue
        seen.add(owner)
        if node.op_type not in ACTIVATION_OPERATORS:
            raise ValueError(
                f"{path}: activation `{owner}` has the operator {node.op_type} (node {node.name}), which is neither "
                "Add nor Mul"
            )
    missing = [name for name in names if name not in seen]
    if missing:
        raise ValueError(f"{path}: no operator of activation `{missing[0]}` is in the graph")
    return dict(sorted(rest.items()))


def _owner(node: str) -> str | None:
    """The activation that a node such as /model/…/polynomial=h:0:mlp:activation/Mul_3 belongs to."""
    for component in node.split("/")[:-1]:
        if component.startswith(POLYNOMIAL_LABEL):
            return component.removeprefix(POLYNOMIAL_LABEL).replace(":", ".")
    return None
