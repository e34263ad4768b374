"""The token ids that come with the messages of a chat, as lists, remembered: to read 30,000 from a message takes 2 ms.

Covers: a bounded memory by the bytes of a message. Does not cover: what the ids mean (`tokenizer`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from warmkv.v1 import inference_pb2

MAX_BYTES = 64 << 20
_ENTRY_BYTES, _ID_BYTES = 400, 40  # CPython: an id is an object of its own and a pointer


class SentIds(NamedTuple):
    """`ids` must not be changed. `largest`: -1 if there are none."""

    ids: list[int]
    largest: int


_NONE = SentIds([], -1)


class SentIdsMemo:
    """Remembers; the least recently used go first. Owned by one event loop."""

    def __init__(self, *, max_bytes: int = MAX_BYTES) -> None:
        self._known: OrderedDict[bytes, SentIds] = OrderedDict()
        self._max_bytes = max_bytes
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Estimated memory; at most `max_bytes`."""
        return self._nbytes

    def of(self, message: inference_pb2.ChatMessage) -> SentIds:
        """The message's ids."""
        if not message.token_ids:
            return _NONE
        key = message.SerializeToString(deterministic=True)
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        ids = list(message.token_ids)
        sent = SentIds(ids, max(ids))
        self._keep(key, sent)
        return sent

    def _keep(self, key: bytes, sent: SentIds) -> None:
        size = _nbytes(key, sent)
        if size > self._max_bytes:
            return
        self._nbytes += size
        while self._nbytes > self._max_bytes:
            self._nbytes -= _nbytes(*self._known.popitem(last=False))
        self._known[key] = sent


def _nbytes(key: bytes, sent: SentIds) -> int:
    return _ENTRY_BYTES + len(key) + _ID_BYTES * len(sent.ids)
