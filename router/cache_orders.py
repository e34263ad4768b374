"""Sending operators' orders to workers: whom, for how long, and what became of each.

Covers: naming workers, waiting for answers, telling failures worker by worker. Does not cover: what orders mean
(`cache_admin`), the stream (`link`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from router.errors import NoWorkerAvailable, RouterError, WorkerLost
from router.fleet import Fleet
from router.link import WorkerLink
from warmkv.v1 import worker_pb2

ANSWER_TIMEOUT_S = 30.0
HASH_BYTES = 32
MAX_BLOCKS = 1000  # that a worker touches for one order


class Told(Protocol):
    """What is told of one worker in an answer."""

    worker: str
    problem: str


T = TypeVar("T", bound=Told)


async def ask(link: WorkerLink, command: worker_pb2.CacheCommand) -> worker_pb2.CacheDone:
    """The worker's answer, with `error` set where it gave none in time. Fills in the command's id."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await link.order(command)
    except TimeoutError:
        return worker_pb2.CacheDone(error=f"no answer within {ANSWER_TIMEOUT_S:g} s; try again, or look into its log")


def named(fleet: Fleet, workers: Sequence[str]) -> list[WorkerLink]:
    """Links of these workers, or with none named of all that are or should be there; sorted by name, none twice.

    Raises:
        WorkerNotFound: there is none of such a name. NoWorkerAvailable: none is known.
    """
    if workers:
        return [fleet.link(name) for name in sorted(set(workers))]
    links = [link for link in fleet.links() if link.connected or link.was_up]
    if not links:
        raise NoWorkerAvailable("No worker is connected; wait for one, or start one.", retry_after_s=1.0)
    return links


def absence(fleet: Fleet, link: WorkerLink) -> str:
    """Why a worker cannot be asked; empty: it can."""
    if link.connected:
        return ""
    return f"it {fleet.excluded_because(link) or 'is not connected'}; try again when it is back"


async def each(
    fleet: Fleet,
    links: Sequence[WorkerLink],
    make: Callable[[WorkerLink], Awaitable[T]],
    absent: Callable[[str, str], T],
) -> list[T]:
    """What every worker did, in the order of the links; `absent` makes the entry of one that cannot be asked.

    Raises:
        WorkerLost: none of them did what it was asked; says why, worker by worker.
    """

    async def one(link: WorkerLink) -> T:
        why = absence(fleet, link)
        return absent(link.name, why) if why else await make(link)

    told = list(await asyncio.gather(*(one(link) for link in links)))
    if all(entry.problem for entry in told):
        raise nobody({entry.worker: entry.problem for entry in told})
    return told


def nobody(problems: Mapping[str, str]) -> RouterError:
    """The error where no worker did what it was asked. `problems`: by worker."""
    why = "; ".join(f"{worker}: {problem}" for worker, problem in sorted(problems.items()))
    return WorkerLost(f"No worker did it ({why}).", workers=",".join(sorted(problems)))
