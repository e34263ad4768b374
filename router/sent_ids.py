"""The token ids that come with the messages of a chat, remembered: to read 30,000 from a message takes 2 ms.

Covers: a bounded memory by the bytes of a message. Does not cover: what the ids mean (`tokenizer`).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import NamedTuple

from kvstore.token_ids import BYTES_PER_ID, u32
from warmkv.v1 import inference_pb2

MAX_BYTES = 64 << 20
_ENTRY_BYTES = 560  # CPython: the heads of key, array and tuple, and the books' own entry


class SentIds(NamedTuple):
    """`ids` must not be changed. `largest`: -1 if there are none. `message_bytes`: of what they came with."""

    ids: array[int]
    largest: int
    message_bytes: int


_NO_IDS = u32(())


class SentIdsMemo:
    """Remembers; the least recently used go first. Owned by one event loop."""

    def __init__(self, *, max_bytes: int = MAX_BYTES) -> None:
        self._known: OrderedDict[tuple[str, bytes], SentIds] = OrderedDict()
        self._max_bytes = max_bytes
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Estimated memory; at most `max_bytes`."""
        return self._nbytes

    def of(self, message: inference_pb2.ChatMessage, *, group: str = "") -> SentIds:
        """The message's ids. What one trust group sent is remembered for that group alone."""
        if not message.token_ids:
            return SentIds(_NO_IDS, -1, message.ByteSize())
        data = message.SerializeToString(deterministic=True)
        key = (group, data)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        ids = list(message.token_ids)
        sent = SentIds(u32(ids), max(ids), len(data))
        self._keep(key, sent)
        return sent

    def _keep(self, key: tuple[str, bytes], sent: SentIds) -> None:
        size = _nbytes(key, sent)
        if size > self._max_bytes:
            return
        self._nbytes += size
        while self._nbytes > self._max_bytes:
            self._nbytes -= _nbytes(*self._known.popitem(last=False))
        self._known[key] = sent


def _nbytes(key: tuple[str, bytes], sent: SentIds) -> int:
    return _ENTRY_BYTES + len(key[1]) + BYTES_PER_ID * len(sent.ids)
