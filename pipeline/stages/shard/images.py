"""Labelled images in tar shards: where they come from, and how a shard of equally sized pixels is made of them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.data.tarfiles import build_tar, npy_header
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.shard.corpus import find_files

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


class DigitsSource(BaseModel):
    """scikit-learn's 1,797 handwritten digits, 8 × 8 grey: real images that every installation has."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["digits"] = "digits"


class FolderSource(BaseModel):
    """One directory per class, images in it (the layout of ImageNet and of torchvision's ImageFolder)."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["folder"]
    path: str = Field(description="directory of the class directories, relative to the workflow file")


class WebdatasetSource(BaseModel):
    """Tar files with an image (jpg, png, webp) and its class number (cls) per sample."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["webdataset"]
    paths: list[str] = Field(min_length=1, description="tar files or globs, relative to the workflow file")


class HubImages(BaseModel):
    """An image data set of the Hugging Face hub."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["hub"]
    dataset: str = Field(description="name on the hub")
    config: str | None = Field(None, description="configuration of the data set")
    split: str = Field("train", description="split")
    revision: str | None = Field(None, description="commit or tag")
    image_field: str = Field("image", description="the field that holds the image")
    label_field: str = Field("label", description="the field that holds the class number")


ImageSource = Annotated[DigitsSource | FolderSource | WebdatasetSource | HubImages, Field(discriminator="kind")]


@dataclass(frozen=True)
class ImageItem:
    """One image before decoding: a file, a part of a tar, or a row of a table that workers open themselves."""

    key: str  # the same wherever the data lies; decides the split
    label: int
    path: Path | None = None
    offset: int = 0
    size: int = -1  # bytes from `offset`; -1: the whole file
    pixels: np.ndarray | None = None  # already decoded, uint8 [height, width]


@dataclass(frozen=True)
class ImageShardTask:
    """One shard to make: which images, and their size."""

    path: Path
    items: list[ImageItem]
    channels: int
    side: int
    label_digits: int


@dataclass(frozen=True)
class ImageShardResult:
    """One line of a manifest. `counts`: images per class of this shard."""

    path: str
    bytes: int
    sha256: str
    samples: int
    counts: dict[int, int]


def read_items(source: ImageSource, directory: Path, cache: Path) -> tuple[list[ImageItem], list[str]]:
    """All images of a source and the names of its classes.

    Raises:
        UserError: nothing there, unreadable files, classes without a number.
    """
    if isinstance(source, DigitsSource):
        return _digits(), [str(digit) for digit in range(10)]
    if isinstance(source, FolderSource):
        return _folder(source, directory)
    if isinstance(source, WebdatasetSource):
        items = [item for path in find_files(source.paths, directory) for item in _tar_items(path)]
        return items, [str(label) for label in range(max((item.label for item in items), default=-1) + 1)]
    return _hub(source, cache)


def _digits() -> list[ImageItem]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [
        ImageItem(f"digit-{number}", int(label), pixels=image)
        for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True))
    ]


def _folder(source: FolderSource, directory: Path) -> tuple[list[ImageItem], list[str]]:
    root = directory / source.path
    classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not classes:
        raise UserError(
            f"source.path: {root} holds no directories", "it must hold one directory per class, with images in them"
        )
    items = [
        ImageItem(f"{name}/{path.name}", label, path)
        for label, name in enumerate(classes)
        for path in sorted((root / name).iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    return items, classes


def _tar_items(path: Path) -> Iterator[ImageItem]:
    """Images and classes of a webdataset tar, which keeps the members of a sample side by side."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path) as archive, path.open("rb") as file:
        for member in archive:
            key, _, extension = member.name.partition(".")
            found.setdefault(key, {})[f".{extension.lower()}"] = (member.offset_data, member.size)
        for key, members in found.items():
            image = next((suffix for suffix in SUFFIXES if suffix in members), None)
            if image is None or ".cls" not in members:
                raise UserError(
                    f"source.paths: sample `{key}` of {path} has {', '.join(members)}",
                    "every sample needs an image (jpg, png, …) and its class number (cls)",
                )
            offset, size = members[".cls"]
            file.seek(offset)
            yield ImageItem(f"{path.name}/{key}", int(file.read(size)), path, *members[image])


def _hub(source: HubImages, cache: Path) -> tuple[list[ImageItem], list[str]]:
    """Images are left as they are encoded, in files below `cache`."""
    from datasets import Image

    from polytrope.pipeline.stages.shard.corpus import load_hub

    loaded = load_hub(source.dataset, source.config, source.split, source.revision, cache)
    loaded = loaded.cast_column(source.image_field, Image(decode=False))
    folder = cache / "images"
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for number, row in enumerate(loaded):
        content, path = row[source.image_field]["bytes"], row[source.image_field]["path"]
        if content is not None:
            path = folder / f"{number:09d}"
            path.write_bytes(content)
        items.append(ImageItem(f"{number}", int(row[source.label_field]), Path(path)))
    feature = loaded.features[source.label_field]
    names = list(getattr(feature, "names", None) or map(str, range(max(item.label for item in items) + 1)))
    return items, names


def source_digest(source: ImageSource, directory: Path) -> dict[str, str]:
    """What identifies the images: sizes and names of files, hashed (their content is hashed when it is read)."""
    if isinstance(source, FolderSource):
        items, _ = _folder(source, directory)
        lines = [f"{item.key} {item.path.stat().st_size if item.path else 0}" for item in items]
    elif isinstance(source, WebdatasetSource):
        lines = [f"{path.name} {path.stat().st_size}" for path in find_files(source.paths, directory)]
    else:
        return {}
    return {"images": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def split_items(
    items: Sequence[ImageItem], validation: Sequence[ImageItem] | None, fraction: float
) -> dict[str, list[ImageItem]]:
    """Train and validation: the second as given, or chosen by the hash of each image's key."""
    if validation is not None:
        return {"train": list(items), "validation": list(validation)}
    parts: dict[str, list[ImageItem]] = {"train": [], "validation": []}
    for item in items:
        number = int.from_bytes(hashlib.sha256(item.key.encode()).digest()[:8], "big")
        parts["validation" if number < fraction * 2**64 else "train"].append(item)
    return parts


def make_image_shard(task: ImageShardTask) -> ImageShardResult:
    """Write one tar: for each image `npy` (uint8 `[channels, side, side]`) and `cls`, both of one size throughout."""
    pixels = np.stack([load_pixels(item, task.channels, task.side) for item in task.items])
    header = npy_header(pixels.shape[1:])
    images = np.empty((len(pixels), len(header) + pixels[0].size), dtype=np.uint8)
    images[:, : len(header)] = np.frombuffer(header, dtype=np.uint8)
    images[:, len(header) :] = pixels.reshape(len(pixels), -1)
    digits = "".join(f"{item.label:0{task.label_digits}d}" for item in task.items)
    labels = np.frombuffer(digits.encode(), dtype=np.uint8).reshape(len(task.items), task.label_digits)
    archive = build_tar(task.path.stem, {"npy": images, "cls": labels})
    task.path.write_bytes(archive.data)
    values, counts = np.unique([item.label for item in task.items], return_counts=True)
    return ImageShardResult(
        task.path.name,
        len(archive),
        hashlib.sha256(archive.data).hexdigest(),
        len(task.items),
        dict(zip(values.tolist(), counts.tolist(), strict=True)),
    )


def load_pixels(item: ImageItem, channels: int, side: int) -> np.ndarray:
    """Decode an image: shorter side to `side`, the middle square of it, uint8 `[channels, side, side]`.

    Raises:
        UserError: a file that is no image, named.
    """
    from PIL import Image

    if item.pixels is not None:
        image: Any = Image.fromarray(item.pixels)
    else:
        assert item.path is not None
        try:
            with item.path.open("rb") as file:
                file.seek(item.offset)
                image = Image.open(io.BytesIO(file.read(item.size)))
                image.load()
        except (OSError, SyntaxError) as error:
            raise UserError(
                f"source: {item.key} in {item.path} is no readable image: {error}", "remove it from the source"
            ) from error
    image = image.convert("RGB" if channels == 3 else "L")
    width, height = image.size
    if (width, height) != (side, side):
        scale = side / min(width, height)
        size = (max(side, round(width * scale)), max(side, round(height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    array = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
