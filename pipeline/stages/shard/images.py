"""Labelled images: where they come from, and how a shard of equally sized pixels is made of them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.data.tarfiles import build_tar, digit_members, npy_members
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.shard.corpus import (
    check_hub_field,
    find_files,
    is_validation,
    load_hub,
    refuse_offline_hub,
)
from polytrope.pipeline.support.file_digests import combined_digest, file_digests
from polytrope.pipeline.support.text import is_unicode

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".jp2",
)  # fmt: skip
_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class DigitsSource(BaseModel):
    """scikit-learn's 1,797 handwritten digits, 8 × 8 grey: real images that every installation has."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["digits"] = "digits"


class FolderSource(BaseModel):
    """One directory per class, images in it at any depth (the layout of ImageNet and of torchvision's ImageFolder)."""

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
    shown: str = ""  # how errors name it; default: its path

    def __str__(self) -> str:
        return self.shown or str(self.path or self.key)


@dataclass(frozen=True)
class ImageShardTask:
    """One shard to make: which images, and their size."""

    path: Path
    items: list[ImageItem]
    channels: int
    side: int
    label_digits: int
    background: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class ImageShardResult:
    """One line of a manifest. `counts`: images per class of this shard."""

    path: str
    bytes: int
    sha256: str
    samples: int
    counts: dict[int, int]


@dataclass(frozen=True)
class ImageItems:
    """The images of a source. `names`: of the classes, None where only their numbers are known. `left_out`: what the
    source holds beside them, and how often."""

    items: list[ImageItem]
    names: list[str] | None
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def classes(self) -> int:
        """How many; where only numbers are known, one more than the highest."""
        return len(self.names) if self.names is not None else max((item.label for item in self.items), default=-1) + 1


def read_items(source: ImageSource, directory: Path, cache: Path) -> ImageItems:
    """All images of a source.

    Args:
        directory: the workflow file's, for relative paths.
        cache: for what has to be unpacked or fetched; it must stay while the images are used.

    Raises:
        UserError: nothing there, unreadable files, classes without a number.
    """
    if isinstance(source, DigitsSource):
        return ImageItems(_digits(), [str(digit) for digit in range(10)])
    if isinstance(source, FolderSource):
        return _folder(source, directory)
    if isinstance(source, WebdatasetSource):
        found = ImageItems([], None)
        for path in find_files(source.paths, directory):
            found.items.extend(_tar_items(path, cache, found.left_out))
        return found
    return _hub(source, cache)


def _digits() -> list[ImageItem]:
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [
        ImageItem(f"digit-{number}", int(label), pixels=image)
        for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True))
    ]


def _folder(source: FolderSource, directory: Path) -> ImageItems:
    """Every directory that is not hidden is a class; images at any depth below it are its images."""
    root = directory / source.path
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"source.path: {root} cannot be read: {error.strerror}", "paths are relative to the workflow file"
        ) from None
    found = ImageItems([], [])
    assert found.names is not None
    for entry in entries:
        if entry.name.startswith("."):
            found.left_out["hidden files and directories"] += 1
        elif entry.is_dir():
            if not is_unicode(entry.name):
                raise UserError(
                    f"source.path: the name of the class {os.fsencode(entry.path)!r} is not UTF-8",
                    "rename the directory (convmv renames many)",
                )
            label = len(found.names)
            images = list(_images_below(Path(entry.path), found.left_out))
            if not images:
                raise UserError(
                    f"source.path: {entry.path} holds no image, so the class `{entry.name}` would have no example",
                    f"remove the directory, or put images there ({', '.join(SUFFIXES[:6])}, …)",
                )
            found.names.append(entry.name)
            found.items.extend(ImageItem(path.relative_to(root).as_posix(), label, path) for path in images)
        else:
            found.left_out["files beside the classes' directories"] += 1
    if not found.names:
        raise UserError(
            f"source.path: {root} holds no directories", "it must hold one directory per class, with images in them"
        )
    return found


def _images_below(directory: Path, left_out: Counter[str]) -> Iterable[Path]:
    """The image files, in the order of their names, as paths below each other are sorted."""
    images: list[Path] = []
    for current, directories, files in os.walk(directory, followlinks=True):
        hidden = [name for name in directories if name.startswith(".")]
        directories[:] = [name for name in directories if name not in hidden]
        if hidden:
            left_out["hidden files and directories"] += len(hidden)
        for name in files:
            path = Path(current, name)
            if name.startswith("."):
                left_out["hidden files and directories"] += 1
            elif path.suffix.lower() not in SUFFIXES:
                left_out[f"files that are no images ({path.suffix.lower() or 'without a suffix'})"] += 1
            elif not path.exists():
                raise UserError(
                    f"source.path: {path} is a link to {os.readlink(path)}, which does not exist",
                    "fetch the data (git-annex, DVC and Git LFS leave such links), or remove the link",
                )
            else:
                images.append(path)
    return sorted(images)


def _tar_items(path: Path, cache: Path, left_out: Counter[str]) -> Iterable[ImageItem]:
    """Images and classes of a webdataset tar: what has one name up to the first dot of its last part is a sample, as
    the webdataset library has it."""
    from webdataset.tariterators import base_plus_ext

    found: dict[str, dict[str, tuple[int, int]]] = {}
    plain = _unpacked(path, cache)
    try:
        with tarfile.open(plain, "r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isdir():
                    continue
                key, extension = base_plus_ext(name)
                if key is None or not member.isfile() or any(part.startswith(".") for part in key.split("/")):
                    left_out["tar members that belong to no sample (hidden, links, without a suffix)"] += 1
                    continue
                sample = found.setdefault(key, {})
                if f".{extension.lower()}" in sample:
                    raise UserError(
                        f"source.paths: {path} holds `{member.name}` twice", "every sample needs a key of its own"
                    )
                sample[f".{extension.lower()}"] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"source.paths: {path} is no tar file, or is damaged: {error}", "get it again") from None
    if not found:
        raise UserError(f"source.paths: {path} holds no samples", "every sample needs an image and its class (cls)")
    with plain.open("rb") as file:
        for key, members in found.items():
            image = next((suffix for suffix in SUFFIXES if suffix in members), None)
            if image is None or ".cls" not in members:
                raise UserError(
                    f"source.paths: sample `{key}` of {path} has {', '.join(members)}",
                    "every sample needs an image (jpg, png, …) and its class number (cls)",
                )
            offset, size = members[".cls"]
            file.seek(offset)
            text = file.read(size).strip()
            if not re.fullmatch(rb"[0-9]{1,9}", text):
                raise UserError(
                    f"source.paths: sample `{key}` of {path} has the class {text[:40].decode(errors='replace')!r}",
                    "`cls` must hold the number of a class: 0, 1, 2, …",
                )
            yield ImageItem(f"{path.name}/{key}", int(text), plain, *members[image], shown=f"{key}{image} in {path}")


def _unpacked(path: Path, cache: Path) -> Path:
    """The tar itself, or what a compressed one holds, written below `cache`."""
    with path.open("rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
    if opener is None:
        return path
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    target = cache / "tars" / f"{digest}.tar"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with opener(path) as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise UserError(f"source.paths: {path} cannot be unpacked: {error}", "get it again") from None
    return target


def _hub(source: HubImages, cache: Path) -> ImageItems:
    """Images are left as they are encoded, in files below `cache`."""
    from datasets import Image

    loaded = load_hub(source.dataset, source.config, source.split, source.revision, cache)
    for field_name in ("image_field", "label_field"):
        check_hub_field(loaded, field_name, getattr(source, field_name))
    loaded = loaded.cast_column(source.image_field, Image(decode=False))
    folder = cache / "images"
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for number, row in enumerate(loaded):
        content, path = row[source.image_field]["bytes"], row[source.image_field]["path"]
        if content is not None:
            path = folder / f"{number:09d}"
            path.write_bytes(content)
        label = row[source.label_field]
        if not isinstance(label, int) or label < 0:
            raise UserError(
                f"source.label_field: row {number} of {source.dataset} has the class {label!r}",
                "classes must be numbers: 0, 1, 2, …; test splits often have none",
            )
        items.append(ImageItem(f"{number}", label, Path(path)))
    names = getattr(loaded.features[source.label_field], "names", None)
    return ImageItems(items, list(names) if names else None)


def source_digest(source: ImageSource, directory: Path) -> dict[str, str]:
    """What identifies the images: names and contents of their files.

    Raises:
        UserError: a file that is missing or cannot be read, or the hub is switched off.
    """
    if isinstance(source, FolderSource):
        items = _folder(source, directory).items
        names, paths = [item.key for item in items], [item.path for item in items if item.path]
    elif isinstance(source, WebdatasetSource):
        paths = find_files(source.paths, directory)
        names = [path.name for path in paths]
    else:
        if isinstance(source, HubImages):
            refuse_offline_hub(source.dataset)
        return {}
    return {"images": combined_digest(names, file_digests(paths, field="source"))}


def split_items(
    items: Sequence[ImageItem], validation: Sequence[ImageItem] | None, fraction: float
) -> dict[str, list[ImageItem]]:
    """Train and validation: the second as given, or chosen by the hash of each image's key."""
    if validation is not None:
        return {"train": list(items), "validation": list(validation)}
    parts: dict[str, list[ImageItem]] = {"train": [], "validation": []}
    for item in items:
        belongs = is_validation(item.key.encode(errors="surrogateescape"), fraction)  # names of any encoding
        parts["validation" if belongs else "train"].append(item)
    return parts


def make_image_shard(task: ImageShardTask) -> ImageShardResult:
    """Write one tar: for each image `npy` (uint8 `[channels, side, side]`) and `cls`, both of one size throughout."""
    import numpy as np

    pixels = np.stack([load_pixels(item, task.channels, task.side, task.background) for item in task.items])
    labels = digit_members(np.array([item.label for item in task.items]), task.label_digits)
    archive = build_tar(task.path.stem, {"npy": npy_members(pixels), "cls": labels})
    task.path.write_bytes(archive.data)
    values, counts = np.unique([item.label for item in task.items], return_counts=True)
    return ImageShardResult(
        task.path.name,
        len(archive),
        hashlib.sha256(archive.data).hexdigest(),
        len(task.items),
        dict(zip(values.tolist(), counts.tolist(), strict=True)),
    )


def load_pixels(
    item: ImageItem, channels: int, side: int, background: tuple[int, int, int] | None = None
) -> np.ndarray:
    """Decode an image, upright: shorter side to `side`, the middle square of it, uint8 `[channels, side, side]`.

    16-bit grey is scaled to 8 bits. Of several frames the first one is taken.

    Args:
        background: red, green, blue behind transparent pixels; None: images that have such are refused.

    Raises:
        UserError: a file that is no image, is too large to decode, or has values whose black and white nobody knows.
    """
    import numpy as np
    from PIL import Image

    image = Image.fromarray(item.pixels) if item.pixels is not None else _open_image(item)
    image = _eight_bits(image, item, background).convert("RGB" if channels == 3 else "L")
    width, height = image.size
    if (width, height) != (side, side):
        scale = side / min(width, height)
        size = (max(side, round(width * scale)), max(side, round(height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    array = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _open_image(item: ImageItem) -> Any:
    """Decoded and upright."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    assert item.path is not None
    try:
        with item.path.open("rb") as file:
            file.seek(item.offset)
            image = Image.open(io.BytesIO(file.read(item.size)))
        image.load()
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # type: ignore[attr-defined]  # lost where it was turned
        return upright
    except Image.DecompressionBombError as error:
        size = re.search(r"[0-9]{4,}", str(error))
        pixels = f"{int(size.group()):,}" if size else "too many"
        raise UserError(
            f"source: {item} has {pixels} pixels, more than Pillow decodes", "make it smaller or remove it"
        ) from None
    except UnidentifiedImageError:  # its text shows the address of a buffer
        raise UserError(
            f"source: {item} is no readable image: no format that Pillow knows", "remove it from the source"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, MemoryError) as error:  # what Pillow raises
        raise UserError(f"source: {item} is no readable image: {error}", "remove it from the source") from error


def _eight_bits(image: Any, item: ImageItem, background: tuple[int, int, int] | None) -> Any:
    """The image with 8 bits per value and without transparency."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 0 … 65535
        import numpy as np

        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(
            f"source: {item} has 32-bit values, for which nothing says what is black and what is white",
            "convert it to 8 or 16 bits per value",
        )
    if image.mode == "LAB":  # which Pillow turns into nothing but RGB
        return image.convert("RGB")
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:  # all of it is opaque
        return image
    if background is None:
        raise UserError(
            f"source: {item} has transparent pixels, and nothing says what is behind them",
            "set `background`, for example to [255, 255, 255]",
        )
    behind = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(behind, image)
