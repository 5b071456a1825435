"""A real S3 API server process (moto's) that tests may stop and kill, and a bucket on it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import boto3
import pytest

from polytrope.pipeline.runs.journal import Event, decode_lines
from polytrope.pipeline.tracking.process import free_port


class S3Server:
    """An S3 server with a bucket of its own for every test."""

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        program = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{self.port}'])"
        self.process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.endpoint}/moto-api/", timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


_DOOR = """
import asyncio, sys

async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def serve(reader, writer):
    try:
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    except OSError:
        writer.close()
        return
    await asyncio.gather(copy(reader, other_writer), copy(other_reader, writer))

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
"""


class Door:
    """The only way to an S3 server, a process that can be killed in its place: moto's server forgets all when it dies,
    a real one keeps what it acknowledged. To a client both deaths look the same: connections break, nobody answers.
    """

    def __init__(self, server: S3Server) -> None:
        self.server, self.port = server, free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.open()

    def open(self) -> None:
        command = [sys.executable, "-c", _DOOR, str(self.port), str(self.server.port)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Objects:
    """What is in a bucket below a prefix, seen with AWS's own client: another one than that under test, and one that a
    process may use before it forks.
    """

    def __init__(self, address: str) -> None:
        self.bucket, _, prefix = address.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self.client = boto3.client("s3")

    def tags(self, prefix: str = "") -> dict[str, str]:
        """Name → a tag that changes with the content, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
        items = [item for page in pages for item in page.get("Contents", [])]
        return {item["Key"].removeprefix(self.prefix): item["ETag"] for item in items}

    def list(self, prefix: str = "") -> list[str]:
        return list(self.tags(prefix))

    def get(self, name: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].read())

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)


def journal_events(address: str, run: str) -> list[Event]:
    """All events of a run in a bucket."""
    objects = Objects(address)
    data = b"".join(objects.get(name) for name in sorted(objects.list(f"runs/{run}/journal/")))
    return [event for event in decode_lines(data.splitlines()) if event is not None]


def bucket_on(server: S3Server | Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "3",
        "POLYTROPE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{time.time_ns()}"
    Objects(f"s3://{name}").client.create_bucket(Bucket=name)
    return f"s3://{name}/polytrope"
