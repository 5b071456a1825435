"""Typical mistakes, what is said to each, and docs/errors.md, which is made of both.

python tests/docs/mistakes.py     # writes docs/errors.md anew
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from polytrope.pipeline.commands.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"

TEXT = """\
name: demo
params: {steps: 100}
stages:
  shard:
    uses: shard
    with:
      source: {kind: files, paths: [corpus.txt]}
      tokenizer: {kind: bpe, vocab_size: 512}
      sequence_length: 64
  train:
    uses: train
    inputs: {dataset: shard}
    with:
      model: {n_layer: 2, n_head: 4, n_embd: 32, activation: hermite3}
      steps: ${params.steps}
      global_batch_size: 8
    resources: {workers: 2}
  convert:
    uses: convert
    inputs: {model: train, dataset: shard}
    with: {family: chebyshev, degree: 8, types: [Hermite]}
  evaluate:
    uses: evaluate
    inputs: {dataset: shard, models: {trained: train, converted: convert}}
    with: {drift: {converted: trained}}
  report:
    uses: report
    inputs: {evaluation: evaluate, models: {trained: train, converted: convert}}
    with: {baseline: trained}
"""
IMAGES = """\
name: demo
stages:
  digits:
    uses: shard_images
    with: {source: {kind: digits}, image_size: 8, channels: 1}
  train:
    uses: train
    inputs: {dataset: digits}
    with:
      model: {architecture: convnext, depths: [1, 1], dims: [8, 16], patch_size: 1}
      epochs: 2
"""
NUMBERS = """\
name: demo
stages:
  pairs:
    uses: shard_numbers
    with: {source: {kind: modular, modulus: 7}}
  train:
    uses: train
    inputs: {dataset: pairs}
    with:
      model: {architecture: mlp, widths: [32, 32]}
      steps: 5
"""
SEARCH = """\
name: demo
stages:
  shard:
    uses: shard
    with:
      source: {kind: files, paths: [corpus.txt]}
      tokenizer: {kind: bpe, vocab_size: 512}
  search:
    uses: sweep
    with:
      stage:
        uses: train
        inputs: {dataset: shard}
        with:
          model: {n_layer: 2, n_head: 4, n_embd: 32, activation: {name: hermite}}
          on_divergence: record
      ranges:
        learning_rate: {low: 1.0e-3, high: 1.0e-2, log: true}
        model.activation.degree: [3, 5, 8]
      trials: 9
      metric: val/loss
      mode: min
      halving: {parameter: steps, smallest: 100, rounds: 3}
  evaluate:
    uses: evaluate
    inputs: {dataset: shard, models: {best: search/best}}
"""


@dataclass(frozen=True)
class Mistake:
    """One of them.

    Args:
        title: what went wrong, in a few words.
        old, new: what stands in the workflow file, and what the mistake makes of it.
        base: the file.
        arguments: of the command.
    """

    title: str
    old: str = ""
    new: str = ""
    base: str = TEXT
    arguments: tuple[str, ...] = ("validate", "workflow.yaml")

    @property
    def text(self) -> str:
        """Of the workflow file."""
        assert self.base.count(self.old) >= 1 or not self.old, f"{self.title}: `{self.old}` is not there"
        return self.base.replace(self.old, self.new, 1) if self.old else self.base


def _activation(title: str, new: str) -> Mistake:
    return Mistake(title, "activation: hermite3", f"activation: {new}")


def _command(title: str, *arguments: str) -> Mistake:
    return Mistake(title, arguments=arguments)


_GPT2 = "{n_layer: 2, n_head: 4, n_embd: 32, activation: hermite3}"
_CONVNEXT = "{architecture: convnext, depths: [1, 1], dims: [8, 16], patch_size: 1}"
_MODELS = "evaluation: evaluate, models: {trained: train, "
_WITH_FIRST = f"""{TEXT}  first:
    uses: train
    inputs: {{dataset: shard}}
    with: {{model: {_GPT2}, steps: 9}}
"""


def _best(title: str, model: str, metric: str) -> Mistake:
    stage = f"  best:\n    uses: select\n    inputs: {{models: {{only: {model}}}}}\n"
    return Mistake(title, "  report:\n", f"{stage}    with: {{metric: {metric}, mode: min}}\n  report:\n")


_SECOND = """  tune:
    uses: train
    inputs: {dataset: longer, initial: train}
    with: {steps: 5}
  longer:
    uses: shard
    with:
      source: {kind: files, paths: [corpus.txt]}
      tokenizer: {kind: bpe, vocab_size: 512}
      sequence_length: 128
  report:"""

SECTIONS: dict[str, list[Mistake]] = {
    "The file": [
        Mistake("a line that is indented wrongly", "    inputs: {dataset: shard}", "   inputs: {dataset: shard}"),
        Mistake("a key given twice", "    resources: {workers: 2}", "    uses: train\n    resources: {workers: 2}"),
        Mistake("a misspelled key of the file", "stages:\n", "stage:\n"),
        Mistake("a misspelled key of a stage", "    inputs: {dataset: shard}", "    input: {dataset: shard}"),
        Mistake("a reference to no parameter", "${params.steps}", "${params.step}"),
        Mistake("a reference to nothing", "${params.steps}", "${parameters.steps}"),
        Mistake("an executor that there is not", "name: demo", "name: demo\nexecutor: slurm"),
        Mistake("a store that there is not", "name: demo", "name: demo\nstore: s3:/bucket"),
        Mistake("a duration that is none", "    resources:", "    timeout: soon\n    resources:"),
        Mistake("a size that is none", "{workers: 2}", "{workers: 2, memory: 4 elephants}"),
        Mistake("no workers", "{workers: 2}", "{workers: 0}"),
        Mistake("a misspelled resource", "{workers: 2}", "{workers: 2, gpu: 1}"),
        Mistake(
            "an environment variable that is not set", "    resources:", "    environment: [NOT_SET]\n    resources:"
        ),
        Mistake("two branches of one name", "    resources:", "    matrix: {seed: [1, 1]}\n    resources:"),
        Mistake("a branch where one stage is meant", "    resources:", "    matrix: {seed: [1, 2]}\n    resources:"),
    ],
    "Stages and their inputs": [
        Mistake("a misspelled stage function", "uses: convert", "uses: covnert"),
        Mistake("a module that is not there", "uses: convert", "uses: my_stages:convert"),
        Mistake("a misspelled stage", "inputs: {dataset: shard}", "inputs: {dataset: shards}"),
        Mistake("a missing input", "    inputs: {dataset: shard}\n", ""),
        Mistake("an input that the stage does not have", "{dataset: shard}", "{data: shard}"),
        Mistake("an input of the wrong kind", "{evaluation: evaluate", "{evaluation: train"),
        Mistake("stages that wait for each other", "{dataset: shard}", "{dataset: shard, initial: convert}"),
        Mistake("a condition on no stage", "    resources:", "    when: stages.shart.documents > 5\n    resources:"),
        Mistake("files that are not there", "[corpus.txt]", "[corpus/*.txt]"),
        Mistake("a source that there is not", "{kind: files,", "{kind: file,"),
        Mistake("a tokenizer that is too small", "vocab_size: 512}", "vocab_size: 100}"),
    ],
    "The model": [
        _activation("a misspelled activation", "hermit"),
        _activation("a degree that is too high", "{name: hermite, degree: 40}"),
        _activation("the same in short", "hermite40"),
        _activation("a misspelled option of an activation", "{name: hermite, degre: 4}"),
        _activation("a start that the family does not have", "{name: fourier, init: stable}"),
        _activation("an interval the wrong way round", "{name: hermite, interval: [4, -4]}"),
        _activation("a gated activation in GPT-2", "{name: hermite, glu: true}"),
        _activation("too few activations", "[gelu]"),
        _activation("blocks without an activation", "[{layers: 0, name: gelu}]"),
        Mistake("a misspelled part", "n_layer: 2", "attention: pwoer, n_layer: 2"),
        Mistake(
            "a state that a power does not have",
            "n_layer: 2",
            "attention: {name: power, power: 4, recurrent: true}, n_layer: 2",
        ),
        Mistake("dropout of weights that are not dropped", "n_layer: 2", "attention: power, dropout: 0.1, n_layer: 2"),
        Mistake(
            "a norm over a batch that is computed twice",
            "activation: hermite3}",
            "activation: hermite3, norm: batch}\n      activation_checkpointing: block",
        ),
        Mistake("heads that do not divide the width", "n_head: 4", "n_head: 3"),
        Mistake("an unknown size", "n_layer: 2,", "preset: gpt3,"),
        Mistake("a setting of another architecture", "n_layer: 2", "depths: [1, 1]"),
        Mistake("an unknown architecture", "{n_layer: 2", "{architecture: gpt, n_layer: 2"),
        Mistake("ConvNeXt on text", _GPT2, "{architecture: convnext}"),
        Mistake("GPT-2 on images", _CONVNEXT, "{architecture: gpt2}", IMAGES),
        Mistake("a vocabulary smaller than the tokenizer's", "n_layer: 2", "vocab_size: 500, n_layer: 2"),
        Mistake("a context shorter than the samples", "n_layer: 2", "sequence_length: 32, n_layer: 2"),
        Mistake("images of other channels", "patch_size: 1", "patch_size: 1, in_channels: 3", IMAGES),
        Mistake("too few classes", "patch_size: 1", "patch_size: 1, num_classes: 5", IMAGES),
        Mistake("images that are too small", "patch_size: 1", "patch_size: 16", IMAGES),
        Mistake("fewer outputs than classes of numbers", "widths", "outputs: 6, widths", NUMBERS),
        Mistake("a loss that is not that of the numbers", "widths", "loss: mse, widths", NUMBERS),
        Mistake("a residual network of unequal widths", "[32, 32]", "[32, 16], residual: true", NUMBERS),
        Mistake("stages of different numbers", "dims: [8, 16]", "dims: [8]", IMAGES),
    ],
    "Training": [
        Mistake("a misspelled parameter", "steps: ${params.steps}", "step: ${params.steps}"),
        Mistake("text for a number", "steps: ${params.steps}", "steps: many"),
        Mistake("both steps and epochs", "steps: ${params.steps}", "steps: 5\n      epochs: 1"),
        Mistake("a batch that does not divide over the workers", "global_batch_size: 8", "global_batch_size: 5"),
        Mistake("a warm-up longer than the training", "global_batch_size: 8", "warmup_steps: 200"),
        Mistake("an arithmetic that there is not", "global_batch_size: 8", "precision: fp8"),
        Mistake("a learning rate that is none", "global_batch_size: 8", "learning_rate: -1e-3"),
        Mistake(
            "DeepSpeed says something else", "global_batch_size: 8", "zero_stage: 1\n      deepspeed: zero-2-offload"
        ),
        Mistake("a name that MLflow does not take", "global_batch_size: 8", "register_as: models/mine"),
        Mistake(
            "nothing to mix",
            "epochs: 2",
            "epochs: 2\n      global_batch_size: 1\n      augmentation: {mixup: 0.2}",
            IMAGES,
        ),
        Mistake("a loss that there is not", "global_batch_size: 8", "loss: {name: focal}"),
        Mistake("what learns, misspelled", "global_batch_size: 8", "trainable: [coefs]"),
        Mistake("augmentation of text", "global_batch_size: 8", "augmentation: {horizontal_flip: true}"),
        Mistake("neither a model nor one to start from", f"      model: {_GPT2}\n", ""),
        Mistake(
            "a model, and one to start from",
            "{dataset: shard}\n    with:\n      model",
            "{dataset: shard, initial: first}\n    with:\n      model",
            _WITH_FIRST,
        ),
        Mistake("fine-tuning on longer samples", "  report:", _SECOND),
    ],
    "Conversion, evaluation, report": [
        Mistake("a family that there is not", "family: chebyshev", "family: chebychev"),
        Mistake("layers that the model does not have", "degree: 8", "degree: 8, layers: 2-5"),
        Mistake("activations that are so already", ", types: [Hermite]", ""),
        Mistake("a drift from no model", "{converted: trained}", "{converted: baseline}"),
        Mistake("a stride longer than the samples", "{drift: {converted: trained}}", "{stride: 100}"),
        Mistake("a baseline that there is not", "baseline: trained", "baseline: gelu"),
        Mistake(
            "a model in the report that was not evaluated", f"{_MODELS}converted:", f"{_MODELS}convert:"
        ),
        _best("a choice by a figure that trainings do not have", "train", "val/los"),
        _best("a choice by a figure of evaluations, without one", "train", "loss"),
        _best("a choice among models that were not trained", "convert", "val/loss"),
        Mistake(
            "an analysis that there is not",
            "  report:\n",
            "  analysis:\n    uses: analyze\n    inputs: {dataset: shard, models: {trained: train}}\n"
            "    with: {analyses: [signal, kernels]}\n  report:\n",
        ),
        Mistake(
            "options of another weight",
            "{family: chebyshev, degree: 8, types: [Hermite]}",
            "{family: chebyshev, degree: 2, weight: normal, coverage: 0.99}",
        ),
        Mistake(
            "a circuit of a softmax",
            "  report:\n",
            "  circuit:\n    uses: export_circuit\n    inputs: {model: train, dataset: shard}\n  report:\n",
        ),
    ],
    "Searches": [
        Mistake("a trial without a stage function", "        uses: train\n", "", SEARCH),
        Mistake("a misspelled parameter of the trials", "on_divergence:", "on_divergance:", SEARCH),
        Mistake("a misspelled parameter that is searched", "learning_rate:", "learning_rat:", SEARCH),
        Mistake("a value that a trial cannot have", "[3, 5, 8]", "[3, 5, 40]", SEARCH),
        Mistake("trials of nothing", "        inputs: {dataset: shard}", "        inputs: {dataset: x}", SEARCH),
        Mistake("a range the wrong way round", "low: 1.0e-3, high: 1.0e-2", "low: 1.0e-2, high: 1.0e-3", SEARCH),
        Mistake("too few trials", "trials: 9", "trials: 4", SEARCH),
        Mistake("a figure that trainings do not have", "val/loss", "val/lss", SEARCH),
        Mistake("a result that a search does not have", "search/best", "search/bst", SEARCH),
    ],
    "The command line": [
        _command("a misspelled command", "rnu", "workflow.yaml"),
        _command("a misspelled option", "run", "workflow.yaml", "--exectuor", "local"),
        _command("an executor that there is not", "run", "workflow.yaml", "--executor", "slurm"),
        _command("a cluster's address, given to a driver that runs here", "run", "workflow.yaml", "--address", "auto"),
        _command("text for a number", "run", "workflow.yaml", "--concurrency", "two"),
        _command("a file that is not there", "run", "workflow.yml"),
        _command("a parameter that the file does not have", "validate", "workflow.yaml", "--set", "params.step=5"),
        _command("a value without a name", "validate", "workflow.yaml", "--set", "5"),
        _command("a stage that there is not", "plan", "workflow.yaml", "--force", "trian"),
        _command("a run that there is not", "status", "20261123-1712-ab12"),
        _command("a stage function that there is not", "stages", "trian"),
    ],
}  # fmt: skip
EXAMPLES = {
    "workflow.yaml": TEXT,
    "workflow.yaml (images)": IMAGES,
    "workflow.yaml (search)": SEARCH,
}


def said(mistake: Mistake, directory: Path) -> tuple[int, str]:
    """Exit code and what is printed to stderr."""
    (directory / "corpus.txt").write_text("A text.\n", encoding="utf-8")
    (directory / "workflow.yaml").write_text(mistake.text, encoding="utf-8")
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = main(mistake.arguments)
        except SystemExit as exit_:  # argparse
            code = int(exit_.code or 0)
    return code, errors.getvalue().rstrip().replace(str(directory), "…")


def page(texts: dict[str, dict[str, str]]) -> str:
    """The Markdown of docs/errors.md from what was said, by section and title."""
    lines = [
        "# Mistakes, and what is said to them",
        "",
        "Everything that the file decides is refused before anything starts, by `polytrope validate`, `plan`, `run`",
        "and `submit` alike: with file, line, field, value, and a way out. These are typical mistakes, as the tests",
        "make them (`python tests/docs/mistakes.py` writes this page).",
        "",
        "The workflow in which each of them is made:",
        "",
        *(line for text in EXAMPLES.values() for line in ("```yml", *text.splitlines(), "```", "")),
    ]
    for section, mistakes in SECTIONS.items():
        lines += [f"## {section}", ""]
        for mistake in mistakes:
            lines += [f"**{mistake.title[0].upper()}{mistake.title[1:]}**", ""]
            changed = [
                line.removeprefix("+ ")
                for line in difflib.ndiff(mistake.base.splitlines(), mistake.text.splitlines())
                if line.startswith("+ ")
            ]
            if changed:
                lines += ["```yml", *changed, "```", ""]
            if mistake.arguments != Mistake.arguments:
                lines += ["```sh", f"polytrope {' '.join(mistake.arguments)}", "```", ""]
            lines += ["```text", *texts[section][mistake.title].splitlines(), "```", ""]
    return "\n".join(lines)


def all_said() -> dict[str, dict[str, str]]:
    """What is said to every mistake, by section and title."""
    os.environ.pop("NOT_SET", None)
    with tempfile.TemporaryDirectory() as directory:
        return {
            section: {mistake.title: said(mistake, Path(directory))[1] for mistake in mistakes}
            for section, mistakes in SECTIONS.items()
        }


if __name__ == "__main__":
    PAGE.write_text(page(all_said()), encoding="utf-8")
    print(f"wrote {PAGE}")
