"""The copy of one run in MLflow: what journal and spool say, sent in order, each point once.

How far the copy is stands in the run's `mlflow.json`. Whoever goes on from there asks the server for the last step of
every curve; MLflow itself ignores a point that it has already, so that what a server took without saying so (it hung,
or died after the commit) is neither lost nor doubled. Runs that were made twice in that way are found and removed.

An error is one of two kinds. A server that is away, slow or broken: everything stops and is tried again from the
cursor. A request that this server will never take (a deleted run, a missing right to register models): it is noted in
`refused` and the rest goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import requests
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import Event, JournalReader, RunState, fold
from polytrope.pipeline.runs.lease import current
from polytrope.pipeline.runs.spool import SpoolEvent, SpoolReader
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.support.files import replace_file
from polytrope.pipeline.tracking import description as mlflow_summary
from polytrope.pipeline.tracking.names import (
    METRICS_PER_REQUEST,
    PARAMETER_LENGTH,
    PARAMETERS_PER_REQUEST,
    TAG_LENGTH,
    flatten,
    milliseconds,
    mlflow_name,
    number,
    parent_folder,
    step_number,
)

CURSOR_FILE = "mlflow.json"
GRAPH_FILE = "graph.svg"
_STATUS = {"succeeded": "FINISHED", "cached": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the pages for training, not for prompts
_REFUSALS = 50  # that are kept
# Of MLflow's codes, those that no second try changes. Not BAD_REQUEST: a lost database connection is reported so.
_PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED"}
_log = logging.getLogger("polytrope.mlflow")


class Latest(NamedTuple):
    """The newest point of a curve. `time` in milliseconds."""

    step: int
    time: int
    value: float


def is_permanent(error: Exception) -> bool:
    """Whether the server will answer the same request in the same way for ever."""
    if isinstance(error, MlflowException):
        return error.error_code in _PERMANENT
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        return 400 <= status < 500 and status not in (401, 403, 408, 425, 429)
    if isinstance(error, requests.RequestException):
        return False
    return isinstance(error, ValueError | TypeError | LookupError | AttributeError | ImportError | FileNotFoundError)


class Copy:
    """One run's copy. `advance` sends what is new; if it raises, make a new `Copy` and go on.

    Args:
        run_directory: `STORE/runs/RUN`.
        uri: MLflow's tracking URI.
        experiment: its name; by default the workflow's.
    """

    def __init__(self, run_directory: Path, uri: str, experiment: str = "") -> None:
        self.directory = run_directory
        self.store = Store(run_directory.parent.parent)
        self.client = MlflowClient(tracking_uri=uri)
        self.uri = uri
        self.experiment_name = experiment
        self.cursor: dict[str, Any] = {
            "children": {},
            "events": 0,
            "spool": {},
            "pending": {},
            "ended": [],
            "failed": [],
            "refused": [],
        }
        self.cursor |= read_cursor(run_directory, uri)
        self.cursor["server"] = server_name(uri)
        self.journal = JournalReader(run_directory)
        self.events: list[Event] = []
        self.latest: dict[str, dict[str, Latest]] = {}  # MLflow run → curve → newest point
        self.found: dict[str | None, str] | None = None  # stage (None: the parent) → MLflow run, as the server has it

    # -- the pass --------------------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Send everything that journal and spool hold beyond the cursor; whether there was anything."""
        self.events += self.journal.read_new()
        if not self.events:
            return False
        before = json.dumps(self.cursor)
        self._ensure_parent()
        for event in self.events[self.cursor["events"] :]:
            if event.type in ("stage_succeeded", "stage_failed", "stage_cancelled"):
                self._copy_spool()  # what a stage said comes before its end
            self._copy_event(event)
            self.cursor["events"] += 1
            self._save()
        self._copy_spool()
        return before != json.dumps(self.cursor)

    @property
    def complete(self) -> bool:
        """Whether the run has ended and all of it has been sent."""
        return fold(self.events, RunState()).done and self.cursor["events"] == len(self.events)

    def close(self) -> None:
        """The copy is complete: remove what a hanging server made twice, and say so in the cursor."""
        self.found = None
        self._existing()
        self.cursor["closed"] = self.cursor["events"]
        self._save()

    def interrupt(self) -> None:
        """The driver is gone without a last word: nothing stays RUNNING."""
        if "parent" not in self.cursor:
            return
        lease = current(self.directory)
        end = milliseconds(lease.renewed if lease is not None else self.events[-1].time)
        for stage, run_id in self.cursor["children"].items():
            if stage not in self.cursor["ended"]:
                self._attempt(f"the end of {stage}", self._end, run_id, "KILLED", end)
        self._attempt("the end of the run", self._end, self.cursor["parent"], "KILLED", end)
        self.close()

    def _end(self, run_id: str, status: str, end: int) -> None:
        self.client.set_terminated(run_id, status, end_time=end)

    def _save(self) -> None:
        replace_file(self.directory / CURSOR_FILE, json.dumps(self.cursor, indent=1).encode())

    def _attempt(self, what: str, request: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Send one thing; if the server will never take it, note that and go on."""
        try:
            request(*arguments, **options)
        except Exception as error:
            if not is_permanent(error):
                raise
            line = f"{what}: {' '.join(str(error).split())[:300]}"
            _log.warning("MLflow refuses %s", line)
            refused = self.cursor["refused"]
            if line not in refused and len(refused) < _REFUSALS:
                refused.append(line)

    # -- runs ------------------------------------------------------------------------------------------------------

    def _existing(self) -> dict[str | None, str]:
        """The MLflow runs of this run; of two for one stage, which a hanging server may have made, one is deleted.

        A run of another store may have the same id; it began at another time.
        """
        if self.found is not None:
            return self.found
        began = milliseconds(self.events[0].time)
        all_runs = list(self._search(self.directory.name))
        parents = {self.cursor.get("parent")} | {
            run.info.run_id
            for run in all_runs
            if "polytrope.stage" not in run.data.tags and run.info.start_time == began
        }
        runs: dict[str | None, list[str]] = {}
        for run in all_runs:
            if run.data.tags.get("mlflow.parentRunId", run.info.run_id) in parents:
                runs.setdefault(run.data.tags.get("polytrope.stage"), []).append(run.info.run_id)
        self.found = {}
        for stage, identifiers in runs.items():
            known = self.cursor.get("parent") if stage is None else self.cursor["children"].get(stage)
            kept = known if known in identifiers else min(identifiers)
            self.found[stage] = kept
            for identifier in identifiers:
                if identifier != kept:
                    self.client.delete_run(identifier)
        return self.found

    def _search(self, run_id: str) -> Iterator[Run]:
        token = None
        while True:
            page = self.client.search_runs(
                [self.cursor["experiment"]], f"tags.`polytrope.run_id` = '{run_id}'", max_results=1000, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _create(self, name: str, moment: float, tags: Mapping[str, str]) -> str:
        run = self.client.create_run(
            self.cursor["experiment"],
            start_time=milliseconds(moment),
            run_name=name,
            tags={key: value[:TAG_LENGTH] for key, value in tags.items()},
        )
        self.latest[run.info.run_id] = {}
        return str(run.info.run_id)

    def _ensure_parent(self) -> None:
        if self.found is not None:
            return
        record = self._record()
        workflow, run_id = record["workflow"], self.directory.name
        if "experiment" not in self.cursor:
            self.cursor["experiment"] = self._experiment(self.experiment_name or str(workflow["name"]))
        existing = self._existing()
        if "parent" in self.cursor:
            return
        self.cursor["parent"] = existing.get(None) or self._create(
            run_id,
            self.events[0].time,
            {
                "polytrope.kind": "workflow",
                "polytrope.run_id": run_id,
                "polytrope.workflow": str(workflow["name"]),
                "polytrope.store": str(self.store.root),
                "mlflow.source.name": mlflow_summary.source_name(record),
                "mlflow.source.type": "JOB",
                "mlflow.user": os.environ.get("USER", "") or "polytrope",
                "mlflow.note.content": str(workflow.get("description") or ""),
            },
        )
        self._save()

    def _record(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "workflow.json").read_bytes()))

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            local = self.uri.startswith("sqlite")
            location = (self.store.root / "mlflow-artifacts").absolute().as_uri() if local else None
            try:
                return str(self.client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS))
            except MlflowException:  # somebody else was faster
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise UserError(
                f"the experiment `{name}` is deleted in MLflow",
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, "
                "or name another one: `tracking.experiment`",
            )
        return str(experiment.experiment_id)

    def _child(self, stage: str, moment: float, tags: Mapping[str, Any]) -> str:
        """The MLflow run of a stage; the same one for every attempt at it."""
        children = self.cursor["children"]
        if stage not in children:
            children[stage] = self._existing().get(stage) or self._create(
                stage,
                moment,
                {
                    "mlflow.parentRunId": self.cursor["parent"],
                    "polytrope.kind": "stage",
                    "polytrope.run_id": self.directory.name,
                    "polytrope.stage": stage,
                },
            )
            self._save()
        child: str = children[stage]
        texts = {key: str(value)[:TAG_LENGTH] for key, value in tags.items() if value not in (None, "")}
        if texts:
            entities = [RunTag(key, text) for key, text in texts.items()]
            self._attempt(f"tags of {stage}", self.client.log_batch, child, tags=entities)
        return child

    # -- journal events ----------------------------------------------------------------------------------------------

    def _copy_event(self, event: Event) -> None:
        stage = event.stage
        if event.type == "attempt_started":
            self._start(event)
        elif event.type == "run_finished":
            self._finish(event)
        elif stage is not None and event.type == "stage_started":
            child = self._child(
                stage, event.time, {"polytrope.key": event.get("key"), "polytrope.attempt": event.get("attempt", 1)}
            )
            self._attempt(f"the start of {stage}", self.client.update_run, child, status="RUNNING")
            if stage in self.cursor["ended"]:
                self.cursor["ended"].remove(stage)
            self._params(child, (event.get("components") or {}).get("parameters", {}))
        elif stage is not None and event.type in ("stage_succeeded", "stage_cached"):
            self._copy_result(stage, event)
        elif stage is not None and event.type in ("stage_failed", "stage_cancelled"):
            if event.type == "stage_failed" or stage in self.cursor["children"]:
                error = (event.get("error") or {}).get("message") or event.get("reason")
                child = self._child(stage, event.time, {"polytrope.error": error})
                self.cursor["failed"].append(stage)
                self._terminate(stage, child, _STATUS[event.type.removeprefix("stage_")], event.time)
        elif stage is not None and event.type == "stage_skipped":
            child = self._child(stage, event.time, {"polytrope.skipped": event.get("reason")})
            self._terminate(stage, child, "FINISHED", event.time)

    def _start(self, event: Event) -> None:
        """A new attempt at the run: (again) running, with what decides it."""
        parent = self.cursor["parent"]
        record = self._record()
        environment = record.get("environment") or {}
        git = environment.get("git") or {}
        packages = environment.get("packages") or {}
        texts = {
            "workflow.json": json.dumps(record["workflow"], indent=2),
            "environment.json": json.dumps({**environment, "git": {**git, "diff": "see git.diff"}}, indent=2),
            "requirements.txt": "".join(f"{name}=={version}\n" for name, version in packages.items()),
            "git.diff": git.get("diff") or "",
        }
        graph = self.directory / GRAPH_FILE
        if graph.exists():
            texts[GRAPH_FILE] = graph.read_text(encoding="utf-8")
        tags = {"polytrope.attempt": str(event.get("attempt", 1))}
        if git:
            tags |= {"mlflow.source.git.commit": git["commit"], "git.dirty": str(git["dirty"]).lower()}
        self._attempt("the start of the run", self.client.update_run, parent, status="RUNNING")
        entities = [RunTag(key, value[:TAG_LENGTH]) for key, value in tags.items()]
        self._attempt("tags of the run", self.client.log_batch, parent, tags=entities)
        self._params(parent, record["workflow"].get("params", {}))
        for name, text in texts.items():
            if text:
                self._attempt(name, self.client.log_text, parent, text, name)

    def _copy_result(self, stage: str, event: Event) -> None:
        cached = event.type == "stage_cached"
        source = str(event.get("hit_from"))
        artifact = self.store.load(event.get("key"))
        origin = stage if artifact is None else artifact.stage  # a stage can have another name there
        tags = {
            "polytrope.key": event.get("key"),
            "polytrope.digest": event.get("digest"),
            "polytrope.cache_hit": str(cached).lower(),
            "polytrope.duration": f"{event.get('duration') or 0:.3f}",
        }
        if cached:
            tags |= {"polytrope.source_run": source, "mlflow.note.content": self._origin(origin, source)}
        child = self._child(stage, event.time, tags)
        if stage in self.cursor["failed"]:
            self.cursor["failed"] = [name for name in self.cursor["failed"] if name != stage]
            self._attempt(f"tags of {stage}", self.client.delete_tag, child, "polytrope.error")
        if artifact is not None:
            self._params(child, artifact.components.get("parameters", {}))
        if cached:
            self._repeat(stage, child, origin, source)
        self._summary(child, event.get("summary") or {}, event.time)
        for item in self.cursor["pending"].pop(stage, []):
            if artifact is not None:
                self._attempt(
                    f"{item['kind']} {item.get('path') or item.get('name')} of {stage}",
                    self._show,
                    stage,
                    child,
                    item,
                    artifact.path,
                    cached,
                )
        self._terminate(stage, child, "FINISHED", event.time)

    def _origin(self, stage: str, source: str) -> str:
        """Markdown that leads to the run that computed a cached stage."""
        text = f"Taken from the store: computed by run `{source}`."
        there = read_cursor(self.store.runs / source, self.uri)
        if stage not in there.get("children", {}):
            return text
        return f"{text} See [{stage}]({mlflow_summary.address(there['experiment'], there['children'][stage])}) there."

    def _repeat(self, stage: str, child: str, origin: str, source: str) -> None:
        """What a cached stage said when another run computed it: its curves can be seen and compared here, too."""
        self.cursor["pending"].pop(stage, None)
        metrics: list[Metric] = []
        for said in SpoolReader(self.store.runs / source / "spool", stage=origin).read_new():
            if said.event["kind"] == "metrics":
                metrics += self._new_points(child, said)
            elif said.event["kind"] == "params":
                self._params(child, said.event["values"])
            else:
                self._keep_for_later(said._replace(stage=stage))
        self._send(child, metrics)

    def _show(self, stage: str, child: str, item: Mapping[str, Any], files: Path, cached: bool) -> None:
        if item["kind"] == "artifact":
            path = files / item["path"]
            target = self.cursor["parent"] if item.get("parent") else child
            if not path.exists():
                raise FileNotFoundError(f"the stage wrote no {item['path']}")
            if cached and not item.get("parent"):
                return  # a cached stage's own artifacts are with the run that computed it
            relative = Path(parent_folder(stage) if item.get("parent") else "") / item["path"]
            place = relative if path.is_dir() else relative.parent
            log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            log(target, str(path), None if str(place) == "." else str(place))
        elif item["kind"] == "dataset":
            self._dataset(child, item)
        elif item["kind"] == "model" and not cached:
            self._register(child, item, files / item["path"], stage)

    def _finish(self, event: Event) -> None:
        parent = self.cursor["parent"]
        for stage, child in self.cursor["children"].items():
            if stage not in self.cursor["ended"]:
                self._terminate(stage, child, "KILLED", event.time)
        graph = self.directory / GRAPH_FILE
        if graph.exists() and any(earlier.type == "stages_returned" for earlier in self.events):
            self._attempt(GRAPH_FILE, self.client.log_text, parent, graph.read_text(encoding="utf-8"), GRAPH_FILE)
        state = fold(self.events, RunState())
        for name, stage in state.stages.items():
            self._summary(parent, {f"{name}/{key}": value for key, value in stage.summary.items()}, event.time)
        for name, comparison in mlflow_summary.comparisons(state).items():
            self._attempt(f"comparison of {name}", self._compare, parent, name, comparison)
        status = str(event.get("status", "failed"))
        note = mlflow_summary.describe(
            state, self._record(), status, self.cursor["experiment"], parent, self.cursor["children"], TAG_LENGTH
        )
        self._attempt("the description", self.client.set_tag, parent, "mlflow.note.content", note)
        self._attempt(
            "the end of the run",
            self._end,
            parent,
            _STATUS.get(status, "FAILED"),
            milliseconds(event.time),
        )

    def _compare(self, parent: str, name: str, comparison: mlflow_summary.Comparison) -> None:
        self.client.log_text(parent, comparison.csv(), f"comparison/{name}.csv")
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / f"{name}.png"
            path.write_bytes(mlflow_summary.draw(comparison))
            self.client.log_artifact(parent, str(path), "comparison")

    def _terminate(self, stage: str, child: str, status: str, moment: float) -> None:
        self._attempt(f"the end of {stage}", self._end, child, status, milliseconds(moment))
        if stage not in self.cursor["ended"]:
            self.cursor["ended"].append(stage)

    # -- what stages said --------------------------------------------------------------------------------------------

    def _copy_spool(self) -> None:
        offsets = dict(self.cursor["spool"])
        waiting: dict[str, list[Metric]] = {}
        for said in SpoolReader(self.directory / "spool", offsets).read_new():
            child = self.cursor["children"].get(said.stage) or self._child(said.stage, said.event["time"], {})
            if said.event["kind"] == "metrics":
                metrics = waiting.setdefault(child, [])
                metrics += self._new_points(child, said)
                if len(metrics) >= METRICS_PER_REQUEST:
                    self._send(child, waiting.pop(child))
            elif said.event["kind"] == "params":
                self._params(child, said.event["values"])
            else:
                self._keep_for_later(said)
        for child, metrics in waiting.items():
            self._send(child, metrics)
        if offsets != self.cursor["spool"]:
            self.cursor["spool"] = offsets
            self._save()

    def _keep_for_later(self, said: SpoolEvent) -> None:
        """Files can be shown when the stage has committed them; an earlier attempt's wishes are void."""
        if said.event["kind"] not in ("artifact", "dataset", "model"):
            return
        item = {**said.event, "attempt": said.attempt}
        kept = [old for old in self.cursor["pending"].get(said.stage, []) if old["attempt"] == said.attempt]
        if item not in kept:
            self.cursor["pending"][said.stage] = [*kept, item]

    def _send(self, run_id: str, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            batch = metrics[start : start + METRICS_PER_REQUEST]
            self._attempt(
                f"{len(batch)} points of {batch[0].key} and others",
                self.client.log_batch,
                run_id,
                metrics=batch,
            )

    def _new_points(self, child: str, said: SpoolEvent) -> Iterator[Metric]:
        """The points of one event that MLflow does not have: a resumed training says some steps again."""
        moment, step = milliseconds(said.event["time"]), said.event.get("step")
        curves = self._curves(child)
        for name, value in said.event["values"].items():
            name, value = mlflow_name(name), number(value)
            latest = curves.get(name)
            point = Latest(step_number(step), moment, value)
            if latest is not None:
                old = point.step <= latest.step if step is not None else (moment < latest.time or point == latest)
                if old:
                    continue
            curves[name] = point
            yield Metric(name, value, moment, point.step)

    def _curves(self, run_id: str) -> dict[str, Latest]:
        """The newest point of every curve; the server is asked once for a run that somebody else began."""
        if run_id not in self.latest:
            self._attempt("a question for its curves", self._ask, run_id)
        return self.latest.setdefault(run_id, {})

    def _ask(self, run_id: str) -> None:
        metrics = self.client.get_run(run_id).data._metric_objs
        self.latest[run_id] = {item.key: Latest(item.step, item.timestamp, item.value) for item in metrics}

    def _summary(self, run_id: str, values: Mapping[str, float], moment: float) -> None:
        """Figures of a stage as a whole: sent if they differ from the newest ones, and never as a point of a curve."""
        if not values:
            return
        curves, metrics = self._curves(run_id), []
        for key, figure in values.items():
            name, value = mlflow_name(key), number(figure)
            latest = curves.get(name)
            if latest is None or (latest.step == 0 and latest.value != value and value == value):
                curves[name] = Latest(0, milliseconds(moment), value)
                metrics.append(Metric(name, value, milliseconds(moment), 0))
        self._send(run_id, metrics)

    def _params(self, run_id: str, values: Mapping[str, Any]) -> None:
        if values:
            self._attempt(f"parameter {next(iter(values))} and others", self._send_params, run_id, values)

    def _send_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Parameters are immutable in MLflow: what it has already is left as it is."""
        flat = {mlflow_name(key): text[:PARAMETER_LENGTH] for key, text in flatten(values).items()}
        have = self.client.get_run(run_id).data.params
        new = [Param(key, text) for key, text in flat.items() if key not in have]
        for start in range(0, len(new), PARAMETERS_PER_REQUEST):
            self.client.log_batch(run_id, params=new[start : start + PARAMETERS_PER_REQUEST])

    def _dataset(self, child: str, item: Mapping[str, Any]) -> None:
        dataset = Dataset(
            name=item["name"][:500],
            digest=item["digest"][:36],
            source_type="polytrope",
            source=json.dumps({"uri": item["source"]}),
            profile=json.dumps(item["profile"])[:60_000],
        )
        self.client.log_inputs(child, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _register(self, child: str, item: Mapping[str, Any], directory: Path, stage: str) -> None:
        """Upload the model directory and register it as a new version with the alias, once per MLflow run."""
        from polytrope.pipeline.tracking.served_model import write_model

        name, alias = item["name"], item["alias"]
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self._versions(name, child)
        if not versions:
            with tempfile.TemporaryDirectory() as temporary:
                write_model(Path(temporary) / "model", directory)
                self.client.log_artifacts(child, str(Path(temporary) / "model"), "model")
            source = f"{self.client.get_run(child).info.artifact_uri}/model"
            self.client.create_model_version(
                name,
                source,
                run_id=child,
                tags={"polytrope.run_id": self.directory.name, "polytrope.stage": stage},
                description=f"stage `{stage}` of run `{self.directory.name}`",
            )
            versions = self._versions(name, child)
        for double in versions[1:]:  # of a hanging server
            self.client.delete_model_version(name, double)
        self.client.set_registered_model_alias(name, alias, versions[0])

    def _versions(self, name: str, child: str) -> list[str]:
        found = self.client.search_model_versions(f"run_id = '{child}'")  # a name may hold quotes
        return sorted((str(version.version) for version in found if version.name == name), key=int)


def server_name(uri: str) -> str:
    """Tells servers apart without keeping their passwords."""
    parsed = urlparse(uri)
    return hashlib.sha256(f"{parsed.scheme}://{parsed.netloc.rpartition('@')[2]}{parsed.path}".encode()).hexdigest()[
        :16
    ]


def read_cursor(run_directory: Path, uri: str) -> dict[str, Any]:
    """What has been sent of a run to this server; {} if nothing."""
    try:
        cursor = dict(json.loads((run_directory / CURSOR_FILE).read_bytes()))
    except FileNotFoundError:
        return {}
    return cursor if cursor.get("server") == server_name(uri) else {}
