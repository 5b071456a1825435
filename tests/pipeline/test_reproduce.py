"""A run computed again: equal bytes, or the first thing that differs by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polytrope.pipeline.proof.reproduce import compare_metrics

POLYTROPE = str(Path(sys.executable).with_name("polytrope"))
STAGES = '''
"""Stages whose results depend on a file, a package, the threads."""
import hashlib, json, os, time
from pathlib import Path
import culprit
from polytrope.pipeline.stage import Artifact, StageContext, stage

def digest(parameters, directory):
    return {"corpus": hashlib.sha256((Path(directory) / parameters.file).read_bytes()).hexdigest()}

@stage(fingerprint=digest)
def read(context: StageContext, file: str) -> dict[str, float]:
    text = Path(file).read_text()
    (context.output / "text").write_text(text)
    return {"characters": len(text)}

def train(context: StageContext, data: Artifact, factor: float = 1.0) -> dict[str, float]:
    loss = len((data.path / "text").read_text()) * factor * culprit.FACTOR
    (context.output / "model.json").write_text(json.dumps([loss, os.environ.get("OMP_NUM_THREADS")]))
    if (Path(__file__).parent / "random").exists():
        (context.output / "clock").write_text(str(time.time_ns()))
    return {"loss": loss, "seconds": time.monotonic()}

def report(context: StageContext, model: Artifact) -> None:
    (context.output / "page").write_text((model.path / "model.json").read_text())
'''
WORKFLOW = """\
name: again
executor: local
tracking: {enabled: false}
stages:
  read: {uses: "again_stages:read", with: {file: corpus.txt}}
  train: {uses: "again_stages:train", inputs: {data: read}}
  report: {uses: "again_stages:report", inputs: {model: train}}
"""


def package(directory: Path, version: str, factor: float) -> None:
    """An installed package `culprit` of this version, on which the training's result depends."""
    place = directory / "packages" / "site-packages"
    for old in place.glob("*.dist-info/METADATA"):
        old.unlink()
        old.parent.rmdir()
    (place / f"culprit-{version}.dist-info").mkdir(parents=True)
    (place / f"culprit-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: culprit\nVersion: {version}\n"
    )
    (place / "culprit.py").write_text(f"FACTOR = {factor}\n")


def polytrope(directory: Path, *arguments: str, threads: int = 1) -> tuple[int, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(directory / "packages" / "site-packages"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    done = subprocess.run(
        [POLYTROPE, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a finished run."""
    (tmp_path / "again_stages.py").write_text(STAGES)
    (tmp_path / "w.yaml").write_text(WORKFLOW)
    (tmp_path / "corpus.txt").write_text("some text")
    package(tmp_path, "1.0", 1.0)
    code, output = polytrope(tmp_path, "run", "w.yaml")
    assert code == 0, output
    return tmp_path


def verdicts(output: str) -> dict[str, str]:
    """Stage → verdict, from the table."""
    lines = output.split("digest then", 1)[1].splitlines()[1:]
    rows = [line.split("  ") for line in lines[: lines.index("")]]
    return {row[0].strip(): row[-1].strip() for row in rows}


def files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (directory / "runs").rglob("*") if path.is_file()}


def test_the_same_run_again_is_bit_equal_and_leaves_nothing(project: Path) -> None:
    before = files(project / ".polytrope")
    code, output = polytrope(project, "reproduce")
    assert code == 0, output
    assert verdicts(output) == {"read": "identical", "train": "identical", "report": "identical"}
    assert "3 of 3 results are bit-equal" in output
    assert files(project / ".polytrope") == before
    assert list((project / ".polytrope" / "reproductions").iterdir()) == []


def test_one_stage_alone_is_computed_on_the_stored_results_before_it(project: Path) -> None:
    code, output = polytrope(project, "reproduce", "--stage", "train", "--into", "new")
    assert code == 0, output
    assert verdicts(output) == {"read": "taken over", "train": "identical"}
    assert (project / "new" / "runs").is_dir()
    code, output = polytrope(project, "reproduce", "--into", "new")
    assert code == 2
    assert "exists already" in output
    code, output = polytrope(project, "reproduce", "--stage", "trian")
    assert code == 2
    assert "train" in output


def test_stages_that_a_stage_returned_are_compared_too(tmp_path: Path) -> None:
    (tmp_path / "further_stages.py").write_text(
        "from pathlib import Path\n"
        "from polytrope import StageContext, Stages\n"
        "def split(context: StageContext) -> Stages:\n"
        "    return Stages({name: {'uses': 'further_stages:part'} for name in ('part', 'unwanted')})\n"
        "def part(context: StageContext) -> None:\n"
        "    (context.output / 'text').write_text(str((Path(__file__).parent / 'other').exists()))\n"
    )
    (tmp_path / "w.yaml").write_text(
        "name: further\nexecutor: local\ntracking: {enabled: false}\nstages:\n"
        "  split: {uses: 'further_stages:split'}\n  alone: {uses: 'further_stages:part'}\n"
        "  never: {uses: 'further_stages:part', when: 'false'}\n"
    )
    code, output = polytrope(tmp_path, "run", "w.yaml")
    assert code == 0, output
    code, output = polytrope(tmp_path, "reproduce", "--stage", "split/part")
    assert code == 0, output
    assert verdicts(output) == {"split": "taken over", "split/part": "identical"}
    code, output = polytrope(tmp_path, "reproduce", "--stage", "split")
    assert code == 0, output
    assert verdicts(output) == {"split": "identical"}
    code, output = polytrope(tmp_path, "reproduce")
    assert code == 0, output
    assert verdicts(output)["never"] == "no result"
    assert "2 of 2 results are bit-equal" in output  # the rest has the key of `alone`
    (tmp_path / "other").touch()
    code, output = polytrope(tmp_path, "reproduce")
    assert code == 1, output
    assert verdicts(output)["split"] == "identical"
    assert verdicts(output)["split/part"].lower().startswith("different")


def test_a_package_version_is_named(project: Path) -> None:
    package(project, "1.1", 1.5)
    code, output = polytrope(project, "reproduce")
    assert code == 1
    assert verdicts(output) == {"read": "identical", "train": "different", "report": "different"}
    assert "first difference: train" in output
    assert "because package culprit: 1.0 → 1.1" in output
    assert "loss: 9 → 13.5" in output
    assert "files: model.json" in output


def test_a_package_that_changes_little_is_within_the_tolerance(project: Path) -> None:
    package(project, "1.1", 1.0000001)
    code, output = polytrope(project, "reproduce")
    assert verdicts(output)["train"] == "within tolerance"
    assert "accepted: the environment is another one" in output
    code, output = polytrope(project, "reproduce", "--tolerance", "1e-12")
    assert code == 1
    assert verdicts(output)["train"] == "different"


def test_what_is_other_than_recorded_without_an_effect_is_named(project: Path) -> None:
    package(project, "1.1", 1.0)
    code, output = polytrope(project, "reproduce")
    assert code == 0, output
    assert "3 of 3 results are bit-equal" in output
    assert "other than recorded, without an effect on these results:\n  package culprit: 1.0 → 1.1\n" in output


def test_the_number_of_threads_is_named(project: Path) -> None:
    _, output = polytrope(project, "reproduce", threads=2)
    assert "first difference: train" in output
    assert "because threads OMP_NUM_THREADS: 1 → 2" in output


def test_a_byte_of_the_data_is_named(project: Path) -> None:
    (project / "corpus.txt").write_text("some texT")
    code, output = polytrope(project, "reproduce")
    assert code == 1
    assert "first difference: read" in output
    assert "because corpus changed" in output


def test_code_is_named(project: Path) -> None:
    (project / "again_stages.py").write_text(STAGES.replace("* factor", "* factor * 2"))
    code, output = polytrope(project, "reproduce")
    assert code == 1
    assert "first difference: train" in output
    assert "because code of again_stages.py changed" in output


def test_a_stage_that_is_not_deterministic_is_named(project: Path) -> None:
    (project / "random").touch()
    code, output = polytrope(project, "reproduce")
    assert code == 1
    assert "first difference: train" in output
    assert "files: clock" in output
    assert "the stage itself is not deterministic" in output


def test_measured_times_are_not_compared_but_what_they_were_measured_on_is(project: Path) -> None:
    (project / "again_stages.py").write_text(
        STAGES
        + """
@stage(measured=True)
def clock(context: StageContext, model: Artifact) -> dict[str, float]:
    (context.output / "time").write_text(str(time.time_ns()))
    return {"step_milliseconds": time.monotonic()}

def page(context: StageContext, times: Artifact, model: Artifact) -> dict[str, float]:
    (context.output / "page").write_text((times.path / "time").read_text())
    return {"pages": 1}
"""
    )
    times = """  clock: {uses: "again_stages:clock", inputs: {model: train}}
  page: {uses: "again_stages:page", inputs: {times: clock, model: train}}
"""
    (project / "w.yaml").write_text(WORKFLOW + times)
    assert polytrope(project, "run", "w.yaml")[0] == 0
    code, output = polytrope(project, "reproduce")
    assert code == 0, output
    assert list(verdicts(output).values()) == ["identical", "identical", "identical", "measured", "measured"]
    (project / "corpus.txt").write_text("some other text")
    code, output = polytrope(project, "reproduce")
    assert (code, "measured" in verdicts(output).values()) == (1, False)
    assert "because corpus changed" in output


def test_verify_finds_a_changed_byte_of_a_run(project: Path) -> None:
    code, output = polytrope(project, "verify")
    assert (code, "3 artifacts hashed, 0 damaged" in output) == (0, True)
    (model,) = (project / ".polytrope" / "artifacts").glob("*/files/model.json")
    content = model.read_text()
    model.chmod(0o644)
    model.write_text(content.replace("9", "8"))
    code, output = polytrope(project, "verify")
    assert code == 1
    assert "model.json: its bytes have changed" in output


def test_metrics_are_compared_relatively_and_measured_times_not_at_all() -> None:
    before = {"loss": 2.0, "tokens_per_second": 10.0, "nan": float("nan"), "gone": 1.0}
    after = {"loss": 2.001, "tokens_per_second": 99.0, "nan": float("nan"), "new": 1.0}
    assert compare_metrics(before, after, 1e-3) == ["gone: 1.0 → (none)", "new: (none) → 1.0"]
    assert compare_metrics({"loss": 2.0}, {"loss": 2.01}, 1e-3) == ["loss: 2 → 2.01"]
