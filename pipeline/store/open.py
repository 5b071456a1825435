"""From the address of a store to the store."""

from __future__ import annotations

from pathlib import Path

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.store.store import Store


def open_store(address: Path | str) -> Store:
    """The store at a directory or at `s3://bucket/prefix`. Nothing is touched yet."""
    if "://" not in str(address):
        return Store(address)
    if not str(address).startswith("s3://"):
        raise UserError(f"store: `{address}` is neither a directory nor `s3://bucket/prefix`")
    from polytrope.pipeline.store.object_store import ObjectStore

    return ObjectStore(str(address))
