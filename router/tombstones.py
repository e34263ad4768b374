"""Why blocks that were known are held by nobody, for the last so many of them. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from router.holders import Gone


class Tombstones:
    """At most `limit` causes, by block; the oldest is forgotten first. O(1) a block."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._causes: OrderedDict[bytes, Gone] = OrderedDict()

    def __len__(self) -> int:
        return len(self._causes)

    def __contains__(self, block: bytes) -> bool:
        return block in self._causes

    def get(self, block: bytes) -> Gone | None:
        """Why it is gone; None: it is not remembered."""
        return self._causes.get(block)

    def bury(self, blocks: Sequence[bytes], cause: Gone) -> None:
        """These left, in this order. They must not be remembered already."""
        causes = self._causes
        for block in blocks:
            causes[block] = cause
        while len(causes) > self.limit:
            causes.popitem(last=False)

    def forget(self, blocks: Sequence[bytes]) -> None:
        """These are known again."""
        causes = self._causes
        if causes and not causes.keys().isdisjoint(blocks):
            for block in blocks:
                causes.pop(block, None)
