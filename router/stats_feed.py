"""One snapshot a second for everybody who watches the dashboard, and ten minutes of history for those who come later.

A frame is made and serialised once, whatever the number of listeners. A listener that does not keep up is dropped: the
page connects again and gets the history at once, while a queue that grows for a sleeping laptop helps nobody.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from router.errors import Overloaded
from router.stats_json import POINT_FIELDS, history_point, stats_to_plain
from warmkv.v1 import admin_pb2

log = logging.getLogger(__name__)

HISTORY_SECONDS = 600


def sse(event: str, data: Mapping[str, Any]) -> bytes:
    """One server-sent event (WHATWG HTML, section 9.2). JSON holds no raw line break, so `data` is one line."""
    return f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class Listener:
    """One open stream: what it has not read yet."""

    def __init__(self, *, show_prompts: bool, max_frames: int, on_drop: Callable[[], None]) -> None:
        self.show_prompts = show_prompts
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue(max_frames)
        self._on_drop = on_drop

    def offer(self, frame: bytes) -> bool:
        """Queue a frame; False when the queue is full, after which the listener is cut off."""
        try:
            self._frames.put_nowait(frame)
        except asyncio.QueueFull:
            self._on_drop()
            return False
        return True

    def end(self) -> None:
        """Let `frames` return; a listener that is behind is cut off, since its peer may never read the rest."""
        if not self._frames.empty():
            self._on_drop()
        while not self._frames.empty():
            self._frames.get_nowait()
        self._frames.put_nowait(None)

    async def frames(self) -> AsyncIterator[bytes]:
        """Frames as they come, until the feed ends."""
        while (frame := await self._frames.get()) is not None:
            yield frame


class StatsFeed:
    """Takes snapshots, keeps the history, serves the listeners. Belongs to one event loop.

    Invariant: every listener was offered every frame since it came, in order, or has been dropped.
    """

    def __init__(
        self,
        snapshot: Callable[[bool], admin_pb2.WatchStatsResponse],
        *,
        period_s: float,
        max_listeners: int,
        max_queued_frames: int,
        about: Mapping[str, Any],
    ) -> None:
        """`snapshot(show_prompts)` gives the numbers; `about` travels with the history."""
        self._snapshot = snapshot
        self._period_s = period_s
        self._max_listeners = max_listeners
        self._max_queued_frames = max_queued_frames
        self._about = about
        self._points: deque[list[float | int | str | None]] = deque(maxlen=max(1, round(HISTORY_SECONDS / period_s)))
        self._listeners: set[Listener] = set()
        self._ended = False

    async def run(self) -> None:
        """Take a snapshot every period until cancelled. A snapshot that fails is logged and skipped."""
        while True:
            try:
                self.tick()
            except Exception:
                log.exception("stats snapshot failed")
            await asyncio.sleep(self._period_s)

    def tick(self) -> None:
        """Take one snapshot and offer it to all listeners; serialised at most once a kind of listener."""
        plain = self._snapshot(False)
        point = history_point(plain)
        self._points.append(point)
        for show_prompts in {listener.show_prompts for listener in self._listeners}:
            stats = self._snapshot(True) if show_prompts else plain
            frame = sse("stats", {"point": point, "stats": stats_to_plain(stats)})
            self._offer(frame, [one for one in self._listeners if one.show_prompts == show_prompts])

    def history(self) -> bytes:
        """The `history` event: all points of the last ten minutes, oldest first."""
        return sse("history", {**self._about, "fields": POINT_FIELDS, "points": list(self._points)})

    @contextmanager
    def listen(self, *, show_prompts: bool, on_drop: Callable[[], None]) -> Iterator[Listener]:
        """Take part until the block is left. `on_drop` is called once if the listener is too slow.

        Raises:
            Overloaded: too many listeners.
        """
        if len(self._listeners) >= self._max_listeners:
            raise Overloaded(
                f"{self._max_listeners} dashboards are open on this router already. Close one, or read GET /api/stats.",
                retry_after_s=5.0,
            )
        listener = Listener(show_prompts=show_prompts, max_frames=self._max_queued_frames, on_drop=on_drop)
        if self._ended:
            listener.end()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def end(self) -> None:
        """End all streams, and those that come later at once."""
        self._ended = True
        for listener in self._listeners:
            listener.end()

    def _offer(self, frame: bytes, listeners: list[Listener]) -> None:
        for listener in listeners:
            if not listener.offer(frame):
                self._listeners.discard(listener)
                log.warning("stats listener dropped", extra={"max_queued_frames": self._max_queued_frames})
