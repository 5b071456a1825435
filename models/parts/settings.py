"""Which parts there are, and their options: what can be checked without torch.

A part is written as its name or as `{name: …, options}`. `PARTS` lists them by the field of the model's configuration;
what builds them stands beside, in one dict per field.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from polytrope.models.per_layer import Entry, layer_configs


def _choice(usual: Any, choices: tuple[Any, ...], description: str) -> Any:
    """A field of a few values. `read` takes what was written, or raises ValueError."""

    def read(value: Any) -> Any:
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        raise ValueError(f"expected {' or '.join(map(repr, choices))}, got {value!r}")

    return field(default=usual, metadata={"read": read, "choices": choices, "description": description})


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """As JSON has it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


@dataclass(frozen=True)
class Part:
    """What all parts have: a name, and options of a few values each."""

    name: ClassVar[str]
    per_layer: ClassVar[bool] = True  # each block has its own; else one for the whole model

    def config(self) -> Entry:
        """Its name, with the options that are not the usual ones."""
        options = asdict(self, dict_factory=_plain)
        changed = {item.name: options[item.name] for item in fields(self) if getattr(self, item.name) != item.default}
        return {"name": self.name, **changed} if changed else self.name


@dataclass(frozen=True)
class Attention(Part):
    """How a token's vector becomes a mixture of those up to it."""

    fixed_weights: ClassVar[bool] = False  # no dropout of attention weights


@dataclass(frozen=True)
class SoftmaxSettings(Attention):
    """Weights are the softmax of the scores."""

    name = "softmax"


@dataclass(frozen=True)
class ReciprocalSettings:
    """1/d as a polynomial: what `export_circuit` puts in the place of the division.

    Args:
        degree: of the Chebyshev polynomial, 1…128.
        newton: steps of Newton's iteration after it, 0…8, which square the error.
        domain: [low, high] of what is divided by.
    """

    degree: int
    newton: int
    domain: tuple[float, float]

    def __post_init__(self) -> None:
        for name, least, most in (("degree", 1, 128), ("newton", 0, 8)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"reciprocal.{name}: expected an integer in {least}…{most}, got {value!r}")
        numbers = [end for end in self.domain if type(end) in (int, float)]
        if not len(numbers) == len(self.domain) == 2 or not 0.0 < self.domain[0] < self.domain[1] < math.inf:
            raise ValueError(f"reciprocal.domain: expected [low, high] with 0 < low < high, got {list(self.domain)}")


def _read_reciprocal(value: Any) -> ReciprocalSettings | None:
    if value is None:
        return None
    wanted = {item.name for item in fields(ReciprocalSettings)}
    if not isinstance(value, dict) or value.keys() != wanted:
        raise ValueError(f"expected {', '.join(sorted(wanted))}, got {value!r}")
    if not isinstance(value["domain"], (list, tuple)):
        raise ValueError(f"reciprocal.domain: expected [low, high], got {value['domain']!r}")
    return ReciprocalSettings(**{**value, "domain": tuple(value["domain"])})


@dataclass(frozen=True)
class PowerSettings(Attention):
    """Weights are an even power of the scores, divided by their sum."""

    name = "power"
    fixed_weights = True

    power: int = _choice(2, (2, 4), "2 or 4")
    recurrent: bool = _choice(
        False, (False, True), "sample with a state of fixed size instead of a cache that grows; power: 2 only"
    )
    sinks: int = _choice(
        0, (0, 1, 2, 4, 8, 16), "positions before the first, of weight 1 and value 0: what is divided by stays near 1"
    )
    reciprocal: ReciprocalSettings | None = field(
        default=None,
        metadata={
            "read": _read_reciprocal,
            "choices": (),
            "description": "{degree, newton, domain}: a polynomial instead of the division, on a range",
        },
    )

    def __post_init__(self) -> None:
        if self.recurrent and self.power != 2:
            raise ValueError(f"recurrent: only power: 2 has a state of that form, this is power: {self.power}")


@dataclass(frozen=True)
class Norm(Part):
    """What keeps the vectors of tokens or pixels at one scale."""

    per_layer = False
    over_batch: ClassVar[bool] = False  # in training, a sample's result depends on the others


@dataclass(frozen=True)
class LayerNormSettings(Norm):
    """Each vector by its own mean and variance."""

    name = "layer_norm"


@dataclass(frozen=True)
class BatchNormSettings(Norm):
    """Each channel by its mean and variance over the batch; afterwards by running averages of these."""

    name = "batch"
    over_batch = True


@dataclass(frozen=True)
class FeedForward(Part):
    """A linear layer, an activation, a linear layer back."""

    multiplicative: ClassVar[bool] = False  # it has parameters that learn at `multiplicative_learning_rate`

    def hidden(self, width: int) -> int:
        """Channels that the activation sees."""
        return 4 * width

    def products(self, width: int) -> int:
        """Multiply-adds of its matrices per vector."""
        return 8 * width**2


@dataclass(frozen=True)
class MLPSettings(FeedForward):
    """Four times as wide inside."""

    name = "mlp"


@dataclass(frozen=True)
class GatedSettings(FeedForward):
    """The activation of one half of the inner channels times the other half, with as many parameters as `mlp`."""

    name = "gated"

    def hidden(self, width: int) -> int:
        """8/3 of the width, so that three matrices have the size of two of four times the width."""
        return 8 * width // 3

    def products(self, width: int) -> int:
        """Of the inner layer with its two halves and of the outer one."""
        return 3 * width * self.hidden(width)


@dataclass(frozen=True)
class DenseSettings(FeedForward):
    """One linear layer before the activation: what an `mlp` is made of."""

    name = "dense"


@dataclass(frozen=True)
class QuadraticSettings(FeedForward):
    """The linear layers made quadratic; they start as the linear ones."""

    name = "quadratic"
    multiplicative = True

    square: bool = _choice(True, (False, True), "with a term of squared inputs: three matrices per layer, not two")

    def products(self, width: int) -> int:
        """Two or three matrices for each of `mlp`."""
        return self.matrices * 8 * width**2

    @property
    def matrices(self) -> int:
        """Of one layer."""
        return 3 if self.square else 2


# By field of the configuration, then by name. The first is what a model has where nothing is said.
PARTS: dict[str, dict[str, type[Part]]] = {
    "attention": {"softmax": SoftmaxSettings, "power": PowerSettings},
    "norm": {"layer_norm": LayerNormSettings, "batch": BatchNormSettings},
    "feedforward": {"mlp": MLPSettings, "gated": GatedSettings, "quadratic": QuadraticSettings, "dense": DenseSettings},
}


def read_part(place: str, given: Any) -> Any:
    """The settings of one part.

    Args:
        place: a field of `PARTS`.
        given: a name, or a mapping with `name` and options.

    Raises:
        ValueError: no such part, an unknown or impossible option; names the field.
    """
    kinds = PARTS[place]
    options = {"name": given} if isinstance(given, str) else given
    name = options.get("name") if isinstance(options, dict) else None
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"{place}: expected one of {', '.join(kinds)}, or {{name: …}} with its options, got {given!r}")
    known = {item.name: item.metadata["read"] for item in fields(kinds[name])}
    values = {option: value for option, value in options.items() if option != "name"}
    for option, value in values.items():
        if option not in known:
            there = f"there are: {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{place}.{option}: {name} has no such option; {there}")
        try:
            values[option] = known[option](value)
        except ValueError as error:
            prefix = "" if str(error).startswith(f"{option}.") else f"{option}: "
            raise ValueError(f"{place}.{prefix}{error}") from error
    try:
        return kinds[name](**values)
    except ValueError as error:
        raise ValueError(f"{place}.{error}") from error


def read_parts(place: str, given: Entry | list[Entry], layers: int) -> list[Any]:
    """The settings of each layer's part.

    Raises:
        ValueError: as `read_part` and `layer_configs`.
    """
    return [read_part(place, entry) for entry in layer_configs(place, given, layers)]
