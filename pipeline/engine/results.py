"""The results of a run's stages: found in the store, or committed there under the lease of their key."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from polytrope.pipeline.engine.attempts import Attempt
from polytrope.pipeline.engine.inputs import input_values
from polytrope.pipeline.executors.worker import Outcome, StoredInput, StoredInputs
from polytrope.pipeline.runs.lease import HolderWatch, Lease, LeaseHeldError
from polytrope.pipeline.store.manifest import FileEntry, StoredArtifact, artifact_digest, file_rows
from polytrope.pipeline.store.store import Commit, Store
from polytrope.pipeline.workflow.graph import StageNode


class Results:
    """`artifacts`: node name → its result, of the nodes that have one. `lease`: of the run; without it no commit."""

    def __init__(self, store: Store, run_id: str, lease: Lease) -> None:
        self.store = store
        self.artifacts: dict[str, StoredArtifact] = {}
        self._run_id = run_id
        self._lease = lease
        self._done: list[Attempt] = []  # their scratch and lease go when the next stages have been started

    def digests(self, node: StageNode) -> dict[str, str | dict[str, str] | None]:
        """Digest of every input of a node whose dependencies have ended."""
        return input_values(node, {name: artifact.digest for name, artifact in self._read_by(node).items()})

    def inputs(self, node: StageNode) -> StoredInputs:
        """The same, for the process of the stage."""
        found = self._read_by(node).items()
        return input_values(node, {name: StoredInput(stored.key, stored.digest, name) for name, stored in found})

    def _read_by(self, node: StageNode) -> dict[str, StoredArtifact]:
        return {name: self.artifacts[name] for name in node.input_nodes if name in self.artifacts}

    def key_lease(self, key: str, watch: bool | HolderWatch) -> Lease:
        """Take the lease of a key; this run's lease vouches for it.

        Raises:
            LeaseHeldError: another run computes the key.
        """
        return Lease.acquire(
            self.store.key_lease_directory(key),
            f"run {self._run_id}",
            heartbeat=False,
            watch=watch,
            via=(self.store.lease_root, f"runs/{self._run_id}", self._lease.record.token),
        )

    def clean_up(self, key: str) -> None:
        """Remove what a driver left that died between its commit and its cleaning up."""
        if not (self.store.has_scratch(key) or self.store.has_key_lease(key)):
            return
        with contextlib.suppress(LeaseHeldError):  # somebody computes it again on purpose
            lease = self.key_lease(key, watch=False)
            self.store.remove_scratch(key)
            self.store.discard_staging(key)
            lease.release(remove=True)

    def intact_or_away(self, key: str, *, full: bool) -> tuple[StoredArtifact | None, list[str], str | None]:
        """The result of `key`, what was wrong with one that was set aside, and where that is now.

        Only for the holder of the key's lease.
        """
        if not self.store.exists(key):
            return None, [], None
        problems = self.store.verify(key, full=full)
        artifact = None if problems else self.store.load(key)
        return artifact, problems, None if artifact is not None else self.store.quarantine(key, problems)

    def make_way(self, key: str, entries: Sequence[FileEntry], problems: list[str]) -> str | None:
        """Set a stored result aside that a forced stage replaces; None: the new one is the same, or there was none."""
        stored = self.store.find(key)
        if not self.store.exists(key) or (stored is not None and stored.digest == artifact_digest(file_rows(entries))):
            return None
        return self.store.quarantine(key, problems)

    def fence(self, attempt: Attempt) -> Callable[[], None]:
        """What raises if this driver may not commit the attempt any more."""

        def check() -> None:
            self._lease.check()
            attempt.lease.check()

        return check

    def commit(self, attempt: Attempt, outcome: Outcome) -> StoredArtifact:
        """Put what a stage wrote in place.

        Raises:
            OutputChangedError: it is not what was hashed when the stage ended.
        """
        assert attempt.staging is not None
        commit = Commit(
            attempt.key,
            attempt.staging,
            attempt.components,
            outcome.summary,
            attempt.node.name,
            self._run_id,
            outcome.duration,
            outcome.entries,
        )
        artifact = self.store.commit(commit, self.fence(attempt))
        self._done.append(attempt)
        return artifact

    def clean_up_committed(self) -> None:
        """Remove the scratch directories and leases of what was committed; the journal says so already."""
        done, self._done = self._done, []
        for attempt in done:
            self.store.remove_scratch(attempt.key)
            attempt.lease.release(remove=True)

    def release(self) -> None:
        """Let go of the leases of what was committed, whatever else has gone wrong."""
        for attempt in self._done:
            with contextlib.suppress(OSError):
                attempt.lease.release(remove=True)
