"""The `shard_images` stage: labelled images → equally sized pixels in webdataset tar shards with a manifest.

Parameters and flow; the work is in `polytrope.pipeline.stages.shard.images`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polytrope.pipeline.data.description import (
    MANIFEST_FILE,
    ImageDataset,
    ImageSample,
    ImageShape,
    ImageSplit,
    Shard,
    write_dataset,
    write_manifest,
)
from polytrope.pipeline.data.promised import PromisedImages
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources, StageContext, stage
from polytrope.pipeline.stages.shard.images import source_digest
from polytrope.pipeline.stages.shard.parameters import ShardImagesParameters


def fingerprint(parameters: ShardImagesParameters, directory: Path) -> dict[str, str]:
    """Names and contents of the image files."""
    found = source_digest(parameters.source, directory)
    if parameters.validation_source is not None:
        validation = source_digest(parameters.validation_source, directory)
        found |= {f"validation_{name}": value for name, value in validation.items()}
    return found


def promise(
    parameters: ShardImagesParameters, _upstream: Mapping[str, Any], _resources: Resources, _directory: Path
) -> PromisedImages:
    """The data set's sizes."""
    digits = parameters.source.kind == "digits"
    return PromisedImages(parameters.image_size, parameters.channels, 10 if digits else None)


@stage(
    parallel=True,
    cpu_only=True,
    promise=promise,
    fingerprint=fingerprint,
)
def shard_images(context: StageContext, parameters: ShardImagesParameters) -> dict[str, float]:
    """Decode, resize and pack labelled images into webdataset tar shards with a manifest."""
    from polytrope.pipeline.stages.shard.images import read_items, split_items

    cache = context.scratch / "huggingface"
    found = read_items(parameters.source, Path.cwd(), cache)
    left_out, classes, names, validation = +found.left_out, found.classes, found.names, None
    if parameters.validation_source is not None:
        separate = read_items(parameters.validation_source, Path.cwd(), cache / "validation")
        if found.names is not None and separate.names is not None and found.names != separate.names:
            differing = sorted(set(found.names) ^ set(separate.names))
            raise UserError(
                f"validation_source: its {separate.classes} classes are not the {found.classes} of `source`: "
                f"only one of both has {', '.join(differing[:5]) or 'this order'}",
                "both need the same class names",
            )
        names = found.names or separate.names
        classes = max(found.classes, separate.classes)  # where only numbers are known, one may lack the highest
        left_out, validation = left_out + separate.left_out, separate.items
    if names is not None and len(names) < classes:
        raise UserError(
            f"source, validation_source: {classes} classes by number, but {len(names)} class names", "both must agree"
        )
    for what, count in left_out.items():
        context.message(f"left out: {count} {what}")
    splits = split_items(found.items, validation, parameters.validation_fraction)
    for name, part in splits.items():
        if not part:
            raise UserError(f"source: {len(found.items)} images, none for the {name} split", "give more images")
    described, digests = {}, ""
    for name, part in splits.items():
        described[name], shard_digests = _write_split(context, name, part, classes, parameters)
        digests += shard_digests
    dataset = ImageDataset(
        name=parameters.name,
        classes=classes,
        class_names=names or [str(label) for label in range(classes)],
        image=ImageShape(channels=parameters.channels, height=parameters.image_size, width=parameters.image_size),
        splits=described,
        digest=hashlib.sha256(digests.encode()).hexdigest(),
        left_out=dict(left_out),
    )
    write_dataset(context.output, dataset)
    profile = {name: dict(split) for name, split in described.items()}
    context.log_dataset(parameters.name, dataset.digest, parameters.source.kind, profile)
    return {
        "classes": float(classes),
        **{f"{name}/images": float(split.samples) for name, split in described.items()},
        **({"left_out": float(left_out.total())} if left_out else {}),
    }


def _write_split(
    context: StageContext, name: str, items: list[Any], classes: int, parameters: ShardImagesParameters
) -> tuple[ImageSplit, str]:
    """Shards and manifest of a split; returns what it holds, and its shards' digests one behind the other."""
    from polytrope.pipeline.stages.shard.images import ImageShardTask, make_image_shard
    from polytrope.pipeline.stages.shard.parallel import parallel_map

    directory = context.output / name
    directory.mkdir()
    size, digits = parameters.shard_images, len(str(max(0, classes - 1)))
    groups = [items[start : start + size] for start in range(0, len(items), size)]
    tasks = (
        ImageShardTask(
            directory / f"shard-{number:06d}.tar",
            group,
            parameters.channels,
            parameters.image_size,
            digits,
            parameters.background,
        )
        for number, group in enumerate(groups)
    )
    results = []
    for result in parallel_map(context, make_image_shard, tasks):
        results.append(result)
        context.progress(len(results), len(groups), f"{name}: {len(results)} of {len(groups)} shards")
    size_of_image = (parameters.channels, parameters.image_size, parameters.image_size)
    write_manifest(
        directory,
        ImageSample(image=size_of_image, label_digits=digits),
        [Shard(path=r.path, bytes=r.bytes, sha256=r.sha256, samples=r.samples) for r in results],
    )
    counts = [sum(result.counts.get(label, 0) for result in results) for label in range(classes)]
    split = ImageSplit(manifest=f"{name}/{MANIFEST_FILE}", samples=len(items), smallest_class=min(counts))
    return split, "".join(result.sha256 for result in results)
