"""`polytrope convert`: the `convert` stage without a workflow. Its options are the fields of the stage's parameters."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from polytrope.models.convert_options import FIT_OPTIONS
from polytrope.pipeline.commands.common import say
from polytrope.pipeline.commands.workflow_files import parameter_rows
from polytrope.pipeline.data.conversion_file import ConversionRecord
from polytrope.pipeline.data.records import finite
from polytrope.pipeline.errors import EXIT_RUN_FAILED, EXIT_SUCCESS, UserError
from polytrope.pipeline.stages.convert.parameters import ConvertParameters
from polytrope.pipeline.support.terminal import columns, wrapped
from polytrope.pipeline.workflow.refusals import words

if TYPE_CHECKING:
    from polytrope.pipeline.stages.convert.work import Outcome

_SINGULAR = {"constraints": "constraint", "types": "type", "calibration_samples": "samples", "ray_tasks": "ray"}
_LEFT_OUT = ("page", "register_as", "register_alias")  # the page is always written; no run is there to register it
_NOT_AS_IS = FIT_OPTIONS | {"include", "exclude", "types", "layers", "rated_samples", "keep", "output_error", "linear"}
_NOT_AS_IS |= {"drop_blocks", "factorize", "quantize"}
_METAVARS = {"int": "N", "float": "X", "str": "TEXT"}
_FIELD_METAVARS = {
    "domain": "LOW,HIGH",
    "drop_blocks": "count=N|blocks=FIRST,LAST",
    "factorize": "energy=X|ratio=X|rank=N",
    "quantize": "bits=N[,NAME=VALUE…]",
}
_ADVICE = 8  # layers whose advice is printed
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a module's name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the model and the output, the fields of `ConvertParameters`, and what only the command has."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model directory, or a file with a state dict")
    parser.add_argument("output", type=Path, metavar="OUTPUT", nargs="?", help="a new directory; none with --dry-run")
    for field, kind, default, description in parameter_rows(ConvertParameters):
        if field in _LEFT_OUT or "." in field:  # the fields of a group are written in one option
            continue
        if field == "threads":
            default, description = "all cores of this machine", "CPU threads"
        shown = "" if default in ("null", "none", "[]", "false") else f" (default {default})"
        settings: dict[str, Any] = {"dest": field, "help": (description + shown).replace("%", "%%")}
        if kind == "bool":
            settings |= {"action": "store_const", "const": True}
        else:
            element = kind.removesuffix(" | null").removeprefix("list[").removesuffix("]")
            settings["metavar"] = _FIELD_METAVARS.get(field) or _METAVARS.get(element, element.replace(" | ", "|"))
            if kind.startswith("list["):
                settings |= {"action": "append", "help": settings["help"] + "; repeatable"}
        parser.add_argument(_option(field), **settings)
    parser.add_argument(
        "--data",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="calibration data: texts, one per line; an array .npy of images or token ids; or .npz, arrays by names "
        "of the model's inputs (decoder_input_ids, input_features, …); repeatable (default, for models with a "
        "tokenizer: CPython's documentation)",
    )
    parser.add_argument(
        "--set",
        dest="config",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of the model's configuration, where its file does not tell: n_head=12, activation=gelu; repeatable",
    )
    parser.add_argument("--ray-address", metavar="ADDRESS", help="of a cluster for --ray (default: this machine)")
    parser.add_argument(
        "--as-is",
        action="store_true",
        help="replace nothing: write a model whose activations are learned already in another --format, for serving "
        "with --onnx or --tables",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the certificates and the advice, write nothing")
    parser.add_argument("--json", action="store_true", help="print conversion.json instead of a table")


def convert(options: argparse.Namespace) -> int:
    """Convert the model and print what became of it.

    Raises:
        UserError: a wrong option, a model or data that cannot be read, a layer that cannot be fitted.
    """
    parameters = read_parameters(options)
    _check(options)
    config = _read_config(options.config)
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of the answer
        outcome = _outcome(options, parameters, config)
    if options.json and outcome.record is not None:
        print(json.dumps(finite(outcome.record.model_dump(exclude_unset=True)), allow_nan=False))
    elif outcome.record is not None:
        print_record(outcome.record)
    if options.dry_run:
        return EXIT_SUCCESS
    if outcome.onnx is not None:
        about = f"onnxruntime deviates by {outcome.onnx.deviation:.1e}; it {outcome.onnx.limits()}"
        _say(options, f"{options.output / 'model.onnx'}: {about}")
    if outcome.rest_of_graph is not None:
        rest = ", ".join(f"{name} × {number}" for name, number in outcome.rest_of_graph.items())
        _say(options, f"the activations are Add and Mul; the rest of the graph has {rest or 'sums and products only'}")
    page = options.output / "conversion.html"
    _say(options, f"wrote {options.output}" + (f"; the page: {page}" if page.exists() else ""))
    if outcome.onnx_failure is not None:
        _warn(f"model.onnx cannot be written: {outcome.onnx_failure}", f"{options.output} has everything else")
        return EXIT_RUN_FAILED
    return EXIT_SUCCESS


def read_parameters(options: argparse.Namespace) -> ConvertParameters:
    """The parameters that the options give, the model's defaults for the others.

    Raises:
        UserError: a value that its field refuses.
    """
    given = {name: getattr(options, name, None) for name in ConvertParameters.model_fields}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values = {"threads": cores, "page": True} | {name: value for name, value in given.items() if value is not None}
    try:
        return ConvertParameters.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0])
        unknown = problem["type"] == "extra_forbidden"  # a part of the option's value as well
        text, near = words(problem, ConvertParameters, values, problem["loc"] if unknown else (field,))
        if problem["type"] == "missing":  # a part of the option's value; what is wrong with others, they say themselves
            text = f"{problem['loc'][-1]}: {text}"
        raise UserError(f"convert: {_option(field)}: {text}", near or "polytrope convert --help") from error


def _option(field: str) -> str:
    return "--" + _SINGULAR.get(field, field).replace("_", "-")


def _check(options: argparse.Namespace) -> None:
    """What needs no torch, which takes seconds to import."""
    for field, path in (("MODEL", options.model), *(("--data", path) for path in options.data)):
        if not path.exists():
            hint = f"{field} is a path from {Path.cwd()}; `polytrope convert --help` says to what"
            raise UserError(f"convert: {path}: there is no such file or directory", hint)
    output = options.output
    if output is None and not options.dry_run:
        raise UserError("convert: OUTPUT is missing", "polytrope convert MODEL OUTPUT, or --dry-run to write nothing")
    if output is not None and options.dry_run:
        raise UserError(f"convert: --dry-run writes nothing, and {output} says where to", "leave one out")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"convert: {output} exists and is not empty", "name a new directory")
    if options.as_is and options.dry_run:
        raise UserError("convert: --as-is fits nothing, so there is nothing to see with --dry-run", "leave one out")
    fitting = [field for field in sorted(_NOT_AS_IS) if getattr(options, field) is not None]
    if options.as_is and fitting:
        raise UserError(f"convert: --as-is fits nothing, so {_option(fitting[0])} means nothing", "leave one out")


def _read_config(entries: Sequence[str]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals:
            raise UserError(f"convert: --set {entry}: expected FIELD=VALUE")
        try:
            config[name] = json.loads(value)
        except json.JSONDecodeError:
            config[name] = value
    return config


def _outcome(options: argparse.Namespace, parameters: ConvertParameters, config: dict[str, Any]) -> Outcome:
    """The conversion itself, into OUTPUT or, dry, nowhere."""
    from polytrope.models.writing import appearing
    from polytrope.pipeline.stages.convert.calibration_data import file_batches
    from polytrope.pipeline.stages.convert.work import Source, convert_model, export_model

    directory = options.model if options.model.is_dir() else options.model.parent
    source = Source(
        options.model,
        lambda model: file_batches(
            model, directory, options.data, parameters, partial(print, file=sys.stderr, flush=True)
        ),
        title=f"{options.model.name} → {parameters.title()}",
        config=config,
        ray_address=options.ray_address,
    )
    try:
        if options.dry_run:
            return convert_model(source, parameters, None, _tell)
        with appearing(options.output, "model.json") as written:
            if options.as_is:
                return export_model(source, parameters, written)
            return convert_model(source, parameters, written, _tell)
    except ValueError as error:
        raise UserError(f"convert: {error}") from error


def _tell(_step: int, text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.json:
        say(text)


def _warn(text: str, hint: str) -> None:
    """What went wrong beside the conversion, and a way out."""
    print(wrapped(f"polytrope: convert: {text}\n  → {hint}", columns(sys.stderr)), file=sys.stderr)


def print_record(conversion: ConversionRecord) -> None:
    """Certificates and advice, readable on 80 columns; `conversion.json` has all bounds."""
    if conversion.quadratic is not None:
        say(f"quadratic instead of linear, with the same function: {', '.join(conversion.quadratic)}")
    _print_structure(conversion)
    if not conversion.layers:
        return
    bounds = {"maximum": "largest", "rms_derivative": "slope", "maximum_outside": "outside"}
    say(
        "errors: root mean square relative to the activation's; largest; root mean square of the slope; largest outside"
    )
    _print_grouped(
        ["degree", "interval", "relative", *bounds.values()],
        [
            (
                layer.name,
                f": {layer.target} → {layer.family}",
                [
                    str(layer.degree),
                    "{:.3g} … {:.3g}".format(*layer.interval),
                    f"{layer.relative_error:.2e}",
                    *("–" if layer.certificate[name] is None else f"{layer.certificate[name]:.2e}" for name in bounds),
                ],
            )
            for layer in conversion.layers
        ],
    )
    _print_polynomials(conversion)
    if conversion.advice:
        print("\nwhat costs most (how far the output moves if only this layer is converted):")
        for entry in conversion.advice[:_ADVICE]:
            say(f"{entry.rank}. {entry.name}: {entry.cost:.2e}")
            if entry.advice:
                say(f"   {entry.advice}")
    if conversion.left:
        print("\nactivations that stay as they are:")
        for left in conversion.left:
            say(f"{left.name} ({left.kind}): {left.reason}")


def _print_structure(conversion: ConversionRecord) -> None:
    """Blocks that are gone, layers in two factors, rounded weights, and what became of the model."""
    dropped, factored, rounded = conversion.dropped, conversion.factorization, conversion.quantization
    size = conversion.size
    if dropped is not None:
        say(f"{len(dropped.blocks)} of {dropped.total} blocks dropped: {', '.join(dropped.blocks)}")
        say(
            f"a map in {dropped.into} stands for them; the state behind them is off by {dropped.relative_error:.3g} of "
            f"its size, {dropped.relative_error_without:.3g} without the map"
        )
    if factored is not None:
        print("linear layers in two factors, and how far their outputs are off:")
        _print_grouped(
            ["size", "utilised rank", "rank", "outputs"],
            [
                (
                    layer.name,
                    "",
                    [
                        f"{layer.inputs} → {layer.outputs}",
                        str(layer.utilised_rank),
                        str(layer.rank),
                        f"{layer.relative_error:.2e}",
                    ],
                )
                for layer in factored.layers
            ],
        )
        for left in factored.left:
            say(f"{left.name} stays: {left.reason}")
    if rounded is not None:
        print(f"weights of {rounded.bits} bits, and how far the layers' outputs are off:")
        _print_grouped(
            ["size", "exponent", "outputs", "uniform"],
            [
                (
                    layer.name,
                    "",
                    [
                        f"{layer.inputs} → {layer.outputs}",
                        f"{layer.exponent:.3g}",
                        f"{layer.relative_error:.2e}",
                        f"{layer.uniform_error:.2e}",
                    ],
                )
                for layer in rounded.layers
            ],
        )
        for equal in rounded.equalized:
            say(equal.describe())
        for other in rounded.unequalized:
            say(f"{other.name} took up no scales: {other.reason}")
        for stays in rounded.left:
            say(f"{stays.name} stays: {stays.reason}")
        say(f"{rounded.bytes_before:,} bytes of parameters before, {rounded.bytes_after:,} with these packed")
    if size is not None:
        moved = f"the output moves by {size.difference:.2e} of its size"
        say(f"{size.before:,} parameters before, {size.after:,} now; {moved}")


def _print_grouped(heads: Sequence[str], entries: Sequence[tuple[str, str, list[str]]]) -> None:
    """A table of activations, each a name, a text behind it and cells; the text heads all that share it.

    Names that differ in numbers alone stand once, with `*` for the numbers, which begin the lines; beside figures,
    names of modules have no room on a terminal.
    """
    groups: dict[tuple[str, str], list[tuple[str, list[str]]]] = {}
    for name, text, cells in entries:
        groups.setdefault((_NUMBER.sub("*", name), text), []).append((name, cells))
    labels = {name: ".".join(_NUMBER.findall(name)) for name, _, _ in entries}
    rows = [heads, *(cells for _, _, cells in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = max(map(len, labels.values()), default=0)

    def line(label: str, cells: Sequence[str]) -> str:
        return "  ".join([label.ljust(first), *map(str.ljust, cells, widths)]).rstrip()

    print(line("", heads))
    for (pattern, text), members in groups.items():
        say((pattern if len(members) > 1 else members[0][0]) + text)
        for name, cells in members:
            print(line(labels[name], cells))


def _print_polynomials(conversion: ConversionRecord) -> None:
    """What polynomials cost, and the inputs outside of their domains."""
    whole = conversion.polynomial
    if whole is None:
        return
    from polytrope.models.domains import describe_outside
    from polytrope.models.polynomials import describe_costs
    from polytrope.pipeline.stages.convert.polynomials import outside_of_record

    say("\nsums and products (baby steps, giant steps in Chebyshev form; products of two variable factors):")
    entries = []
    for layer in conversion.layers:
        cost, outside = layer.circuit, layer.outside
        assert cost is not None
        assert outside is not None
        counts = [cost.depth, cost.levels, cost.products, cost.constant_products]
        left = f"{outside.below + outside.above} of {outside.inputs} ({outside.probability:.2g})"
        entries.append((layer.name, "", [str(layer.degree), *map(str, counts), left]))
    _print_grouped(["degree", "depth", "levels", "products", "by constants", "held-out inputs outside"], entries)
    say(describe_costs(whole))
    warning = describe_outside(outside_of_record(conversion))
    if warning is not None:
        _warn(warning, "more calibration data (--samples), a wider --domain-margin, or --domain=LOW,HIGH")
