"""A stage of the job on a GPU: the data set that was made elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from polytrope.pipeline.stage import StageContext, stage
from polytrope.pipeline.support.file_digests import combined_digest, file_digests


class PreparedParameters(BaseModel):
    """Where it is."""

    model_config = ConfigDict(extra="forbid")
    path: str = Field(description="directory of a data set's files")


def fingerprint(parameters: PreparedParameters, directory: Path) -> dict[str, str]:
    """Of the content."""
    root = directory / parameters.path
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    names = [path.relative_to(root).as_posix() for path in paths]
    return {"files": combined_digest(names, file_digests(paths, field="path"))}


@stage(cpu_only=True, fingerprint=fingerprint)
def prepared(context: StageContext, parameters: PreparedParameters) -> None:
    """`shard` needs `datasets`, and its key is of the Python that it ran on."""
    shutil.copytree(parameters.path, context.output, dirs_exist_ok=True)
