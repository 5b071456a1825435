"""Learnable activations as `torch.nn` modules, and `build_activation`, which makes any of them from a configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.ops import functional, initialization, reference
from polytrope.ops.families import MAX_DEGREE, MAX_PIECES
from polytrope.ops.functional import Interval
from polytrope.ops.functional import check_interval as check_interval

Init = str | Callable[[Tensor], Tensor]


def check_degree(degree: Any, largest: int = MAX_DEGREE, name: str = "degree") -> int:
    """An integer in 1…largest.

    Raises:
        ValueError: anything else.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree <= largest:
        raise ValueError(f"{name}: expected an integer from 1 to {largest}, got {degree!r}")
    return degree


class LearnableActivation(nn.Module):
    """What all families have in common.

    Args:
        degree: 1…16.
        num_parameters: 1, or the number of groups of channels that have coefficients of their own.
        dim: the dimension of x whose channels are grouped.
        interval: (lo, hi), outside of which the function goes on along its tangents; None: everywhere its formula.
        glu: the last dimension of x holds [a, b]; the result is F(a) · b.
        init: `variance_preserving` (E[F²] = E[F'²] = 1 under N(0, 1)), `torchortho` (the published one, where there is
            one), or a function to imitate: a name of `fitting.targets.NAMED`, a callable or a module.
    """

    published = False  # whether torchortho has this family

    def __init__(
        self,
        name: str,
        degree: int,
        *,
        num_parameters: int = 1,
        dim: int = -1,
        interval: Any = None,
        glu: bool = False,
        init: Init = "variance_preserving",
    ) -> None:
        super().__init__()
        if isinstance(num_parameters, bool) or not isinstance(num_parameters, int) or num_parameters < 1:
            raise ValueError(f"num_parameters: expected an integer of at least 1, got {num_parameters!r}")
        if not isinstance(dim, int) or (glu and num_parameters > 1 and dim != -1):
            raise ValueError(f"dim: expected an integer, with glu -1, got {dim!r}")
        if init == "torchortho" and not self.published:
            raise ValueError(f"init: torchortho has no {name} activation; use variance_preserving")
        self.name = name
        self.degree = check_degree(degree)
        self.num_parameters = num_parameters
        self.dim = dim
        self.interval: Interval | None = check_interval(interval)
        self.glu = glu
        self.init = init if init == "torchortho" else "variance_preserving"

    def learn(self, **initial: Any) -> None:
        """Make these the learnable parameters, repeated for every group."""
        for name, value in initial.items():
            tensor = torch.as_tensor(value, dtype=torch.float64)
            if self.num_parameters > 1:
                tensor = tensor.expand(self.num_parameters, *tensor.shape)
            self.register_parameter(name, nn.Parameter(tensor.to(torch.get_default_dtype()).clone()))

    def imitate(self, init: Init) -> None:
        """Fit the parameters to another activation, where `init` is not one of the names of an initialisation."""
        if init in ("variance_preserving", "torchortho"):
            return
        from polytrope.ops.interpolate import fit

        try:
            found = fit(init, self.name, self.degree, interval=self.interval or (-4.0, 4.0))
        except ValueError as error:
            known = "variance_preserving, torchortho or a function to imitate"
            raise ValueError(f"init: expected {known}; {error}") from None
        with torch.no_grad():
            for name, value in found.parameters.items():
                parameter = self.get_parameter(name)
                parameter.copy_(torch.from_numpy(np.asarray(value)).expand_as(parameter))

    def _options(self) -> dict[str, Any]:
        return {"dim": self.dim, "interval": self.interval, "glu": self.glu}

    def config(self) -> dict[str, Any]:
        """What `build_activation` needs to make this module again; its parameters are in its state."""
        config: dict[str, Any] = {"name": self.name, "degree": self.degree}
        if self.interval is not None:
            config["interval"] = list(self.interval)
        defaults = {"num_parameters": 1, "dim": -1, "glu": False, "init": "variance_preserving"}
        own = {name: getattr(self, name) for name in defaults}
        return config | {name: value for name, value in own.items() if value != defaults[name]}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items() if name != "name")

    def load_torchortho_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters of the same activation of the package torchortho 0.1.2.

        Raises:
            ValueError: a state that is not one of this family and degree.
        """
        keys = self._torchortho_keys()
        if not keys:
            raise ValueError(f"state: torchortho has no {self.name} activation like this one")
        found: dict[str, Tensor] = {}
        for name, key in keys.items():
            own = self.get_parameter(name)
            count = own.numel() // self.num_parameters
            if key not in state or state[key].numel() != count:
                kept = {name: list(tensor.shape) for name, tensor in state.items()}
                raise ValueError(f"state: expected {key!r} with {count} numbers, as torchortho writes it, got {kept}")
            found[name] = state[key].detach().reshape(own.shape[1:] if self.num_parameters > 1 else own.shape)
        with torch.no_grad():
            for name, tensor in found.items():
                own = self.get_parameter(name)
                own.copy_(tensor.expand_as(own))

    def _torchortho_keys(self) -> dict[str, str]:
        """This module's parameters -> torchortho's names."""
        return {}


class OrthogonalPolynomial(LearnableActivation):
    """sum_k coefficients[k] B_k(x).

    Args:
        name: `hermite` (B_k = He_k / k!, probabilists'), `chebyshev` (T_k) or `legendre` (P_k).
        learnable_recurrence: learn the recurrence of the basis as well (`functional.favard`), starting from this one.
    """

    def __init__(self, name: str, degree: int = 3, *, learnable_recurrence: bool = False, **options: Any) -> None:
        if name not in reference.BASES:
            raise ValueError(f"basis: expected one of {', '.join(reference.BASES)}, got {name!r}")
        self.published = name == "hermite"
        super().__init__(name, degree, **options)
        self.learnable_recurrence = learnable_recurrence
        self.learn(coefficients=initialization.polynomial(name, self.degree, self.init))
        if learnable_recurrence:
            scales, couplings = initialization.recurrence(name, self.degree)
            self.learn(scales=scales, shifts=torch.zeros(self.degree), couplings=couplings)
        self.imitate(options.get("init", self.init))

    coefficients: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        if self.learnable_recurrence:
            recurrence = (self.scales, self.shifts, self.couplings)
            return functional.favard(x, self.coefficients, *recurrence, **self._options())  # type: ignore[arg-type]
        function: Callable[..., Tensor] = getattr(functional, self.name)
        return function(x, self.coefficients, **self._options())

    def config(self) -> dict[str, Any]:
        return super().config() | ({"learnable_recurrence": True} if self.learnable_recurrence else {})


class Hermite(OrthogonalPolynomial):
    """sum_k coefficients[k] He_k(x) / k!, probabilists' Hermite polynomials."""

    def __init__(self, degree: int = 3, **options: Any) -> None:
        super().__init__("hermite", degree, **options)

    def _torchortho_keys(self) -> dict[str, str]:
        return {} if self.learnable_recurrence else {"coefficients": "coefficients"}


class Chebyshev(OrthogonalPolynomial):
    """sum_k coefficients[k] T_k(x), Chebyshev polynomials of the first kind."""

    def __init__(self, degree: int = 3, **options: Any) -> None:
        super().__init__("chebyshev", degree, **options)


class Legendre(OrthogonalPolynomial):
    """sum_k coefficients[k] P_k(x), Legendre polynomials."""

    def __init__(self, degree: int = 3, **options: Any) -> None:
        super().__init__("legendre", degree, **options)


class Fourier(LearnableActivation):
    """bias + sum_k amplitudes[k] cos(frequencies[k] x - phases[k]) / k!, all learnable.

    Args:
        harmonic: bias + sum_k (cosines[k] cos(k w x) + sines[k] sin(k w x)) / k! instead, with one learnable
            `frequency` w: a single sine and cosine for any degree.
    """

    published = True

    def __init__(self, degree: int = 5, *, harmonic: bool = False, **options: Any) -> None:
        super().__init__("fourier", degree, **options)
        self.harmonic = harmonic
        bias, amplitude = initialization.fourier(self.degree, self.init)
        amplitudes = torch.full((self.degree,), amplitude, dtype=torch.float64)
        if harmonic:
            half = amplitudes / math.sqrt(2.0)  # cos(kx - π/4) = (cos kx + sin kx) / √2
            self.learn(bias=bias, frequency=1.0, cosines=half, sines=half)
        else:
            frequencies = torch.arange(1, self.degree + 1)
            phases = torch.full((self.degree,), math.pi / 4)
            self.learn(bias=bias, amplitudes=amplitudes, frequencies=frequencies, phases=phases)
            self.imitate(options.get("init", self.init))
        if harmonic and options.get("init", self.init) != self.init:
            raise ValueError("init: the harmonic mode imitates no other function; use harmonic=False")

    bias: nn.Parameter
    frequency: nn.Parameter
    cosines: nn.Parameter
    sines: nn.Parameter
    amplitudes: nn.Parameter
    frequencies: nn.Parameter
    phases: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        if self.harmonic:
            return functional.harmonic(x, self.bias, self.frequency, self.cosines, self.sines, **self._options())
        return functional.fourier(x, self.bias, self.amplitudes, self.frequencies, self.phases, **self._options())

    def config(self) -> dict[str, Any]:
        return super().config() | ({"harmonic": True} if self.harmonic else {})

    def _torchortho_keys(self) -> dict[str, str]:
        own = {"bias": "fundamental", "amplitudes": "coefficients", "frequencies": "grid", "phases": "phases"}
        return {} if self.harmonic else own


class Tropical(LearnableActivation):
    """(√2 / degree) max_k (k x + coefficients[k]): convex, piecewise linear."""

    published = True

    def __init__(self, degree: int = 5, **options: Any) -> None:
        _refuse_interval(options)
        super().__init__("tropical", degree, **options)
        self.learn(coefficients=initialization.tropical(self.degree, self.init))
        self.imitate(options.get("init", self.init))

    coefficients: nn.Parameter

    def _torchortho_keys(self) -> dict[str, str]:
        return {"coefficients": "coefficients"}

    def forward(self, x: Tensor) -> Tensor:
        return functional.tropical(x, self.coefficients, dim=self.dim, glu=self.glu)


class TropicalRational(LearnableActivation):
    """max_k (p_k x + c_k) - max_k (q_k x + d_k), all learnable: any continuous piecewise-linear function."""

    def __init__(self, degree: int = 6, **options: Any) -> None:
        _refuse_interval(options)
        super().__init__("tropical_rational", degree, **options)
        slopes, intercepts, denominator_slopes, denominator_intercepts = initialization.tropical_rational(self.degree)
        self.learn(
            numerator_slopes=slopes,
            numerator_intercepts=intercepts,
            denominator_slopes=denominator_slopes,
            denominator_intercepts=denominator_intercepts,
        )
        self.imitate(options.get("init", self.init))

    def _torchortho_keys(self) -> dict[str, str]:
        sides = (("numerator", "num"), ("denominator", "denom"))
        own = {f"{side}_slopes": f"powers_{short}" for side, short in sides}
        return own | {f"{side}_intercepts": f"coefficients_{short}" for side, short in sides}

    numerator_slopes: nn.Parameter
    numerator_intercepts: nn.Parameter
    denominator_slopes: nn.Parameter
    denominator_intercepts: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        numerator = self.numerator_slopes, self.numerator_intercepts
        denominator = self.denominator_slopes, self.denominator_intercepts
        return functional.tropical_rational(x, *numerator, *denominator, dim=self.dim, glu=self.glu)


class Rational(LearnableActivation):
    """(sum_k numerator[k] x^k) / (1 + |sum_j denominator[j] x^(j+1)|): no poles.

    Args:
        degree: of the numerator.
        denominator_degree: default: one less.
    """

    def __init__(self, degree: int = 5, denominator_degree: int | None = None, **options: Any) -> None:
        super().__init__("rational", degree, **options)
        default = self.degree - 1
        self.denominator_degree = default if denominator_degree is None else denominator_degree
        if self.denominator_degree != 0:
            check_degree(self.denominator_degree, name="denominator_degree")
        numerator, denominator = initialization.rational(self.degree, self.denominator_degree)
        self.learn(numerator=numerator, denominator=denominator)
        if self.denominator_degree == default:
            self.imitate(options.get("init", self.init))
        elif options.get("init", self.init) != self.init:
            raise ValueError(f"denominator_degree: expected {default} with an init that imitates")

    numerator: nn.Parameter
    denominator: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return functional.rational(x, self.numerator, self.denominator, **self._options())

    def config(self) -> dict[str, Any]:
        default = self.denominator_degree == self.degree - 1
        return super().config() | ({} if default else {"denominator_degree": self.denominator_degree})


class PolyReLU(LearnableActivation):
    """sum_k coefficients[k] max(x, 0)^k (Zhuo et al., "Polynomial composition activations", 2024)."""

    def __init__(self, degree: int = 3, **options: Any) -> None:
        super().__init__("polyrelu", degree, **options)
        self.learn(coefficients=initialization.polyrelu(self.degree))
        self.imitate(options.get("init", self.init))

    coefficients: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return functional.polyrelu(x, self.coefficients, **self._options())


class PolyNorm(LearnableActivation):
    """bias + sum_k coefficients[k] x^k / rms(x^k) over the last dimension (Zhuo et al., 2024): not elementwise."""

    def __init__(self, degree: int = 3, *, epsilon: float = 1e-6, init: str = "variance_preserving") -> None:
        if init != "variance_preserving":
            raise ValueError(f"init: expected variance_preserving, got {init!r}")
        super().__init__("polynorm", degree)
        self.epsilon = epsilon
        coefficients, bias = initialization.polynorm(self.degree)
        self.learn(coefficients=coefficients, bias=bias)

    coefficients: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return functional.polynorm(x, self.coefficients, self.bias, epsilon=self.epsilon)

    def config(self) -> dict[str, Any]:
        return super().config() | ({} if self.epsilon == 1e-6 else {"epsilon": self.epsilon})


class PiecewiseLinear(LearnableActivation):
    """Lines between equidistant knots whose `values` are learned; the outer lines go on.

    Args:
        degree: the number of pieces, 1…64.
        interval: the first and the last knot.
    """

    def __init__(self, degree: int = 8, *, interval: Any = (-4.0, 4.0), **options: Any) -> None:
        super().__init__("piecewise_linear", 1, interval=interval, **options)
        if self.interval is None:
            raise ValueError("interval: expected (lo, hi), the first and the last knot, got None")
        self.degree = check_degree(degree, MAX_PIECES)
        knots = torch.linspace(*self.interval, self.degree + 1, dtype=torch.float64)
        self.register_buffer("knots", knots, persistent=False)
        self.learn(values=initialization.piecewise_linear(knots.numpy()))
        self.imitate(options.get("init", self.init))

    def imitate(self, init: Init) -> None:
        if init != self.init:
            from polytrope.ops.fitting.targets import resolve_target

            with torch.no_grad():
                self.values.copy_(resolve_target(init)(self.knots).expand_as(self.values))

    knots: Tensor
    values: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return functional.piecewise_linear(x, self.knots, self.values, dim=self.dim, glu=self.glu)


def _refuse_interval(options: Mapping[str, Any]) -> None:
    if options.get("interval") is not None:
        raise ValueError("interval: not for a function that ends in straight lines already; leave it out")


LEARNABLE: dict[str, Callable[..., LearnableActivation]] = {
    "hermite": Hermite,
    "chebyshev": Chebyshev,
    "legendre": Legendre,
    "fourier": Fourier,
    "tropical": Tropical,
    "tropical_rational": TropicalRational,
    "rational": Rational,
    "polyrelu": PolyReLU,
    "polynorm": PolyNorm,
    "piecewise_linear": PiecewiseLinear,
}
CLASSICAL: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def read_activation(config: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options) of an activation's configuration; `hermite3` is short for `{name: hermite, degree: 3}`.

    Raises:
        ValueError: unknown name; says what is accepted.
    """
    options: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(config)
    name = options.pop("name", None)
    short = re.fullmatch(r"([a-z_]+?)(\d+)", name) if isinstance(name, str) else None
    if short and short[1] in LEARNABLE and "degree" not in options:
        name, options = short[1], {"degree": int(short[2]), **options}
    if name not in CLASSICAL and name not in LEARNABLE:
        raise ValueError(f"activation {name!r}: expected one of {', '.join([*CLASSICAL, *LEARNABLE])}")
    return str(name), options


def build_activation(config: str | dict[str, Any]) -> nn.Module:
    """The activation of a configuration: a name (`gelu`, `hermite3`), or a dict of `name` and that module's arguments.

    Raises:
        ValueError: unknown name, unknown or wrong argument; says what is accepted.
    """
    name, options = read_activation(config)
    if name in CLASSICAL:
        if options:
            raise ValueError(f"activation {name!r} takes no options, got {', '.join(options)}")
        return CLASSICAL[name]()
    try:
        return LEARNABLE[name](**options)
    except TypeError as error:
        raise ValueError(f"activation {name!r}: {error}") from None


def is_learnable_activation(module: nn.Module) -> bool:
    """Whether a module is one of this package's activations, whose parameters are coefficients."""
    return isinstance(module, LearnableActivation)
