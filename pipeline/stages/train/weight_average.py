"""An exponential moving average of the weights: what is validated and saved when `ema_decay` is set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Masters = Callable[[], Mapping[str, Tensor]]


class WeightAverage:
    """fp32 averages of the weights that the optimizer works on, updated after each step; the same on every rank.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the first steps do not weigh for ever (Tan & Le,
    2019, as in TensorFlow's `ExponentialMovingAverage` with `num_updates`).

    Running statistics (buffers) belong to the weights that made them: they are averaged with them.

    Args:
        model: whose weights are averaged, those that learn.
        decay: in [0, 1).
        masters: these weights in fp32, by name: of bf16 and fp16 the optimizer's, of which the model's are roundings.
    """

    def __init__(self, model: nn.Module, decay: float, masters: Masters) -> None:
        self.decay, self.updates = decay, 0
        learned = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.statistics = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        self.tensors: dict[str, Tensor] = {**learned, **self.statistics}
        self._masters = masters
        current = self._current()
        self.averages = {
            name: current[name].to(tensor.device, torch.float32, copy=True) for name, tensor in self.tensors.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now; a collective where the masters are sharded."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        whole = self._current()
        current = [whole[name].to(average.device) for name, average in self.averages.items()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1.0 - decay)

    def _current(self) -> Mapping[str, Tensor]:
        return {**self._masters(), **self.statistics}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model, rounded to its type; the trained weights come back, bit for bit."""
        trained = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self.tensors.items():
                    tensor.copy_(trained[name])

    def state(self) -> dict[str, Tensor | int]:
        """For a checkpoint."""
        return {"updates": self.updates, **{f"average.{name}": tensor for name, tensor in self.averages.items()}}

    def load(self, state: dict[str, Tensor | int]) -> None:
        """From a checkpoint."""
        self.updates = int(state["updates"])
        for name, average in self.averages.items():
            tensor = state[f"average.{name}"]
            assert isinstance(tensor, Tensor)
            average.copy_(tensor)
