"""What image folders and tars of the world hold: read right, or refused by name, and nothing is left out in silence."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image, ImageCms

from polytrope.pipeline.data.description import ImageDataset, read_dataset
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Resources, stage_context
from polytrope.pipeline.stages.shard import images
from polytrope.pipeline.stages.shard.images import (
    FolderSource,
    HubImages,
    ImageItem,
    WebdatasetSource,
    load_pixels,
    read_items,
    source_digest,
    split_items,
)
from polytrope.pipeline.stages.shard.parameters import ShardImagesParameters
from polytrope.pipeline.stages.shard.shard_images import shard_images


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(
    path: Path,
    *,
    prefix: str = "",
    label: Callable[[int], str] = lambda number: str(number % 2),
    mode: str = "w",
    extra: tuple[str, ...] = (),
) -> None:
    """Twenty samples `PREFIX0000.png` and `.cls`; `extra`: further members, directories where they end in /."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name in extra:
            member = tarfile.TarInfo(name.rstrip("/"))
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO())
        for number in range(20):
            for suffix, data in (("png", png(number)), ("cls", label(number).encode())):
                member = tarfile.TarInfo(f"{prefix}{number:04}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def items_of(path: Path, cache: Path) -> list[ImageItem]:
    return read_items(WebdatasetSource(kind="webdataset", paths=[str(path)]), path.parent, cache).items


def test_a_folder_is_read_as_torchvision_reads_it_and_says_what_it_leaves(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for number in range(3):
            save(tmp_path / f"d/{name}/{number}.png", number)
    for number in range(2):
        save(tmp_path / f"d/cat/more/{number}.PNG", number)
        save(tmp_path / f"d/dog/{number}.tif", number)
        save(tmp_path / f"d/dog/g{number}.gif", number)
        save(tmp_path / f"d/dog/p{number}.pgm", number)
    (tmp_path / "d/.ipynb_checkpoints").mkdir()
    (tmp_path / "d/cat/Thumbs.db").write_text("x")
    (tmp_path / "d/cat/._0.png").write_text("x")
    (tmp_path / "d/README").write_text("x")
    found = read_items(FolderSource(kind="folder", path="d"), tmp_path, tmp_path / "cache")
    assert found.names == ["cat", "dog"]
    assert [item.label for item in found.items].count(0) == 5
    assert [item.label for item in found.items].count(1) == 9
    assert dict(found.left_out) == {
        "hidden files and directories": 2,
        "files beside the classes' directories": 1,
        "files that are no images (.db)": 1,
    }
    context = stage_context(tmp_path / "stage", resources=Resources())
    parameters = {"source": {"kind": "folder", "path": str(tmp_path / "d")}, "validation_fraction": 0.4}
    summary = shard_images(context, ShardImagesParameters.model_validate(parameters))
    assert summary["left_out"] == 4
    written = read_dataset(context.output)
    assert written.left_out == dict(found.left_out)
    messages = [
        json.loads(line) for file in (tmp_path / "stage/events").iterdir() for line in file.read_text().splitlines()
    ]
    assert sum("left out:" in str(event.get("text")) for event in messages) == 3


def test_names_of_another_encoding_are_read_and_those_of_classes_refused(tmp_path: Path) -> None:
    for number in range(9):
        save(tmp_path / "cat" / f"caf\udce9{number}.png", number)
    source = FolderSource(kind="folder", path=".")
    parts = split_items(read_items(source, tmp_path, tmp_path / "cache").items, None, 0.5)
    assert sorted(map(len, parts.values())) == [2, 7]  # by the bytes of their names
    save(tmp_path / "d\udce9" / "0.png", 0)
    with pytest.raises(UserError, match=r"the name of the class b'.*d\\xe9' is not UTF-8"):
        read_items(source, tmp_path, tmp_path / "cache")


def test_an_empty_class_and_a_link_to_nowhere_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "d/dog/0.png", 0)
    (tmp_path / "d/cat").mkdir()
    source = FolderSource(kind="folder", path="d")
    with pytest.raises(UserError, match=r"d/cat holds no image"):
        read_items(source, tmp_path, tmp_path)
    (tmp_path / "d/cat/gone.png").symlink_to("/nowhere/x.png")
    with pytest.raises(UserError, match=r"gone\.png is a link to /nowhere/x\.png"):
        read_items(source, tmp_path, tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_items(FolderSource(kind="folder", path="e"), tmp_path, tmp_path)


def test_corrected_pictures_of_one_size_change_the_digest_however_often_it_was_taken(tmp_path: Path) -> None:
    for name, number in (("cat", 1), ("dog", 2)):
        (tmp_path / "d" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(tmp_path / "d" / name / "0.bmp")
    source = FolderSource(kind="folder", path="d")
    before = source_digest(source, tmp_path)
    assert source_digest(source, tmp_path) == before
    cat, dog = (tmp_path / "d/cat/0.bmp"), (tmp_path / "d/dog/0.bmp")
    swapped = cat.read_bytes(), dog.read_bytes()
    dog.write_bytes(swapped[0])
    cat.write_bytes(swapped[1])
    assert source_digest(source, tmp_path) != before


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({"prefix": "./"}, ""),
        ({"prefix": "train/", "extra": ("train/",)}, "train/"),
        ({"prefix": "imagenet-1.0/"}, "imagenet-1.0/"),
        ({"extra": ("._0000.png", ".DS_Store", "LICENSE")}, ""),
        ({"mode": "w:gz"}, ""),
        ({"mode": "w:xz"}, ""),
    ],
)
def test_tars_as_the_world_writes_them_are_read(tmp_path: Path, options: dict[str, Any], prefix: str) -> None:
    write_tar(tmp_path / "x.tar", **options)
    found = read_items(WebdatasetSource(kind="webdataset", paths=["x.tar"]), tmp_path, tmp_path / "cache")
    assert [item.key for item in found.items] == [f"x.tar/{prefix}{number:04}" for number in range(20)]
    assert [item.label for item in found.items] == [number % 2 for number in range(20)]
    assert [int(load_pixels(item, 1, 8)[0, 0, 0]) for item in found.items] == list(range(20))
    assert found.left_out.total() == (3 if "._0000.png" in options.get("extra", ()) else 0)


@pytest.mark.parametrize(
    ("label", "message"),
    [("cat", "class 'cat'"), ("", "class ''"), ("-1", "class '-1'"), ("1.5", r"class '1\.5'")],
)
def test_classes_that_are_no_numbers_are_refused_with_tar_and_sample(tmp_path: Path, label: str, message: str) -> None:
    write_tar(tmp_path / "x.tar", label=lambda number: label if number == 3 else "1")
    with pytest.raises(UserError, match=rf"sample `0003` of .*x\.tar has the {message}"):
        items_of(tmp_path / "x.tar", tmp_path)


def test_damaged_foreign_and_doubled_tars_are_refused_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "good.tar")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "good.tar").read_bytes()[:20000])
    (tmp_path / "page.tar").write_text("<html>403</html>")
    write_tar(tmp_path / "twice.tar", extra=("0007.png",))
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress((tmp_path / "good.tar").read_bytes())[:-100])
    for name, message in (
        ("cut.tar", r"cut\.tar is no tar file, or is damaged"),
        ("page.tar", r"page\.tar is no tar file, or is damaged"),
        ("twice.tar", r"twice\.tar holds `0007\.png` twice"),
        ("cut.tar.gz", r"cut\.tar\.gz cannot be unpacked"),
    ):
        with pytest.raises(UserError, match=message):
            items_of(tmp_path / name, tmp_path / "cache")


def test_a_validation_tar_may_lack_the_highest_class(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", label=lambda number: str(number % 3))
    write_tar(tmp_path / "validation.tar", label=lambda _: "0")
    context = stage_context(tmp_path / "stage", resources=Resources())
    parameters = {
        "source": {"kind": "webdataset", "paths": [str(tmp_path / "train.tar")]},
        "validation_source": {"kind": "webdataset", "paths": [str(tmp_path / "validation.tar")]},
    }
    shard_images(context, ShardImagesParameters.model_validate(parameters))
    dataset = read_dataset(context.output)
    assert isinstance(dataset, ImageDataset)
    assert (dataset.classes, dataset.class_names) == (3, ["0", "1", "2"])
    assert set(open_split(context.output, "validation").images(np.arange(20))[1].tolist()) == {0}


def test_sixteen_bit_grey_is_scaled_and_values_without_white_are_refused(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    Image.fromarray(ramp).save(tmp_path / "a8.png")
    sixteen = Image.fromarray(ramp.astype(np.uint16) * 257)
    expected = load_pixels(ImageItem("k", 0, tmp_path / "a8.png"), 1, 16)
    for name in ("a16.png", "a16.tif", "a16.pgm"):
        sixteen.save(tmp_path / name)
        assert np.array_equal(load_pixels(ImageItem("k", 0, tmp_path / name), 1, 16), expected), name
        assert np.array_equal(load_pixels(ImageItem("k", 0, tmp_path / name), 3, 16)[1], expected[0]), name
    for values in (ramp.astype(np.float32), ramp.astype(np.int32)):
        Image.fromarray(values).save(tmp_path / "wide.tif")
        with pytest.raises(UserError, match=r"wide\.tif has 32-bit values"):
            load_pixels(ImageItem("k", 0, tmp_path / "wide.tif"), 1, 16)


def test_lab_is_read_as_grey_too_and_what_is_no_image_is_described_alike_every_time(tmp_path: Path) -> None:
    image = Image.fromarray(np.tile(np.arange(0, 256, 17, dtype=np.uint8)[:, None, None], (1, 16, 3)))
    profiles = [ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")]
    lab = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    colour, grey = (load_pixels(ImageItem("k", 0, tmp_path / "lab.tif"), channels, 16) for channels in (3, 1))
    assert np.abs(grey[0, :, 0].astype(int) - np.arange(0, 256, 17)).max() <= 1
    assert np.abs(colour.astype(int) - grey.astype(int)).max() <= 1
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"pointer\.png is no readable image: no format that Pillow knows"):
        load_pixels(ImageItem("k", 0, tmp_path / "pointer.png"), 1, 16)


def test_photographs_stand_upright(tmp_path: Path) -> None:
    upright = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it
    lying.save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(load_pixels(ImageItem("k", 0, tmp_path / "phone.png"), 1, 8)[0], np.asarray(upright))


def test_transparency_needs_a_background_and_opaque_alpha_does_not(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 4), (200, 100, 50, 255), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    assert load_pixels(ImageItem("k", 0, tmp_path / "opaque.png"), 3, 8)[:, 0, 0].tolist() == [200, 100, 50]
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "half.png")
    with pytest.raises(UserError, match=r"half\.png has transparent pixels"):
        load_pixels(ImageItem("k", 0, tmp_path / "half.png"), 3, 8)
    shown = load_pixels(ImageItem("k", 0, tmp_path / "half.png"), 3, 8, (255, 255, 255))
    assert shown[:, 0, 0].tolist() == [255, 255, 255]
    assert shown[:, 7, 7].tolist() == [200, 100, 50]


def test_an_image_bomb_is_named_with_its_size(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = 20000, 10000
    rows = zlib.compress(b"\0" * (width // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    (tmp_path / "scan.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    with pytest.raises(UserError, match=r"scan\.png has 200,000,000 pixels"):
        load_pixels(ImageItem("k", 0, tmp_path / "scan.png"), 1, 8)


def test_images_of_the_hub_are_refused_as_texts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = Dataset.from_dict({"image": [{"bytes": png(1), "path": None}], "fine_label": [0]})
    monkeypatch.setattr(images, "load_hub", lambda *_: pictures)  # the hub itself is out of reach here
    with pytest.raises(UserError, match=r"source\.label_field: there is no field `label`") as refused:
        read_items(HubImages(kind="hub", dataset="cifar100"), tmp_path, tmp_path)
    assert refused.value.hint == "the fields are image, fine_label"
    with pytest.raises(UserError, match=r"source\.image_field: there is no field `img`"):
        read_items(HubImages(kind="hub", dataset="cifar100", image_field="img"), tmp_path, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"source\.dataset: .*HF_HUB_OFFLINE.*cifar100"):
        source_digest(HubImages(kind="hub", dataset="cifar100"), tmp_path)
