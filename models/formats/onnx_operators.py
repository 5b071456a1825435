"""Which operators of an ONNX file belong to polynomial activations: additions and multiplications, or it is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch import nn

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
        model: the one that `onnx.save_onnx` has written: its nodes are named after the modules they come from.

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
        owners = [name for name in names if _comes_from(node.name, name)]
        seen.update(owners)
        if not owners and node.op_type not in RING_OPERATORS:
            rest[node.op_type] += 1
        if owners and node.op_type not in ACTIVATION_OPERATORS:
            raise ValueError(
                f"{path}: activation `{owners[0]}` has the operator {node.op_type} (node {node.name}), which is "
                "neither Add nor Mul"
            )
    missing = [name for name in names if name not in seen]
    if missing:
        raise ValueError(f"{path}: no operator of activation `{missing[0]}` is in the graph")
    return dict(sorted(rest.items()))


def _comes_from(node: str, name: str) -> bool:
    """Whether a node such as /model/h.0/mlp/activation/Mul_3 is of the module transformer.h.0.mlp.activation.

    The exporter names the modules that are called, which leaves containers out.
    """
    called = node.removeprefix("/model").strip("/").replace("/", ".").split(".")[:-1]
    parts = iter(name.split("."))
    return name == "" or (called[-1:] == name.split(".")[-1:] and all(part in parts for part in called))
