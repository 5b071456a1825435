"""A store in a bucket (`s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`), through `obstore`.

Endpoint, credentials and region come from the usual variables of each provider: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …
(and the profiles of ~/.aws), GOOGLE_APPLICATION_CREDENTIALS, …, AZURE_STORAGE_ACCOUNT_NAME, ….
AWS_MAX_ATTEMPTS says for every provider how often a request is tried.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.store.aws_profile import profile_settings
from polytrope.pipeline.store.backend import ObjectInfo
from polytrope.pipeline.support.faults import fault_point
from polytrope.pipeline.support.files import unique_name

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")
_ADDRESS = re.compile(r"(s3|gs|az)://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/(.*))?", re.DOTALL)
_ATTEMPTS = 6  # of one request
_PARALLEL = 16
_BLOCK = 1 << 20
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "specified bucket does not exist")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Bucket:
    """A backend, see `polytrope.pipeline.store.backend`; and files sent there from this machine, and fetched.

    Names are relative to the prefix of the address.
    """

    def __init__(self, address: str) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            scheme = address.partition("://")[0]
            raise UserError(
                f"store: `{address}` is not `{scheme}://bucket/prefix`", f"for example {scheme}://my-bucket/polytrope"
            )
        self._address = address.rstrip("/")
        self.scheme, self.name = match.group(1), match.group(2)
        self.prefix = (match.group(3) or "").strip("/")
        if "//" in self.prefix:
            raise UserError(f"store: `{address}` holds an empty name between two `/`")

    @property
    def address(self) -> str:
        return self._address

    @cached_property
    def _made(self) -> ObjectStore:
        try:
            from obstore.store import AzureStore, GCSStore, S3Store
        except ImportError:
            raise UserError(
                f"a store at {self.scheme}:// needs obstore", "install it: `pip install 'polytrope[s3]'`"
            ) from None
        with _explained(self.address):
            retries, prefix = _retries(), self.prefix or None
            if self.scheme == "gs":
                return GCSStore(self.name, prefix=prefix, client_options=_client(""), retry_config=retries)
            if self.scheme == "az":
                client = _client(os.environ.get("AZURE_ENDPOINT", ""))
                return AzureStore(self.name, prefix=prefix, client_options=client, retry_config=retries)
            settings, provider = profile_settings()
            endpoint = settings.get("endpoint", "")
            return S3Store(
                self.name,
                prefix=prefix,
                config={"region": "us-east-1", **settings},  # type: ignore[arg-type]
                client_options=_client(endpoint),
                retry_config=retries,
                credential_provider=provider,
            )

    @property
    def _store(self) -> ObjectStore:
        if _first_process() != os.getpid():
            raise OSError(errno.EIO, "a process was forked from one that used an object store", self.address)
        return self._made

    def prepare(self) -> None:
        """Nothing: a bucket is made by its owner."""

    def put(self, name: str, data: bytes, *, absent: bool = False) -> bool:
        import obstore

        fault_point("before put")
        with _explained(f"{self.address}/{name}"):
            if not absent:
                obstore.put(self._store, name, data, use_multipart=False)
                fault_point("after put")
                return True
        for attempt in range(_attempts(), 0, -1):
            try:
                with _explained(f"{self.address}/{name}"):
                    obstore.put(self._store, name, data, mode="create", use_multipart=False)
            except FileExistsError:
                return self.get(name) == data  # True: it was this very call, whose first answer was lost
            except OSError:  # not repeated by the client: it cannot know whether the request was carried out
                written = self.get(name)
                if written is None and attempt > 1:
                    continue
                if written != data:
                    raise
            break
        fault_point("after put")
        return True

    def get(self, name: str) -> bytes | None:
        import obstore

        try:
            with _explained(f"{self.address}/{name}"):
                return bytes(obstore.get(self._store, name).bytes())
        except FileNotFoundError:
            return None

    def children(self, name: str) -> builtins.list[str]:
        import obstore

        with _explained(f"{self.address}/{name}"):
            found = obstore.list_with_delimiter(self._store, name or None)
        paths = [str(item["path"]) for item in found["objects"]] + [str(path) for path in found["common_prefixes"]]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def list(self, name: str) -> dict[str, ObjectInfo]:
        import obstore

        with _explained(f"{self.address}/{name}"):
            items = [item for chunk in obstore.list(self._store, name or None, chunk_size=1000) for item in chunk]
        found = {
            item["path"]: ObjectInfo(item["size"], item["e_tag"] or "", item["last_modified"].timestamp())
            for item in items
        }
        return dict(sorted(found.items()))

    def publish(self, directory: Path, name: str, head: str, data: bytes) -> bool:  # noqa: ARG002
        """Its files were sent; they count when `head` is there."""
        return self.put(f"{name}/{head}", data, absent=True)

    def withdraw(self, name: str, target: str, head: str) -> bool:
        """Only `head` goes: what it speaks of stays for those who are reading it, until it is collected."""
        data = self.get(f"{name}/{head}")
        if data is None:
            return False
        self.put(f"{target}/{head}", data)
        self.delete([f"{name}/{head}"])
        return True

    def remove(self, name: str) -> None:
        """What stands directly below `name` first: without its manifest an artifact is never seen half deleted."""
        names = [*self.list(name), name]
        depth = name.count("/") + 1
        self.delete([item for item in names if item.count("/") <= depth])
        self.delete([item for item in names if item.count("/") > depth])

    def delete(self, names: Iterable[str]) -> None:
        """Remove single objects; several at a time."""
        import obstore

        def one(name: str) -> None:
            with contextlib.suppress(FileNotFoundError), _explained(f"{self.address}/{name}"):
                obstore.delete(self._store, name)

        _each(one, builtins.list(names))

    def place(self, name: str) -> ObjectPlace:
        return ObjectPlace(self, name)

    def send(self, files: Iterable[tuple[Path, str]]) -> dict[str, str]:
        """Upload (local file, name) of each, several at a time; returns the tag of every name.

        Raises:
            FileNotFoundError: a local file is gone.
        """
        import obstore

        def one(pair: tuple[Path, str]) -> tuple[str, str]:
            path, name = pair
            fault_point("before upload")
            with path.open("rb") as file, _explained(f"{self.address}/{name}"):
                return name, obstore.put(self._store, name, file)["e_tag"] or ""

        return dict(_each(one, builtins.list(files)))

    def fetch(self, files: Iterable[tuple[str, Path]]) -> None:
        """Download (name, local file) of each, several at a time; a file appears whole or not at all.

        Raises:
            FileNotFoundError: there is no such name.
        """
        import obstore

        def one(pair: tuple[str, Path]) -> None:
            name, path = pair
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{unique_name()}")
            try:
                with temporary.open("wb") as file, _explained(f"{self.address}/{name}"):
                    for block in obstore.get(self._store, name).stream(_BLOCK):
                        file.write(block)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

        _each(one, builtins.list(files))


class ObjectPlace:
    """The place of a lease in a bucket: the objects directly below a name."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self.bucket, self.name = bucket, name

    def __truediv__(self, name: str) -> ObjectPlace:
        return ObjectPlace(self.bucket, f"{self.name}/{name}" if self.name else name)

    def __str__(self) -> str:
        return f"{self.bucket.address}/{self.name}"

    def names(self) -> list[str]:
        return self.bucket.children(self.name)

    def read(self, name: str) -> bytes | None:
        return self.bucket.get(f"{self.name}/{name}")

    def create(self, name: str, data: bytes) -> bool:
        return self.bucket.put(f"{self.name}/{name}", data, absent=True)

    def replace(self, name: str, data: bytes) -> None:
        self.bucket.put(f"{self.name}/{name}", data)

    def remove(self, name: str) -> None:
        self.bucket.delete([f"{self.name}/{name}"])

    def drop(self) -> None:
        """Nothing: a name without objects does not exist."""


@cache
def _first_process() -> int:
    """The process that first used a bucket; `obstore` hangs in those that were forked from it."""
    return os.getpid()


def _attempts() -> int:
    given = os.environ.get("AWS_MAX_ATTEMPTS", str(_ATTEMPTS))
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"AWS_MAX_ATTEMPTS={given!r}: expected a number of at least 1", "mend or unset it")
    return int(given)


def _retries() -> Any:
    seconds = timedelta(seconds=1)
    backoff = {"init_backoff": 0.3 * seconds, "max_backoff": 20 * seconds, "base": 2}
    return {"max_retries": _attempts() - 1, "retry_timeout": 180 * seconds, "backoff": backoff}


def _client(endpoint: str) -> Any:
    """Options of the HTTP client. A file of any size may take its time, as long as something arrives."""
    return {
        "connect_timeout": "5s",
        "read_timeout": "20s",
        "timeout": "1h",
        "allow_http": endpoint.startswith("http://"),
    }


def _each(action: Callable[[_Item], _Result], items: list[_Item]) -> list[_Result]:
    if len(items) < 2:
        return [action(item) for item in items]
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return list(pool.map(action, items))


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    """An error of the client or the server as an `OSError` that a person understands.

    Raises:
        FileNotFoundError: there is no such object. FileExistsError: there is one, and there was to be none.
    """
    from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except AlreadyExistsError as error:
        raise FileExistsError(errno.EEXIST, "there is such an object already", place) from error
    except FileNotFoundError as error:
        if any(sign in str(error) for sign in _NO_BUCKET):
            raise OSError(errno.EIO, _reason(error), place) from error
        raise FileNotFoundError(errno.ENOENT, "there is no such object", place) from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise OSError(errno.EIO, f"access is refused: {_reason(error)}", place) from error
    except BaseError as error:
        raise OSError(errno.EIO, _reason(error), place) from error


def _reason(error: Exception) -> str:
    text = str(error).partition("\n\nDebug source")[0]
    code = re.search(r"<Code>(.*?)</Code>", text, re.DOTALL)
    message = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    if code is not None:
        return f"the server says {code.group(1)}: {message.group(1) if message else ''}".rstrip(": ")
    if "169.254.169.254" in text or "metadata.google.internal" in text or "credential" in text.lower():
        return f"there are no credentials for it (AWS_ACCESS_KEY_ID, AWS_PROFILE, …): {text.rpartition(' - ')[2]}"
    return " ".join(text.split())
