"""An exponential moving average of the weights: what is validated and saved when `ema_decay` is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """fp32 averages of all parameters of `model`, updated after each step.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the first steps do not weigh for ever (Tan & Le,
    2019, as in TensorFlow's `ExponentialMovingAverage` with `num_updates`).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = dict(model.named_parameters())
        self.averages = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [parameter.detach().float() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), current, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model; the trained weights come back, bit for bit, afterwards."""
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(trained[name])

    def state(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **{f"average.{name}": tensor for name, tensor in self.averages.items()}}

    def load(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, average in self.averages.items():
            tensor = state[f"average.{name}"]
            assert isinstance(tensor, Tensor)
            average.copy_(tensor)
