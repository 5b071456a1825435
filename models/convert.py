"""Convert any model in one call: find its activations, measure their inputs, fit, replace, and prove the effect.

conversion = convert(model, loader, family="hermite", degree=8)
print(conversion.report())
conversion.save("converted")
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from polytrope.models import inputs
from polytrope.models.calibration import Calibration, calibrate
from polytrope.models.changes import (
    DroppedBlocks,
    EqualizedLayer,
    FactoredLayer,
    Factorization,
    Left,
    Quantization,
    QuantizedLayer,
    UnchangedLayer,
)
from polytrope.models.conversion import (
    FitOptions,
    LayerConversion,
    apply,
    fit_layers,
    fit_options,
    layer_costs,
    prove,
)
from polytrope.models.convert_options import (
    DropBlocks,
    Factorize,
    Quantize,
    check_equalize,
    check_keep,
    check_structural,
    fits_activations,
    read_drop_blocks,
    read_factorize,
    read_quantize,
)
from polytrope.models.drop_blocks import drop_and_map
from polytrope.models.factorize import factor_layers
from polytrope.models.formats import read_model, write_model
from polytrope.models.formats.module import MODULE_FILE, load_module
from polytrope.models.inputs import Data, read_batches, size_of
from polytrope.models.linearized import refuse_tangent
from polytrope.models.modes import measuring
from polytrope.models.overwritten import refuse_overwritten
from polytrope.models.polynomials import Polynomials, hold_out, measure_polynomials
from polytrope.models.quantize import parameter_bytes, quantize_layers
from polytrope.models.rewriting import FunctionalActivation
from polytrope.models.selection import Selection, select_activations
from polytrope.models.sensitivity import sensitivities
from polytrope.models.surgery import Choice, is_activation, replace_module
from polytrope.models.writing import appearing

CERTIFICATES = "certificates.json"
RATED_SAMPLES = 8  # that the difference is of, and the costs if nothing else is said
SAID_EVERY = 10.0  # seconds, how far a long step is
_FORMAT = 1

_Item = TypeVar("_Item")
Forward = Callable[[nn.Module, Any], Tensor]
Measure = Callable[[nn.Module, Selection, Sequence[Any]], dict[str, Calibration]]


@dataclass(frozen=True)
class ConvertedActivation:
    """What became of one activation.

    Args:
        name: of its module.
        target: the class that was there, or the function: `GELU`, `silu()`.
        config: of the new module, for `polytrope.ops.build_activation`.
        interval: where the fit holds; it goes on along tangents outside.
        relative_error: root mean square over the measured inputs, relative to that of the target.
        certificate: bounds of its errors by name (`polytrope.ops.interpolate.Certificate`); None where there is none,
            as outside of a domain.
        inputs: extremes and quantiles of what it receives.
        cost: how far the model's output moves when this one alone is converted, relative to the output; None: not
            measured.
    """

    name: str
    target: str
    config: dict[str, Any]
    interval: tuple[float, float]
    relative_error: float
    certificate: dict[str, Any]
    inputs: dict[str, Any]
    cost: float | None


@dataclass(frozen=True)
class Conversion:
    """A converted model, and what is known of it.

    Args:
        model: it.
        activations: what was converted, in the order of `named_modules`.
        left: the activations that stay as they are, and why.
        samples: of the calibration; 0 where a function ran the model.
        difference: of the model's output on the first samples from the one before: |difference| / |output|.
        layers: the fits with their calibrations; none in a conversion that was loaded.
        selection: what was chosen, with the calls that became modules; None in one that was loaded.
        rated: the samples that `difference` is of.
        polynomials: with `polynomial_only`, what they cost, and their inputs on samples that were kept aside.
        dropped: blocks that are gone.
        factorization: linear layers that are in two factors.
        quantization: linear layers whose weights are rounded.
        parameters: numbers in the model before and after.
    """

    model: nn.Module = field(repr=False, compare=False)
    activations: list[ConvertedActivation]
    left: list[Left]
    samples: int
    difference: float
    layers: list[LayerConversion] = field(default_factory=list, repr=False, compare=False)
    selection: Selection | None = field(default=None, repr=False, compare=False)
    rated: Any = field(default=None, repr=False, compare=False)
    polynomials: Polynomials | None = None
    dropped: DroppedBlocks | None = None
    factorization: Factorization | None = None
    quantization: Quantization | None = None
    parameters: tuple[int, int] | None = None

    @property
    def certificates(self) -> dict[str, dict[str, Any]]:
        """Bounds of every activation's errors, by its name."""
        return {entry.name: entry.certificate for entry in self.activations}

    def report(self) -> str:
        """Tables as text: blocks that are gone, factored and rounded layers, every activation with its errors, and what
        stays."""
        parts = [] if self.dropped is None else [self.dropped.describe()]
        if self.factorization is not None:
            parts.append(_table(self.factorization.rows()))
        if self.quantization is not None:
            parts.append(_table(self.quantization.rows()))
        if self.activations or not parts:
            parts.append(_table(self._activation_rows()))
        parts.append(f"all together: the output moves by {self.difference:.2e}")
        text = "\n\n".join(parts)
        if self.parameters is not None and self.parameters[0] != self.parameters[1]:
            text += f"\n{self.parameters[0]:,} parameters before, {self.parameters[1]:,} now"
        if self.quantization is not None:
            before, after = self.quantization.bytes_before, self.quantization.bytes_after
            text += f"\n{before:,} bytes of parameters, {after:,} with rounded weights packed"
            text += "".join(f"\n{entry.describe()}" for entry in self.quantization.equalized)
        if self.polynomials is not None:
            text += f"\n{self.polynomials.describe()}"
        stays = [[entry.name, entry.kind, entry.reason] for entry in self.left]
        if self.factorization is not None:
            stays += [[entry.name, "Linear", entry.reason] for entry in self.factorization.left]
        if self.quantization is not None:
            stays += [[entry.name, "weights", entry.reason] for entry in self.quantization.left]
            stays += [[entry.name, "not equalised", entry.reason] for entry in self.quantization.unequalized]
        return f"{text}\n\n{_table([['stays as it is', 'kind', 'reason'], *stays])}" if stays else text

    def _activation_rows(self) -> list[list[str]]:
        rows = [["activation", "conversion", "interval", "relative error", "largest error", "output moves by"]]
        for entry in self.activations:
            rows.append(
                [
                    entry.name,
                    f"{entry.target} → {entry.config['name']} {entry.config['degree']}",
                    "{:.2f} … {:.2f}".format(*entry.interval),
                    f"{entry.relative_error:.2e}",
                    f"{entry.certificate['maximum']:.2e}",
                    "–" if entry.cost is None else f"{entry.cost:.2e}",
                ]
            )
        only = self.polynomials
        if only is not None:
            rows[0] += ["depth", "products", "held-out inputs outside"]
            for row in rows[1:]:
                cost, seen = only.costs[row[0]], only.seen[row[0]]
                row += [str(cost.depth), str(cost.products), f"{seen.outside} of {seen.inputs}"]
        return rows

    def save(self, directory: str | Path, source: str | Path | None = None) -> None:
        """Write the model and its certificates.

        A GPT-2 or ConvNeXt of this package as its own directory, a model of transformers as one that
        `from_pretrained(…, trust_remote_code=True)` loads, any other module as its weights and a description of its
        activations.

        Args:
            directory: appears whole, or not at all.
            source: the directory the model came from: its tokenizer and other files are taken over.

        Raises:
            ValueError: what the format cannot say, or a model that does not come back from it.
        """
        given = self.rated if isinstance(self.rated, Mapping) else {}
        named = {str(name): value for name, value in given.items() if isinstance(value, Tensor)}
        content = {
            "format": _FORMAT,
            "samples": self.samples,
            "difference": self.difference,
            "activations": [asdict(entry) for entry in self.activations],
            "left": [asdict(entry) for entry in self.left],
            "polynomials": None if self.polynomials is None else self.polynomials.to_dict(),
        }
        if self.dropped is not None:
            content["dropped"] = asdict(self.dropped)
        if self.factorization is not None:
            content["factorization"] = asdict(self.factorization)
        if self.quantization is not None:
            content["quantization"] = asdict(self.quantization)
        if self.parameters is not None:
            content["parameters"] = list(self.parameters)
        with appearing(Path(directory), CERTIFICATES) as aside:
            write_model(aside, self.model, source=None if source is None else Path(source), inputs=named or None)
            (aside / CERTIFICATES).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, model: nn.Module | None = None) -> Conversion:
        """What `save` wrote, in evaluation mode.

        Args:
            model: for a module that is neither of this package nor of transformers: a fresh one of the same class,
                which gets the activations and the weights.

        Raises:
            ValueError: a directory that cannot be read, a module that is missing or another one.
        """
        source = Path(directory)
        path = source / CERTIFICATES
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}, this version reads {_FORMAT}")
            entries = [{**entry, "interval": tuple(entry["interval"])} for entry in content["activations"]]
            activations = [ConvertedActivation(**entry) for entry in entries]
            left = [Left(**entry) for entry in content["left"]]
            only = content.get("polynomials")
            polynomials = None if only is None else Polynomials.from_dict(only)
            samples, difference = int(content["samples"]), float(content["difference"])
            structure = _read_structure(content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}; name a directory of Conversion.save") from error
        if (source / MODULE_FILE).exists():
            if model is None:
                raise ValueError(f"{source}: give a fresh model too, Conversion.load(directory, model)")
            loaded = load_module(source, model)
            return cls(loaded, activations, left, samples, difference, polynomials=polynomials, **structure)
        if model is not None:
            raise ValueError(f"{source} says how its model is built: Conversion.load(directory), without a model")
        return cls(read_model(source), activations, left, samples, difference, polynomials=polynomials, **structure)


def _read_structure(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `Conversion.save` wrote of dropped blocks, factored and rounded layers, and numbers of parameters."""
    found: dict[str, Any] = {}
    if (dropped := content.get("dropped")) is not None:
        found["dropped"] = DroppedBlocks(**{**dropped, "blocks": tuple(dropped["blocks"])})
    if (factored := content.get("factorization")) is not None:
        layers = tuple(FactoredLayer(**entry) for entry in factored["layers"])
        left = tuple(UnchangedLayer(**entry) for entry in factored["left"])
        found["factorization"] = Factorization(factored["energy"], layers, left)
    if (rounded := content.get("quantization")) is not None:
        kinds = {"layers": QuantizedLayer, "left": UnchangedLayer}
        kinds |= {"equalized": EqualizedLayer, "unequalized": UnchangedLayer}
        parts = {name: tuple(kind(**entry) for entry in rounded[name]) for name, kind in kinds.items()}
        found["quantization"] = Quantization(**{**rounded, **parts})
    if (counts := content.get("parameters")) is not None:
        found["parameters"] = (int(counts[0]), int(counts[1]))
    return found


def convert(
    model: nn.Module,
    data: Data,
    *,
    drop_blocks: Mapping[str, Any] | None = None,
    factorize: Mapping[str, Any] | None = None,
    quantize: Mapping[str, Any] | None = None,
    family: str | None = None,
    degree: int | None = None,
    target_error: float | None = None,
    coverage: float | None = None,
    weight: str = "measured",
    derivative_weight: float = 0.01,
    constraints: Sequence[str] = (),
    basis: str = "family",
    polynomial_only: bool = False,
    depth: int | None = None,
    domain: tuple[float, float] | None = None,
    domain_margin: float = 0.25,
    types: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: tuple[int, int] | None = None,
    samples: int | None = 256,
    rated_samples: int = RATED_SAMPLES,
    keep: int | None = None,
    output_error: float | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    in_place: bool = False,
    progress: Callable[[int, str], None] | None = None,
) -> Conversion:
    """Replace a model's activations, modules and functions it calls, by learnable ones fitted on what they receive.

    Before that it drops blocks, and puts linear layers in two factors; afterwards it rounds weights to few bits. All
    of it where it is asked for.

    Args:
        model: any; it is in the mode it was in afterwards.
        data: batches (a DataLoader, a list of dicts, tensors or tuples), or a function that runs the model. A dict goes
            in by name; of a tuple as many entries as the model's `forward` requires, the others are labels.
        drop_blocks: `{"count": 2}` or `{"blocks": [3, 4]}`, as of `convert_options.DropBlocks`; the first step.
        factorize: `{"energy": 0.999}`, `{"ratio": 3}` or `{"rank": 16}`, as of `convert_options.Factorize`; the second.
        quantize: `{"bits": 4}`, with `exponent`, `per` and `equalize` as of `convert_options.Quantize`; the last step.
        family, target_error, coverage, weight, derivative_weight, constraints, basis: as of `conversion.FitOptions`.
            Without family activations become hermite, but beside `drop_blocks`, `factorize` or `quantize` they stay.
        degree: 8 if not given; with `target_error` the highest one tried, 16 if not given.
        polynomial_only: sums and products alone, for encrypted inference and verification, on a certified range; a
            quarter of the samples is kept aside and checks it.
        depth: multiplicative depth of each polynomial, 6 if not given; with `target_error` the largest one tried, 16 if
            not given.
        domain, domain_margin: the certified range (lo, hi) of all of them; if not given, the extremes of the measured
            inputs, widened on each side by that share of their distance.
        types, include, exclude, layers: which activations, as of `surgery.Choice`; all but types also which linear
            layers.
        samples: as many samples of the data are used, rounded up to whole batches; None: all.
        rated_samples: how much an error of an activation moves the output is measured on as many, by its input: the
            fits go by it, unless there is a `target_error`; then what each conversion costs, one activation after the
            other. 0: neither, and all inputs count alike.
        keep: so many activations stay as they are: those whose conversion alone moves the output most.
        output_error: instead of `keep`: as few as leave an output that moves by at most this, relative to itself, if
            what the others cost is independent, so that its squares add up.
        forward: how a batch goes through the model, where the above does not fit; returns what holds a tensor.
        in_place: convert `model` itself; otherwise a copy, and `model` stays as it is. After an error it is as it was.
        progress: is told what begins, by the number of the step, of 3, and in a long one how far it is.

    Raises:
        ValueError: an option that is not as described or does not go with another, nothing to convert, data the model
            cannot run on, a layer that cannot be fitted, a conversion that has no effect.
    """
    drop, factor, rounding = read_drop_blocks(drop_blocks), read_factorize(factorize), read_quantize(quantize)
    given: dict[str, Any] = {
        "family": family,
        "degree": degree,
        "target_error": target_error,
        "coverage": coverage,
        "weight": weight,
        "derivative_weight": derivative_weight,
        "constraints": constraints,
        "basis": basis,
        "polynomial_only": polynomial_only,
        "depth": depth,
        "domain": domain,
        "domain_margin": domain_margin,
    }
    options = None
    structural = any(step is not None for step in (drop, factor, rounding))
    if fits_activations(family, polynomial_only, structural):
        check_equalize(rounding)
        options = fit_options(**given)
    else:
        given |= {"types": types, "rated_samples": rated_samples, "keep": keep, "output_error": output_error}
        given |= {"include": include, "exclude": exclude, "layers": layers}
        check_structural(given, factors=factor is not None or rounding is not None)
    if samples is not None and samples < 1:
        raise ValueError(f"samples: expected at least 1, or None for all, got {samples!r}")
    if rated_samples < 0:
        raise ValueError(f"rated_samples: expected at least 0, got {rated_samples!r}")
    if keep is not None and keep < 0:
        raise ValueError(f"keep: expected at least 0, got {keep!r}")
    if output_error is not None and not 0 < output_error < math.inf:
        raise ValueError(f"output_error: expected a number > 0, got {output_error!r}")
    check_keep(keep, output_error, rated_samples)
    refuse_tangent(model, "convert the model that it is a tangent of")
    batches = read_batches(data, samples)
    if not in_place:
        try:
            model = copy.deepcopy(model)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{type(model).__name__} cannot be copied: {error}; use in_place=True") from error
    run = inputs.forward if forward is None else _first_tensor_of(forward)
    choice = Choice(types, include, exclude, layers)
    return convert_batches(
        model,
        batches,
        options,
        choice,
        forward=run,
        tell=progress,
        rated_samples=rated_samples,
        keep=keep,
        output_error=output_error,
        drop=drop,
        factor=factor,
        rounding=rounding,
    )


def convert_batches(
    model: nn.Module,
    batches: Sequence[Any],
    options: FitOptions | None,
    choice: Choice,
    *,
    forward: Forward = inputs.forward,
    measure: Measure | None = None,
    tell: Callable[[int, str], None] | None = None,
    rated_samples: int = RATED_SAMPLES,
    keep: int | None = None,
    output_error: float | None = None,
    drop: DropBlocks | None = None,
    factor: Factorize | None = None,
    rounding: Quantize | None = None,
) -> Conversion:
    """What `convert` does, in place.

    Args:
        options: None: activations stay as they are.
        measure: calibrates the chosen activations elsewhere.
        tell: is told what begins, and in a long step how far it is.

    Raises:
        ValueError: as of `convert`; the model is as it was.
    """

    def activations() -> Conversion:
        assert options is not None
        return _convert_activations(
            model,
            batches,
            options,
            choice,
            forward=forward,
            measure=measure,
            tell=tell,
            rated_samples=rated_samples,
            keep=keep,
            output_error=output_error,
        )

    if drop is None and factor is None and rounding is None:
        return activations()
    say = tell or (lambda _step, _text: None)
    total = sum(map(size_of, batches))
    said = f" on {total} samples" if total else ""

    def going(what: str, items: Sequence[_Item]) -> Iterator[_Item]:
        return inputs.paced(items, lambda text: say(0, f"{what}: {text}"), every=SAID_EVERY)

    rated = inputs.head(batches, RATED_SAMPLES)
    before = sum(parameter.numel() for parameter in model.parameters())
    bytes_before = parameter_bytes(model)
    with _unchanged_by_errors(model):
        with inputs.on_calibration_data():
            wanted = _output(model, rated, forward)
        dropped, factored = None, None
        if drop is not None:
            say(0, f"dropping blocks{said}")
            dropped = drop_and_map(model, batches, drop, forward, walk=partial(going, "dropping blocks"))
        if factor is not None:
            say(0, f"factoring linear layers{said}")
            factored = factor_layers(model, batches, factor, choice, forward, walk=partial(going, "factoring"))
        made = Conversion(model, [], [], total, 0.0, rated=rated) if options is None else activations()
        rounded = None
        if rounding is not None:
            say(2, f"rounding weights to {rounding.bits} bits{said}")
            rounded = quantize_layers(
                model, batches, rounding, choice, forward, walk=partial(going, "rounding weights")
            )
            rounded = replace(rounded, bytes_before=bytes_before)
        found = _output(model, rated, forward)
    return replace(
        made,
        difference=_moved(found, wanted),
        dropped=dropped,
        factorization=factored,
        quantization=rounded,
        parameters=(before, sum(parameter.numel() for parameter in model.parameters())),
    )


def _moved(found: Tensor, wanted: Tensor) -> float:
    """|difference| / |output|."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))


def _convert_activations(
    model: nn.Module,
    batches: Sequence[Any],
    options: FitOptions,
    choice: Choice,
    *,
    forward: Forward,
    measure: Measure | None,
    tell: Callable[[int, str], None] | None,
    rated_samples: int,
    keep: int | None = None,
    output_error: float | None = None,
) -> Conversion:
    """Of a model as it is now."""
    if keep or output_error is not None:
        # What is kept is found on a model that is put back: the functions among it stay functions.
        trial = copy.deepcopy(model)
        whole = _convert_activations(
            trial, batches, options, choice, forward=forward, measure=measure, tell=tell, rated_samples=rated_samples
        )
        found_costs = {entry.name: entry.cost or 0.0 for entry in whole.activations}
        kept = _dearest(found_costs, keep, output_error)
        rest = replace(choice, exclude=[*choice.exclude, *map(escape, kept)])  # names, no patterns
        made = _convert_activations(
            model, batches, options, rest, forward=forward, measure=measure, tell=tell, rated_samples=rated_samples
        )
        reasons = {name: f"kept: converted alone it would move the output by {found_costs[name]:.2e}" for name in kept}
        left = [replace(entry, reason=reasons.get(entry.name, entry.reason)) for entry in made.left]
        return replace(made, left=left)
    say = tell or (lambda _step, _text: None)
    held_out: list[Any] = []
    if options.polynomial_only is not None:
        batches, held_out = hold_out(batches)

    def going(step: int, what: str, items: Sequence[_Item]) -> Iterator[_Item]:
        return inputs.paced(items, lambda text: say(step, f"{what}: {text}"), every=SAID_EVERY)

    total = sum(map(size_of, batches))
    said = f" on {total} samples" if total else ""
    if not model._modules and is_activation(model):
        raise ValueError(f"{type(model).__name__} is an activation itself; put it into nn.Sequential")
    rated = inputs.head(batches, RATED_SAMPLES)
    with _unchanged_by_errors(model):
        say(0, f"looking for activations{said}")
        with inputs.on_calibration_data():
            before = _output(model, rated, forward)
        selection = select_activations(
            model, batches, forward, choice, walk=lambda items: going(0, "looking for activations", items)
        )
        found = selection.activations

        def output() -> Tensor:
            with inputs.on_calibration_data():
                return _output(model, rated, forward)

        refuse_overwritten(model, [entry.name for entry in found], before, output, _rounding(model))
        say(1, f"calibrating {len(found)} activations{said}")
        if measure is None:
            calibrations = calibrate(model, found, going(1, "calibrating", batches), forward)
        else:
            calibrations = measure(model, selection, batches)
        rating = inputs.heads(batches, rated_samples) if rated_samples else []
        effects = None
        if rating and options.goes_by_effect:
            what = "measuring how errors move the output"
            say(2, what)
            effects = sensitivities(model, found, calibrations, going(2, what, rating), forward)
        say(2, f"fitting {options.title()}")
        fits = fit_layers(going(2, "fitting", found), calibrations, options, effects)
        costs: Mapping[str, float] = {}
        if rating:
            say(2, f"rating {len(fits)} activations")
            costs = layer_costs(model, fits, rating, forward, walk=lambda items: going(2, "rating", items))
        try:
            apply(model, fits)
            names = [entry.name for entry in fits]
            prove(model, names, rated, forward)
            after = _output(model, rated, forward)
            polynomials = measure_polynomials(model, names, held_out, forward) if held_out else None
        except BaseException:
            for entry in fits:
                replace_module(model, entry.name, entry.module)
            raise
    activations = [_described(entry, costs.get(entry.name)) for entry in fits]
    return Conversion(
        model, activations, selection.left, total, _moved(after, before), fits, selection, rated, polynomials
    )


def _dearest(costs: Mapping[str, float], keep: int | None, output_error: float | None) -> list[str]:
    """The activations that stay, the dearest first.

    Raises:
        ValueError: all of them would.
    """
    costs = {name: cost if math.isfinite(cost) else math.inf for name, cost in costs.items()}  # NaN has no order
    ranked = sorted(costs, key=lambda name: (-costs[name], name))
    if keep is None:
        assert output_error is not None
        rests = [math.sqrt(math.fsum(costs[name] ** 2 for name in ranked[start:])) for start in range(len(ranked))]
        keep = next((start for start, rest in enumerate(rests) if rest <= output_error), len(ranked))
        if keep == len(ranked):
            raise ValueError(
                f"output_error: no activation can be converted within {output_error:.3g}; `{ranked[-1]}` alone moves "
                f"the output by {rests[-1]:.3g}"
            )
    if keep >= len(ranked):
        raise ValueError(f"keep: {keep} of {len(ranked)} activations would stay, so that nothing would be converted")
    return ranked[:keep]


def _described(entry: LayerConversion, cost: float | None) -> ConvertedActivation:
    return ConvertedActivation(
        name=entry.name,
        target=target_name(entry.module),
        config=entry.fit.config,
        interval=entry.interval,
        relative_error=entry.relative_error,
        certificate={
            name: value if math.isfinite(value) else None for name, value in entry.fit.certificate.to_dict().items()
        },
        inputs=entry.calibration.summary(),
        cost=cost,
    )


def target_name(module: nn.Module) -> str:
    """An activation's class; of a function that was called, the function."""
    return f"{module.kind}()" if isinstance(module, FunctionalActivation) else type(module).__name__


def _first_tensor_of(forward: Callable[[nn.Module, Any], Any]) -> Forward:
    def run(model: nn.Module, batch: Any) -> Tensor:
        return inputs.forward(model, lambda same: forward(same, batch))

    return run


def _output(model: nn.Module, batch: Any, forward: Forward) -> Tensor:
    """In float64, without padding; a model that draws random numbers draws the same ones each time."""
    with measuring(model), torch.random.fork_rng():
        torch.manual_seed(0)
        return inputs.counted(forward(model, batch), inputs.mask_of(model, batch)).double()


def _rounding(model: nn.Module) -> float:
    """How far an output may move by the order of additions alone, relative to itself."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max(1e-4, *(4 * torch.finfo(kind).eps for kind in kinds), 0.0)


@contextmanager
def _unchanged_by_errors(model: nn.Module) -> Iterator[None]:
    """Classes, children, parameters and notes of all modules are as they were after an error; no tensor was changed."""
    kept = [
        (module, type(module), dict(module._modules), dict(module._parameters), dict(vars(module)))
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, kind, children, parameters, attributes in kept:
            module.__class__ = kind
            for current, before in ((module._modules, children), (module._parameters, parameters)):
                current.clear()
                current.update(before)  # type: ignore[arg-type]
            vars(module).update(attributes)
        raise


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
