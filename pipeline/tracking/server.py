"""Requests to MLflow, and what their failures mean.

A server that is away, slow or broken: everything stops and is tried again from the cursor. A request that this server
will never take (a deleted run, a missing right, a value its database cannot hold): it is noted and the rest goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import requests
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from polytrope.pipeline.errors import UserError
from polytrope.pipeline.tracking.cursor import Cursor

# Of MLflow's codes, those that no second try changes. Not BAD_REQUEST: a lost database connection is reported so.
_PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "PERMISSION_DENIED"}
_PROBE = "polytrope.probe"
_log = logging.getLogger("polytrope.mlflow")


def is_permanent(error: Exception) -> bool:
    """Whether the server will answer the same request in the same way for ever."""
    if isinstance(error, MlflowException):
        return error.error_code in _PERMANENT
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        return 400 <= status < 500 and status not in (401, 403, 408, 425, 429)
    if isinstance(error, requests.RequestException):
        return False
    return isinstance(
        error, ValueError | TypeError | LookupError | AttributeError | ImportError | FileNotFoundError | UserError
    )


def one_line(error: Exception) -> str:
    """What an error says, for `refused`."""
    return " ".join(str(error).split())[:300]


class Server:
    """One MLflow server. What it refuses goes into the cursor.

    Args:
        uri: MLflow's tracking URI.
        cursor: of the run that is copied.
    """

    def __init__(self, uri: str, cursor: Cursor) -> None:
        self.client = MlflowClient(tracking_uri=uri)
        self.cursor = cursor

    def attempt(self, what: str, request: Callable[..., Any], *arguments: Any, **options: Any) -> bool:
        """Send one thing; if the server will never take it, note that and go on. Whether it was taken."""
        try:
            request(*arguments, **options)
        except Exception as error:
            if not is_permanent(error) and not self._fails_alone(request, arguments, options):
                raise
            self.refuse(what, error)
            return False
        return True

    def send(self, run_id: str, kind: str, batch: Sequence[Metric] | Sequence[Param]) -> None:
        """Send metrics or parameters of a run in one request; where the server does not take it, its halves, down to
        the one at fault.

        Args:
            kind: `metrics` or `params`, as `log_batch` calls them.
        """
        try:
            self.client.log_batch(run_id, **{kind: batch})
        except Exception as error:
            if not is_permanent(error) and not self._fails_alone(self.client.log_batch, (run_id,), {kind: batch}):
                raise
            if len(batch) == 1 or not self._takes_anything(run_id):
                others = "" if len(batch) == 1 else f" and {len(batch) - 1} others"
                self.refuse(f"{_shown(batch[0])}{others}", error)
                return
            half = len(batch) // 2
            self.send(run_id, kind, batch[:half])
            self.send(run_id, kind, batch[half:])

    def _takes_anything(self, run_id: str) -> bool:
        """Whether the run is there and can be written."""
        try:
            self._write(run_id)
        except Exception as error:
            if not is_permanent(error):
                raise
            return False
        return True

    def refuse(self, what: str, error: Exception) -> None:
        """Note that the server will not take something."""
        line = f"{what}: {one_line(error)}"
        _log.warning("MLflow refuses %s", line)
        self.cursor.refuse(line)

    def _fails_alone(self, request: Callable[..., Any], arguments: Sequence[Any], options: dict[str, Any]) -> bool:
        """Whether a request fails while the server writes something else: then it is the request that is wrong.

        A database may answer with an inner error to a value that it cannot hold, as it does when it is away. So it must
        write something harmless before and after a second try that fails again.
        """
        if self.cursor.parent is None:
            return False
        try:
            self._write(self.cursor.parent)
            try:
                request(*arguments, **options)
            except Exception:
                self._write(self.cursor.parent)
                return True
        except Exception:
            return False  # it is the server
        return False  # the second try succeeded: to be sure, all is asked again from the cursor

    def _write(self, run_id: str) -> None:
        self.client.log_batch(run_id, tags=[RunTag(_PROBE, "")])


def _shown(item: Metric | Param) -> str:
    if isinstance(item, Param):
        return f"parameter {item.key}"
    return f"metric {item.key} = {item.value} at step {item.step}"
