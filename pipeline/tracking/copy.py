"""The copy of one run in MLflow: what journal and spool say, sent in order, each point once.

How far the copy is stands in the run's `mlflow.json`. Whoever goes on from there asks the server for the last step of
every curve; MLflow itself ignores a point that it has already, so that what a server took without saying so (it hung,
or died after the commit) is neither lost nor doubled. Runs that were made twice in that way are found and removed.

Files that the artifact store does not take are postponed: everything else arrives, and later passes try them again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Run, RunTag
from mlflow.exceptions import MlflowException

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.runs.journal import Event, JournalReader, RunState, fold
from polytrope.pipeline.runs.lease import current
from polytrope.pipeline.runs.spool import SpoolEvent, SpoolReader
from polytrope.pipeline.store.store import Store
from polytrope.pipeline.tracking import overview as mlflow_summary
from polytrope.pipeline.tracking.cursor import Postponed, Shown, read_cursor
from polytrope.pipeline.tracking.curves import Curves
from polytrope.pipeline.tracking.names import (
    METRICS_PER_REQUEST,
    TAG_LENGTH,
    loss_curves,
    milliseconds,
    printable,
    workflow_run_name,
)
from polytrope.pipeline.tracking.server import Server, is_permanent, one_line
from polytrope.pipeline.tracking.shown import show

GRAPH_FILE = "graph.svg"
_STATUS = {"succeeded": "FINISHED", "cached": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the pages for training, not for prompts


class Copy:
    """One run's copy. `advance` sends what is new; if it raises, make a new `Copy` and go on.

    Args:
        store: that holds the run.
        run_directory: of the run.
        uri: MLflow's tracking URI.
        experiment: its name; by default the workflow's.
    """

    def __init__(self, store: Store, run_directory: Path, uri: str, experiment: str = "") -> None:
        self.directory = run_directory
        self.store = store
        self.uri = uri
        self.experiment_name = experiment
        self.cursor = read_cursor(run_directory, uri)
        self.server = Server(uri, self.cursor)
        self.client = self.server.client
        self.curves = Curves(self.server)
        self.journal = JournalReader(run_directory)
        self.events: list[Event] = []
        self.state = RunState()  # after `events`
        self.first = True
        self.found: dict[str | None, str] | None = None  # stage (None: the parent) → MLflow run, as the server has it

    # -- the pass --------------------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Send everything that journal and spool hold beyond the cursor; whether there was anything."""
        new = self.journal.read_new()
        self.events += new
        fold(new, self.state)
        if not self.events:
            return False
        before = self.cursor.model_copy(deep=True)
        self._ensure_parent()
        for event in self.events[self.cursor.events :]:
            if event.type in ("stage_succeeded", "stage_failed", "stage_cancelled", "stage_skipped"):
                self._copy_spool()  # what a stage said comes before its end
            self._copy_event(event)
            self.cursor.events += 1
            self._save()
        self._copy_spool()
        if self.first or self.complete:
            self._show_postponed()
        self.first = False
        return before != self.cursor

    @property
    def complete(self) -> bool:
        """Whether the run has ended and all of it has been sent."""
        return self.state.done and self.cursor.events == len(self.events)

    def close(self) -> None:
        """The copy is complete: remove what a hanging server made twice, and say so in the cursor."""
        self.found = None
        self._existing()
        self.cursor.closed = self.cursor.events
        self._save()

    def interrupt(self) -> None:
        """The driver is gone without a last word: nothing stays RUNNING."""
        if self.cursor.parent is None:
            return
        lease = current(self.directory)
        end = milliseconds(lease.renewed if lease is not None else self.events[-1].time)
        for stage, run_id in self.cursor.children.items():
            if stage not in self.cursor.ended:
                self._attempt(f"the end of {stage}", self._end, run_id, "KILLED", end)
        self._attempt("the end of the run", self._end, self.cursor.parent, "KILLED", end)
        self.close()

    def _end(self, run_id: str, status: str, end: int) -> None:
        self.client.set_terminated(run_id, status, end_time=end)

    def _save(self) -> None:
        self.cursor.save(self.directory)

    def _attempt(self, what: str, request: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Send one thing; if the server will never take it, note that and go on."""
        self.server.attempt(what, request, *arguments, **options)

    # -- runs ------------------------------------------------------------------------------------------------------

    def _existing(self) -> dict[str | None, str]:
        """The MLflow runs of this run; of two for one stage, which a hanging server may have made, one is deleted.

        A run of another store may have the same id; it began at another time.
        """
        if self.found is not None:
            return self.found
        began = milliseconds(self.events[0].time)
        all_runs = list(self._search(f"tags.`polytrope.run_id` = '{self.directory.name}'"))
        parents = {self.cursor.parent} | {
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
            known = self.cursor.parent if stage is None else self.cursor.children.get(stage)
            kept = known if known in identifiers else min(identifiers)
            self.found[stage] = kept
            for identifier in identifiers:
                if identifier != kept:
                    self.client.delete_run(identifier)
        return self.found

    def _search(self, condition: str) -> Iterator[Run]:
        token = None
        while True:
            page = self.client.search_runs([self.cursor.experiment], condition, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _create(self, name: str, moment: float, tags: Mapping[str, str]) -> str:
        run = self.client.create_run(
            self.cursor.experiment,
            start_time=milliseconds(moment),
            run_name=name,
            tags={key: printable(value)[:TAG_LENGTH] for key, value in tags.items()},
        )
        self.curves.begin(run.info.run_id)
        return str(run.info.run_id)

    def _ensure_parent(self) -> None:
        if self.found is not None:
            return
        record = self._record()
        workflow, run_id = record["workflow"], self.directory.name
        if self.cursor.experiment is None:
            self.cursor.experiment = self._experiment(self.experiment_name or str(workflow["name"]))
        existing = self._existing()
        if self.cursor.parent is not None:
            return
        self.cursor.parent = existing.get(None) or self._create(
            self._name(str(workflow["name"]), run_id),
            self.events[0].time,
            {
                "polytrope.kind": "workflow",
                "polytrope.run_id": run_id,
                "polytrope.workflow": str(workflow["name"]),
                "polytrope.store": self.store.address,
                "mlflow.source.name": mlflow_summary.source_name(record),
                "mlflow.source.type": "JOB",
                "mlflow.user": os.environ.get("USER", "") or "polytrope",
                "mlflow.note.content": str(workflow.get("description") or ""),
            },
        )
        self._save()

    def _name(self, workflow: str, run_id: str) -> str:
        """Of the workflow's run: counted among those of the experiment."""
        runs = self._search("tags.`polytrope.kind` = 'workflow'")
        return printable(workflow_run_name(workflow, (run.info.run_name or "" for run in runs), run_id))

    def _record(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "workflow.json").read_bytes()))

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            local = self.uri.startswith("sqlite")
            location = self.store.local("mlflow-artifacts").as_uri() if local else None
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
        children = self.cursor.children
        if stage not in children:
            children[stage] = self._existing().get(stage) or self._create(
                stage,
                moment,
                {
                    "mlflow.parentRunId": self.cursor.parent or "",
                    "polytrope.kind": "stage",
                    "polytrope.run_id": self.directory.name,
                    "polytrope.stage": stage,
                },
            )
            self._save()
        child: str = children[stage]
        texts = {key: printable(str(value))[:TAG_LENGTH] for key, value in tags.items() if value not in (None, "")}
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
            if stage in self.cursor.ended:
                self.cursor.ended.remove(stage)
            self.curves.parameters(child, (event.get("components") or {}).get("parameters", {}))
        elif stage is not None and event.type in ("stage_succeeded", "stage_cached"):
            self._copy_result(stage, event)
        elif stage is not None and event.type in ("stage_failed", "stage_cancelled"):
            if event.type == "stage_failed" or stage in self.cursor.children:
                error = (event.get("error") or {}).get("message") or event.get("reason")
                child = self._child(stage, event.time, {"polytrope.error": error})
                self.cursor.failed.append(stage)
                self._terminate(stage, child, _STATUS[event.type.removeprefix("stage_")], event.time)
        elif stage is not None and event.type == "stage_skipped":
            child = self._child(stage, event.time, {"polytrope.skipped": event.get("reason")})
            self._terminate(stage, child, "FAILED" if event.get("error") else "FINISHED", event.time)

    def _start(self, event: Event) -> None:
        """A new attempt at the run: (again) running, with what decides it."""
        parent = self.cursor.parent
        assert parent is not None  # `_ensure_parent` came before
        record = self._record()
        environment = record.get("environment") or {}
        git = environment.get("git") or {}
        tags = {"polytrope.attempt": str(event.get("attempt", 1))}
        if git:
            tags |= {"mlflow.source.git.commit": git["commit"], "git.dirty": str(git["dirty"]).lower()}
        self._attempt("the start of the run", self.client.update_run, parent, status="RUNNING")
        entities = [RunTag(key, value[:TAG_LENGTH]) for key, value in tags.items()]
        self._attempt("tags of the run", self.client.log_batch, parent, tags=entities)
        self.curves.parameters(parent, record["workflow"].get("params", {}))
        for name, text in self._texts().items():
            if text:
                self._send_file(Postponed(what=name, name=name))

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
            self.store.pull_run(source)
            tags |= {"polytrope.source_run": source, "mlflow.note.content": self._origin(origin, source)}
        child = self._child(stage, event.time, tags)
        if stage in self.cursor.failed:
            self.cursor.failed = [name for name in self.cursor.failed if name != stage]
            self._attempt(f"tags of {stage}", self.client.delete_tag, child, "polytrope.error")
        if artifact is not None:
            self.curves.parameters(child, artifact.components.get("parameters", {}))
        if cached:
            self._repeat(stage, child, origin, source)
        self.curves.summary(child, event.get("summary") or {}, event.time)
        for shown in self.cursor.pending.pop(stage, []):
            what, key = f"{shown.name} of {stage}", str(event.get("key"))
            self._send_file(Postponed(what=what, stage=stage, key=key, cached=cached, shown=shown))
        self._terminate(stage, child, "FINISHED", event.time)

    def _origin(self, stage: str, source: str) -> str:
        """Markdown that leads to the run that computed a cached stage."""
        text = f"Taken from the store: computed by run `{source}`."
        there = read_cursor(self.store.run_directory(source), self.uri)
        if there.experiment is None or stage not in there.children:
            return text
        return f"{text} See [{stage}]({mlflow_summary.address(there.experiment, there.children[stage])}) there."

    def _repeat(self, stage: str, child: str, origin: str, source: str) -> None:
        """What a cached stage said when another run computed it: its curves can be seen and compared here, too."""
        self.cursor.pending.pop(stage, None)
        metrics: list[Metric] = []
        losses: list[Metric] = []
        for said in SpoolReader(self.store.run_directory(source) / "spool", stage=origin).read_new():
            if said.event["kind"] == "metrics":
                metrics += self.curves.new_points(child, said)
                losses += self._losses(said._replace(stage=stage))
            elif said.event["kind"] == "params":
                self.curves.parameters(child, said.event["values"])
            else:
                self._keep_for_later(said._replace(stage=stage))
        self.curves.send(child, metrics)
        self.curves.send(self.cursor.parent or "", losses)

    def _losses(self, said: SpoolEvent) -> list[Metric]:
        """The same on the workflow's own run, whose first charts they are."""
        values = loss_curves(said.stage, said.event["values"])
        if said.event.get("step") is None or not values or self.cursor.parent is None:
            return []
        return list(self.curves.new_points(self.cursor.parent, said._replace(event={**said.event, "values": values})))

    def _send_file(self, item: Postponed) -> None:
        """Send a file; if only that fails (an artifact store that this machine cannot write), it waits."""
        try:
            if item.name is None:
                self._show(item)
            elif item.name.startswith("comparison/"):
                self._compare(item.name.removeprefix("comparison/"))
            else:
                self.client.log_text(self.cursor.parent, self._texts()[item.name], item.name)
        except Exception as error:
            if is_permanent(error):
                self.server.refuse(item.what, error)
            else:
                self.client.search_experiments(max_results=1)  # raises if it is the server itself that is away
                self.cursor.postponed = [*self.cursor.postponed, item.model_copy(update={"reason": one_line(error)})]

    def _show(self, item: Postponed) -> None:
        assert item.shown is not None
        if item.shown.kind != "dataset" and not self.store.exists(item.key):
            raise FileNotFoundError(f"its artifact {item.key[:12]} is no longer in the store")
        files = Path() if item.shown.kind == "dataset" else self.store.materialize(item.key)
        show(
            self.client,
            item.shown,
            stage=item.stage,
            child=self.cursor.children[item.stage],
            parent=self.cursor.parent or "",
            run_id=self.directory.name,
            files=files,
            cached=item.cached,
        )

    def _texts(self) -> dict[str, str]:
        """Files about the run as a whole, by name."""
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
        return texts

    def _show_postponed(self) -> None:
        """Try again what could not be shown."""
        waiting = self.cursor.postponed
        self.cursor.postponed = []
        for number, item in enumerate(waiting):
            try:
                self._send_file(item)
            except Exception:
                self.cursor.postponed = [*self.cursor.postponed, *waiting[number:]]
                self._save()
                raise
        if waiting:
            self._save()

    def _finish(self, event: Event) -> None:
        parent, experiment = self.cursor.parent, self.cursor.experiment
        assert parent is not None  # `_ensure_parent` came before
        assert experiment is not None
        for stage, child in self.cursor.children.items():
            if stage not in self.cursor.ended:
                self._terminate(stage, child, "KILLED", event.time)
        graph = self.directory / GRAPH_FILE
        if graph.exists() and any(earlier.type == "stages_returned" for earlier in self.events):
            self._send_file(Postponed(what=GRAPH_FILE, name=GRAPH_FILE))
        state = self.state
        for name, ended in state.stages.items():
            self.curves.summary(parent, {f"{name}/{key}": value for key, value in ended.summary.items()}, event.time)
        for name in mlflow_summary.comparisons(state):
            self._send_file(Postponed(what=f"comparison of {name}", name=f"comparison/{name}"))
        status = str(event.get("status", "failed"))
        note = mlflow_summary.describe(
            state, self._record(), status, experiment, parent, self.cursor.children, TAG_LENGTH
        )
        self._attempt("the description", self.client.set_tag, parent, "mlflow.note.content", note)
        self._attempt(
            "the end of the run",
            self._end,
            parent,
            _STATUS.get(status, "FAILED"),
            milliseconds(event.time),
        )

    def _compare(self, name: str) -> None:
        comparison = mlflow_summary.comparisons(self.state)[name]
        self.client.log_text(self.cursor.parent, comparison.csv(), f"comparison/{name}.csv")
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / f"{name}.png"
            path.write_bytes(mlflow_summary.draw(comparison))
            self.client.log_artifact(self.cursor.parent, str(path), "comparison")

    def _terminate(self, stage: str, child: str, status: str, moment: float) -> None:
        self._attempt(f"the end of {stage}", self._end, child, status, milliseconds(moment))
        if stage not in self.cursor.ended:
            self.cursor.ended.append(stage)

    # -- what stages said --------------------------------------------------------------------------------------------

    def _copy_spool(self) -> None:
        offsets = dict(self.cursor.spool)
        waiting: dict[str, list[Metric]] = {}
        for said in SpoolReader(self.directory / "spool", offsets).read_new():
            child = self.cursor.children.get(said.stage) or self._child(said.stage, said.event["time"], {})
            if said.event["kind"] == "metrics":
                waiting.setdefault(child, []).extend(self.curves.new_points(child, said))
                waiting.setdefault(self.cursor.parent or "", []).extend(self._losses(said))
                for run_id in [run_id for run_id, metrics in waiting.items() if len(metrics) >= METRICS_PER_REQUEST]:
                    self.curves.send(run_id, waiting.pop(run_id))
            elif said.event["kind"] == "params":
                self.curves.parameters(child, said.event["values"])
            else:
                self._keep_for_later(said)
        for child, metrics in waiting.items():
            self.curves.send(child, metrics)
        if offsets != self.cursor.spool:
            self.cursor.spool = offsets
            self._save()

    def _keep_for_later(self, said: SpoolEvent) -> None:
        """Files can be shown when the stage has committed them; an earlier attempt's wishes are void."""
        if said.event["kind"] not in ("artifact", "dataset", "model"):
            return
        shown = Shown(attempt=said.attempt, event=said.event)
        kept = [old for old in self.cursor.pending.get(said.stage, []) if old.attempt == said.attempt]
        if shown not in kept:
            self.cursor.pending[said.stage] = [*kept, shown]
