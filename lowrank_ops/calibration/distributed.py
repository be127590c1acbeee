"""Posts failures to the other processes of ``torch.distributed``, which would otherwise wait until a timeout."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..files import digest

_POLL_SECONDS = 0.05
_ended: dict[str, int] = {}  # by group: how many all_reduce_ calls have ended, with or without an error
_posted: dict[str, str] = {}  # by key: this process's failure, not taken back yet


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without ``torch.distributed``."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextmanager
def failures_posted() -> Iterator[None]:
    """An exception in the block makes :func:`wait_for_all` raise in the other processes; success withdraws it."""
    try:
        yield
    except BaseException as error:
        post_failure(error)
        raise
    _take_back()


def post_failure(error: BaseException) -> None:
    """Make :func:`wait_for_all` raise in the other processes: in the world and in all groups used so far."""
    rank, world = rank_and_world()
    if world > 1:
        _take_back()  # of an earlier failure
        for group in {_name(torch.distributed.group.WORLD), *_ended}:
            key, message = _key("failed", group), f"on rank {rank}: {type(error).__name__}: {error}"
            _store().set(key, message)
            _posted[key] = message


def wait_for_all(group: torch.distributed.ProcessGroup | None) -> None:
    """Wait until every process of the group has called this, or one of them has failed.

    Raises:
        RuntimeError: a process has failed; in every process that waits.
    """
    if torch.distributed.get_world_size(group) == 1:
        return
    _take_back()
    name, store = _name(group), _store()
    failed, raised, here = (_key(what, name) for what in ("failed", "raised", "here"))
    ranks = range(torch.distributed.get_world_size(group))
    store.set(f"{here}/{torch.distributed.get_rank(group)}", "")
    until = time.monotonic() + torch.distributed.constants.default_pg_timeout.total_seconds()
    arrived = False
    while time.monotonic() < until:  # after that, the collective itself times out
        for key in (failed, raised):
            if store.check([key]):
                message = store.get(key).decode()
                store.set(raised, message)
                _ended[name] = _ended.get(name, 0) + 1
                raise RuntimeError(
                    f"the statistics of all processes cannot be summed, because calibration failed {message}"
                )
        if arrived:
            break
        arrived = store.check([f"{here}/{rank}" for rank in ranks])
        if not arrived:
            time.sleep(_POLL_SECONDS)
    _ended[name] = _ended.get(name, 0) + 1


def _take_back() -> None:
    """Withdraw the failure of this process: it has a result now, or the other processes have raised already."""
    for key, message in list(_posted.items()):
        _, group, count = key.rsplit("/", 2)
        store = _store()
        if store.check([_key("raised", group)]):
            _ended[group] = int(count) + 1
        elif store.check([key]) and store.get(key).decode() == message:
            store.delete_key(key)
        del _posted[key]


def _name(group: torch.distributed.ProcessGroup | None) -> str:
    return digest(torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD))[:16]


def _key(what: str, group: str) -> str:
    return f"lowrank_ops-{what}/{group}/{_ended.get(group, 0)}"


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()
