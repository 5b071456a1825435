"""What stages show in MLflow beside figures: files, data sets, registered models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from polytrope.pipeline.tracking.cursor import Shown
from polytrope.pipeline.tracking.names import parent_folder


def show(
    client: MlflowClient, shown: Shown, *, stage: str, child: str, parent: str, run_id: str, files: Path, cached: bool
) -> None:
    """Send one thing.

    Args:
        child, parent: MLflow's runs of the stage and of the workflow.
        run_id: of the run.
        files: directory of the stage's artifact.
        cached: the stage was taken from the store: its own files are with the run that computed it.

    Raises:
        FileNotFoundError: the stage wrote no such file.
        Exception: whatever the server or its artifact store answered.
    """
    event = shown.event
    if shown.kind == "artifact":
        _artifact(client, event, stage, child, parent, files, cached)
    elif shown.kind == "dataset":
        _dataset(client, event, child)
    elif shown.kind == "model" and not cached:
        _register(client, event, child, stage, run_id, files / event["path"])


def _artifact(
    client: MlflowClient, event: Mapping[str, Any], stage: str, child: str, parent: str, files: Path, cached: bool
) -> None:
    of_workflow = bool(event.get("parent"))
    path = files / event["path"]
    if not path.exists():
        raise FileNotFoundError(f"the stage wrote no {event['path']}")
    if cached and not of_workflow:
        return
    relative = Path(parent_folder(stage) if of_workflow else "") / event["path"]
    place = relative if path.is_dir() else relative.parent
    log = client.log_artifacts if path.is_dir() else client.log_artifact
    log(parent if of_workflow else child, str(path), None if str(place) == "." else str(place))


def _dataset(client: MlflowClient, event: Mapping[str, Any], child: str) -> None:
    dataset = Dataset(
        name=event["name"][:500],
        digest=event["digest"][:36],
        source_type="polytrope",
        source=json.dumps({"uri": event["source"]}),
        profile=json.dumps(event["profile"])[:60_000],
    )
    client.log_inputs(child, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _register(
    client: MlflowClient, event: Mapping[str, Any], child: str, stage: str, run_id: str, directory: Path
) -> None:
    """Upload the model directory and register it as a new version with the alias, once per MLflow run."""
    from polytrope.pipeline.tracking.served_model import write_model

    name, alias = event["name"], event["alias"]
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = _versions(client, name, child)
    if not versions:
        with tempfile.TemporaryDirectory() as temporary:
            write_model(Path(temporary) / "model", directory)
            client.log_artifacts(child, str(Path(temporary) / "model"), "model")
        source = f"{client.get_run(child).info.artifact_uri}/model"
        client.create_model_version(
            name,
            source,
            run_id=child,
            tags={"polytrope.run_id": run_id, "polytrope.stage": stage},
            description=f"stage `{stage}` of run `{run_id}`",
        )
        versions = _versions(client, name, child)
    for double in versions[1:]:  # of a hanging server
        client.delete_model_version(name, double)
    client.set_registered_model_alias(name, alias, versions[0])


def _versions(client: MlflowClient, name: str, child: str) -> list[str]:
    found = client.search_model_versions(f"run_id = '{child}'")  # a name may hold quotes
    return sorted((str(version.version) for version in found if version.name == name), key=int)
