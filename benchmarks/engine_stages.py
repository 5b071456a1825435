"""Stages of the engine's benchmark: one that does nothing, one that writes a large file."""

from __future__ import annotations

from polytrope.pipeline.stage import Artifact, StageContext


def nothing(context: StageContext, index: int, source: Artifact | None = None) -> None:
    """Does nothing; what is measured is everything around it."""


def gather(context: StageContext, parts: dict[str, Artifact]) -> None:
    """The end of a fan-out."""


def large(context: StageContext, gibibytes: int) -> None:
    """A file of that size; sparse, so that only hashing it takes time."""
    with open(context.output / "zeros", "wb") as file:
        file.truncate(gibibytes * 2**30)
