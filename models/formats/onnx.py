"""Write a model or one activation as ONNX: learned activations become ordinary operators. Checked by running it."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Export:
    """What was written.

    Args:
        deviation: the largest one of onnxruntime's outputs from the model's.
        free: the dimensions that may have any size: `batch`, and `length` of token sequences.
        reason: why one of these is not free; None: all that there are are.
    """

    deviation: float
    free: tuple[str, ...]
    reason: str | None = None

    def limits(self) -> str:
        """What sizes it takes, for people."""
        takes = f"any {' and '.join(self.free)}" if self.free else "only the traced sizes"
        return f"takes {takes}" if self.reason is None else f"takes {takes}, not more: {self.reason}"


def save_onnx(
    path: Path,
    model: nn.Module,
    inputs: Sequence[Tensor],
    names: Sequence[str] | None = None,
    *,
    fixed: bool = False,
) -> Export:
    """Write `path`, a float32 model; onnxruntime runs it on `inputs`, one sample and shorter sequences to compare.

    The first dimension of every input and output and the length of token sequences are free where the model allows it:
    one whose trace keeps the traced length, or number of samples, is written with that. Models of transformers compute
    attention by its definition, for the exporter has no operator for queries in groups.

    Args:
        inputs: examples, from which the shapes of the other dimensions are taken.
        names: keyword of each input; None: they are positional.
        fixed: no dimension is free, so that no operator asks for a shape.

    Raises:
        ValueError: a package is missing, an activation without plain form, an operator ONNX does not have, or outputs
            that differ by more than 1e-4 of the largest output (the file is removed then).
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ValueError("writing ONNX needs the package onnx: pip install 'polytrope[onnx]'") from error
    copied: Any = with_plain_activations(model)
    if hasattr(copied, "set_attn_implementation"):
        copied.set_attn_implementation("eager")
    plain = _FirstTensor(copied, names).eval().float()
    labels = list(names or [f"input_{index}" for index in range(len(inputs))])
    examples = [x.cpu().float() if x.is_floating_point() else x.cpu() for x in inputs]
    single, shorter = [x[:1] for x in examples], [_shorter(x) for x in examples]
    sequences = any(part.shape != x.shape for part, x in zip(shorter, examples, strict=True))
    reason = None
    tried: list[tuple[str, ...]] = [()] if fixed else [*([("batch", "length")] if sequences else []), ("batch",), ()]
    for free in tried:
        checked = [examples, *([single] if "batch" in free else []), *([shorter] if "length" in free else [])]
        try:
            _export(path, plain, examples, shorter, labels, free)
            return Export(max(_check(path, model, part, labels, names) for part in checked), free, reason)
        except ValueError as error:
            if not free:
                raise
            reason = reason or str(error).removeprefix(f"{path}: ")
    raise AssertionError("the last attempt returns or raises")


def _shorter(x: Tensor) -> Tensor:
    """Fewer tokens of each sequence; anything else as it is."""
    sequences = x.dim() == 2 and not x.is_floating_point() and x.size(1) > 1
    return x[:, : x.size(1) - 1 - x.size(1) // 3] if sequences else x


def _export(
    path: Path,
    plain: nn.Module,
    inputs: Sequence[Tensor],
    shorter: Sequence[Tensor],
    labels: Sequence[str],
    free: tuple[str, ...],
) -> None:
    """Args: shorter: the inputs at another length, which tell the dimensions that follow it."""
    try:
        with torch.no_grad(), warnings.catch_warnings(), _without_log(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            axes: dict[str, dict[int, str]] = {label: {0: "batch"} if "batch" in free else {} for label in labels}
            output = plain(*inputs)
            axes["output"] = {0: "batch"} if "batch" in free and output.dim() else {}
            if "length" in free:
                cut = [x.shape != part.shape for x, part in zip(inputs, shorter, strict=True)]
                one = len({x.size(1) for x, changed in zip(inputs, cut, strict=True) if changed}) == 1
                axes |= {
                    label: axes[label] | {1: "length" if one else f"{label}_length"}
                    for label, changed in zip(labels, cut, strict=True)
                    if changed
                }
                sizes = enumerate(zip(output.shape, plain(*shorter).shape, strict=True))
                changed_places = [place for place, (whole, part) in sizes if place and whole != part]
                axes["output"] |= {place: "length" if one else f"output_{place}" for place in changed_places}
            torch.onnx.export(
                plain,
                tuple(inputs),
                str(path),
                input_names=list(labels),
                output_names=["output"],
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,  # the newer exporter needs onnxscript
            )
    except Exception as error:  # the exporter, and the model's own code in it, raise many kinds
        path.unlink(missing_ok=True)
        raise ValueError(f"{path}: ONNX export failed: {str(error).strip() or type(error).__name__}") from error


@contextmanager
def _without_log() -> Iterator[None]:
    """Without the exporter's log, which has the whole graph beside an error.

    The exporter turns it on at each call (it asks whether a function is true, not what it returns), so that no setting
    helps: the function that prints is exchanged for the time of the call.
    """
    internals: Any = torch._C
    printing = internals._jit_onnx_log
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    internals._jit_onnx_log = lambda *_parts: None
    try:
        yield
    finally:
        logger.setLevel(level)
        internals._jit_onnx_log = printing


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
        raise ValueError(f"{path}: onnxruntime cannot run it: {str(error).strip()}") from error
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
