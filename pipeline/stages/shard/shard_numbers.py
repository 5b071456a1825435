"""The `shard_numbers` stage: rows of numbers, with numbers to predict or classes, in tar shards with a manifest.

Parameters and flow; the work is in `polytrope.pipeline.stages.shard.numbers`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytrope.pipeline.data.description import (
    MANIFEST_FILE,
    NumbersDataset,
    NumbersSample,
    NumbersSplit,
    Shard,
    write_dataset,
    write_manifest,
)
from polytrope.pipeline.data.promised import PromisedNumbers
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources, StageContext, stage
from polytrope.pipeline.stages.shard.numbers import (
    FileSource,
    NumbersTask,
    Table,
    make_numbers_shard,
    read_table,
    sizes,
    source_digest,
    split_rows,
)
from polytrope.pipeline.stages.shard.numbers_transform import fit_transform
from polytrope.pipeline.stages.shard.parameters import ShardNumbersParameters

if TYPE_CHECKING:
    import numpy as np


def fingerprint(parameters: ShardNumbersParameters, directory: Path) -> dict[str, str]:
    """The content of a file."""
    return source_digest(parameters.source, directory)


def promise(
    parameters: ShardNumbersParameters, _upstream: Mapping[str, Any], _resources: Resources, _directory: Path
) -> PromisedNumbers:
    """The sizes of a row."""
    return PromisedNumbers(*sizes(parameters.source))


@stage(parallel=True, cpu_only=True, promise=promise, fingerprint=fingerprint)
def shard_numbers(context: StageContext, parameters: ShardNumbersParameters) -> dict[str, float]:
    """Compute or read rows of numbers and pack them into webdataset tar shards with a manifest."""
    source = parameters.source
    table = read_table(source, Path.cwd()) if isinstance(source, FileSource) else None
    inputs, targets, classes = sizes(source)
    if table is not None:
        inputs = table.inputs.shape[1]
        targets = table.targets.shape[1] if classes is None else None
    assert inputs is not None
    sample = NumbersSample(
        inputs=inputs, targets=targets, label_digits=None if classes is None else len(str(classes - 1))
    )
    splits = split_rows(source, table, parameters.validation_fraction)
    for name, rows in splits.items():
        if not len(rows):
            total = sum(len(part) for part in splits.values())
            raise UserError(f"source: {total} rows, none for the {name} split", "give more rows")
    transform = None
    if isinstance(source, FileSource) and source.transform is not None:
        assert table is not None
        transform = fit_transform(source, table, splits["train"])
    described, digests = {}, "" if transform is None else transform.model_dump_json()
    for name, rows in splits.items():
        described[name], shard_digests = _write_split(context, name, rows, table, sample, parameters)
        digests += shard_digests
    dataset = NumbersDataset(
        name=parameters.name,
        inputs=inputs,
        targets=targets,
        classes=classes,
        splits=described,
        digest=hashlib.sha256(digests.encode()).hexdigest(),
        transform=transform,
    )
    write_dataset(context.output, dataset)
    profile = {name: dict(split) for name, split in described.items()}
    context.log_dataset(parameters.name, dataset.digest, source.kind, profile)
    return {"inputs": float(inputs), **{f"{name}/rows": float(split.samples) for name, split in described.items()}}


def _write_split(
    context: StageContext,
    name: str,
    rows: np.ndarray,
    table: Table | None,
    sample: NumbersSample,
    parameters: ShardNumbersParameters,
) -> tuple[NumbersSplit, str]:
    """Shards and manifest of a split; returns what it holds, and its shards' digests one behind the other."""
    from polytrope.pipeline.stages.shard.parallel import parallel_map

    directory = context.output / name
    directory.mkdir()
    groups = [rows[start : start + parameters.shard_rows] for start in range(0, len(rows), parameters.shard_rows)]
    tasks = (
        NumbersTask(
            directory / f"shard-{number:06d}.tar",
            (parameters.source, group) if table is None else Table(table.inputs[group], table.targets[group]),
            sample.label_digits,
        )
        for number, group in enumerate(groups)
    )
    results = []
    for result in parallel_map(context, make_numbers_shard, tasks):
        results.append(result)
        context.progress(len(results), len(groups), f"{name}: {len(results)} of {len(groups)} shards")
    shards = [Shard(path=r.path, bytes=r.bytes, sha256=r.sha256, samples=r.samples) for r in results]
    write_manifest(directory, sample, shards)
    split = NumbersSplit(manifest=f"{name}/{MANIFEST_FILE}", samples=len(rows))
    return split, "".join(result.sha256 for result in results)
