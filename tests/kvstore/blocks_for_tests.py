"""Small layouts, chains whose bytes follow from their names, and a clock that tests move."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash, block_hashes
from kvstore.layout import KVLayout
from kvstore.tier import BlockMeta, Tier, chain_metas

LAYOUT = KVLayout(layers=2, kv_heads=1, k_dim=4, v_dim=2, dtype="float32", block_size=2)
ROOT = BlockHash(b"r" * 32)
OTHER_ROOT = BlockHash(b"o" * 32)


@dataclass(slots=True)
class ManualClock:
    """Seconds that only a test moves."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def payload(name: BlockHash, layout: KVLayout = LAYOUT) -> memoryview:
    """The bytes that a block of this name holds in all tests."""
    return memoryview(hashlib.shake_128(name).digest(layout.block_nbytes))


def payloads(metas: Sequence[BlockMeta], layout: KVLayout = LAYOUT) -> list[memoryview]:
    return [payload(meta.hash, layout) for meta in metas]


def buffers(count: int, layout: KVLayout = LAYOUT) -> list[memoryview]:
    return [memoryview(bytearray(layout.block_nbytes)) for _ in range(count)]


def chain(
    length: int,
    *,
    root: BlockHash = ROOT,
    ttl_s: float | None = None,
    until: float | None = None,
    first_token: int = 0,
) -> list[BlockMeta]:
    """A chain of so many blocks; chains of another first token share none."""
    tokens = [first_token, *range(1, LAYOUT.block_size * length)]
    names = block_hashes(tokens, root, LAYOUT.block_size)
    return chain_metas(names, before=root, root=root, ttl_s=ttl_s, until=until)


def names(metas: Sequence[BlockMeta]) -> list[BlockHash]:
    return [meta.hash for meta in metas]


def read_verified(
    tier: Tier, hashes: Sequence[BlockHash], *, deadline_s: float | None = None, layout: KVLayout = LAYOUT
) -> int:
    """How many leading blocks arrive. Each must be the right one, and what ended the read must be told and counted."""
    into, before = buffers(len(hashes), layout), Counter(tier.stats().misses)
    count, ended = tier.read(hashes, into, deadline_s=deadline_s)
    assert [bytes(buffer) for buffer in into[:count]] == [bytes(payload(name, layout)) for name in hashes[:count]]
    assert (ended is None) == (count == len(hashes))
    if ended is not None:
        assert Counter(tier.stats().misses) - before == Counter([str(ended)])
    return count
