"""Rows of numbers and what belongs to them: functions that are known exactly, and files."""

from __future__ import annotations

import csv
import hashlib
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polytrope.pipeline.data.tarfiles import build_tar, digit_members, npy_members
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.shard.corpus import is_validation
from polytrope.pipeline.support.file_digests import file_digests

if TYPE_CHECKING:
    import numpy as np

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_FUNCTION = 2**64 - 1  # the place of a function's own random numbers: no row has this number

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rows = Annotated[int, Field(ge=2, lt=2**63)]  # one for each split at least


class InnerPolynomial(BaseModel):
    """p(x) = Σ_j λ_j He_q(a_j·x) / √q!, with orthonormal a_j and Σ λ² = 1: mean 0 and variance 1."""

    model_config = _STRICT

    degree: int = Field(2, ge=1, le=32, description="q")
    rank: int = Field(ge=1, description="how many directions a_j; at most `dimension`")


class HierarchicalSource(BaseModel):
    """Normal x and a polynomial of a polynomial: y = Σ_k c_k He_k(p(x)) / √k! (+ noise)."""

    model_config = _STRICT

    kind: Literal["hierarchical"]
    rows: Rows = Field(description="how many, for both splits together")
    dimension: int = Field(ge=1, description="numbers in x, of which each is normal")
    inner: InnerPolynomial = Field(description="p: {degree, rank}")
    outer: list[float] = Field(min_length=1, max_length=33, description="coefficients c_0, c_1, …")
    noise: float = Field(0.0, ge=0, description="deviation of normal noise added to y")
    seed: Seed = Field(0, description="of the function and the rows")

    @model_validator(mode="after")
    def possible(self) -> HierarchicalSource:
        if self.inner.rank > self.dimension:
            raise ValueError(f"inner.rank: {self.inner.rank} orthogonal directions in dimension {self.dimension}")
        if not any(self.outer):
            raise ValueError(f"outer: {self.outer} is the polynomial 0")
        return self


class ModularSource(BaseModel):
    """All pairs (a, b): x holds both as one-hot vectors, the class is (a + b) mod `modulus`."""

    model_config = _STRICT

    kind: Literal["modular"]
    modulus: int = Field(ge=2, le=4096, description="what is added modulo; there are modulus² pairs")


class CircleSource(BaseModel):
    """x = (cos θ, sin θ) with uniform θ, and y = Σ_k A_k cos(kθ + φ_k), k = 1, 2, …"""

    model_config = _STRICT

    kind: Literal["circle"]
    rows: Rows = Field(description="how many, for both splits together")
    amplitudes: list[float] = Field(min_length=1, description="A_1, A_2, …")
    phases: list[float] | None = Field(None, description="φ_1, φ_2, … in radians; default: all 0")
    seed: Seed = Field(0, description="of θ")

    @model_validator(mode="after")
    def possible(self) -> CircleSource:
        if self.phases is not None and len(self.phases) != len(self.amplitudes):
            raise ValueError(f"phases: {len(self.phases)} for {len(self.amplitudes)} amplitudes")
        return self


class FileSource(BaseModel):
    """An `.npz` with arrays `[rows]` or `[rows, numbers]`, or a `.csv` whose first line names its columns."""

    model_config = _STRICT

    kind: Literal["file"]
    path: str = Field(description="of the file, relative to the workflow file", pattern=r"\.(npz|csv)$")
    inputs: list[str] = Field(["inputs"], min_length=1, description="arrays or columns that together are x")
    targets: list[str] = Field(["targets"], min_length=1, description="arrays or columns that together are y")
    classes: int | None = Field(
        None, ge=2, description="y is one of so many classes, 0, 1, …; default: y is numbers to predict"
    )
    transform: Literal["yeo_johnson"] | None = Field(
        None,
        description="power transform that makes every column of x, and of y unless it is a class, as normal as it can: "
        "mean 0 and variance 1 over the training rows",
    )


NumbersSource = Annotated[HierarchicalSource | ModularSource | CircleSource | FileSource, Field(discriminator="kind")]


def sizes(source: NumbersSource) -> tuple[int | None, int | None, int | None]:
    """Numbers in x, in y (None for classes), and classes; also None where only the file tells."""
    if isinstance(source, HierarchicalSource):
        return source.dimension, 1, None
    if isinstance(source, ModularSource):
        return 2 * source.modulus, None, source.modulus
    if isinstance(source, CircleSource):
        return 2, 1, None
    if source.path.endswith(".npz"):  # an array may have many columns
        return None, None, source.classes
    return len(source.inputs), len(source.targets) if source.classes is None else None, source.classes


def source_digest(source: NumbersSource, directory: Path) -> dict[str, str]:
    """What identifies the content of a file.

    Raises:
        UserError: it is missing or cannot be read.
    """
    if not isinstance(source, FileSource):
        return {}
    return {"file": file_digests([directory / source.path], field="source.path")[0]}


@dataclass(frozen=True)
class Table:
    """Rows `[n, inputs]` float32, with targets `[n, targets]` float32 or classes `[n]` int64."""

    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class NumbersTask:
    """A shard to write: numbers of its rows in the source, or the rows of a file. `label_digits`: of a class."""

    path: Path
    content: tuple[NumbersSource, np.ndarray] | Table
    label_digits: int | None


@dataclass(frozen=True)
class NumbersResult:
    """A written shard: name, size, sha256, rows."""

    path: str
    bytes: int
    sha256: str
    samples: int


def split_rows(source: NumbersSource, table: Table | None, fraction: float) -> dict[str, np.ndarray]:
    """Numbers of the rows of each split: by the hash of a row's number, of the pair, or of what a file has as inputs,
    so that equal rows of a file are in one split."""
    import numpy as np

    if table is not None:
        keys = [row.tobytes() for row in table.inputs + np.float32(0)]  # -0 + 0 is 0: equal rows, equal bytes
    elif isinstance(source, ModularSource):
        keys = [f"{a},{b}".encode() for a in range(source.modulus) for b in range(source.modulus)]
    else:
        assert not isinstance(source, FileSource)
        keys = [str(number).encode() for number in range(source.rows)]
    chosen = np.fromiter((is_validation(key, fraction) for key in keys), dtype=bool, count=len(keys))
    return {"train": np.flatnonzero(~chosen), "validation": np.flatnonzero(chosen)}


def make_numbers_shard(task: NumbersTask) -> NumbersResult:
    """Write one tar: for each row `inputs.npy`, and `targets.npy` (both float32) or `cls`."""
    table = task.content if isinstance(task.content, Table) else make_rows(*task.content)
    members = {"inputs.npy": npy_members(table.inputs.astype("<f4"))}
    if task.label_digits is None:
        members["targets.npy"] = npy_members(table.targets.astype("<f4"))
    else:
        members["cls"] = digit_members(table.targets, task.label_digits)
    archive = build_tar(task.path.stem, members)
    task.path.write_bytes(archive.data)
    digest = hashlib.sha256(archive.data).hexdigest()
    return NumbersResult(task.path.name, len(archive), digest, len(table.inputs))


def make_rows(source: NumbersSource, numbers: np.ndarray) -> Table:
    """The rows with these numbers (int64 `[n]`): each is a function of its number alone, bit by bit, whatever the
    others are.

    Raises:
        UserError: a y that float32 does not hold.
    """
    import numpy as np

    if isinstance(source, ModularSource):
        first, second = np.divmod(numbers, source.modulus)
        inputs = np.zeros((len(numbers), 2 * source.modulus), dtype=np.float32)
        rows = np.arange(len(numbers))
        inputs[rows, first] = 1.0
        inputs[rows, source.modulus + second] = 1.0
        return Table(inputs, (first + second) % source.modulus)
    if isinstance(source, CircleSource):
        angles = np.array([2.0 * math.pi * _random(source.seed, int(number)).random() for number in numbers])
        targets = np.zeros(len(numbers))
        for k, amplitude in enumerate(source.amplitudes, start=1):
            targets += amplitude * np.cos(k * angles + (source.phases[k - 1] if source.phases else 0.0))
        inputs = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        return Table(inputs, _drawn(source, numbers, targets))
    assert isinstance(source, HierarchicalSource)
    drawn = np.array([_random(source.seed, int(number)).standard_normal(source.dimension + 1) for number in numbers])
    rows = drawn[:, : source.dimension].astype(np.float32)
    targets = hierarchical(source, rows.astype(np.float64))
    if source.noise:
        targets = targets + source.noise * drawn[:, source.dimension]
    return Table(rows, _drawn(source, numbers, targets))


def _drawn(source: HierarchicalSource | CircleSource, numbers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """y of the rows with these numbers, `[n, 1]` float32."""
    import numpy as np

    with np.errstate(over="ignore"):
        narrow = targets.astype(np.float32)
    if not np.isfinite(narrow).all():
        index = int(np.flatnonzero(~np.isfinite(narrow))[0])
        fields = "inner.degree, outer" if isinstance(source, HierarchicalSource) else "amplitudes"
        raise UserError(
            f"source: y of row {numbers[index]} is {targets[index]:.3g}, which float32 does not hold",
            f"lower degrees or coefficients: {fields}",
        )
    return narrow[:, None]


def hierarchical(source: HierarchicalSource, rows: np.ndarray) -> np.ndarray:
    """y without noise, float64 `[n]`, of x `[n, dimension]`. (Wang et al., Learning Hierarchical Polynomials with
    Three-Layer Neural Networks, 2023)

    Sums run over one row at a time: a product of matrices would round differently with the number of rows.
    """
    import numpy as np

    directions, weights = directions_of(source)
    inner = np.zeros(len(rows))
    for direction, weight in zip(directions, weights, strict=True):
        inner += weight * normalised_hermite(source.inner.degree, (rows * direction).sum(axis=1))[-1]
    powers = normalised_hermite(len(source.outer) - 1, inner)
    return sum((c * power for c, power in zip(source.outer, powers, strict=True)), start=np.zeros(len(rows)))


def directions_of(source: HierarchicalSource) -> tuple[np.ndarray, np.ndarray]:
    """a `[rank, dimension]` with orthonormal rows and λ `[rank]` with Σ λ² = 1, drawn with the seed."""
    import numpy as np

    generator = _random(source.seed, _FUNCTION)
    directions: list[np.ndarray] = []
    for drawn in generator.standard_normal((source.inner.rank, source.dimension)):
        left = drawn
        for _ in range(2):  # once more takes away what rounding left
            for other in directions:
                left = left - (left * other).sum() * other
        directions.append(left / np.sqrt((left * left).sum()))
    weights = generator.standard_normal(source.inner.rank)
    return np.array(directions), weights / np.sqrt((weights * weights).sum())


def normalised_hermite(degree: int, x: np.ndarray) -> list[np.ndarray]:
    """He_k(x) / √k! for k = 0 … degree: orthonormal for normal x."""
    import numpy as np

    values = [np.ones_like(x)]
    for k in range(degree):
        before = math.sqrt(k) * values[k - 1] if k else 0.0
        values.append((x * values[k] - before) / math.sqrt(k + 1))
    return values


def _random(seed: int, number: int) -> np.random.Generator:
    """Random numbers of one row: a counter-based generator starts anywhere at once."""
    import numpy as np

    counter = np.array([0, 0, 0, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


def read_table(source: FileSource, directory: Path) -> Table:
    """The rows of a file.

    Raises:
        UserError: it cannot be read, has no such array or column, or values that are not what they should be.
    """
    import numpy as np

    path = directory / source.path
    try:
        columns = _read_npz(source, path) if path.suffix == ".npz" else _read_csv(source, path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, csv.Error) as error:
        raise UserError(f"source.path: {path} cannot be read: {error}", "expected an npz or csv file") from error
    joined = {}
    for field in ("inputs", "targets"):
        parts = [columns[name] for name in getattr(source, field)]
        for name, part in zip(getattr(source, field), parts, strict=True):
            if part.dtype.kind not in "fiub" or part.ndim not in (1, 2) or not part.size:
                raise UserError(
                    f"source.{field}: `{name}` of {path} is {part.dtype} {list(part.shape)}",
                    "expected numbers [rows] or [rows, numbers]",
                )
        lengths = {name: len(columns[name]) for name in [*source.inputs, *source.targets]}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise UserError(f"source: different numbers of rows in {path}: {listed}", "all must have as many")
        joined[field] = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    targets = joined["targets"]
    if source.classes is not None:
        classes = _classes(source, path, targets)
        return Table(_float32("inputs", path, joined["inputs"]), classes)
    return Table(_float32("inputs", path, joined["inputs"]), _float32("targets", path, targets))


def _read_npz(source: FileSource, path: Path) -> dict[str, np.ndarray]:
    import numpy as np

    with np.load(path, allow_pickle=False) as content:
        _refuse_missing(source, path, list(content.files))
        return {name: content[name] for name in [*source.inputs, *source.targets]}


def _read_csv(source: FileSource, path: Path) -> dict[str, np.ndarray]:
    import numpy as np

    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file)
        names = next(lines, [])
        _refuse_missing(source, path, names)
        places = {name: names.index(name) for name in [*source.inputs, *source.targets]}
        values: dict[str, list[float]] = {name: [] for name in places}
        for line in lines:
            if not line:
                continue
            if any(text.strip() for text in line[len(names) :]):
                raise UserError(
                    f"source.path: {path}, line {lines.line_num} has {len(line)} values for {len(names)} columns",
                    "a comma inside a number would put what follows into other columns: write decimal points",
                )
            for name, place in places.items():
                try:
                    values[name].append(float(line[place]))
                except (ValueError, IndexError):
                    text = line[place] if place < len(line) else "nothing"
                    raise UserError(
                        f"source.path: {path}, line {lines.line_num}, `{name}`: {text!r} is no number",
                        "every row needs a number there",
                    ) from None
    return {name: np.array(column) for name, column in values.items()}


def _refuse_missing(source: FileSource, path: Path, names: list[str]) -> None:
    for field in ("inputs", "targets"):
        for name in getattr(source, field):
            if names.count(name) != 1:
                number = "several" if name in names else "no"
                raise UserError(f"source.{field}: {path} has {number} `{name}`", f"it has {', '.join(names) or 'none'}")


def _float32(field: str, path: Path, values: np.ndarray) -> np.ndarray:
    import numpy as np

    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    if not np.isfinite(narrow).all():
        row = int(np.argwhere(~np.isfinite(narrow))[0, 0])
        raise UserError(
            f"source.{field}: row {row} of {path} has a number that float32 does not hold: {values[row].tolist()}",
            "numbers must be finite",
        )
    return narrow


def _classes(source: FileSource, path: Path, values: np.ndarray) -> np.ndarray:
    import numpy as np

    assert source.classes is not None
    if values.shape[1] != 1:
        raise UserError(f"source.targets: {path} has {values.shape[1]} columns of classes", "a row has one class")
    column = values[:, 0]
    wrong = (column != np.floor(column)) | (column < 0) | (column >= source.classes)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"source.targets: row {row} of {path} has the class {column[row]}",
            f"with classes: {source.classes} they are 0 … {source.classes - 1}",
        )
    return column.astype(np.int64)
