"""PeerServer: serves the blocks of this worker's host tier to other workers of the fleet.

Covers: who may ask, how many at once, how long a reader may take. Does not cover: the protocol (`wire`), the
reader (`peer`).

One thread waits for callers and one serves each of them; all are bounded (`callers`), and none is the engine's. A
block stays in place only while it is sent, in groups of VIEWS_AT_ONCE, and a group has its time: a reader that stalls
is hung up on, and its slots are free again. The host tier's lock is held for look-ups, never while bytes travel.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.errors import TierError
from kvstore.peer.callers import Callers
from kvstore.peer.promises import PromiseBoard
from kvstore.peer.wire import BUSY, END, Channel, FleetKey, HungUpError, PeerProtocolError, PeerRefusedError
from kvstore.tier import BlockMeta, Clock

log = logging.getLogger(__name__)

VIEWS_AT_ONCE = 4
MAX_AWAIT_S = 1.0  # that an answer about promises is put off
HASH_NBYTES = 32
OWNER = "peer"


class View(Protocol):
    """Bytes that stay in place until the view ends; see `HostTier.view`."""

    @property
    def meta(self) -> BlockMeta:
        """The block."""
        ...

    @property
    def payload(self) -> memoryview:
        """Its bytes."""
        ...


class BlockSource(Protocol):
    """What is asked of the tier that is served. Thread-safe; `HostTier` is one."""

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """As `Tier.match`."""
        ...

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """As `Tier.touch`."""
        ...

    def view(self, hashes: Sequence[BlockHash], *, owner: str) -> Sequence[View]:
        """Views of those that are held, in order. Each must be ended."""
        ...

    def end_view(self, view: Any) -> None:
        """Let a view go that this source has given."""
        ...


class _StalledError(Exception):
    """A reader did not take its blocks in time."""


class _Limits(NamedTuple):
    greeting_s: float
    idle_s: float
    queue_s: float
    send_s: float


class PeerServer:
    """Listens from the start until `close`. Thread-safe.

    Attributes:
        promises: what this worker makes for others, which they may ask to hear of.
    """

    def __init__(
        self,
        source: BlockSource,
        *,
        codec: BlockCodec,
        secret: str,
        host: str = "127.0.0.1",
        port: int = 0,
        max_connections: int = 256,
        max_greetings: int = 32,
        max_sends: int = 4,
        greeting_s: float = 1.0,
        idle_s: float = 60.0,
        queue_s: float = 0.1,
        send_s: float = 5.0,
        wall_clock: Clock = time.time,
    ) -> None:
        """Listen.

        Args:
            source: whose blocks. codec: of the blocks. secret: of the fleet.
            host, port: where to listen; only this machine by default, and a port that is free.
            max_connections: for more, those that have asked nothing for longest are closed.
            max_greetings: callers that have yet to prove themselves; for more, the first ones are closed.
            max_sends: groups of blocks that are sent at the same time.
            greeting_s: a caller has to prove itself in this time. idle_s: between questions.
            queue_s: wait for one of `max_sends`, after which the caller is told to ask elsewhere; and for a place among
                connections that are all being answered.
            send_s: a group of VIEWS_AT_ONCE blocks has to be taken in this time.
            wall_clock: seconds since the epoch, for headers.

        Raises:
            TierError: the secret is empty, or the address cannot be listened on.
        """
        self._source, self._codec = source, codec
        self.promises = PromiseBoard()
        self._key = FleetKey(secret)
        self._limits = _Limits(greeting_s, idle_s, queue_s, send_s)
        self._callers = Callers(max_proven=max_connections, max_unproven=max_greetings, patience_s=queue_s)
        self._sends = threading.BoundedSemaphore(max_sends)
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._refusal = ""
        self._is_open = True
        self._listener = _listen(host, port)
        self._acceptor = threading.Thread(target=self._accept, name="peer-accept", daemon=True)
        self._acceptor.start()

    @property
    def address(self) -> str:
        """`host:port` of the listening socket, as a `PeerTier` takes it.

        When it listens on all addresses (0.0.0.0), name the machine instead, with this port.
        """
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def counts(self) -> dict[str, int]:
        """By kind since the start, those that occurred; and `open`, the connections now.

        connections; turned_away: were too many, and nobody's place could be given to them; refused: no secret, or other
        blocks; how they ended: ended (by the peer), idle, displaced (by others that came while they were silent),
        stalled (a reader that did not take its blocks in time), broken (not the protocol, or a fault of ours); blocks
        and bytes sent; busy: readers that were told to ask elsewhere.
        """
        with self._lock:
            return {**self._counts, "open": len(self._callers)}

    def close(self) -> None:
        """Hang up on everybody and listen no more. Waits until no view is held."""
        self._is_open = False
        self.promises.close()
        serving = self._callers.close()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for channel, thread in serving.items():
            channel.hang_up()
            if thread.ident is not None:
                thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if not self._is_open:
                    return
                self._count("broken")
                time.sleep(0.05)  # no file descriptors left: others give theirs back, and we try again
                continue
            try:
                self._take(sock)
            except OSError:  # it was gone before it was welcomed
                self._count("broken")
                sock.close()

    def _take(self, sock: socket.socket) -> None:
        channel = Channel(sock, time.monotonic() + self._limits.greeting_s)
        thread = threading.Thread(target=self._serve, args=(channel,), name="peer-serve", daemon=True)
        is_welcome = self._callers.add(channel, thread)
        self._count("connections" if is_welcome else "turned_away")
        if not is_welcome:
            channel.close()
            return
        try:
            thread.start()
        except RuntimeError:  # the machine has no thread left: this caller goes without
            self._end(channel, "broken")

    def _serve(self, channel: Channel) -> None:
        how = "broken"
        try:
            how = self._converse(channel)
        except PeerRefusedError as error:
            how = self._refused(str(error))
        except (HungUpError, ConnectionError):
            how = "ended"
        except _StalledError:
            how = "stalled"
        except TimeoutError:
            how = "idle"
        except (PeerProtocolError, OSError):
            how = "broken"
        except Exception:  # a fault of ours must not take the worker's other callers with it
            log.exception("serving a peer failed")
        finally:
            self._end(channel, how)

    def _converse(self, channel: Channel) -> str:
        """Answer it until it is silent for too long, or has no place; how it ended."""
        self._key.admit(channel, self._codec)
        if not self._callers.prove(channel):
            return "turned_away"
        while True:
            channel.until = time.monotonic() + self._limits.idle_s
            self._callers.wait(channel)
            question = channel.receive_frame()
            if not self._callers.wake(channel):
                return "displaced"
            channel.until = time.monotonic() + self._limits.send_s
            self._answer(channel, question)

    def _answer(self, channel: Channel, question: list[object]) -> None:
        match question:
            case ["match", list(hashes)]:
                channel.send_frame(self._source.match(_names(hashes)))
            case ["touch", list(hashes)]:
                self._source.touch(_names(hashes))
                channel.send_frame(0)
            case ["read", list(hashes)]:
                self._send_blocks(channel, _names(hashes))
            case ["await", list(tickets), list(seen), int(patience_ms)]:
                patience_s = min(MAX_AWAIT_S, max(0, patience_ms) / 1e3)
                channel.send_frame(*self.promises.wait(_names(tickets), _seen(seen, len(tickets)), patience_s))
            case _:
                raise PeerProtocolError("a peer asks something that is no question")

    def _send_blocks(self, channel: Channel, names: Sequence[BlockHash]) -> None:
        for start in range(0, len(names), VIEWS_AT_ONCE):
            group = names[start : start + VIEWS_AT_ONCE]
            if not self._sends.acquire(timeout=self._limits.queue_s):
                self._count("busy")
                channel.send([BUSY])
                return
            try:
                is_whole = self._send_group(channel, group)
            finally:
                self._sends.release()
            if not is_whole:
                break
        channel.send([END])

    def _send_group(self, channel: Channel, names: Sequence[BlockHash]) -> bool:
        """Send the leading blocks; whether these were all of them."""
        views = self._source.view(names, owner=OWNER)
        sent: list[BlockHash] = []
        channel.until = time.monotonic() + self._limits.send_s
        try:
            for name, view in zip(names, views, strict=False):
                if view.meta.hash != name:
                    break  # what is not held is not among the views
                channel.send(self._codec.encode(view.meta, view.payload, self._wall_clock()))
                sent.append(name)
        except TimeoutError as error:
            raise _StalledError from error
        finally:
            for view in views:
                self._source.end_view(view)
            self._source.touch(sent)
            with self._lock:
                self._counts.update(blocks=len(sent), bytes=len(sent) * self._codec.value_nbytes)
        return len(sent) == len(names)

    def _refused(self, problem: str) -> str:
        with self._lock:
            is_new, self._refusal = problem != self._refusal, problem
        if is_new:  # whoever knocks again and again must not fill the log
            log.warning("a peer was refused", extra={"problem": problem})
        return "refused"

    def _end(self, channel: Channel, how: str) -> None:
        self._count("displaced" if self._callers.is_displaced(channel) else how)
        self._callers.remove(channel)
        channel.close()

    def _count(self, kind: str) -> None:
        with self._lock:
            self._counts[kind] += 1


def _names(hashes: list[object]) -> list[BlockHash]:
    names = [BlockHash(name) for name in hashes if isinstance(name, bytes) and len(name) == HASH_NBYTES]
    if len(names) != len(hashes):
        raise PeerProtocolError(f"a question holds hashes of {HASH_NBYTES} bytes")
    return names


def _seen(seen: list[object], count: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for each in seen:
        match each:
            case [int(state), int(made)]:
                found.append((state, made))
            case _:
                raise PeerProtocolError("what was seen of a promise is a state and a number of blocks")
    if len(found) != count:
        raise PeerProtocolError("as many promises are asked about as were seen")
    return found


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise TierError(
            f"cannot serve blocks to peers on {host}:{port}: {error}; name an address of this machine and a free port"
        ) from error
