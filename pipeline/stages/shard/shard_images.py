"""The `shard_images` stage: labelled images → equally sized pixels in webdataset tar shards with a manifest.

Parameters and flow; the work is in `polytrope.pipeline.stages.shard.images`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import StageContext, stage
from polytrope.pipeline.stages.shard.images import source_digest
from polytrope.pipeline.stages.shard.parameters import ShardImagesParameters


def fingerprint(parameters: ShardImagesParameters, directory: Path) -> dict[str, str]:
    """Names and sizes of the image files."""
    found = source_digest(parameters.source, directory)
    if parameters.validation_source is not None:
        validation = source_digest(parameters.validation_source, directory)
        found |= {f"validation_{name}": value for name, value in validation.items()}
    return found


@stage(
    parallel=True,
    fingerprint=fingerprint,
)
def shard_images(context: StageContext, parameters: ShardImagesParameters) -> dict[str, float]:
    """Decode, resize and pack labelled images into webdataset tar shards with a manifest."""
    from polytrope.pipeline.stages.shard.images import read_items, split_items

    directory, cache = Path.cwd(), context.scratch / "huggingface"
    items, classes = read_items(parameters.source, directory, cache)
    validation = None
    if parameters.validation_source is not None:
        validation, names = read_items(parameters.validation_source, directory, cache / "validation")
        if names != classes:
            raise UserError(
                f"validation_source: its {len(names)} classes are not the {len(classes)} of `source`",
                "both need the same class names",
            )
    splits = split_items(items, validation, parameters.validation_fraction)
    for name, part in splits.items():
        if not part:
            raise UserError(f"source: {len(items)} images, none for the {name} split", "give more images")
    described = {name: _write_split(context, name, part, len(classes), parameters) for name, part in splits.items()}
    digest = hashlib.sha256("".join(entry.pop("digests") for entry in described.values()).encode()).hexdigest()
    description = {
        "format": 1,
        "kind": "images",
        "name": parameters.name,
        "classes": len(classes),
        "class_names": classes,
        "image": {
            "channels": parameters.channels,
            "height": parameters.image_size,
            "width": parameters.image_size,
        },
        "splits": described,
        "digest": digest,
    }
    (context.output / "dataset.json").write_text(json.dumps(description, indent=1))
    context.log_dataset(parameters.name, digest, parameters.source.kind, described)
    return {
        "classes": float(len(classes)),
        **{f"{name}/images": float(entry["samples"]) for name, entry in described.items()},
    }


def _write_split(
    context: StageContext, name: str, items: list[Any], classes: int, parameters: ShardImagesParameters
) -> dict[str, Any]:
    from polytrope.pipeline.stages.shard.images import ImageShardTask, make_image_shard
    from polytrope.pipeline.stages.shard.parallel import parallel_map

    directory = context.output / name
    directory.mkdir()
    size, digits = parameters.shard_images, len(str(max(0, classes - 1)))
    groups = [items[start : start + size] for start in range(0, len(items), size)]
    tasks = (
        ImageShardTask(directory / f"shard-{number:06d}.tar", group, parameters.channels, parameters.image_size, digits)
        for number, group in enumerate(groups)
    )
    results = []
    for result in parallel_map(context, make_image_shard, tasks):
        results.append(result)
        context.progress(len(results), len(groups), f"{name}: {len(results)} of {len(groups)} shards")
    manifest = {
        "format": 1,
        "sample": {
            "image": [parameters.channels, parameters.image_size, parameters.image_size],
            "label_digits": digits,
        },
        "shards": [
            {"path": result.path, "bytes": result.bytes, "sha256": result.sha256, "samples": result.samples}
            for result in results
        ],
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1))
    counts = [sum(result.counts.get(label, 0) for result in results) for label in range(classes)]
    return {
        "manifest": f"{name}/manifest.json",
        "samples": len(items),
        "smallest_class": min(counts),
        "digests": "".join(result.sha256 for result in results),
    }
