"""How the workers of a training find each other and form the process group, in local processes and under Ray Train."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any


def take_place_under_ray() -> None:
    """Set the environment variables that torch and DeepSpeed read a worker's place from."""
    import ray.train

    place = ray.train.get_context()
    os.environ.update(
        RANK=str(place.get_world_rank()),
        LOCAL_RANK=str(place.get_local_rank()),
        WORLD_SIZE=str(place.get_world_size()),
        LOCAL_WORLD_SIZE=str(place.get_local_world_size()),
        NODE_RANK=str(place.get_node_rank()),
    )


def join(rendezvous: str | None, rank: int, workers: int, backend: str, timeout: timedelta) -> None:
    """Form the process group of all workers; `timeout` holds for its collectives and those of every later group.

    Args:
        rendezvous: a `file://` address on this machine; None under Ray Train, which tells all where rank 0 listens.
        backend: `gloo` or `nccl`.
    """
    import torch.distributed as dist

    _limit_collectives(timeout)
    if rendezvous is not None:
        dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=workers, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=_ray_store(rank, workers, timeout), rank=rank, world_size=workers, timeout=timeout
        )


def _limit_collectives(timeout: timedelta) -> None:
    """DeepSpeed makes groups of its own, and torch gives those its default of 30 minutes."""
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if hasattr(distributed_c10d, name):
            setattr(distributed_c10d, name, timeout)


def _ray_store(rank: int, workers: int, timeout: timedelta) -> Any:
    """Rank 0 opens a port of its node's address; Ray Train carries it to the others."""
    import ray.util
    from ray.train.collective import broadcast_from_rank_zero
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address = ray.util.get_node_ip_address()
    _use_interface_of(address)
    if rank == 0:
        store = TCPStore(address, 0, workers, is_master=True, timeout=timeout, wait_for_workers=False)
        broadcast_from_rank_zero((address, store.port))
        return store
    host, port = broadcast_from_rank_zero(None)
    return TCPStore(host, port, workers, is_master=False, timeout=timeout)


def _use_interface_of(address: str) -> None:
    """Let gloo talk over the network that Ray uses; what the host name resolves to may be another, or nothing."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return
