"""Dropped blocks, factored and rounded layers, in `conversion.json`."""

from __future__ import annotations

from polytrope.models.convert import Conversion
from polytrope.pipeline.data.conversion_file import ConversionRecord, Size


def with_structure(record: ConversionRecord, made: Conversion) -> ConversionRecord:
    """The record with what became of blocks and linear layers, where that was asked for."""
    if made.parameters is None:
        return record
    size = Size(before=made.parameters[0], after=made.parameters[1], difference=made.difference)
    done = {"dropped": made.dropped, "factorization": made.factorization, "quantization": made.quantization}
    return record.model_copy(update={**done, "size": size})
