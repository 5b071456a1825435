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


def _whole(usual: int, most: int, description: str) -> Any:
    """A field of whole numbers from 1 to `most`."""

    def read(value: Any) -> int:
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"expected an integer in 1…{most}, got {value!r}")
        return value

    choices = tuple(range(1, most + 1))
    return field(default=usual, metadata={"read": read, "choices": choices, "description": description})


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """As JSON has it."""
    return {name: _listed(value) for name, value in items}


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Part:
    """What all parts have: a name, and options of a few values each."""

    name: ClassVar[str]
    per_layer: ClassVar[bool] = True  # each block has its own; else one for the whole model
    multiplicative: ClassVar[bool] = False  # it has parameters that learn at `multiplicative_learning_rate`

    def config(self) -> Entry:
        """Its name, with the options that are not the usual ones."""
        options = asdict(self, dict_factory=_plain)
        changed = {item.name: options[item.name] for item in fields(self) if getattr(self, item.name) != item.default}
        return {"name": self.name, **changed} if changed else self.name


@dataclass(frozen=True)
class Attention(Part):
    """How a token's vector becomes a mixture of those up to it."""

    fixed_weights: ClassVar[bool] = False  # no dropout of attention weights
    divides: ClassVar[bool] = False  # by denominators that `range_penalty` holds
    pairs: ClassVar[bool] = True  # it computes a product for each pair of positions
    heads: ClassVar[bool] = True  # its channels are those of `n_head` heads


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
    divides = True

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
class PolynomialMixerSettings(Attention):
    """A polynomial of mixtures of the last positions, without weights."""

    name = "polynomial_mixer"
    fixed_weights = True
    pairs = False
    heads = False
    multiplicative = True

    degree: int = _choice(2, (2, 3), "2 or 3")
    reach: int = _choice(16, (4, 8, 16, 32, 64), "positions that a filter sees, its own and those before: 4 … 64")


@dataclass(frozen=True)
class Norm(Part):
    """What keeps the vectors of tokens or pixels at one scale."""

    per_layer = False
    over_batch: ClassVar[bool] = False  # in training, a sample's result depends on the others
    activates: ClassVar[bool] = False  # in a block it takes the place of the activation too
    divides: ClassVar[bool] = False  # by roots of mean squares that `range_penalty` holds


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
class InverseRootSettings:
    """1/√m as a polynomial: what `export_circuit` puts in the place of the roots of all norms of a model.

    Args:
        degree, newton: as of `ReciprocalSettings`; a step makes an error e one of about -1.5 e².
        domains: [low, high] of the mean squares of each norm, in the order of their computation.
    """

    degree: int
    newton: int
    domains: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        for number in range(len(self.domains)):
            self.of(number)

    def of(self, number: int) -> ReciprocalSettings:
        """Of one norm."""
        try:
            return ReciprocalSettings(self.degree, self.newton, self.domains[number])
        except ValueError as error:
            raise ValueError(str(error).replace("reciprocal.", "root.", 1)) from error


def _read_inverse_root(value: Any) -> InverseRootSettings | None:
    if value is None:
        return None
    wanted = {item.name for item in fields(InverseRootSettings)}
    if not isinstance(value, dict) or value.keys() != wanted:
        raise ValueError(f"expected {', '.join(sorted(wanted))}, got {value!r}")
    domains = value["domains"]
    if not isinstance(domains, (list, tuple)) or not all(isinstance(entry, (list, tuple)) for entry in domains):
        raise ValueError(f"root.domains: expected a list of [low, high], got {domains!r}")
    return InverseRootSettings(**{**value, "domains": tuple(tuple(entry) for entry in domains)})


@dataclass(frozen=True)
class RMSNormSettings(Norm):
    """Each vector by the root of its mean square."""

    name = "rms"
    divides = True

    root: InverseRootSettings | None = field(
        default=None,
        metadata={
            "read": _read_inverse_root,
            "choices": (),
            "description": "{degree, newton, domains}: polynomials instead of the roots, on a range per norm",
        },
    )


@dataclass(frozen=True)
class EvoNormSettings(Norm):
    """Of a block: norm and activation in one, by the variance of groups of channels."""

    name = "evonorm"
    activates = True

    groups: int = _choice(8, (1, 2, 4, 8, 16, 32, 64), "of channels, over which the variance is taken: 1 … 64")


@dataclass(frozen=True)
class NoNormSettings(Norm):
    """Vectors stay as they are."""

    name = "none"


@dataclass(frozen=True)
class FeedForward(Part):
    """A linear layer, an activation, a linear layer back."""

    activated: ClassVar[bool] = True  # it has an activation inside
    ends_linear: ClassVar[bool] = True  # the last layer of a block is a linear one

    def hidden(self, width: int) -> int:
        """Channels inside, which the activation sees."""
        return 4 * width

    @property
    def matrices(self) -> int:
        """Of the size of its weight, in the place of one linear layer."""
        return 1

    @property
    def no_ring_operation(self) -> str | None:
        """What in its layers is no sum or product; None where nothing is."""
        return None

    @property
    def over_batch(self) -> bool:
        """In training, a sample's result depends on the others."""
        return False

    @property
    def over_space(self) -> bool:
        """A pixel's result depends on its neighbours."""
        return False

    def products(self, width: int) -> int:
        """Multiply-adds of its matrices per vector."""
        return self.matrices * 8 * width**2

    def layer_products(self, inputs: int, outputs: int) -> int:
        """Multiply-adds of the matrices of one layer of an `mlp`, per row."""
        return self.matrices * inputs * outputs


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
    ends_linear = False

    square: bool = _choice(True, (False, True), "with a term of squared inputs: three matrices per layer, not two")

    @property
    def matrices(self) -> int:
        """Two, and one of the squares."""
        return 3 if self.square else 2


@dataclass(frozen=True)
class KANSettings(FeedForward):
    """A learned function of one variable for every pair of an input and an output: a layer of an `mlp`."""

    name = "kan"

    basis: str = _choice(
        "hermite", ("hermite", "fourier", "tropical", "spline"), "what these functions are sums of: see docs/parts"
    )
    degree: int = _whole(3, 16, "functions per input; fourier: pairs of them")

    def __post_init__(self) -> None:
        if self.functions > LARGEST_EXPANSION:
            raise ValueError(
                f"degree: {self.basis} of degree {self.degree} has {self.functions} functions per input, and "
                f"{LARGEST_EXPANSION} times a dense layer is the most"
            )

    @property
    def functions(self) -> int:
        """Of the basis, per input."""
        return 2 * self.degree if self.basis == "fourier" else self.degree

    def layer_products(self, inputs: int, outputs: int) -> int:
        """One dense layer per function."""
        return self.functions * inputs * outputs


LARGEST_EXPANSION = 16  # of a `kan` layer, in dense layers


@dataclass(frozen=True)
class PiSettings(FeedForward):
    """A product of linear layers: a polynomial of a given degree, as a layer of an `mlp`."""

    name = "pi"

    degree: int = _whole(2, 16, "of the polynomial: how many linear layers are multiplied")
    skip: bool = _choice(True, (True, False), "each factor is 1 + a linear layer, so that lower degrees are there")
    activation: str = _choice(
        "none",
        ("none", "leaky_relu"),
        "leaky_relu: around every product a linear layer and leaky rectifiers, no polynomial any more",
    )

    def layer_products(self, inputs: int, outputs: int) -> int:
        """A matrix per factor; with rectifiers one more, of the products."""
        mixing = outputs**2 if self.activation != "none" else 0
        return self.degree * (inputs * outputs + mixing)


@dataclass(frozen=True)
class PadeSettings(FeedForward):
    """The linear layers made quotients of polynomials; they start as the linear ones."""

    name = "pade"
    multiplicative = True
    ends_linear = False

    # K of at least 2, for P_{K-1} is to start as the linear layer as well.
    numerator_degree: int = _choice(2, (2, 3, 4), "of the polynomials above, 2, 3 or 4")
    denominator_degree: int = _choice(1, (1, 2), "of those below: 1, which makes no poles, or 2, which may")

    @property
    def matrices(self) -> int:
        """One for each coefficient but the constant ones."""
        return self.numerator_degree + self.denominator_degree

    @property
    def no_ring_operation(self) -> str | None:
        """Always."""
        return "a quotient"


@dataclass(frozen=True)
class MuSettings(FeedForward):
    """Products of two linear layers, and no activation."""

    name = "mu"
    activated = False

    norm: str = _choice("none", ("none", "layer_norm", "batch"), "of both factors: none, layer_norm or batch")
    shift: bool = _choice(
        False, (False, True), "of images: quarters of the channels move by one pixel before they are multiplied"
    )

    def rank(self, width: int) -> int:
        """Channels between the two layers that make the second factor."""
        return max(1, self.hidden(width) // 8)

    def products(self, width: int) -> int:
        """Of the layer of the first factor, the two of the second, and the outer one."""
        hidden, rank = self.hidden(width), self.rank(width)
        return 2 * width * hidden + rank * (width + hidden)

    @property
    def no_ring_operation(self) -> str | None:
        """With layer norms."""
        return "layer norm" if self.norm == "layer_norm" else None

    @property
    def over_batch(self) -> bool:
        """With batch norms."""
        return self.norm == "batch"

    @property
    def over_space(self) -> bool:
        """With shifts."""
        return self.shift


@dataclass(frozen=True)
class Mixer(Part):
    """What mixes the pixels of each channel before the feed-forward layers."""

    def products(self, width: int) -> int:
        """Multiply-adds per pixel."""
        return 0 * width


@dataclass(frozen=True)
class DepthwiseSettings(Mixer):
    """A 7 × 7 convolution of each channel by itself."""

    name = "depthwise"

    def products(self, width: int) -> int:
        """One per pixel of the filter and channel."""
        return 49 * width


@dataclass(frozen=True)
class MaxPlusSettings(Mixer):
    """The same with maximum and plus for plus and times: no products."""

    name = "max_plus"

    form: str = _choice(
        "max", ("max", "min", "difference"), "max, min, or difference: the one less the other, with filters of its own"
    )


@dataclass(frozen=True)
class PADReSettings(Mixer):
    """A polynomial of mixtures of pixels and channels."""

    name = "padre"
    multiplicative = True

    degree: int = _choice(2, (2, 3), "2 or 3")

    def products(self, width: int) -> int:
        """Of its filters, and of 3 degree - 1 matrices."""
        return (2 * self.degree - 1) * 49 * width + (3 * self.degree - 1) * width**2


# By field of the configuration, then by name. The first is what a model has where nothing is said.
PARTS: dict[str, dict[str, type[Part]]] = {
    "attention": {"softmax": SoftmaxSettings, "power": PowerSettings, "polynomial_mixer": PolynomialMixerSettings},
    "norm": {
        "layer_norm": LayerNormSettings,
        "batch": BatchNormSettings,
        "rms": RMSNormSettings,
        "evonorm": EvoNormSettings,
        "none": NoNormSettings,
    },
    "feedforward": {
        "mlp": MLPSettings,
        "gated": GatedSettings,
        "quadratic": QuadraticSettings,
        "pade": PadeSettings,
        "mu": MuSettings,
        "dense": DenseSettings,
        "kan": KANSettings,
        "pi": PiSettings,
    },
    "mixer": {"depthwise": DepthwiseSettings, "max_plus": MaxPlusSettings, "padre": PADReSettings},
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
