"""`polytrope convert`: the conversion of a model without a workflow."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import EXIT_SUCCESS, UserError

_FAMILIES = ("hermite", "chebyshev", "legendre", "fourier", "tropical", "tropical_rational", "rational", "polyrelu")


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="polytrope convert",
        description="Replace the activations of a model by a fitted basis. MODEL: a directory of polytrope, of Hugging "
        "Face or of DeepSpeed, or a file with a state dict. It stays as it is; OUTPUT gets the converted model, "
        "conversion.json and conversion.html.",
        epilog="example:\n  polytrope convert model/ converted/ --degree 8\n"
        "  polytrope convert model/ --dry-run --target-error 0.01\n"
        "  polytrope convert trained/ serving/ --as-is --onnx --tables\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("output", type=Path, metavar="OUTPUT", nargs="?", help="not needed with --dry-run")
    parser.add_argument("--family", choices=_FAMILIES, default="hermite", help="default hermite")
    parser.add_argument("--degree", type=int, default=None, metavar="N", help="1 … 16 (default 8)")
    parser.add_argument(
        "--target-error",
        type=float,
        metavar="E",
        help="the smallest degree per layer with at most this rms error, relative to the activation's rms; --degree is "
        "then the highest one tried (default 16)",
    )
    parser.add_argument("--coverage", type=float, metavar="SHARE", help="of the inputs inside the interval; see docs")
    parser.add_argument("--derivative-weight", type=float, default=0.01, metavar="λ", help="default 0.01")
    parser.add_argument(
        "--constraint", action="append", default=[], choices=("ends", "end_values", "origin"), help="repeatable"
    )
    parser.add_argument(
        "--data",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="calibration data: texts, one per line, or an array .npy of images or token ids; repeatable (default, for "
        "models with a tokenizer: CPython's documentation)",
    )
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="of the calibration (default 256)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default 32")
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="module names to convert")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="module names to leave")
    parser.add_argument("--type", dest="types", action="append", default=[], metavar="CLASS", help="class to convert")
    parser.add_argument("--layers", metavar="FIRST-LAST", help="layer numbers from 0, such as 0-5")
    parser.add_argument(
        "--set",
        dest="config",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of the model's configuration, for state dicts: n_head=4, activation=gelu",
    )
    parser.add_argument("--ray", type=int, default=0, metavar="TASKS", help="calibrate in that many Ray tasks")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a cluster, for example auto (default: this machine)"
    )
    parser.add_argument(
        "--format",
        choices=("own", "huggingface"),
        default="as_read",
        help="of the output (default: own for GPT-2 and ConvNeXt, which the other commands read; else huggingface)",
    )
    parser.add_argument("--onnx", action="store_true", help="write model.onnx as well, checked with onnxruntime")
    parser.add_argument("--tables", action="store_true", help="write every activation as a table, tables/NAME.json")
    parser.add_argument(
        "--as-is",
        action="store_true",
        help="replace nothing: write a model whose activations are learned already in another --format, for serving "
        "with --onnx or --tables",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the certificates and the advice, write nothing")
    parser.add_argument("--json", action="store_true", help="print conversion.json instead of a table")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Parse and do it.

    Raises:
        UserError: a wrong option, a model or data that cannot be read, a layer that cannot be fitted.
    """
    options = build_parser().parse_args(list(arguments))
    _check(options)
    try:
        return _convert(options)
    except ValueError as error:
        raise UserError(f"convert: {error}") from error


def _check(options: argparse.Namespace) -> None:
    """What can be told before anything is read."""
    if options.output is None and not options.dry_run:
        raise UserError("convert: OUTPUT is missing", "polytrope convert MODEL OUTPUT, or --dry-run to write nothing")
    output = options.output
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"convert: {options.output} exists and is not empty", "name a new directory")
    if options.as_is and options.dry_run:
        raise UserError("convert: --as-is fits nothing, so there is nothing to see with --dry-run", "leave one out")
    for name, right, wanted in (
        ("degree", options.degree is None or 1 <= options.degree <= 16, "an integer from 1 to 16"),
        ("target-error", options.target_error is None or options.target_error > 0, "a number above 0"),
        ("coverage", options.coverage is None or 0.5 < options.coverage <= 1, "a share above 0.5, at most 1"),
        ("derivative-weight", 0 <= options.derivative_weight < float("inf"), "a number of at least 0"),
        ("samples", options.samples >= 1, "at least 1"),
        ("batch-size", options.batch_size >= 1, "at least 1"),
        ("ray", options.ray >= 0, "a number of tasks"),
    ):
        if not right:
            value = getattr(options, name.replace("-", "_"))
            raise UserError(f"convert: --{name}: expected {wanted}, got {value}", "polytrope convert --help")


def _convert(options: argparse.Namespace) -> int:
    from polytrope.models.calibration import calibrate
    from polytrope.models.conversion import FitOptions
    from polytrope.models.formats import read_model
    from polytrope.models.surgery import Activation, find_activations
    from polytrope.pipeline.stages.convert import calibration_data as data
    from polytrope.pipeline.stages.convert import work

    config = _config(options.config)
    model = read_model(options.model, config)
    if options.as_is:
        found = [Activation(name, module) for name, module in work.learned_activations(model).items()]
    else:
        found = find_activations(
            model, types=options.types, include=options.include, exclude=options.exclude, layers=_layers(options.layers)
        )
    if options.as_is and not (options.onnx or options.tables):
        batches, calibrations = [], {}
    else:
        batches = _batches(options, model)
        if options.ray:
            from polytrope.pipeline.stages.convert.parallel_calibration import calibrate_on_ray

            names = [activation.name for activation in found]
            calibrations = calibrate_on_ray(options.model, config, names, batches, options.ray, options.ray_address)
        else:
            calibrations = calibrate(model, found, batches, data.forward)
    rated = {name: tensor[:8] for name, tensor in batches[-1].items()} if batches else {}
    result = None
    if not options.as_is:
        fitting = FitOptions(
            options.family,
            options.degree or (16 if options.target_error else 8),
            options.target_error,
            options.coverage,
            options.derivative_weight,
            tuple(options.constraint),
        )
        result = work.fit_model(model, found, calibrations, fitting, rated)
        if options.json:
            print(json.dumps(result.content))
        else:
            print_result(result.content)
        if options.dry_run:
            return EXIT_SUCCESS
    onnx = rated if options.onnx else None
    output: Path = options.output
    with _appearing_whole(output) as directory:
        if result is None:
            deviation = work.write_model(model, directory, options.model, options.format, onnx)
        else:
            deviation = work.save(model, result, directory, options.model, options.format, onnx)
        if options.tables:
            chosen = {activation.name: model.get_submodule(activation.name) for activation in found}
            work.write_tables(directory, chosen, calibrations)
        if result is not None:
            from polytrope.pipeline.stages.convert.conversion_page import write_page

            write_page(directory, result.content, f"{options.model.name} → {options.family}")
    if deviation is not None:
        _say(options, f"{output / 'model.onnx'}: onnxruntime deviates by {deviation:.1e}")
    _say(options, f"wrote {output}" + ("" if result is None else f"; the page: {output / 'conversion.html'}"))
    return EXIT_SUCCESS


@contextmanager
def _appearing_whole(output: Path) -> Iterator[Path]:
    """A directory beside `output` that becomes `output` if all went well, and goes otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.json:
        print(text)


def _batches(options: argparse.Namespace, model: Any) -> list[Any]:
    from polytrope.pipeline.stages.convert import calibration_data as data

    arrays = [path for path in options.data if path.suffix == ".npy"]
    if arrays:
        return [batch for path in arrays for batch in data.array_batches(path, options.batch_size, options.samples)]
    directory = options.model if options.model.is_dir() else options.model.parent
    tokenizer = data.tokenizer_of(directory)
    if tokenizer is None:
        raise UserError(
            f"convert: {directory} has no tokenizer.json, so the calibration data must be numbers",
            "give --data FILE.npy: images [n, channels, height, width] as float, or token ids [n, length]",
        )
    texts = data.read_texts(options.data) if options.data else data.documentation_sentences()
    step = max(1, len(texts) // options.samples)
    texts = texts[::step][: options.samples]
    longest = data.longest_input(model, directory)
    return data.text_batches(tokenizer, texts, options.batch_size, longest, not hasattr(model, "architecture"))


def _config(entries: Sequence[str]) -> dict[str, Any]:
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


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise UserError(f"convert: --layers {text}: expected FIRST-LAST, such as 0-5") from None


def print_result(content: dict[str, Any]) -> None:
    """Certificates and advice as tables."""
    from polytrope.pipeline.commands.common import print_table

    rows = []
    for layer in content["layers"]:
        certificate = layer["certificate"]
        rows.append(
            [
                layer["name"],
                f"{layer['target']} → {layer['family']} {layer['degree']}",
                f"{layer['interval'][0]:.2f} … {layer['interval'][1]:.2f}",
                f"{layer['relative_error']:.2e}",
                f"{certificate['rms']:.2e}",
                f"{certificate['maximum']:.2e}",
                f"{certificate['rms_derivative']:.2e}",
                f"{certificate['maximum_outside']:.2e}",
            ]
        )
    heads = ["layer", "conversion", "interval", "relative", "rms", "largest", "rms slope", "largest outside"]
    print_table(heads, rows)
    if content.get("advice"):
        print("\nwhat costs most (how far the output moves if only this layer is converted):")
        shown = [
            [f"{entry['rank']}.", entry["name"], f"{entry['cost']:.2e}", entry.get("advice", "")]
            for entry in content["advice"][:8]
        ]
        print_table(["", "layer", "output moves by", "advice"], shown)
