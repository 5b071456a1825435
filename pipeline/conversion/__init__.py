"""Conversion of pretrained models: what the `convert` stage and the command `polytrope convert` have in common."""

from __future__ import annotations

from collections.abc import Sequence


def convert_command(arguments: Sequence[str]) -> int:
    """`polytrope convert`; returns the exit code."""
    from polytrope.pipeline.conversion.command import run

    return run(arguments)
