"""TensorBoard and Weights & Biases get what the stages said, read back by their own packages: each point once."""

from __future__ import annotations

import glob
import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from mlflow_support import wait_until

from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.files import safe_name
from polytrope.pipeline.tracking.lock import locked
from polytrope.pipeline.tracking.loggers import LOGGERS, check_loggers, log_now
from polytrope.pipeline.workflow.spec import TrackingSpec

pytestmark = pytest.mark.timeout(180)

STAGES = '''
from pathlib import Path
from polytrope.pipeline.stage import StageContext

def train(context: StageContext, rate: float = 0.5) -> dict[str, float]:
    """Four steps; the third is said again, as by a training that was resumed."""
    for step in (1, 2, 3, 3, 4):
        context.log_metrics({"train/loss": 4.0 / step, "learning_rate": rate}, step=step)
    context.log_params({"workers": 2})
    (context.output / "x").write_text("x")
    return {"val/loss": 1.25}
'''
WORKFLOW = """\
name: curves
executor: local
tracking: {enabled: false, loggers: [LOGGERS]}
stages:
  "train":
    uses: curve_stages:train
    matrix: {rate: [0.5, 0.25]}
    with: {rate: "${matrix.rate}"}
"""


@pytest.fixture(params=["tensorboard", "wandb"])
def logger(request: pytest.FixtureRequest) -> str:
    for package in (request.param, LOGGERS[request.param].package):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'polytrope[{request.param}]'")
    return str(request.param)


def tensorboard_curves(store: Store, run: str, stage: str) -> tuple[dict[str, list[tuple[int, float]]], str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(store.local("tensorboard") / run / safe_name(stage)))
    events.Reload()
    tags = events.Tags()
    curves = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags["scalars"]}
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("parameters/text_summary")]
    return {tag.replace("result/", ""): points for tag, points in curves.items()}, texts[-1]


def leveldb_records(path: Path) -> Iterator[bytes]:
    """The records of a file in the format of LevelDB's logs: blocks of 32 KiB, in them checksum, length, type, data."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_curves(store: Store, run: str, stage: str) -> tuple[dict[str, list[tuple[int, float]]], str]:
    from wandb.proto import wandb_internal_pb2

    for path in glob.glob(str(store.local("wandb") / run / "wandb" / "offline-run-*" / "*.wandb")):
        records = [wandb_internal_pb2.Record.FromString(content) for content in leveldb_records(Path(path))]
        if next(record.run.display_name for record in records if record.HasField("run")) != stage:
            continue
        curves: dict[str, list[tuple[int, float]]] = {}
        parameters: dict[str, Any] = {}
        summary: dict[str, float] = {}
        for record in records:
            items = {
                item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item
            }
            for name in items.keys() - {"step"} if "step" in items else ():
                if not name.startswith("_"):
                    curves.setdefault(name, []).append((int(items["step"]), float(items[name])))
            updates = [*record.config.update, *record.run.config.update]
            parameters.update({item.key or item.nested_key[0]: item.value_json for item in updates})
            for item in record.summary.update:
                summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
        return {**{name: [(0, value)] for name, value in summary.items()}, **curves}, json.dumps(parameters)
    raise AssertionError(f"no run for {stage}")


READ = {"tensorboard": tensorboard_curves, "wandb": wandb_curves}


def test_a_logger_has_every_point_once_whatever_died_before(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "curve_stages.py").write_text(STAGES)
    (tmp_path / "w.yaml").write_text(WORKFLOW.replace("LOGGERS", logger))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    store = Store(tmp_path / ".polytrope")
    for run, state in (("r1", "computed"), ("r2", "from the store")):
        assert main(["run", "w.yaml", "--run-id", run]) == 0
        assert f"{logger}: {store.local(logger) / run}\n" in capsys.readouterr().out, state
        if run == "r1":
            log_now(store, store.run_directory(run))  # as after a crash: from the beginning
        for rate in (0.5, 0.25):
            curves, parameters = READ[logger](store, run, f"train[rate={rate}]")
            assert curves["train/loss"] == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3)), (4, 1.0)], state
            assert curves["learning_rate"] == [(step, rate) for step in (1, 2, 3, 4)]
            assert curves["val/loss"] == [(0, 1.25)]
            assert str(rate) in parameters
            assert "workers" in parameters

    with locked(store.run_directory("r1") / "loggers.lock", 0):  # as by the process of a run that goes on
        assert log_now(store, store.run_directory("r1")) is None
    curves, _ = READ[logger](store, "r1", "train[rate=0.5]")
    assert len(curves["train/loss"]) == 4, "what another process writes is left alone"

    blocked = store.local(logger)
    blocked.rename(tmp_path / "elsewhere")
    blocked.write_text("no directory")  # a full disk, a missing right, …: it is left out with its reason
    problems = log_now(store, store.run_directory("r1"))
    assert problems is not None
    (name, reason), *others = problems.items()
    assert (name, others) == (logger, [])
    assert main(["sync", "r1"]) == 1
    assert f"{logger} has not taken all of run r1" in capsys.readouterr().err
    assert reason.startswith(("FileExistsError", "NotADirectoryError"))


def test_a_killed_driver_takes_the_loggers_with_it_and_a_resume_writes_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "curve_stages.py").write_text(
        STAGES.replace("return {", 'while not Path("go").exists(): time.sleep(0.02)\n    return {').replace(
            "from pathlib", "import time\nfrom pathlib"
        )
    )
    (tmp_path / "w.yaml").write_text(WORKFLOW.replace("LOGGERS", "tensorboard"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    store = Store(tmp_path / ".polytrope")
    with (tmp_path / "output").open("wb") as output:
        command = [sys.executable, "-m", "polytrope.pipeline.commands.cli", "run", "w.yaml", "--run-id", "r1"]
        driver = subprocess.Popen(command, stdout=output, stderr=output)

    def logs() -> list[psutil.Process]:
        children = psutil.Process(driver.pid).children()
        return [child for child in children if "polytrope.pipeline.tracking.loggers" in child.cmdline()]

    wait_until(lambda: list(store.local("tensorboard").glob("r1/*/events*")), "the logger writes")
    (process,) = logs()
    driver.kill()
    driver.wait()
    process.wait(30)
    (tmp_path / "go").touch()
    assert main(["resume", "r1"]) == 0
    for rate in (0.5, 0.25):
        curves, _ = tensorboard_curves(store, "r1", f"train[rate={rate}]")
        assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4]


def test_a_logger_whose_package_is_missing_is_refused_before_anything_starts() -> None:
    missing = [name for name, kind in LOGGERS.items() if importlib.util.find_spec(kind.package) is None]
    for name in missing:
        with pytest.raises(UserError) as refused:
            check_loggers([name])
        assert refused.value.hint == f"pip install 'polytrope[{name}]'"
    check_loggers([name for name in LOGGERS if name not in missing])


def test_the_workflow_file_knows_the_loggers_that_there_are() -> None:
    (names,) = get_args(TrackingSpec.model_fields["loggers"].annotation)
    assert set(get_args(names)) == set(LOGGERS)
