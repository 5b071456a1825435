"""The quickstart computed again: equal to the bit, and what is other than recorded is named."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import shutil
import subprocess
from pathlib import Path

import pytest
from mlflow_support import POLYTROPE
from quickstart_support import REPOSITORY, SETTINGS, Run

pytestmark = pytest.mark.timeout(900)


def polytrope(directory: Path, *arguments: str, threads: int = 1) -> tuple[int, str]:
    done = subprocess.run(
        [POLYTROPE, *arguments],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def edit_record(directory: Path, *keys: str, value: object) -> None:
    """Change one value of a run's record."""
    path = directory / "workflow.json"
    record = json.loads(path.read_text())
    place = record
    for key in keys[:-1]:
        place = place[key]
    assert place.get(keys[-1]) != value
    place[keys[-1]] = value
    path.write_text(json.dumps(record))


def test_a_stage_of_the_quickstart_is_bit_equal_and_says_what_is_other_than_recorded(
    local_quickstart: Run, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(local_quickstart.store.address, store, ignore=shutil.ignore_patterns("mlflow*"))
    run_id = local_quickstart.state.run_id or ""
    edit_record(store / "runs" / run_id, "environment", "packages", "torch", value="1.0")
    code, output = polytrope(tmp_path, "reproduce", run_id, "--stage", "convert", f"--store={store}", threads=2)
    assert code == 0, output
    assert "1 of 1 results are bit-equal" in output
    assert "other than recorded, without an effect on these results:" in output
    assert "  package torch: 1.0 → " in output
    assert "  threads OMP_NUM_THREADS: 1 → 2" in output


@pytest.mark.chaos
def test_the_quickstart_is_bit_equal_until_a_thread_count_or_a_byte_of_the_data_changes(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index, text in enumerate(pydoc_data.topics.topics.values()):
        (corpus / f"{index:03d}.txt").write_text(text)
    shutil.copy(REPOSITORY / "workflows" / "quickstart.yaml", tmp_path)
    settings = [f"params.{name}={value}" for name, value in (SETTINGS | {"steps": 30}).items()]
    settings += ["stages.shard.with.source={kind: files, paths: [corpus/*.txt]}"]
    options = [f"--set={setting}" for setting in settings]
    code, output = polytrope(tmp_path, "run", "quickstart.yaml", "--executor=local", "--no-tracking", *options)
    assert code == 0, output
    (run,) = (tmp_path / ".polytrope" / "runs").iterdir()

    code, output = polytrope(tmp_path, "reproduce")
    assert code == 0, output
    assert "8 of 8 results are bit-equal" in output
    assert "other than recorded" not in output

    record = (run / "workflow.json").read_text()
    edit_record(run, "workflow", "stages", "baseline", "with", "threads_per_worker", value=2)
    code, output = polytrope(tmp_path, "reproduce", "--stage", "baseline")
    assert code == 1, output
    assert "first difference: baseline" in output
    assert "because parameters.threads_per_worker: 1 → 2" in output
    (run / "workflow.json").write_text(record)

    changed = corpus / "007.txt"
    changed.write_text("#" + changed.read_text()[1:])
    code, output = polytrope(tmp_path, "reproduce", "--stage", "shard")
    assert code == 1, output
    assert "first difference: shard" in output
    assert "because files changed" in output
