"""The fan-out of the engine's benchmark in Metaflow. Run in an environment of its own; N: number of tasks."""

import os

from metaflow import FlowSpec, step


class NothingFlow(FlowSpec):
    """start → N × nothing → gather → end"""

    @step
    def start(self):
        self.indices = list(range(int(os.environ["N"])))
        self.next(self.nothing, foreach="indices")

    @step
    def nothing(self):
        self.next(self.gather)

    @step
    def gather(self, inputs):  # noqa: ARG002
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    NothingFlow()
