"""Dropped blocks, factored and rounded layers, in `conversion.json`."""

from __future__ import annotations

from dataclasses import asdict

from polytrope.models.convert import Conversion
from polytrope.pipeline.data.conversion_file import ConversionRecord, DroppedBlocks, Factorization, Quantization, Size


def with_structure(record: ConversionRecord, made: Conversion) -> ConversionRecord:
    """The record with what became of blocks and linear layers, where that was asked for."""
    if made.parameters is None:
        return record
    dropped, factored, rounded = made.dropped, made.factorization, made.quantization
    return record.model_copy(
        update={
            "dropped": None if dropped is None else DroppedBlocks.model_validate(asdict(dropped)),
            "factorization": None if factored is None else Factorization.model_validate(asdict(factored)),
            "quantization": None if rounded is None else Quantization.model_validate(asdict(rounded)),
            "size": Size(before=made.parameters[0], after=made.parameters[1], difference=made.difference),
        }
    )
