"""Names of a prompt's blocks, remembered for prompts that begin alike. Hashing is most of a decision's time.

Covers: `kvstore.blocks.block_hashes` behind a bounded memory of segments. Does not cover: the rule of the chain. A
segment is found by the name before it and the exact bytes of its tokens, so there is nothing to collide and prompts
that share a beginning share entries; a known prompt costs about a tenth of hashing it. Least recently used go first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.blocks import BlockHash, block_hashes, short

_SEGMENT_BLOCKS = 32

_Key = tuple[BlockHash, bytes]  # the name before a segment, and its tokens' bytes


class Names(NamedTuple):
    """Names of full blocks, first to last: of 32 bytes, and short."""

    full: list[BlockHash]
    short: list[bytes]


class HashMemo:
    """Remembers segments of 32 blocks; at 16 tokens a block an entry takes about 7 KiB."""

    def __init__(self, *, max_segments: int = 8192) -> None:
        self._segments: OrderedDict[_Key, Names] = OrderedDict()
        self._max_segments = max_segments

    def __len__(self) -> int:
        return len(self._segments)

    def names(self, token_ids: Sequence[int], root: BlockHash, block_size: int) -> Names:
        """The same as `block_hashes(token_ids, root, block_size)`, and the short names."""
        data = array("I", token_ids).tobytes()
        size = _SEGMENT_BLOCKS * block_size
        nbytes, at, parent = 4 * size, 0, root
        names = Names([], [])
        while 4 * at + nbytes <= len(data):
            key = (parent, data[4 * at : 4 * at + nbytes])
            segment = self._known(key) or self._made(key, token_ids[at : at + size], block_size)
            names.full.extend(segment.full)
            names.short.extend(segment.short)
            at, parent = at + size, segment.full[-1]
        tail = block_hashes(token_ids[at:], parent, block_size)
        names.full.extend(tail)
        names.short.extend(map(short, tail))
        return names

    def _known(self, key: _Key) -> Names | None:
        segment = self._segments.get(key)
        if segment is not None:
            self._segments.move_to_end(key)
        return segment

    def _made(self, key: _Key, token_ids: Sequence[int], block_size: int) -> Names:
        full = block_hashes(token_ids, key[0], block_size)
        segment = self._segments[key] = Names(full, [short(name) for name in full])
        if len(self._segments) > self._max_segments:
            self._segments.popitem(last=False)
        return segment
