"""The shard_images stage: real images to tar shards that webdataset reads, and a ConvNeXt that trains on them."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training_support import history, read_events, run_training

from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources, stage_context
from polytrope.pipeline.stages.shard.parameters import ShardImagesParameters
from polytrope.pipeline.stages.shard.shard_images import fingerprint, shard_images


def run_stage(directory: Path, parameters: Mapping[str, Any], workers: int = 1) -> Path:
    """Run the stage as the engine does; returns its output."""
    context = stage_context(directory, stage="digits", resources=Resources(workers=workers))
    shard_images(context, ShardImagesParameters.model_validate(parameters))
    return context.output


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stage(tmp_path_factory.mktemp("digits"), {"source": {"kind": "digits"}, "shard_images": 500})


def test_every_digit_is_in_one_split_with_its_class(digits: Path) -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    expected = {
        (np.rint(image * (255 / 16)).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    }
    found = []
    for split in ("train", "validation"):
        reader = open_split(digits, split)
        pixels, labels = reader.images(np.arange(len(reader)))
        assert pixels.shape == (len(reader), 1, 8, 8)
        found += [(image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True)]
    assert len(found) == len(original.images)
    assert set(found) == expected
    description = json.loads((digits / "dataset.json").read_text())
    assert 0.15 < description["splits"]["validation"]["samples"] / len(found) < 0.25


def test_webdataset_reads_the_shards(digits: Path) -> None:
    import webdataset

    reader = open_split(digits, "train")
    pixels, labels = reader.images(np.arange(500))
    read = list(webdataset.WebDataset(str(digits / "train/shard-000000.tar"), shardshuffle=False).decode())
    assert [sample["cls"] for sample in read] == labels.tolist()
    assert all(np.array_equal(sample["npy"], image) for sample, image in zip(read, pixels, strict=True))


def test_the_number_of_tasks_changes_no_byte(digits: Path, tmp_path: Path) -> None:
    again = run_stage(tmp_path, {"source": {"kind": "digits"}, "shard_images": 500}, workers=2)
    for path in sorted(file for file in digits.rglob("*") if file.is_file()):
        ours, theirs = (hashlib.sha256(file.read_bytes()) for file in (path, again / path.relative_to(digits)))
        assert ours.digest() == theirs.digest(), path.name


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pictures, 20 × 12, of the classes red and blue, as a folder and as a webdataset tar."""
    directory = tmp_path / "pictures"
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        for number in range(12):
            name = ("blue", "red")[number % 2]
            image = Image.new("RGB", (20, 12), name)
            (directory / name).mkdir(parents=True, exist_ok=True)
            image.save(directory / name / f"{number:02d}.png")
            content = (directory / name / f"{number:02d}.png").read_bytes()
            for extension, data in (("png", content), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number:02d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    monkeypatch.chdir(tmp_path)
    return directory


@pytest.mark.parametrize(
    "source", [{"kind": "folder", "path": "pictures"}, {"kind": "webdataset", "paths": ["pictures.tar"]}]
)
def test_files_and_tars_become_squares_of_the_asked_size(
    pictures: Path, tmp_path: Path, source: dict[str, Any]
) -> None:
    parameters = {"source": source, "image_size": 6, "channels": 3, "validation_fraction": 0.4}
    output = run_stage(tmp_path / "stage", parameters)
    blue_and_red = np.array([[0, 0, 255], [255, 0, 0]])
    for split in ("train", "validation"):
        reader = open_split(output, split)
        pixels, labels = reader.images(np.arange(len(reader)))
        assert pixels.shape[1:] == (3, 6, 6)
        assert np.array_equal(pixels, np.broadcast_to(blue_and_red[labels][:, :, None, None], pixels.shape))
    before = fingerprint(ShardImagesParameters.model_validate(parameters), tmp_path)
    (pictures / "red" / "13.png").write_bytes((pictures / "red" / "01.png").read_bytes())
    if source["kind"] == "folder":
        assert fingerprint(ShardImagesParameters.model_validate(parameters), tmp_path) != before
    else:  # one label corrected: the tar's size is the same
        content = bytearray((tmp_path / "pictures.tar").read_bytes())
        with tarfile.open(tmp_path / "pictures.tar") as archive:
            content[archive.getmember("00.cls").offset_data] = ord("1")
        (tmp_path / "pictures.tar").write_bytes(content)
        assert fingerprint(ShardImagesParameters.model_validate(parameters), tmp_path) != before


def test_a_file_that_is_no_image_is_named(pictures: Path, tmp_path: Path) -> None:
    (pictures / "red" / "99.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"red/99\.png is no readable image"):
        run_stage(tmp_path / "stage", {"source": {"kind": "folder", "path": "pictures"}, "channels": 3})


def test_a_convnext_learns_digits_with_mixup(digits: Path, tmp_path: Path) -> None:
    model = {"architecture": "convnext", "depths": [1, 1], "dims": [32, 64], "patch_size": 1, "layer_scale": 0.0}
    run_training(
        tmp_path,
        Artifact(digits, "digest", "digits"),
        model={**model, "activation": {"name": "hermite", "degree": 3}},
        steps=50,
        learning_rate=4e-3,
        warmup_steps=20,
        global_batch_size=32,
        validation_samples=300,
        validation_every=0,
        checkpoint_every=0,
        augmentation={"mixup": 0.1, "label_smoothing": 0.1},
        peak_flops=1e12,
    )
    assert any("mfu" in event["values"] for event in read_events(tmp_path, "metrics"))
    assert history(tmp_path)[-1]["val/accuracy"] > 0.5  # by chance: 0.1


def test_the_small_form_of_the_imagenet_workflow_runs(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(16):
        for split in ("train", "val"):
            directory = tmp_path / "imagenet" / split / ("cat", "dog")[number % 2]
            directory.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / f"{number:02d}.JPEG")
    settings = {
        "imagenet": tmp_path / "imagenet", "activations": "[gelu]", "preset": "convnext-atto", "image_size": 32,
        "epochs": 1, "global_batch_size": 8, "micro_batch_size": 8, "warmup_steps": 1, "precision": "fp32",
        "workers": 1, "gpus": 0, "cpus": 1, "validation_samples": 16,
    }  # fmt: skip
    command = [str(Path(sys.executable).parent / "polytrope"), "run", "workflows/convnext-imagenet.yaml"]
    command += ["--executor", "local", "--no-tracking", "--store", str(tmp_path / "store")]
    command += [f"--set=params.{name}={value}" for name, value in settings.items()]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "train[activation=gelu]" in done.stdout + done.stderr
