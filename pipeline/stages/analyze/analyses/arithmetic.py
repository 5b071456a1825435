"""The loss where products by weights are piecewise affine: a multiplication that only adds the numbers' bits.

For float32 the sum of the bits of |a| and |b| less those of 1 is a number whose relative error against |a b| is between
-1/9 and 0, exact for powers of two (Mogami, Deep Neural Network Training without Multiplications, 2020; Kosson, Jaggi,
Hardware-Efficient Transformer Training via Piecewise Affine Operations, 2023).
Only evaluation: what a model trained with exact products loses.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytrope.ops import is_learnable_activation
from polytrope.pipeline.data.analysis_file import ArithmeticFigures
from polytrope.pipeline.stages.analyze.parameters import ArithmeticOptions
from polytrope.pipeline.stages.analyze.subject import Subject, validation_batches, validation_loss

_ONE = 0x3F800000  # the bits of 1.0
_SMALLEST = 0x00800000  # of the smallest normal number
_INFINITE = 0x7F800000
_AT_ONCE = 1 << 22  # products
_MOST = 10**10  # products that are not too many to wait for


def analyse_arithmetic(subject: Subject, options: ArithmeticOptions) -> ArithmeticFigures:
    """Both losses. Linear layers and convolutions are piecewise affine; other products stay as they are, and
    layers with weights among them are named.

    About ten seconds per 10⁹ products, of which 10¹⁰ are the most.
    """
    network = copy.deepcopy(subject.network)
    products = _count(network, subject)
    loss = validation_loss(subject.network, subject)
    if products > _MOST:
        said = f"arithmetic: {products:.1e} products by weights are more than {_MOST:.0e}; lower `samples`"
        return ArithmeticFigures(products=products, loss=loss, piecewise_loss=None, missing=[said])
    exact: dict[str, None] = {}
    for module in network.modules():
        forward = piecewise_layer(module, options.offset)
        if forward is not None:
            module.forward = forward  # type: ignore[method-assign, assignment]
        elif multiplies(module):
            exact[type(module).__name__] = None
    found = validation_loss(network, subject)
    missing = [f"arithmetic: products by the weights of {', '.join(exact)} stay exact"] if exact else []
    if not math.isfinite(found):
        missing.append("arithmetic: the loss is not finite")
    return ArithmeticFigures(
        products=products, loss=loss, piecewise_loss=found if math.isfinite(found) else None, missing=missing
    )


def piecewise_products(a: Tensor, b: Tensor, offset: float = 1.0) -> Tensor:
    """a ⊗ b of broadcast float32 tensors: sign · float(bits|a| + bits|b| - bits 1), and that ⊗ `offset`.

    0 where either is 0 (or subnormal) or the product would be; NaN where it would be infinite or an input is not
    finite.
    """
    first, second = (x.view(torch.int32).long() & 0x7FFFFFFF for x in (a, b))
    raised = int(torch.tensor(offset, dtype=torch.float32).view(torch.int32)) - _ONE
    bits = first + second + (raised - _ONE)
    nothing = (first < _SMALLEST) | (second < _SMALLEST) | (bits < _SMALLEST)
    too_large = (bits >= _INFINITE) | (first >= _INFINITE) | (second >= _INFINITE)
    size = bits.clamp(_SMALLEST, _INFINITE - 1).int().view(torch.float32)
    size = torch.where(a.signbit() != b.signbit(), -size, size).where(~nothing, 0.0)
    return size.where(~too_large, torch.nan)


def piecewise_linear(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    """Σ_i x_i ⊗ w_oi ⊗ offset, `[n, inputs]` and `[outputs, inputs]` to `[n, outputs]`, float32."""
    rows = max(1, _AT_ONCE // weight.numel())
    return torch.cat([piecewise_products(part[:, None], weight, offset).sum(-1) for part in x.split(rows)])


def piecewise_layer(module: nn.Module, offset: float) -> Callable[[Tensor], Tensor] | None:
    """The forward pass of a layer of weights; None of other modules."""
    if isinstance(module, nn.Linear):

        def linear(x: Tensor) -> Tensor:
            result = piecewise_linear(x.float().flatten(0, -2), module.weight.float(), offset)
            biased: Tensor = result if module.bias is None else result + module.bias
            return biased.view(*x.shape[:-1], -1).to(x.dtype)

        return linear
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, tuple):
        padding = module.padding

        def convolution(x: Tensor) -> Tensor:
            windows = F.unfold(x.float(), module.kernel_size, module.dilation, padding, module.stride)
            reach = module.dilation[0] * (module.kernel_size[0] - 1)
            height = (x.size(2) + 2 * padding[0] - reach - 1) // module.stride[0] + 1
            own = windows.transpose(1, 2).unflatten(2, (module.groups, -1))  # [batch, places, groups, inputs]
            weight = module.weight.float().flatten(1).unflatten(0, (module.groups, -1))
            parts = [
                piecewise_linear(own[:, :, group].flatten(0, 1), weight[group], offset)
                for group in range(module.groups)
            ]
            result = torch.cat(parts, dim=1).view(x.size(0), own.size(1), -1).transpose(1, 2)
            result = result.unflatten(2, (height, -1))
            biased: Tensor = result if module.bias is None else result + module.bias[:, None, None]
            return biased.to(x.dtype)

        return convolution
    return None


def multiplies(module: nn.Module) -> bool:
    """Whether it has matrices of its own that its inputs are multiplied by; an embedding looks rows up."""
    if isinstance(module, nn.Embedding) or is_learnable_activation(module):
        return False
    return any(weight.dim() >= 2 for weight in module.parameters(recurse=False))


def _count(network: nn.Module, subject: Subject) -> int:
    """Products by weights of all samples: those of the first batch times the number of batches."""
    counts: list[int] = []

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        counts.append(output.numel() * weight[0].numel())

    hooks = [
        module.register_forward_hook(count) for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    inputs, _ = next(iter(validation_batches(subject)))
    with torch.no_grad():
        network(inputs)
    for hook in hooks:
        hook.remove()
    return sum(counts) * math.ceil(subject.samples / subject.batch_size)
