"""Learnable activations as `torch.nn` modules, and `build_activation`, which makes any of them from a configuration.

All that differs from family to family stands in its class here: what it accepts, how it starts, how another function is
imitated, its plain form and its moments.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from polytrope.ops import functional, initialization, plain, rational_spline, tensors
from polytrope.ops.circuit import Circuit, make_circuit
from polytrope.ops.families import MAX_COMPOSED, MAX_PIECES, check_degree
from polytrope.ops.fitting import composition, solvers
from polytrope.ops.fitting.curves import Array
from polytrope.ops.fitting.polynomial import natural_variable, of_line
from polytrope.ops.fitting.targets import NAMED, find_kinks, resolve_target, sample
from polytrope.ops.functional import Interval, Variable, check_domain, check_variable
from polytrope.ops.functional import check_interval as check_interval
from polytrope.ops.moments import REACH, Moments, moments_of_hermite, moments_of_module
from polytrope.ops.plain import PlainForm

Init = str | Callable[[Tensor], Tensor]
_ROUNDING = 1e-3  # of float32, relative to the largest |F| (at least 1): what a start that imitates may lose


class Definition(NamedTuple):
    """A module's function, which takes x, the parameters in the order of `initial`, and `options` by name.

    Args:
        function: of `functional`, or one that calls it.
        options: such as `interval`.
        initial: the values that every group of channels starts with, by the parameter's name, float64.
    """

    function: Callable[..., Tensor]
    options: dict[str, Any]
    initial: dict[str, Array]


class LearnableActivation(nn.Module):
    """What all families have in common.

    Args:
        degree: 1…16.
        num_parameters: 1, or the number of groups of channels that have coefficients of their own.
        dim: the dimension of x whose channels are grouped.
        interval: (lo, hi), outside of which the function goes on along its tangents; None: everywhere its formula.
        glu: the last dimension of x holds [a, b]; the result is F(a) · b.
        init: `variance_preserving` (E[F²] = E[F'²] = 1 under N(0, 1), tangents included), `stable` (polynomials: the
            same, and deep nets without normalisation stay there), `siren` (Fourier of degree 1: sin(30 x), for an
            `mlp`), `torchortho` (the published one, where there is one), or a function to imitate: a name of
            `fitting.targets.NAMED`, a callable or a module. Default: `stable` where there is one, otherwise
            `variance_preserving`.
        device: of the parameters; default: torch's.
        dtype: of the parameters; default: torch's.
    """

    accepts_interval: ClassVar[bool] = True
    accepts_groups: ClassVar[bool] = True  # of channels, and gated use
    has_degree: ClassVar[bool] = True
    published: bool = False  # whether torchortho has this family
    starts: ClassVar[tuple[str, ...]] = ("variance_preserving",)  # beside torchortho and functions; first: the default
    variable: Variable | None = None  # of a polynomial

    def __init__(
        self,
        name: str,
        degree: int,
        *,
        num_parameters: int = 1,
        dim: int = -1,
        interval: Any = None,
        glu: bool = False,
        init: Init | None = None,
        device: torch.device | str | None = None,  # noqa: ARG002 (`learn` reads it)
        dtype: torch.dtype | None = None,  # noqa: ARG002
    ) -> None:
        super().__init__()
        if isinstance(num_parameters, bool) or not isinstance(num_parameters, int) or num_parameters < 1:
            raise ValueError(f"num_parameters: expected an integer of at least 1, got {num_parameters!r}")
        if not isinstance(dim, int) or (glu and num_parameters > 1 and dim != -1):
            raise ValueError(f"dim: expected an integer, with glu -1, got {dim!r}")
        if not self.accepts_groups and (num_parameters != 1 or dim != -1 or glu):
            raise ValueError(f"num_parameters, dim and glu: not for {name}, which is not elementwise; leave them out")
        if not self.accepts_interval and interval is not None:
            raise ValueError(f"interval: not for {name}; leave it out")
        self.name = name
        self.degree = check_degree(degree)
        self.num_parameters = num_parameters
        self.dim = dim
        self.interval: Interval | None = check_interval(interval)
        self.glu = glu
        self.init = self._named_start(init) or self.starts[0]
        self._learned: tuple[str, ...] = ()
        self._initial: dict[str, Array] = {}

    function: Callable[..., Tensor]  # of `functional`

    def _named_start(self, init: Init | None) -> str | None:
        """`init` where it is the name of an initialisation that this family has; None for a function to imitate."""
        if init is None:
            return self.starts[0]
        if init == "torchortho":
            if not self.published:
                raise ValueError(f"init: torchortho has no {self.name} activation; use variance_preserving")
            return "torchortho"
        if init == "stable" and init not in self.starts:
            having = ", ".join(name for name, family in LEARNABLE.items() if "stable" in family.starts)
            raise ValueError(f"init: stable is for {having}, not for {self.name}; use variance_preserving")
        return str(init) if init in self.starts else None

    def learn(self, function: Callable[..., Tensor], options: Mapping[str, Any], **initial: Any) -> None:
        """Make these the learnable parameters, which `function` takes after x in this order.

        Args:
            options: what the module was made with: `init`, `device` and `dtype` are read.
            initial: values for one group, which every group starts with. One number becomes a parameter `[1]`, because
                none without dimensions can be sharded.
        """
        self.function = function
        self._learned = tuple(initial)
        self._initial = {name: np.array(value, dtype=np.float64, ndmin=1) for name, value in initial.items()}
        init = options.get("init")
        if init is not None and self._named_start(init) is None:
            with _ordinary_tensors():
                self._initial |= {name: np.array(value, ndmin=1) for name, value in self.imitate(init).items()}
        for name, value in self._initial.items():
            shape = (self.num_parameters, *value.shape) if self.num_parameters > 1 else value.shape
            empty = torch.empty(shape, device=options.get("device"), dtype=options.get("dtype"))
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put the parameters back to the values that the module was made with."""
        for name, value in self._initial.items():
            tensors.fill(self.get_parameter(name), torch.from_numpy(value))

    def imitate(self, init: Init) -> dict[str, Array]:
        """Parameters for which F is closest to another function in value and slope on the interval, or on [-4, 4].

        Raises:
            ValueError: no such function, or a degree whose rounding in float32 spoils it.
        """
        return self._imitate(init, self.name)

    def _imitate(self, init: Init, family: str, denominator_degree: int | None = None) -> dict[str, Array]:
        def attempt(ends: Interval, variable: Variable | None) -> tuple[dict[str, Array], float, bool]:
            """Parameters, what they lose to rounding, and whether that is little."""
            found = solvers.imitate(init, family, self.degree, ends, denominator_degree, variable)
            x = np.linspace(*ends, 4001)
            exact, _ = found.curve(x)
            numbers = (
                torch.from_numpy(np.atleast_1d(value)) for value in {**self._initial, **found.parameters}.values()
            )
            coordinates = {} if variable is None else {"variable": variable}
            rounded = self.function(torch.from_numpy(x).float(), *(part.float() for part in numbers), **coordinates)
            lost = float(np.abs(rounded.double().numpy() - exact).max())
            return found.parameters, lost, lost <= _ROUNDING * max(1.0, float(np.abs(exact).max()))

        def works(ends: Interval, variable: Variable | None) -> bool:
            with np.errstate(all="ignore"):
                try:
                    return attempt(ends, variable)[2]
                except ValueError:
                    return False

        low, high = ends = self.interval or (-4.0, 4.0)
        with self._naming_starts():
            parameters, lost, is_little = attempt(ends, self.variable)
        if is_little:
            return parameters
        said = f"loses {lost:.2g} to rounding in float32" if lost < math.inf else "is no finite number in float32"
        said += " as an imitation"
        if self.interval is None or not works((-4.0, 4.0), None):  # the degree is too high everywhere
            raise ValueError(
                f"init: {self.name} of degree {self.degree} on [{low:.4g}, {high:.4g}] {said}; take a lower degree"
                + (", another interval" if self.interval else "")
                + (" or a variable" if natural_variable(family, ends) and self.variable is None else "")
            )
        ways = []
        if (own := natural_variable(family, ends)) and works(ends, own):
            ways.append(f"give it variable: [{own[0]:.6g}, {own[1]:.6g}]")
        middle, half = (low + high) / 2, (high - low) / 2
        reaches = [half * 4.0**k for k in range(1, 16 if family in solvers.LINEAR else 1)]  # others take seconds
        wider = [(float(f"{middle - reach:.7g}"), float(f"{middle + reach:.7g}")) for reach in reaches]
        if (
            wide := next((ends for ends in wider if ends[0] < ends[1] and works(ends, self.variable)), None)
        ) is not None:
            ways.append(f"[{wide[0]:.7g}, {wide[1]:.7g}] is wide enough")
        ways.append("leave interval out" if ways else "take another one, or leave it out")
        raise ValueError(
            f"interval: {self.name} of degree {self.degree} on [{low:.10g}, {high:.10g}] {said}; {', or '.join(ways)}"
        )

    @contextlib.contextmanager
    def _naming_starts(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            published = ["torchortho"] if self.published else []
            known = ", ".join([*self.starts, *published])
            raise ValueError(f"init: expected {known} or a function to imitate; {error}") from None

    def forward(self, input: Tensor) -> Tensor:  # as torch's own activations call it: some models give it by keyword
        parameters = self._arguments()
        if type(input) is Tensor and not input.is_nested:
            return self.function(input, *parameters, **self._options())
        return tensors.call(self.function, input, *parameters, **self._options())

    def _arguments(self) -> list[Tensor]:
        """What `function` takes after x."""
        own: dict[str, Any] = self._parameters  # `getattr` looks there last, and in Python
        return [own[name] if name in own else getattr(self, name) for name in self._learned]

    def _options(self) -> dict[str, Any]:
        """What `function` takes by name."""
        if self.accepts_interval:
            return {"dim": self.dim, "interval": self.interval, "glu": self.glu, **self._coordinates()}
        return {"dim": self.dim, "glu": self.glu}

    def _coordinates(self) -> dict[str, Any]:
        return {} if self.variable is None else {"variable": self.variable}

    def config(self) -> dict[str, Any]:
        """What `build_activation` needs to make this module again; its parameters are in its state."""
        config: dict[str, Any] = {"name": self.name}
        if self.has_degree:
            config["degree"] = self.degree
        if self.interval is not None:
            config["interval"] = list(self.interval)
        defaults = {"num_parameters": 1, "dim": -1, "glu": False, "init": self.starts[0]}
        own = {name: getattr(self, name) for name in defaults}
        return config | {name: value for name, value in own.items() if value != defaults[name]}

    def definition(self) -> Definition:
        """What this module computes, and how its parameters start."""
        return Definition(self.function, self._options(), dict(self._initial))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items() if name != "name")

    def moments(self) -> Moments:
        """See `polytrope.ops.moments`."""
        self._refuse_groups("moments")
        return moments_of_module(self, [*self.kinks(), *(self.interval or ())])

    def kinks(self) -> list[float]:
        """Where the slope may jump inside the interval."""
        return []

    def polynomial_degree(self) -> int | None:
        """Of the polynomial of x that F is, in the interval if there is one; None: it is none."""
        return None

    def plain(self) -> PlainForm:
        """The function as ordinary operations on constants.

        Raises:
            ValueError: the family has no such form, or this module is gated or has groups of channels.
        """
        raise ValueError(f"activation {self.name}: only elementwise activations with one set of coefficients")

    def _refuse_groups(self, what: str) -> None:
        if self.glu or self.num_parameters > 1:
            raise ValueError(f"{what}: only activations with one set of coefficients that are not gated")

    def _numbers(self) -> dict[str, Array]:
        """The parameters of one group in float64."""
        self._refuse_groups(f"activation {self.name}")
        return {name: self.get_parameter(name).detach().double().cpu().numpy() for name in self._learned}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self._learned:
            saved, own = state_dict.get(prefix + name), self._parameters.get(name)
            # Saved when one number was a parameter `[]`, or `[groups]`.
            if (
                isinstance(saved, Tensor)
                and own is not None
                and saved.dim() == own.dim() - 1
                and saved.numel() == own.numel()
            ):
                state_dict[prefix + name] = saved.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    def load_torchortho_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters of the same activation of the package torchortho 0.1.2.

        Raises:
            ValueError: a state that is not one of this family and degree.
        """
        keys = self._torchortho_keys()
        if not keys:
            raise ValueError(f"state: torchortho has no {self.name} activation like this one ({self.extra_repr()})")
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


@contextlib.contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Inside, tensors are real, on the CPU and differentiable, whatever modes (fake tensors, inference) are set."""
    with torch.device("cpu"), torch.inference_mode(False), _disable_current_modes():
        yield


class OrthogonalPolynomial(LearnableActivation):
    """sum_k coefficients[k] B_k(x).

    Args:
        name: `hermite` (B_k = He_k / k!, probabilists'), `chebyshev` (T_k) or `legendre` (P_k).
        learnable_recurrence: learn the recurrence of the basis as well (`functional.favard`), starting from this one.
        variable: (shift, scale): sum_k coefficients[k] B_k(u) of u = (x - shift) / scale; None: of x. Not learned, it
            changes the coordinates only: the function that `init` names is the same in any variable.
    """

    starts = ("stable", "variance_preserving")

    def __init__(
        self, name: str, degree: int = 3, *, learnable_recurrence: bool = False, variable: Any = None, **options: Any
    ) -> None:
        bases = {"hermite": functional.hermite, "chebyshev": functional.chebyshev, "legendre": functional.legendre}
        if name not in bases:
            raise ValueError(f"basis: expected one of {', '.join(bases)}, got {name!r}")
        self.published = name == "hermite"
        super().__init__(name, degree, **options)
        self.learnable_recurrence = learnable_recurrence
        self.variable = check_variable(variable)
        coefficients = initialization.polynomial(name, self.degree, self.init, self.interval, self.variable)
        if learnable_recurrence:
            scales, couplings = initialization.recurrence(name, self.degree)
            others = {"scales": scales, "shifts": np.zeros(self.degree), "couplings": couplings}
            self.learn(functional.favard, options, coefficients=coefficients, **others)
        else:
            self.learn(bases[name], options, coefficients=coefficients)

    coefficients: nn.Parameter
    scales: nn.Parameter
    shifts: nn.Parameter
    couplings: nn.Parameter

    def config(self) -> dict[str, Any]:
        variable = {} if self.variable is None else {"variable": list(self.variable)}
        return super().config() | variable | ({"learnable_recurrence": True} if self.learnable_recurrence else {})

    def polynomial_degree(self) -> int | None:
        return int(self.degree)

    def _powers(self) -> Array:
        """Coefficients of 1, u, u², … of the variable u."""
        values = self._numbers()
        if not self.learnable_recurrence:
            powers: Array = values["coefficients"] @ initialization.to_powers(self.name, self.degree)
            return powers
        line = np.polynomial.Polynomial([0.0, 1.0])
        before, now = 0.0 * line, 0.0 * line + 1.0
        total = values["coefficients"][0] * now
        for k in range(self.degree):
            scale, shift, coupling = (values[name][k] for name in ("scales", "shifts", "couplings"))
            now, before = (scale * line + shift) * now - coupling * before, now
            total = total + values["coefficients"][k + 1] * now
        return np.concatenate([total.coef, np.zeros(self.degree + 1)])[: self.degree + 1]

    def moments(self) -> Moments:
        if self.interval is not None:
            return super().moments()
        if self.name == "hermite" and not self.learnable_recurrence and self.variable is None:
            return moments_of_hermite(self._numbers()["coefficients"])
        shift, scale = self.variable or (0.0, 1.0)
        powers = np.array(of_line(self._powers(), -shift / scale, 1.0 / scale))
        return moments_of_hermite(initialization.to_hermite(powers))

    def plain(self) -> PlainForm:
        return plain.powers(self._powers(), self.interval, self.variable)


class Hermite(OrthogonalPolynomial):
    """sum_k coefficients[k] He_k(x) / k!, probabilists' Hermite polynomials."""

    published = True

    def __init__(self, degree: int = 3, **options: Any) -> None:
        super().__init__("hermite", degree, **options)

    def _torchortho_keys(self) -> dict[str, str]:
        own = not self.learnable_recurrence and self.variable is None
        return {"coefficients": "coefficients"} if own else {}


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
    starts = ("variance_preserving", "siren")

    def __init__(self, degree: int = 5, *, harmonic: bool = False, **options: Any) -> None:
        super().__init__("fourier", degree, **options)
        self.harmonic = harmonic
        if self.init == "siren":
            if self.degree != 1 or harmonic or self.interval is not None:
                raise ValueError("init: siren is one sine: degree: 1, without harmonic and interval")
            sine = {"amplitudes": [1.0], "frequencies": [initialization.SIREN_FREQUENCY], "phases": [math.pi / 2]}
            self.learn(functional.fourier, options, bias=0.0, **sine)
            return
        bias, amplitude = initialization.fourier(self.degree, self.init, self.interval)
        amplitudes = np.full(self.degree, amplitude)
        if harmonic:
            half = amplitudes / math.sqrt(2.0)  # cos(kx - π/4) = (cos kx + sin kx) / √2
            self.learn(functional.harmonic, options, bias=bias, frequency=1.0, cosines=half, sines=half)
        else:
            waves = {"frequencies": np.arange(1, self.degree + 1), "phases": np.full(self.degree, math.pi / 4)}
            self.learn(functional.fourier, options, bias=bias, amplitudes=amplitudes, **waves)

    bias: nn.Parameter
    frequency: nn.Parameter
    cosines: nn.Parameter
    sines: nn.Parameter
    amplitudes: nn.Parameter
    frequencies: nn.Parameter
    phases: nn.Parameter

    def imitate(self, init: Init) -> dict[str, Array]:
        return self._imitate(init, "harmonic" if self.harmonic else "fourier")

    def config(self) -> dict[str, Any]:
        return super().config() | ({"harmonic": True} if self.harmonic else {})

    def plain(self) -> PlainForm:
        values = self._numbers()
        order = np.arange(1, self.degree + 1)
        shares = 1.0 / np.array([float(math.factorial(k)) for k in order])
        if self.harmonic:
            values = {
                "bias": values["bias"],
                "amplitudes": np.hypot(values["cosines"], values["sines"]),
                "frequencies": order * values["frequency"],
                "phases": np.arctan2(values["sines"], values["cosines"]),
            }
        values = values | {"bias": values["bias"].reshape(()), "amplitudes": values["amplitudes"] * shares}
        return PlainForm(values, plain.waves, self.interval is not None)

    def _torchortho_keys(self) -> dict[str, str]:
        own = {"bias": "fundamental", "amplitudes": "coefficients", "frequencies": "grid", "phases": "phases"}
        return {} if self.harmonic else own


class Tropical(LearnableActivation):
    """(√2 / degree) max_k (k x + coefficients[k]): convex, piecewise linear."""

    accepts_interval = False  # it ends in straight lines already
    published = True

    def __init__(self, degree: int = 5, **options: Any) -> None:
        super().__init__("tropical", degree, **options)
        self.learn(functional.tropical, options, coefficients=initialization.tropical(self.degree, self.init))

    coefficients: nn.Parameter

    def _torchortho_keys(self) -> dict[str, str]:
        return {"coefficients": "coefficients"}

    def kinks(self) -> list[float]:
        return _crossings(np.arange(self.degree + 1.0), self._numbers()["coefficients"])

    def plain(self) -> PlainForm:
        scale = math.sqrt(2.0) / self.degree
        intercepts = scale * self._numbers()["coefficients"]
        lines = {"slopes": scale * np.arange(self.degree + 1), "intercepts": intercepts}
        return PlainForm(lines, plain.largest_line, False)


class TropicalRational(LearnableActivation):
    """max_k (p_k x + c_k) - max_k (q_k x + d_k), all learnable: any continuous piecewise-linear function."""

    accepts_interval = False  # it ends in straight lines already

    def __init__(self, degree: int = 6, **options: Any) -> None:
        super().__init__("tropical_rational", degree, **options)
        slopes, intercepts, denominator_slopes, denominator_intercepts = initialization.tropical_rational(self.degree)
        self.learn(
            functional.tropical_rational,
            options,
            numerator_slopes=slopes,
            numerator_intercepts=intercepts,
            denominator_slopes=denominator_slopes,
            denominator_intercepts=denominator_intercepts,
        )

    numerator_slopes: nn.Parameter
    numerator_intercepts: nn.Parameter
    denominator_slopes: nn.Parameter
    denominator_intercepts: nn.Parameter

    def _torchortho_keys(self) -> dict[str, str]:
        sides = (("numerator", "num"), ("denominator", "denom"))
        own = {f"{side}_slopes": f"powers_{short}" for side, short in sides}
        return own | {f"{side}_intercepts": f"coefficients_{short}" for side, short in sides}

    def kinks(self) -> list[float]:
        values = self._numbers()
        sides = [(values[f"{side}_slopes"], values[f"{side}_intercepts"]) for side in ("numerator", "denominator")]
        return [crossing for slopes, intercepts in sides for crossing in _crossings(slopes, intercepts)]

    def plain(self) -> PlainForm:
        values = self._numbers()
        names = {"numerator_": "", "denominator_": "lower_"}
        lines = {new + what: values[old + what] for old, new in names.items() for what in ("slopes", "intercepts")}
        return PlainForm(lines, plain.difference_of_largest_lines, False)


class Rational(LearnableActivation):
    """(sum_k numerator[k] x^k) / (1 + |sum_j denominator[j] x^(j+1)|): no poles.

    Args:
        degree: of the numerator.
        denominator_degree: default: one less. 0: a polynomial, without the parameter `denominator`.
    """

    def __init__(self, degree: int = 5, denominator_degree: int | None = None, **options: Any) -> None:
        super().__init__("rational", degree, **options)
        self.denominator_degree = self.degree - 1 if denominator_degree is None else denominator_degree
        if self.denominator_degree != 0:
            check_degree(self.denominator_degree, name="denominator_degree")
        numerator, denominator = initialization.rational(self.degree, self.denominator_degree, self.interval)
        if self.denominator_degree == 0:
            # A parameter of no numbers has no gradient, which DistributedDataParallel waits for.
            self.register_parameter("denominator", None)
            self.learn(functional.polynomial, options, numerator=numerator)
        else:
            self.learn(functional.rational, options, numerator=numerator, denominator=denominator)

    numerator: nn.Parameter
    denominator: nn.Parameter | None

    def imitate(self, init: Init) -> dict[str, Array]:
        return self._imitate(init, "rational", self.denominator_degree)

    def config(self) -> dict[str, Any]:
        default = self.denominator_degree == self.degree - 1
        return super().config() | ({} if default else {"denominator_degree": self.denominator_degree})

    def polynomial_degree(self) -> int | None:
        return int(self.degree) if self.denominator_degree == 0 else None

    def kinks(self) -> list[float]:
        """Where the sum between the bars is 0."""
        if self.denominator_degree == 0:
            return []
        roots = np.polynomial.Polynomial([0.0, *self._numbers()["denominator"]]).trim().roots()
        return [float(root.real) for root in roots if abs(root.imag) <= 1e-9 * max(1.0, float(abs(root)))]

    def plain(self) -> PlainForm:
        values = {"denominator": np.zeros(1), **self._numbers()}
        # Without leading zeros: far out the first number of each decides.
        numbers = {name: value[: max(1, *(np.flatnonzero(value) + 1), 1)] for name, value in values.items()}
        return PlainForm(numbers, plain.quotient, self.interval is not None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "denominator")
        if self.denominator_degree == 0 and isinstance(saved, Tensor) and saved.numel() == 0:
            del state_dict[prefix + "denominator"]  # saved when it was a parameter of no numbers
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PolyReLU(LearnableActivation):
    """sum_k coefficients[k] max(x, 0)^k (Zhuo et al., "Polynomial composition activations", 2024)."""

    def __init__(self, degree: int = 3, **options: Any) -> None:
        super().__init__("polyrelu", degree, **options)
        coefficients = initialization.polyrelu(self.degree, self.interval)
        self.learn(functional.polyrelu, options, coefficients=coefficients)

    coefficients: nn.Parameter

    def kinks(self) -> list[float]:
        return [0.0]

    def plain(self) -> PlainForm:
        powers = {"powers": self._numbers()["coefficients"]}
        return PlainForm(powers, plain.powers_of_relu, self.interval is not None)


class PolyNorm(LearnableActivation):
    """bias + sum_k coefficients[k] x^k / rms(x^k) over the last dimension (Zhuo et al., 2024): not elementwise.

    A function to start from is imitated where rows are long and normally distributed.
    """

    accepts_interval = False
    accepts_groups = False

    def __init__(self, degree: int = 3, *, epsilon: float = 1e-6, **options: Any) -> None:
        super().__init__("polynorm", degree, **options)
        self.epsilon = epsilon
        coefficients, bias = initialization.polynorm(self.degree)
        self.learn(functional.polynorm, options, coefficients=coefficients, bias=bias)

    coefficients: nn.Parameter
    bias: nn.Parameter

    def imitate(self, init: Init) -> dict[str, Array]:
        with self._naming_starts():
            hermite = solvers.imitate(init, "hermite", self.degree, None).parameters["coefficients"]
        powers = hermite @ initialization.to_powers("hermite", self.degree)
        return {"coefficients": powers[1:] * initialization.polynorm_sizes(self.degree), "bias": powers[0]}

    def _options(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon}

    def config(self) -> dict[str, Any]:
        return super().config() | ({} if self.epsilon == 1e-6 else {"epsilon": self.epsilon})

    def moments(self) -> Moments:
        """In rows of infinite length; what scales a row leaves F as it is, so the slope is 0."""
        values = self._numbers()
        sized = values["coefficients"] / initialization.polynorm_sizes(self.degree)
        powers = np.concatenate([values["bias"], sized])
        found = moments_of_hermite(initialization.to_hermite(powers))
        return Moments(found.value, found.derivative, 0.0)


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
        knots = np.linspace(*self.interval, self.degree + 1)
        is_named = self._named_start(options.get("init")) is not None
        values = initialization.piecewise_linear(knots) if is_named else np.zeros_like(knots)
        self.learn(_equidistant_lines, options, values=values)

    @property
    def knots(self) -> Tensor:
        """`[degree + 1]`, float64. They follow from the interval, so that no change of dtype or device spoils them."""
        return _knots(self.interval, self.degree + 1, self.values.device)

    def imitate(self, init: Init) -> dict[str, Array]:
        with self._naming_starts():
            target = resolve_target(init)
        with torch.no_grad():
            return {"values": target(_knots(self.interval, self.degree + 1, torch.device("cpu"))).double().numpy()}

    values: nn.Parameter

    def kinks(self) -> list[float]:
        assert self.interval is not None
        return [float(knot) for knot in np.linspace(*self.interval, self.degree + 1)]

    def plain(self) -> PlainForm:
        return plain.broken_line(np.asarray(self.kinks()), self._numbers()["values"])


def _equidistant_lines(
    x: Tensor, values: Tensor, *, dim: int = -1, interval: Interval | None = None, glu: bool = False
) -> Tensor:
    """`functional.piecewise_linear` with equidistant knots from one end of the interval to the other."""
    return functional.rising_lines(x, _knots(interval, values.shape[-1], values.device), values, dim=dim, glu=glu)


def _knots(interval: Interval | None, count: int, device: torch.device) -> Tensor:
    assert interval is not None
    return torch.linspace(*interval, count, dtype=torch.float64, device=device)


class Affine(LearnableActivation):
    """gain · f(input_scale · x + input_shift) + offset around a fixed f: a control, which learns scale but no shape.

    Computed in plain torch, without a kernel.

    Args:
        base: f, a name of `fitting.targets.NAMED`; default: the function that `init` names, else `gelu`. Where `init`
            names f, the module starts as f itself.
    """

    accepts_interval = False  # f has its own ends
    has_degree = False

    def __init__(self, *, base: str | None = None, **options: Any) -> None:
        if "degree" in options:
            raise ValueError("degree: not for affine; leave it out")
        init = options.get("init")
        self.base = base or (init if isinstance(init, str) and init in NAMED else "gelu")
        if self.base not in NAMED:
            raise ValueError(f"base: expected one of {', '.join(NAMED)}, got {self.base!r}")
        super().__init__("affine", 1, **options)
        scale, offset, _ = _preserving(self.base)
        self.learn(_affine, options, gain=scale, offset=scale * offset, input_scale=1.0, input_shift=0.0)

    gain: nn.Parameter
    offset: nn.Parameter
    input_scale: nn.Parameter
    input_shift: nn.Parameter

    def imitate(self, init: Init) -> dict[str, Array]:
        if init != self.base:
            named = ", ".join([*self.starts, self.base])
            raise ValueError(f"init: expected {named} for affine around {self.base}, got {init!r}")
        return {"gain": np.ones(1), "offset": np.zeros(1), "input_scale": np.ones(1), "input_shift": np.zeros(1)}

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"base": self.base}

    def config(self) -> dict[str, Any]:
        return super().config() | {"base": self.base}

    def kinks(self) -> list[float]:
        """Those of f, where its argument is there; none where it is the same everywhere."""
        scale, shift = (float(self._numbers()[name][0]) for name in ("input_scale", "input_shift"))
        return [(kink - shift) / scale for kink in _preserving(self.base)[2]] if scale else []

    def plain(self) -> PlainForm:
        return plain.rescaled(self.base, self._numbers())


_SPLINE = ("widths", "start", "rises", "slopes", "line")  # what `_rational_spline` takes


class RationalSpline(LearnableActivation):
    """A rising rational-quadratic spline less a learned straight line, whose knots, values and slopes are learned.

    It is the curve with these values and slopes at the knots, so it starts as any function without a fit. The outer
    lines go on.

    Args:
        degree: the number of pieces, 1…64.
        interval: the first and the last knot.
    """

    starts = ("variance_preserving", "identity")

    def __init__(self, degree: int = 8, *, interval: Any = (-4.0, 4.0), **options: Any) -> None:
        super().__init__("rational_spline", 1, interval=interval, **options)
        if self.interval is None:
            raise ValueError("interval: expected (lo, hi), the first and the last knot, got None")
        self.degree = check_degree(degree, MAX_PIECES)
        with _ordinary_tensors():
            initial = self._start(self.init if options.get("init") is None else options["init"])
        self.learn(_rational_spline, options, **initial)

    widths: nn.Parameter
    start: nn.Parameter
    rises: nn.Parameter
    slopes: nn.Parameter
    line: nn.Parameter

    def _start(self, init: Init) -> dict[str, Array]:
        if init != "variance_preserving":  # a function to imitate comes in its place
            return self._through(lambda x: x)
        gelu = self._through(NAMED["gelu"])
        given = {name: torch.from_numpy(np.array(value, ndmin=1)) for name, value in gelu.items()}

        def curve(x: Tensor) -> Tensor:
            return _rational_spline(x, *(given[name] for name in _SPLINE), interval=self.interval)

        knots = _knots(self.interval, self.degree + 1, torch.device("cpu")).tolist()
        scale, offset = initialization.normalize(lambda x: sample(curve, x), self.interval, knots)
        return self._through(lambda x: scale * (NAMED["gelu"](x) + offset), margin=0.1 * scale)

    def _through(self, target: Callable[[Tensor], Tensor], margin: float = 0.1) -> dict[str, Array]:
        """Values and slopes of the target at equidistant knots; the line makes the least slope rise by `margin`."""
        knots = _knots(self.interval, self.degree + 1, torch.device("cpu"))
        values, slopes = (torch.from_numpy(part) for part in sample(target, knots.numpy()))
        secants = values.diff() / knots.diff()
        line = max(0.0, margin - float(torch.cat([slopes, secants]).min()))
        widths, slopes, rises = rational_spline.free(knots, slopes + line, secants + line)
        start = values[:1] + line * knots[:1] - knots[:1]
        found = {"widths": widths, "start": start, "rises": rises, "slopes": slopes}
        return {name: part.numpy() for name, part in found.items()} | {"line": np.array([line])}

    def imitate(self, init: Init) -> dict[str, Array]:
        with self._naming_starts():
            return self._through(resolve_target(init))

    def _tied(self) -> dict[str, Tensor]:
        assert self.interval is not None
        numbers = {name: torch.from_numpy(value) for name, value in self._numbers().items() if name != "line"}
        return dict(
            zip(("knots", "heights", "slopes"), rational_spline.tied(**numbers, interval=self.interval), strict=True)
        )

    def kinks(self) -> list[float]:
        """The knots: curvature jumps there, slopes do not."""
        return [float(knot) for knot in self._tied()["knots"]]

    def plain(self) -> PlainForm:
        found = rational_spline.plain_numbers(**self._tied(), line=torch.from_numpy(self._numbers()["line"]))
        return PlainForm({name: part.numpy() for name, part in found.items()}, rational_spline.plain_spline, False)


def _rational_spline(
    x: Tensor,
    widths: Tensor,
    start: Tensor,
    rises: Tensor,
    slopes: Tensor,
    line: Tensor,
    *,
    dim: int = -1,
    interval: Interval | None = None,
    glu: bool = False,
) -> Tensor:
    """`functional.rational_spline` of numbers that may be any; they are tied in float64."""
    assert interval is not None
    knots, heights, rates = rational_spline.tied(
        widths.double(), slopes.double(), rises.double(), start.double(), interval
    )
    return functional.rising_spline(x, knots, heights, rates, line, dim=dim, glu=glu)


@functools.cache
def _preserving(base: str) -> tuple[float, float, list[float]]:
    """(s, o) such that s (f + o) preserves the variance, and where the slope of f jumps."""
    with _ordinary_tensors():
        function = resolve_target(base)
        kinks = find_kinks(function, -REACH, REACH)
        return *initialization.normalize(lambda x: sample(function, x), None, kinks), kinks


def _affine(
    x: Tensor,
    gain: Tensor,
    offset: Tensor,
    input_scale: Tensor,
    input_shift: Tensor,
    *,
    base: str,
    dim: int = -1,
    glu: bool = False,
) -> Tensor:
    """gain · f(input_scale · x + input_shift) + offset; the numbers are `[1]`, or `[groups, 1]`.

    Like the kernels it computes bfloat16 and float16 in float32 and rounds once.
    """
    groups = gain.numel()
    dim = functional.check_input(x.dtype, x.shape, glu, groups, dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    argument, factor = x.chunk(2, dim=-1) if glu else (x, None)
    argument = argument.to(wide)
    numbers = [number.to(wide).flatten() for number in (gain, offset, input_scale, input_shift)]
    if groups > 1:
        argument = argument.unflatten(dim, (groups, argument.shape[dim] // groups))
        numbers = [number.reshape(groups, *[1] * -dim) for number in numbers]
    elif x.dim() == 0:
        numbers = [number.squeeze() for number in numbers]
    value = numbers[0] * NAMED[base](numbers[2] * argument + numbers[3]) + numbers[1]
    if groups > 1:
        value = value.flatten(dim - 1, dim)
    if factor is not None:
        value = value * factor.to(wide)
    return value.to(x.dtype)


class Composition(LearnableActivation):
    """P_m(… P_1((x - center) / half_width)), times x with `gate`: a polynomial without comparisons, for its `domain`.

    Each P_i is a sum of Chebyshev polynomials. Outside the domain nothing is promised: the powers go on.

    Args:
        degree: of the polynomials, innermost first, each 1…128; a number stands for a single one.
        domain: (lo, hi), the inputs it is made for; `half_width` is the distance from the center to the farther end.
        center: default: the middle of the domain.
        gate: multiply by x, as GELU(x) = x Φ(x).
    """

    accepts_interval = False

    def __init__(
        self,
        degree: int | Sequence[int] = 8,
        *,
        domain: Any = (-4.0, 4.0),
        center: float | None = None,
        gate: bool = False,
        **options: Any,
    ) -> None:
        super().__init__("composition", 1, **options)
        degrees = list(degree) if isinstance(degree, (list, tuple)) else [degree]
        if not degrees:
            raise ValueError("degree: expected a number or the degrees of the polynomials, innermost first, got []")
        self.degrees = tuple(check_degree(entry, MAX_COMPOSED) for entry in degrees)
        self.degree = max(self.degrees)
        self.domain = check_domain(domain)
        self.center = _in_domain(sum(self.domain) / 2 if center is None else center, self.domain)
        self.half_width = composition.half_width(self.domain, self.center)
        self.gate = bool(gate)
        identity = [np.pad([0.0, 1.0], (0, entry - 1)) for entry in self.degrees[:-1]]
        outer = initialization.composition(self.degrees[-1], self.center, self.half_width, self.gate)
        self.learn(functional.composition, options, **composition.parameters([*identity, outer]))

    def _options(self) -> dict[str, Any]:
        own = {"center": self.center, "half_width": self.half_width, "gate": self.gate}
        return own | {"dim": self.dim, "glu": self.glu}

    def imitate(self, init: Init) -> dict[str, Array]:
        with self._naming_starts():
            target = resolve_target(init)
            found = composition.fit_structure(target, self.domain, self.center, self.degrees, self.gate)
        return composition.parameters(found)

    def config(self) -> dict[str, Any]:
        degree = self.degrees[0] if len(self.degrees) == 1 else list(self.degrees)
        center = {} if self.center == sum(self.domain) / 2 else {"center": self.center}
        return (
            super().config()
            | {"degree": degree, "domain": list(self.domain)}
            | center
            | ({"gate": True} if self.gate else {})
        )

    def polynomial_degree(self) -> int | None:
        return math.prod(self.degrees) + self.gate

    def circuit(self) -> Circuit:
        """The same by additions and multiplications alone, its numbers in float64."""
        return make_circuit(
            [part.tolist() for part in self._numbers().values()], self.center, self.half_width, self.gate
        )

    def plain(self) -> PlainForm:
        circuit = self.circuit()
        return PlainForm({}, lambda x, _numbers: circuit.run(x), False)


def _in_domain(center: Any, domain: Interval) -> float:
    with contextlib.suppress(TypeError, ValueError):
        if domain[0] <= float(center) <= domain[1]:
            return float(center)
    raise ValueError(f"center: expected a number in the domain {list(domain)}, got {center!r}")


def _crossings(slopes: Array, intercepts: Array) -> list[float]:
    """Where any two of these lines cross."""
    rise, apart = slopes[None] - slopes[:, None], intercepts[:, None] - intercepts[None]
    return [float(at) for at in np.unique(apart[rise != 0.0] / rise[rise != 0.0])]


LEARNABLE: dict[str, type[Any]] = {  # of LearnableActivation, whose subclasses take arguments of their own
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
    "rational_spline": RationalSpline,
    "affine": Affine,
    "composition": Composition,
}
CLASSICAL: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


def read_activation(config: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options) of an activation's configuration; `hermite3` is short for `{name: hermite, degree: 3}`.

    Raises:
        ValueError: unknown name; says what is accepted.
    """
    options: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(config)
    name = options.pop("name", None)
    short = re.fullmatch(r"([a-z_]+?)(\d+)", name) if isinstance(name, str) else None
    if short and short[1] in LEARNABLE and LEARNABLE[short[1]].has_degree and "degree" not in options:
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
        module: nn.Module = LEARNABLE[name](**options)
        return module
    except TypeError as error:
        raise ValueError(f"activation {name!r}: {error}") from None


def is_learnable_activation(module: nn.Module) -> bool:
    """Whether a module is one of this package's activations, whose parameters are coefficients."""
    return isinstance(module, LearnableActivation)
