"""What may start next: the walk through a graph, in the order of the file, that a run makes and a plan foretells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heappop, heappush

from polytrope.pipeline.executors.base import Usage
from polytrope.pipeline.runs.journal import DONE_STATES
from polytrope.pipeline.workflow.graph import StageNode

LOOK_AHEAD = 64  # queued nodes that are tried when the first ones do not fit


class Schedule:
    """Each node waits for its dependencies, is ready when they are done, may be queued for resources, and ends.

    `graph`: the nodes, each after its dependencies; it may grow. `ended`: node → state in which it ended.
    """

    def __init__(self, graph: Mapping[str, StageNode]) -> None:
        self.graph: Mapping[str, StageNode] = {}
        self.ended: dict[str, str] = {}
        self._names: list[str] = []
        self._position: dict[str, int] = {}
        self._missing: dict[str, int] = {}  # how many dependencies are not done
        self._followers: dict[str, list[str]] = {}
        self._ready: list[int] = []  # heap of positions
        self._queue: list[int] = []  # heap of positions
        self.grow(graph)

    def grow(self, graph: Mapping[str, StageNode]) -> None:
        """Take a graph that has all nodes so far, and perhaps further ones anywhere between them."""
        ready = [self._names[position] for position in self._ready]
        queued = [self._names[position] for position in self._queue]
        known = self._position
        self.graph, self._names = graph, list(graph)
        self._position = {name: position for position, name in enumerate(graph)}
        self._followers = {name: [] for name in graph}
        for name, node in graph.items():
            self._missing[name] = sum(self.ended.get(source) not in DONE_STATES for source in node.dependencies)
            for source in node.dependencies:
                self._followers[source].append(name)
        ready += [name for name in graph if name not in known and self._missing[name] == 0]
        self._ready = sorted(self._position[name] for name in ready)
        self._queue = sorted(self._position[name] for name in queued)

    def next_ready(self) -> StageNode | None:
        """The first node whose dependencies are done and which was not asked for yet."""
        return self.graph[self._names[heappop(self._ready)]] if self._ready else None

    def queue(self, name: str) -> None:
        """The node must run: `next_fitting` gives it when there is room."""
        heappush(self._queue, self._position[name])

    def next_fitting(self, usage: Usage) -> StageNode | None:
        """The first queued node for which there is room; of very many that do not fit, the first `LOOK_AHEAD`."""
        postponed: list[int] = []
        found = None
        while self._queue and found is None and len(postponed) < LOOK_AHEAD and not usage.is_full:
            position = heappop(self._queue)
            node = self.graph[self._names[position]]
            if usage.fits(node.resources):
                found = node
            else:
                postponed.append(position)
        for position in postponed:
            heappush(self._queue, position)
        return found

    @property
    def is_waiting(self) -> bool:
        """Whether a node is ready or queued."""
        return bool(self._ready or self._queue)

    def end(self, name: str, state: str) -> None:
        """The node has ended; if it is done, its followers may be ready."""
        self.ended[name] = state
        if state not in DONE_STATES:
            return
        for follower in self._followers[name]:
            self._missing[follower] -= 1
            if self._missing[follower] == 0 and follower not in self.ended:
                heappush(self._ready, self._position[follower])

    def position(self, name: str) -> int:
        """The node's place in the order of the file."""
        return self._position[name]

    def behind(self, name: str) -> Iterator[str]:
        """All nodes that depend on this one, directly or through others, in order."""
        found = {name}
        for other in self._names[self._position[name] + 1 :]:
            if found.intersection(self.graph[other].dependencies):
                found.add(other)
                yield other

    def blocked(self) -> Iterator[tuple[str, str]]:
        """(node, dependency) where the node has not ended and the dependency failed or was cancelled.

        Whoever iterates ends each node, so that those behind it follow.
        """
        for name, node in self.graph.items():
            if name not in self.ended:
                lost = [source for source in node.dependencies if self.ended.get(source) in ("failed", "cancelled")]
                if lost:
                    yield name, lost[0]
