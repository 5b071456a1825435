"""Two hosts on one machine: network namespaces with their own addresses, joined by a virtual cable, a Ray node on each.

    python tests/two_hosts.py polytrope run workflows/quickstart.yaml --executor ray --ray-address 10.77.0.1:6379

runs a command on the first of them and takes everything down again. Needs root and Debian's iproute2.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

ADDRESSES = ("10.77.0.1", "10.77.0.2")
HEAD = f"{ADDRESSES[0]}:6379"


def why_not() -> str | None:
    """Why this machine cannot have two hosts; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"polytrope-probe-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except FileNotFoundError:
        return "the Debian package iproute2 is not installed"
    except subprocess.CalledProcessError as error:
        return f"`ip netns add` does not work here: {error.stderr.strip()}"
    return None


class TwoHosts:
    """A Ray head with one CPU on the first host, a node with another one on the second.

    `kill` and `replace` are about the second host's node. The cluster asks for a token, as the documentation
    recommends: whoever joins it needs `environment`.
    """

    address = HEAD

    def __init__(self) -> None:
        self.names = [f"polytrope-{os.getpid()}-{host}" for host in (0, 1)]
        self._directory = tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp")  # Ray's socket paths are short
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def __enter__(self) -> TwoHosts:
        try:
            for name in self.names:
                _ip("netns", "add", name)
            ends = [f"pt{os.getpid()}-{host}" for host in (0, 1)]
            _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for name, end, address in zip(self.names, ends, ADDRESSES, strict=True):
                _ip("link", "set", end, "netns", name)
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
                _ip("-n", name, "link", "set", end, "up")
                _ip("-n", name, "link", "set", "lo", "up")
            self._start(0, "--head", "--port=6379", "--num-cpus=1", "--include-dashboard=false")
            self.replace()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        for host in (1, 0):
            self._kill_all(host)
        for node in self._nodes:
            node.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        self._directory.cleanup()

    def command(self, *arguments: str, host: int = 0) -> list[str]:
        """The command line that runs `arguments` on a host."""
        return ["ip", "netns", "exec", self.names[host], *arguments]

    def kill(self) -> None:
        """Everything on the second host ends at once, as if its power was cut."""
        self._kill_all(1)

    def replace(self) -> None:
        """Start a Ray node on the second host."""
        self._start(1, f"--address={HEAD}", "--num-cpus=1")

    def _start(self, host: int, *options: str) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        place = Path(self._directory.name) / f"host-{host}-{len(self._nodes)}"
        common = ["--block", "--disable-usage-stats", "--object-store-memory=100000000"]
        directory = [f"--temp-dir={place}"] if host == 0 else []
        arguments = [ray, "start", f"--node-ip-address={ADDRESSES[host]}", *common, *directory, *options]
        log = place.with_suffix(".log")
        with log.open("wb") as output:
            node = subprocess.Popen(
                self.command(*arguments, host=host), env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )
        self._nodes.append(node)
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Ray node of host {host} did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.1)

    def _kill_all(self, host: int) -> None:
        """SIGKILL to every process of a namespace: only what this object started is in it."""
        for _ in range(20):
            found = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True)
            pids = found.stdout.split()
            if not pids:
                return
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 2
    reason = why_not()
    if reason:
        print(f"two_hosts: {reason}", file=sys.stderr)
        return 2
    with TwoHosts() as hosts:
        return subprocess.run(hosts.command(*sys.argv[1:]), env=hosts.environment).returncode


if __name__ == "__main__":
    sys.exit(main())
