"""Write a model or one activation as ONNX: learned activations become ordinary operators. Checked by running it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.formats.plain import with_plain_activations

OPSET = 17
TOLERANCE = 1e-4


class _FirstTensor(nn.Module):
    """Returns the first tensor of the model's output: exporters know nothing of output classes."""

    def __init__(self, model: nn.Module, names: Sequence[str] | None) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Any:
        if self.names is None:
            output = self.model(*inputs)
        else:
            output = self.model(**dict(zip(self.names, inputs, strict=True)))
        return output if isinstance(output, Tensor) else output[0]


def save_onnx(
    path: Path, model: nn.Module, inputs: Sequence[Tensor], names: Sequence[str] | None = None, check: bool = True
) -> float:
    """Write `path`, a float32 model; returns the largest deviation found.

    The first dimension of every input and output is free, and the length of token sequences is where the model allows
    it: one that keeps the traced length is written with that length fixed.

    Args:
        inputs: examples, from which the shapes of the other dimensions are taken.
        names: keyword of each input; None: they are positional.
        check: run the file with onnxruntime on `inputs`, and on shorter sequences, and compare.

    Raises:
        ValueError: a package is missing, an activation without plain form, an operator ONNX does not have, or outputs
            that differ by more than 1e-4 of the largest output (the file is removed then).
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ValueError("writing ONNX needs the package onnx: pip install 'polytrope[onnx]'") from error
    plain = _FirstTensor(with_plain_activations(model), names).eval().float()
    labels = list(names or [f"input_{index}" for index in range(len(inputs))])
    examples = [x.float() if x.is_floating_point() else x for x in inputs]
    tokens = all(x.dim() == 2 and not x.is_floating_point() for x in examples) and examples[0].size(1) > 1
    if not tokens or not check:
        _export(path, plain, examples, labels, free=("batch",))
        return _check(path, model, examples, labels, names) if check else 0.0
    shorter = [x[:, : x.size(1) - 1 - x.size(1) // 3] for x in examples]
    try:
        _export(path, plain, examples, labels, free=("batch", "length"))
        return max(_check(path, model, part, labels, names) for part in (examples, shorter))
    except ValueError:
        _export(path, plain, examples, labels, free=("batch",))
        return _check(path, model, examples, labels, names)


def _export(
    path: Path, plain: nn.Module, inputs: Sequence[Tensor], labels: Sequence[str], free: tuple[str, ...]
) -> None:
    with torch.no_grad():
        axes = dict(enumerate(free[: plain(*inputs).dim()]))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                plain,
                tuple(inputs),
                str(path),
                input_names=list(labels),
                output_names=["output"],
                dynamic_axes={label: dict(enumerate(free)) for label in labels} | {"output": axes},
                opset_version=OPSET,
                dynamo=False,  # the newer exporter needs onnxscript
            )
    except Exception as error:  # the exporter raises many kinds
        path.unlink(missing_ok=True)
        raise ValueError(f"{path}: ONNX export failed: {str(error).splitlines()[0]}") from error


def _check(
    path: Path,
    model: nn.Module,
    inputs: Sequence[Tensor],
    labels: Sequence[str],
    names: Sequence[str] | None,
) -> float:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("checking ONNX needs the package onnxruntime: pip install 'polytrope[onnx]'") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    try:
        (output,) = session.run(None, {label: x.numpy() for label, x in zip(labels, inputs, strict=True)})
    except Exception as error:  # onnxruntime raises many kinds
        path.unlink(missing_ok=True)
        raise ValueError(f"{path}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from error
    with torch.no_grad():
        expected = _FirstTensor(copy.deepcopy(model).cpu().float(), names).eval()(*inputs).numpy()
    if output.shape != expected.shape:
        path.unlink(missing_ok=True)
        raise ValueError(f"{path}: onnxruntime gives {list(output.shape)}, the model {list(expected.shape)}")
    deviation = float(np.abs(output - expected).max())
    scale = max(1.0, float(np.abs(expected).max()))
    if not deviation <= TOLERANCE * scale:
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{path}: onnxruntime's output deviates by {deviation:.3g}, more than {TOLERANCE} · {scale:.3g}"
        )
    return deviation
