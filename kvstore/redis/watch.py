"""The watch on a Redis server: which blocks it has dropped, so that routers stop counting on them.

Covers: hearing of removals, confirming them, asking again after a gap. Does not cover: what a removal means
(`RedisBooks` tells it), the connection's messages (`push`).

Three ways to hear, the best that the server allows:

- keyevent channels (`evicted`, `expired`, `del`): exact, for every worker's blocks;
- client-side caching (`CLIENT TRACKING ... BCAST`): a hint, since writes and EXPIRE push the same message;
- asking: a batch of the believed blocks every second, in turn. This runs always, and finds what the others missed.

Whatever was heard, a block is told as removed only after the server has said so: EXISTS, over the same connection. Of a
block that was written or read meanwhile the answer may be the older one: it is asked again. After a reconnect, after a
flush (which has no keyevent but pushes to tracking clients) and after an overflow, all believed blocks are asked for.

After a flush nobody may count on blocks of workers that have died either, and no worker knows which these are. So:

1. Every worker that hears of a flush tells that the whole tier was cleared (`AllBlocksCleared`), at once, whatever it
   believes. Whoever finds the server empty after a gap does, too.
2. Then it asks the server for all that it believes, tells the removal of what is gone, and again the storing of what is
   there: blocks that were written between the flush and the question.
3. Events of two workers reach a router in any order: what one has told in 2 the other's news of 1 may wipe out. So each
   worker does 2 once more TELL_AGAIN_S later. Whoever is later than that with 1 takes credit away that is due, until
   the block is written or read by a worker that did not know it: a miss, nothing worse.

In a cluster each master is watched, and its flush is a flush of the tier: then the watches of all masters do 2 and 3.
Blocks of dead workers on the other masters are not counted on any more, though they are there, until they are read. A
flush that nobody heard of is mended by misses: the tier tells of each block at which a prefix ended (`RedisBooks`).

One thread, one connection, nobody waits for it. What waits to be asked is bounded; the server bounds what waits to be
heard, and closes the connection beyond that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from itertools import islice

import redis
from redis.exceptions import NoPermissionError

from kvstore.blocks import BlockHash
from kvstore.events import RemovalCause
from kvstore.redis.address import mask_url, parse_address
from kvstore.redis.books import RedisBooks
from kvstore.redis.facts import remedy
from kvstore.redis.push import GRANTS, Heard, Hearing, PushConnection

log = logging.getLogger(__name__)

HASH_NBYTES = 32
BATCH = 512  # blocks in one question
MAX_SUSPECTS = 1 << 16
_HEARD_AT_ONCE = 4096  # messages before they are confirmed
_SUSPICIOUS = 16  # believed blocks of one batch, all of them gone: somebody emptied the server
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_LONGEST_WAIT_S = 0.25  # the books may have something to ask
_LONGEST_CLOSE_S = 5.0
_NEVER = float("inf")
TELL_AGAIN_S = 5.0  # after a flush; far longer than news of it needs to the last worker and on to a router


class Watching(StrEnum):
    """Whether a server is watched. `configure`: its notifications may be turned on, for everybody who uses it."""

    OFF = "off"
    LISTEN = "listen"
    CONFIGURE = "configure"


class RedisWatch:
    """Tells the books which blocks are gone. Begins at once, ends at `close`. Thread-safe.

    Attributes:
        hearing: the way in which it hears now; None: not connected.
        advice: what would let it hear better; empty when nothing would.
        problem: what is wrong and what to do; empty when nothing is.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: bytes,
        books: RedisBooks,
        may_configure: bool = False,
        is_ours: Callable[[BlockHash], bool] | None = None,
        patience_s: float = 2.0,
        ask_every_s: float = 1.0,
        listen_again_s: float = 30.0,
        tell_again_s: float = TELL_AGAIN_S,
    ) -> None:
        """Start the thread.

        Args:
            url: see `address.URL_FORMS`, not of a cluster.
            prefix: of every key of ours, before the block's hash in hex.
            books: what to tell.
            may_configure: whether it may turn on the server's notifications for everybody.
            is_ours: which of the believed blocks lie on this server (a node of a cluster); None: all.
            patience_s: longest wait for one answer. ask_every_s: between two batches of believed blocks.
            listen_again_s: between two looks whether the server notifies by now, while it does not.
            tell_again_s: between a flush and the second time that it tells what is there nevertheless.

        Raises:
            TierError: the URL cannot be used.
        """
        self._address = parse_address(url)
        self._where = mask_url(url)
        self._prefix = prefix
        self._books = books
        self._may_configure = may_configure
        self._is_ours = is_ours
        self._patience_s = patience_s
        self._ask_every_s = ask_every_s
        self._listen_again_s = listen_again_s
        self._listen_again_at = float("inf")
        self._suspects: dict[BlockHash, RemovalCause] = {}  # in the order in which they were heard of
        self._unasked: deque[BlockHash] = deque()  # believed ones whose turn will come
        self._ask_all = self._was_flushed = False
        self._tell_again_s = tell_again_s
        self._flushes = books.flushes  # those after which it has told what is there
        self._tell_again_at = _NEVER
        self._asked_at = float("-inf")
        self._has_listened = False  # what the server held before we came, nobody counts on through us
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._connection: PushConnection | None = None
        self.hearing: Hearing | None = None
        self.advice = self.problem = ""
        self._thread = threading.Thread(target=self._run, name="redis-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and its connection. May be called twice."""
        with self._lock:
            self._ended.set()
            if self._connection is not None:
                self._connection.interrupt()
        self._thread.join(_LONGEST_CLOSE_S)

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._ended.is_set():
            try:
                with PushConnection(self._address, self._patience_s) as connection:
                    self._begin(connection)
                    pause_s = _FIRST_PAUSE_S
                    while not self._ended.is_set() and not self._could_hear_better(connection):
                        self._turn(connection)
            except (redis.RedisError, OSError) as error:
                self._lost(error)
            except Exception as error:  # a watch that ends by itself would leave wrong credit for ever
                log.exception("the watch on redis met a defect of ours", extra={"server": self._where})
                self._lost(error)
            self._ended.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _begin(self, connection: PushConnection) -> None:
        with self._lock:
            self._connection = connection
            if self._ended.is_set():
                return
        hearing, advice = connection.listen(self._prefix, may_configure=self._may_configure)
        if advice and advice != self.advice:
            log.warning("redis tells of removals late", extra={"server": self._where, "advice": advice})
        if self.problem:
            log.info("redis is watched again", extra={"server": self._where})
        self.advice, self.problem, self.hearing = advice, "", hearing
        self._listen_again_at = time.monotonic() + self._listen_again_s
        self._ask_all = True  # whatever was said before we listened

    def _could_hear_better(self, connection: PushConnection) -> bool:
        """Asked now and then: somebody may have followed the advice."""
        if self.hearing is Hearing.EVENTS or time.monotonic() < self._listen_again_at:
            return False
        self._listen_again_at = time.monotonic() + self._listen_again_s
        return connection.could_hear_better()

    def _lost(self, error: Exception) -> None:
        with self._lock:
            self._connection = None
        self.hearing = None
        if self._ended.is_set():
            return
        problem = self._remedy(error)
        if problem != self.problem:
            log.warning("redis is not watched", extra={"server": self._where, "problem": problem})
        self.problem = problem

    def _remedy(self, error: Exception) -> str:
        if isinstance(error, NoPermissionError):
            return f"{self._where} forbids a command of the watch; grant it with ACL SETUSER name {GRANTS}"
        return remedy(error, self._where, self._address.masked(str(error)))

    def _turn(self, connection: PushConnection) -> None:
        """Hear what is said, for one interval at most, and confirm it."""
        due_s = self._asked_at + self._ask_every_s - time.monotonic()
        self._doubt(dict.fromkeys(self._books.take_doubtful(), RemovalCause.ABSENT))
        if self._is_to_tell():
            self._ask_all = True
        is_idle = not (self._suspects or self._ask_all)
        wait_s = min(max(0.0, due_s), _LONGEST_WAIT_S) if is_idle else 0.0
        for heard in islice(connection.hear(wait_s), _HEARD_AT_ONCE):
            self._suspect(heard)
        if self._ask_all:
            self._confirm_all(connection)
        elif self._suspects:
            self._confirm_suspects(connection)
        if time.monotonic() - self._asked_at >= self._ask_every_s:
            self._confirm_some(connection)

    def _suspect(self, heard: Heard) -> None:
        if heard.key is None:
            self._ask_all = self._was_flushed = True
            self._books.flushed()
            return
        name = self._name(heard.key)
        if name is not None and (self._books.suspects(name) or not heard.is_hint):
            self._doubt({name: heard.cause})

    def _doubt(self, causes: dict[BlockHash, RemovalCause]) -> None:
        """Ask for these soon; the last cause counts, in its place."""
        for name, cause in causes.items():
            self._suspects.pop(name, None)
            self._suspects[name] = cause
        if len(self._suspects) > MAX_SUSPECTS:
            self._suspects.clear()
            self._ask_all = True

    def _confirm_suspects(self, connection: PushConnection) -> None:
        """The next ones. Of those that no keyevent named, only what is believed there still is worth a question."""
        batch = dict(islice(self._suspects.items(), BATCH))
        believed = self._books.believed(batch)
        asked = {name: cause for name, cause in batch.items() if cause is not RemovalCause.ABSENT or name in believed}
        for name in batch.keys() - asked.keys():
            del self._suspects[name]
        if asked:
            self._confirm(connection, asked)

    def _confirm_some(self, connection: PushConnection) -> None:
        """The next batch of the believed ones. If all of many are gone, so may be the rest."""
        self._asked_at = time.monotonic()
        if not self._unasked:
            self._unasked.extend(self._believed())
        names = [self._unasked.popleft() for _ in range(min(BATCH, len(self._unasked)))]
        believed = self._books.believed(names)
        asked = {name: RemovalCause.ABSENT for name in names if name in believed}
        if not asked:
            connection.ping()  # a dead connection may look like a silent one
        elif self._confirm(connection, asked) == len(asked) >= _SUSPICIOUS:
            self._ask_all = True

    def _confirm_all(self, connection: PushConnection) -> None:
        """Ask for all that is believed. If the connection fails meanwhile, nothing of it counts as done."""
        names, is_to_tell, flushes = self._believed(), self._is_to_tell(), self._books.flushes
        cause = RemovalCause.CLEARED if self._was_flushed else RemovalCause.ABSENT
        self._ask_all, removed = False, 0
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            removed += self._confirm(connection, dict.fromkeys(batch, cause))
            if is_to_tell:
                self._books.tell_again(batch)
        self._unasked.clear()
        self._asked_at = time.monotonic()
        if is_to_tell:
            self._has_told(flushes)
        elif self._has_listened and (self._is_ours is None or removed) and connection.is_empty():
            self._books.flushed()  # of blocks that others wrote and nobody here believed in, too
        self._has_listened = True

    def _is_to_tell(self) -> bool:
        """Whether the books have told of a flush, and not yet what is there nevertheless; or of one a while ago."""
        return self._books.flushes != self._flushes or time.monotonic() >= self._tell_again_at

    def _has_told(self, flushes: int) -> None:
        is_first = flushes != self._flushes
        self._flushes = flushes
        self._tell_again_at = time.monotonic() + self._tell_again_s if is_first else _NEVER
        self._was_flushed = self._books.flushes != flushes  # one that was heard of meanwhile is yet to be answered

    def _believed(self) -> list[BlockHash]:
        """Blocks that are believed on this server."""
        return [name for name in self._books.names() if self._is_ours is None or self._is_ours(name)]

    def _confirm(self, connection: PushConnection, asked: dict[BlockHash, RemovalCause]) -> int:
        """Ask the server for these and tell those that are gone; how many."""
        with self._books.doubting() as seen:
            there = connection.exist([self._prefix + name.hex().encode() for name in asked])
            gone = {name: cause for (name, cause), is_there in zip(asked.items(), there, strict=True) if not is_there}
            again = self._books.gone(gone, seen=seen)
        for name in asked:
            self._suspects.pop(name, None)
        self._doubt({name: asked[name] for name in again})
        for heard in connection.heard_meanwhile():
            self._suspect(heard)
        return len(gone) - len(again)

    def _name(self, key: bytes) -> BlockHash | None:
        if not key.startswith(self._prefix):
            return None
        with suppress(ValueError):
            name = bytes.fromhex(key[len(self._prefix) :].decode())
            return BlockHash(name) if len(name) == HASH_NBYTES else None
        return None


def start_watch(
    watching: Watching,
    url: str,
    *,
    prefix: bytes,
    books: RedisBooks,
    is_ours: Callable[[BlockHash], bool] | None = None,
) -> RedisWatch | None:
    """A watch as asked for; None: none. Arguments as `RedisWatch`.

    Raises:
        TierError: the URL cannot be used.
    """
    if watching is Watching.OFF:
        return None
    may_configure = watching is Watching.CONFIGURE
    return RedisWatch(url, prefix=prefix, books=books, may_configure=may_configure, is_ours=is_ours)
