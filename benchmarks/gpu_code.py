"""What the CUDA kernels cost by their machine code, where no GPU is at hand: registers, spills, instructions.

    python -m benchmarks.gpu_code [--sources DIRECTORY] [--against FILE] [--out FILE]

Compiles the kernels for sm_90 and reads ptxas's report (registers, spills) and, with cuobjdump, the loop that goes over
the elements. For the loop the sources are compiled once more for bfloat16 alone, without a scaled variable, so that it
holds little that is skipped at run time; of its branches those are followed that pass every load and store and, among
these, the fewest instructions. `slots` is what a multiprocessor's four schedulers need at least for an element, in
instructions per lane: all instructions; twice those of the integer, comparison and conversion pipe, of half the rate;
eight times those of the special functions (CUDA C++ Programming Guide, throughput of arithmetic instructions, compute
capability 9.0). A bound, not a time: what a GPU makes of it, only a GPU tells (`benchmarks.gpu_ops`).

`--sources`: a directory of other sources, `ops/csrc` of an older commit; `--against`: the record of such a run, to
stand beside. Needs nvcc, cuobjdump and nvdisasm (CUDA toolkit, or pip's nvidia-cuda-cuobjdump and -nvdisasm).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from polytrope.ops import build

ROOT = Path(__file__).parents[1]
# Rows of `benchmarks.gpu_ops`: the kernels that answer them, by a pattern of their names.
ROWS = {
    "Hermite 3": r"(forward|backward)_kernel<Polynomial, 3, 0, plain>",
    "Hermite 8": r"(forward|backward)_kernel<Polynomial, 8, 0, plain>",
    "Hermite 8, with an interval": r"(forward|backward)_kernel<Polynomial, 8, 0, with_tails>",
    "Hermite 3, per channel": r"(forward|backward)_columns<Polynomial, 3, 0, \d, false>",
    "Hermite 8, per channel": r"(forward|backward)_columns<Polynomial, 8, 0, \d, false>",
    "Hermite 8, per channel, with an interval": r"(forward|backward)_columns<Polynomial, 8, 0, \d, true>",
    "Tropical 6": r"(forward|backward)_kernel<Tropical, 6, 0, plain>",
    "Tropical rational 6": r"(forward|backward)_kernel<TropicalRational, 6, 0, plain>",
    "Fourier 6": r"(forward|backward)_kernel<FourierSeries<CoarseWaves>, 6, 0, plain>",
    "Fourier 6, harmonic": r"(forward|backward)_kernel<Harmonic\w+<CoarseWaves>, 6, 0, plain>",
    "Rational 5": r"(forward|backward)_kernel<Rational, 5, 4, plain>",
    "PolyReLU 3": r"(forward|backward)_kernel<PolyReLU, 3, 0, plain>",
    "PolyNorm 3": r"(forward|backward)_rows<3, (?:of_16_bits|true)>",
}
SOURCES = ("cuda_polynomial.cu", "cuda_waves.cu", "cuda_lines.cu", "cuda_quotients.cu", "cuda_polynorm.cu")
# Degrees 3, 6 and the highest of each family are enough.
FEW = (
    (
        "first_degree(int, int last) { return last; }",
        "first_degree(int first, int last) { return first <= 3 ? 3 : first <= 6 && last > 6 ? 6 : last; }",
    ),
)
# What makes a kernel one for bfloat16.
FIXED = (
    ("(type == type_float32)", "(false)"),
    ("(type == type_bfloat16)", "(true)"),
    ("scaled(is_scaled(p))", "scaled(false)"),
    ("bounded(float(p.low) > -INFINITY || float(p.high) < INFINITY)", "bounded(true)"),
)
OLDER = (("form != plain && !never_has_tails<Family> && p.tails;", "form == with_tails;"),)  # before 27 November
HALF_RATE = r"(FMNMX|FSETP|FSEL|FSET|ISETP|IADD|SEL|LOP3|PLOP3|SHF|PRMT|VIMNMX|I2F|F2F|F2I|LEA|MOV|R2UR|CS2R|FCHK|VOTE)"


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers
    predicated: bool
    target: int | None  # of a branch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=build.SOURCES)
    parser.add_argument("--against", type=Path, help="an earlier record, shown before each figure")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu-code.json")
    options = parser.parse_args()
    lacking = [tool for tool in ("nvcc", "cuobjdump", "nvdisasm", "c++filt") if shutil.which(tool) is None]
    if lacking:
        print(f"benchmarks.gpu_code needs {', '.join(lacking)} on PATH", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        report = compile_all(options.sources, Path(scratch) / "all", fixed=False)[0]
        cubins = compile_all(options.sources, Path(scratch) / "fixed", fixed=True)[1]
        loops = {name: figures for cubin in cubins for name, figures in read_loops(cubin).items()}
    resources = read_report(report)
    rows = {row: find(pattern, resources, loops) for row, pattern in ROWS.items()}
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    before = json.loads(options.against.read_text(encoding="utf-8")) if options.against else {}
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows, before))
    return 0


def compile_all(sources: Path, scratch: Path, *, fixed: bool) -> tuple[str, list[Path]]:
    """ptxas's report on all sources, and their machine code."""
    scratch.mkdir()
    texts = {path.name: path.read_text(encoding="utf-8") for path in sources.iterdir()}
    replacements = FEW + FIXED if fixed else FEW
    if lost := [old for old, _ in replacements if not any(old in text for text in texts.values())]:
        print(f"{sources}: not found there, and so not replaced: {lost}", file=sys.stderr)
    for name, text in texts.items():
        for old, new in replacements + OLDER if fixed else replacements:
            text = text.replace(old, new)
        (scratch / name).write_text(text, encoding="utf-8")
    flags = [flag for flag in build.CUDA_FLAGS if "cudart" not in flag and "fPIC" not in flag]
    report, cubins = "", []
    for source in SOURCES:
        cubins.append(scratch / f"{source}.cubin")
        command = [
            "nvcc",
            *flags,
            "-DPOLYTROPE_FEW_DEGREES",
            "-arch=sm_90",
            "-cubin",
            str(scratch / source),
            "-o",
            str(cubins[-1]),
        ]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise SystemExit(f"nvcc {source}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        report += done.stderr
    return report, cubins


def readable(names: Iterable[str]) -> dict[str, str]:
    """Mangled names of kernels → `backward_kernel<Polynomial, 3, 0, plain>`."""
    listed = list(names)
    done = subprocess.run(["c++filt"], input="\n".join(listed), capture_output=True, encoding="utf-8", check=True)
    found = {}
    for mangled, name in zip(listed, done.stdout.splitlines(), strict=True):
        short = re.sub(r"\(anonymous namespace\)::|polytrope::|^void ", "", name)
        short = short[: short.index(">(") + 1] if ">(" in short else short.split("(")[0]
        for number, form in enumerate(("plain", "with_tails", "general")):
            short = short.replace(f"(Form){number}", form)
        short = short.replace("(Kept)4", "of_16_bits")
        found[mangled] = re.sub(r"\(\w+\)(\d)", r"\1", short)
    return found


def read_report(report: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of each kernel."""
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = {name: (int(spilled), int(registers)) for name, spilled, registers in re.findall(pattern, report, re.S)}
    names = readable(found)
    return {names[name]: {"registers": used, "spilled": spilled} for name, (spilled, used) in found.items()}


def read_loops(cubin: Path) -> dict[str, dict[str, Any]]:
    """Of each kernel the loop that goes over its elements."""
    text = subprocess.run(["cuobjdump", "-sass", str(cubin)], capture_output=True, encoding="utf-8", check=True).stdout
    functions = re.split(r"^\s*Function : ", text, flags=re.M)[1:]
    code = {function.split()[0]: instructions(function) for function in functions}
    names = readable(code)
    found = {names[name]: measure(own) for name, own in code.items()}
    return {name: figures for name, figures in found.items() if figures is not None}


def instructions(text: str) -> list[Instruction]:
    found = []
    for address, predicate, name, rest in re.findall(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);", text, re.M
    ):
        jump = re.search(r"0x([0-9a-f]+)\s*$", rest) if name.startswith("BRA") else None
        predicated = bool(predicate) or bool(re.match(r"\s*!?U?P\d", rest) and name.startswith("BRA"))
        found.append(Instruction(int(address, 16), name, predicated, int(jump.group(1), 16) if jump else None))
    return found


def measure(code: list[Instruction]) -> dict[str, Any] | None:
    """The innermost loop with the widest store to global memory; None without one."""
    loops = [
        (one.target, one.address) for one in code if one.target is not None and one.target <= one.address
    ]  # first and last address
    best: tuple[tuple[int, int], list[Instruction]] | None = None
    for first, last in loops:
        path = shortest_path([one for one in code if first <= one.address <= last])
        stores = [width_of(one.name) for one in path if one.name.startswith("STG")]
        if stores and any(one.name.startswith("LDG") for one in path):
            rank = (max(stores), -(last - first))
            if best is None or rank > best[0]:
                best = (rank, path)
    if best is None:
        return None
    path = best[1]
    names = [one.name for one in path]
    elements = sum(width_of(name) for name in names if name.startswith("STG")) // 2
    half = sum(bool(re.match(HALF_RATE, name)) for name in names)
    special = sum(name.startswith("MUFU") for name in names)
    return {
        "elements": elements,
        "instructions": round(len(path) / elements, 2),
        "half_rate": round(half / elements, 2),
        "special": round(special / elements, 2),
        "shared_loads": round(sum(name.startswith("LDS") for name in names) / elements, 2),
        "local": sum(name.startswith(("LDL", "STL")) for name in names),
        "slots": round(max(len(path), 2 * half, 8 * special) / elements, 1),
        "bytes": {kind: sorted({width_of(n) for n in names if n.startswith(kind)}) for kind in ("LDG", "STG")},
    }


def width_of(name: str) -> int:
    """Bytes of a load or store of one thread."""
    found = re.search(r"\.(128|64|U8|S8|U16|S16)\b", name)
    return {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}[found.group(1)] if found else 4


def shortest_path(loop: list[Instruction]) -> list[Instruction]:
    """Once through a loop, forward: over the most loads and stores of global memory, then the fewest instructions."""
    place = {one.address: index for index, one in enumerate(loop)}
    end = len(loop)
    # From each instruction on: (loads and stores, - instructions), and the next one.
    best: list[tuple[tuple[int, int], int]] = [((0, 0), end)] * (end + 1)
    unreached = (-1, 0)
    for index in range(end - 1, -1, -1):
        one = loop[index]
        nexts = []
        if index == end - 1:
            nexts = [end]
        elif one.target is None:
            nexts = [] if one.name.startswith(("EXIT", "RET")) and not one.predicated else [index + 1]
        else:
            ahead = place.get(one.target)
            nexts = [ahead] if ahead is not None and ahead > index else []
            if one.predicated:
                nexts.append(index + 1)
        memory = one.name.startswith(("LDG", "STG"))
        options = [(best[following][0], following) for following in nexts if best[following][0] != unreached]
        if options:
            (count, negative), following = max(options)
            best[index] = ((count + memory, negative - 1), following)
        else:
            best[index] = (unreached, end)
    path, index = [], 0
    while index < end:
        path.append(loop[index])
        index = best[index][1]
    return path


def find(pattern: str, resources: dict[str, Any], loops: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, figures in resources.items():
        match = re.fullmatch(pattern, name)
        if match:
            found[match.group(1)] = {"kernel": name, **figures, **loops.get(name, {})}
    return found


def table(rows: dict[str, Any], before: dict[str, Any]) -> Table:
    shown = Table(title="sm_90, bfloat16, by the machine code; not yet run on a GPU")
    headings = ("activation", "way", "registers", "spilled", "instructions", "half rate", "special", "slots", "loads")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in ("activation", "way") else "right")
    for row, ways in rows.items():
        for way in ("forward", "backward"):
            new, old = ways.get(way, {}), before.get(row, {}).get(way, {})
            cells = [
                " → ".join(str(figures[key]) for figures in (old, new) if key in figures)
                for key in ("registers", "spilled", "instructions", "half_rate", "special", "slots")
            ]
            loads = "; ".join(", ".join(map(str, width)) for width in new.get("bytes", {}).values())
            shown.add_row(row, way, *cells, loads)
    return shown


if __name__ == "__main__":
    sys.exit(main())
