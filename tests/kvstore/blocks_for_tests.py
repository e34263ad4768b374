"""Small layouts, chains whose bytes follow from their names, and a clock that tests move."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash, block_hashes
from kvstore.layout import KVLayout
from kvstore.tier import BlockMeta, chain_metas

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
