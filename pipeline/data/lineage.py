"""What a model was made from, and what all of it was trained on: `lineage.json` beside a model."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from polytrope.pipeline.data.converted_layers import CONVERSION_FILE, read_shown_conversion
from polytrope.pipeline.data.records import read_record

LINEAGE_FILE = "lineage.json"
_IF_ANY = ("structure", "teachers")


class Ancestor(BaseModel):
    """An artifact that a model was made from."""

    model_config = ConfigDict(frozen=True)

    stage: str
    digest: str


class Teacher(BaseModel):
    """A model that another one was trained to be like: where it lies, and what it and its ancestors have seen.

    Args:
        samples, tokens, unknown: as of its `Lineage`.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    digest: str
    samples: int = 0
    tokens: int | None = None
    unknown: bool = False


class Lineage(BaseModel):
    """How a model came to be.

    Args:
        ancestors: what it was made from, the oldest first; none for one from scratch.
        samples: training samples that it and its ancestors have seen, each as often as it was seen.
        tokens: the same in tokens; None for images.
        unknown: an ancestor came from elsewhere, so the counts are what is known.
        base_model: the name on Hugging Face's hub of that ancestor, where it is known.
        structure: what was done to blocks, linear layers and weights of its ancestors, for people, the oldest first.
        teachers: models that it or its ancestors, or these models themselves, were trained to be like, each once. What
            they have seen is not in `samples` and `tokens`.
    """

    model_config = ConfigDict(frozen=True)

    ancestors: list[Ancestor] = []
    samples: int = 0
    tokens: int | None = None
    unknown: bool = False
    base_model: str | None = None
    structure: list[str] = []
    teachers: list[Teacher] = []

    def then(self, stage: str, digest: str, samples: int = 0, tokens: int | None = None) -> Lineage:
        """Of a model that is made from this one, which lies in the artifact of `stage`, by so much training."""
        return Lineage(
            ancestors=[*self.ancestors, Ancestor(stage=stage, digest=digest)],
            samples=self.samples + samples,
            tokens=None if self.tokens is None and tokens is None else (self.tokens or 0) + (tokens or 0),
            unknown=self.unknown,
            base_model=self.base_model,
            structure=self.structure,
            teachers=self.teachers,
        )

    def taught_by(self, stage: str, digest: str, teacher: Lineage) -> Lineage:
        """Of a model that was trained to be like the one in the artifact of `stage`, whose lineage is `teacher`."""
        seen = Teacher(
            stage=stage, digest=digest, samples=teacher.samples, tokens=teacher.tokens, unknown=teacher.unknown
        )
        each = {found.digest: found for found in (*self.teachers, *teacher.teachers, seen)}
        return self.model_copy(update={"teachers": list(each.values())})


def read_lineage(directory: Path) -> Lineage:
    """Of the model in a directory; one that nothing is known of has `unknown`.

    Raises:
        UserError: damaged.
    """
    path = Path(directory) / LINEAGE_FILE
    return read_record(path, Lineage, "name a `train` or `convert` stage") if path.exists() else Lineage(unknown=True)


def read_origin(directory: Path) -> Lineage:
    """Of the model in a directory, for one that is made from it: what its own conversion did to it counts as done.

    Raises:
        UserError: damaged.
    """
    lineage = read_lineage(directory)
    if not (Path(directory) / CONVERSION_FILE).is_file():
        return lineage
    done = read_shown_conversion(Path(directory)).structure()
    return lineage.model_copy(update={"structure": [*lineage.structure, *done]})


def write_lineage(directory: Path, lineage: Lineage) -> None:
    """Beside the model in a directory; a structure that is as it was built, and teachers that there are none of, are
    left out."""
    text = lineage.model_dump_json(indent=1, exclude={name for name in _IF_ANY if not getattr(lineage, name)})
    (directory / LINEAGE_FILE).write_text(text + "\n", encoding="utf-8")
