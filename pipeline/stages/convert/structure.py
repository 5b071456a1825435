"""Dropped blocks and factored layers, in `conversion.json`."""

from __future__ import annotations

from dataclasses import asdict

from polytrope.models.convert import Conversion
from polytrope.pipeline.data.conversion_file import ConversionRecord, DroppedBlocks, Factorization, Size


def with_structure(record: ConversionRecord, made: Conversion) -> ConversionRecord:
    """The record with what became of blocks and linear layers, where that was asked for."""
    if made.parameters is None:
        return record
    dropped, factored = made.dropped, made.factorization
    return record.model_copy(
        update={
            "dropped": None if dropped is None else DroppedBlocks.model_validate(asdict(dropped)),
            "factorization": None if factored is None else Factorization.model_validate(asdict(factored)),
            "size": Size(before=made.parameters[0], after=made.parameters[1], difference=made.difference),
        }
    )
