"""TensorBoard: a directory of event files per stage, which `tensorboard --logdir STORE/tensorboard` shows."""

from __future__ import annotations

from collections.abc import Mapping

from tensorboardX import SummaryWriter

from polytrope.pipeline.support.files import safe_name
from polytrope.pipeline.tracking.loggers import LoggedRun
from polytrope.pipeline.tracking.overview import markdown_table


class TensorBoard:
    """A `Logger`. Parameters are a table of text; a stage's figures are scalars below `result/`."""

    def __init__(self, run: LoggedRun) -> None:
        self.run = run
        self._writers: dict[str, SummaryWriter] = {}
        self._parameters: dict[str, dict[str, str]] = {}

    def parameters(self, stage: str, values: Mapping[str, str]) -> None:
        """As a whole each time: TensorBoard shows the newest text."""
        known = self._parameters.setdefault(stage, {})
        known.update(values)
        rows = [[name, str(value)] for name, value in known.items()]
        self._writer(stage).add_text("parameters", markdown_table(["parameter", "value"], rows))

    def metrics(self, stage: str, values: Mapping[str, float], step: int, moment: float) -> None:
        """A point of each curve."""
        for name, value in values.items():
            self._writer(stage).add_scalar(name, value, step, walltime=moment)

    def result(self, stage: str, values: Mapping[str, float], moment: float) -> None:
        """The figures, and the file as it stands."""
        for name, value in values.items():
            self._writer(stage).add_scalar(f"result/{name}", value, 0, walltime=moment)
        self._writer(stage).flush()

    def close(self) -> None:
        """Write what is still in memory."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, stage: str) -> SummaryWriter:
        if stage not in self._writers:
            self._writers[stage] = SummaryWriter(str(self.run.directory / safe_name(stage)), flush_secs=5)
        return self._writers[stage]
