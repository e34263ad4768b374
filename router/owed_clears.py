"""Clears that workers owe: each is asked of every worker that has not confirmed it, whenever that is heard of.

Covers: asking each link once, who confirmed, which holds of peers wait for whom. Does not cover: the rounds of a clear
(`fleet`), which clears are remembered (`kvstore.past_clears`). Owned by the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from kvstore.past_clears import PastClear
from router.link import WorkerLink
from warmkv.v1 import worker_pb2

_Key = tuple[int, str]


class OwedClears:
    """`on_confirmed` is told of each clear that a worker has carried out late."""

    def __init__(self, on_confirmed: Callable[[PastClear, str], None]) -> None:
        self._on_confirmed = on_confirmed
        self._asked: set[tuple[_Key, str]] = set()
        self._holds: dict[int, _Key] = {}

    def ask(self, link: WorkerLink, clears: Iterable[PastClear]) -> None:
        """Ask the worker for what it has not confirmed; for each clear once, as its link repeats it by itself."""
        for clear in clears:
            if link.name in clear.confirmed or (clear.key, link.name) in self._asked:
                continue
            self._asked.add((clear.key, link.name))
            request = worker_pb2.Clear(chain_root=clear.root, prefix_hash=clear.prefix)
            link.owe_clear(request).add_done_callback(partial(self._answered, clear, link.name))

    def leave(self, clear: PastClear, workers: Iterable[str]) -> None:
        """Somebody else asks these workers for it, until `take`."""
        self._asked.update((clear.key, worker) for worker in workers)

    def take(self, clear: PastClear, workers: Iterable[str]) -> None:
        """Nobody asks them any more."""
        self._asked.difference_update((clear.key, worker) for worker in workers)

    def forget(self, worker: str) -> None:
        """Its link is gone, and with it what that had been asked; a new link is asked again."""
        self._asked = {asked for asked in self._asked if asked[1] != worker}

    def hold(self, number: int, clear: PastClear) -> None:
        """Workers read nothing from peers until the clear is settled."""
        self._holds[number] = clear.key

    def settled_holds(self, clears: Iterable[PastClear], workers: Iterable[str]) -> list[int]:
        """Take out the holds whose clears all of these `workers` have confirmed, or that a younger clear covers."""
        names = set(workers)
        open_clears = {clear.key for clear in clears if not names <= clear.confirmed}
        settled = [number for number, key in self._holds.items() if key not in open_clears]
        for number in settled:
            del self._holds[number]
        return settled

    def _answered(self, clear: PastClear, worker: str, done: asyncio.Future[worker_pb2.ClearDone]) -> None:
        if done.cancelled():
            return
        if done.result().error:
            self.take(clear, [worker])  # asked again when it is heard of, or with the next change
        else:
            self._on_confirmed(clear, worker)
