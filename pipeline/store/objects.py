"""Objects below `s3://bucket/prefix` on any S3-compatible server: reading, listing, and writing on condition.

Endpoint, credentials and region come from the usual variables and files of AWS clients (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_PROFILE, …). Failures are `OSError`s: callers treat a server that is away like a broken disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.support.faults import fault_point
from polytrope.pipeline.support.files import unique_name

_ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]+)(?:/(.*))?")
_GONE = ("404", "NoSuchKey", "NotFound")
_REFUSED = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")
_PARALLEL = 16


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of one object: bytes, a tag that changes with its content, and when it was written."""

    size: int
    tag: str
    modified: float = 0.0  # seconds since the epoch, by the server's clock


class Bucket:
    """Names are relative to the prefix. One per process: its client must not cross a fork."""

    def __init__(self, address: str) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise UserError(f"store: `{address}` is not `s3://bucket/prefix`", "for example s3://my-bucket/polytrope")
        self.address = address.rstrip("/")
        self.name, prefix = match.group(1), (match.group(2) or "").strip("/")
        self.prefix = f"{prefix}/" if prefix else ""

    @cached_property
    def client(self) -> Any:
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise UserError("a store on S3 needs boto3", "install it: `pip install 'polytrope[s3]'`") from None
        retries = {"mode": "standard", "max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", "6"))}
        config = Config(retries=retries, connect_timeout=5, read_timeout=20, max_pool_connections=2 * _PARALLEL)
        with _explained(self.address):
            return boto3.client("s3", config=config, region_name=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))

    def get(self, name: str) -> bytes | None:
        """The content of an object, None if there is none."""
        with _explained(f"{self.address}/{name}"):
            try:
                return bytes(self.client.get_object(Bucket=self.name, Key=self.prefix + name)["Body"].read())
            except self.client.exceptions.ClientError as error:
                if _code(error) in _GONE and _code(error) != "NoSuchBucket":
                    return None
                raise

    def put(self, name: str, data: bytes, *, absent: bool = False) -> bool:
        """Write an object. `absent`: only if there is none; False then if there is one."""
        fault_point("before put")
        with _explained(f"{self.address}/{name}"):
            condition = {"IfNoneMatch": "*"} if absent else {}
            try:
                self.client.put_object(Bucket=self.name, Key=self.prefix + name, Body=data, **condition)
            except self.client.exceptions.ClientError as error:
                if not (absent and _code(error) in _REFUSED):
                    raise
                return self.get(name) == data  # True: it was this very call, whose first answer was lost
        fault_point("after put")
        return True

    def list(self, prefix: str) -> dict[str, ObjectInfo]:
        """Every object whose name starts with `prefix`, sorted by name."""
        found: dict[str, ObjectInfo] = {}
        with _explained(f"{self.address}/{prefix}"):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix + prefix)
            for page in pages:
                for item in page.get("Contents", []):
                    found[item["Key"][len(self.prefix) :]] = ObjectInfo(
                        item["Size"], item["ETag"].strip('"'), item["LastModified"].timestamp()
                    )
        return dict(sorted(found.items()))

    def delete(self, names: Iterable[str]) -> None:
        with _explained(self.address):
            for name in names:
                self.client.delete_object(Bucket=self.name, Key=self.prefix + name)

    def upload(self, files: Iterable[tuple[Path, str]]) -> None:
        """(local file, name) of each; several at a time."""

        def one(pair: tuple[Path, str]) -> None:
            fault_point("before upload")
            with _explained(f"{self.address}/{pair[1]}"):
                self.client.upload_file(str(pair[0]), self.name, self.prefix + pair[1])

        _each(one, list(files))

    def download(self, files: Iterable[tuple[str, Path]]) -> None:
        """(name, local file) of each; a file appears whole or not at all."""

        def one(pair: tuple[str, Path]) -> None:
            name, path = pair
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{unique_name()}")
            with _explained(f"{self.address}/{name}"):
                self.client.download_file(self.name, self.prefix + name, str(temporary))
            os.replace(temporary, path)

        _each(one, list(files))


class ObjectDirectory:
    """The objects directly below a name, as far as leases need a directory."""

    def __init__(self, bucket: Bucket, name: str = "") -> None:
        self.bucket, self.name = bucket, name

    def __truediv__(self, name: str) -> ObjectDirectory:
        return ObjectDirectory(self.bucket, f"{self.name}/{name}" if self.name else name)

    def __str__(self) -> str:
        return f"{self.bucket.address}/{self.name}"

    def names(self) -> list[str]:
        """Names that start with `lease-`."""
        return [name.rpartition("/")[2] for name in self.bucket.list(f"{self.name}/lease-")]

    def read(self, name: str) -> bytes | None:
        return self.bucket.get(f"{self.name}/{name}")

    def create(self, name: str, data: bytes) -> bool:
        return self.bucket.put(f"{self.name}/{name}", data, absent=True)

    def replace(self, name: str, data: bytes) -> None:
        self.bucket.put(f"{self.name}/{name}", data)

    def remove(self, name: str) -> None:
        self.bucket.delete([f"{self.name}/{name}"])


def _each(action: Any, items: list[Any]) -> None:
    if len(items) < 2:
        for item in items:
            action(item)
        return
    with ThreadPoolExecutor(_PARALLEL) as pool:
        for _ in pool.map(action, items):
            pass


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """An error of the client or the server as an `OSError` that a person understands."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError as error:
        raise OSError(
            errno.EACCES, "there are no credentials for S3 (AWS_ACCESS_KEY_ID, AWS_PROFILE, …)", place
        ) from error
    except ClientError as error:
        message = error.response.get("Error", {}).get("Message", "")
        raise OSError(errno.EIO, f"the S3 server says {_code(error)}: {message}", place) from error
    except (BotoCoreError, Boto3Error) as error:
        raise OSError(errno.EIO, str(error), place) from error
