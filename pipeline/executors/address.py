"""The address of a cluster, looked at before anything starts and without Ray."""

from __future__ import annotations

import socket

from polytrope.pipeline.errors import UserError


def check_address(address: str | None) -> None:
    """Refuse an address where nothing listens, in two seconds at most and without Ray.

    Raises:
        UserError: Ray Client addresses, malformed ones, and those that do not answer.
    """
    if address is None or address in ("auto", "local"):
        return
    if address.startswith(("ray://", "http://", "https://")):
        raise UserError(
            f"ray_address: `{address}` is not the address of a cluster's head (host:port)",
            f"run the driver on the cluster instead: `polytrope submit WORKFLOW --address {address}`",
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"ray_address: `{address}` is not `host:port`", "for example `ray_address: 10.0.0.1:6379`")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.5).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray_address: no Ray cluster answers at {address}: {error}",
            "start one with `ray start --head`, mend the address, or leave it out for a private cluster",
        ) from error
