"""The blocks that the cases of `faults` store and ask for, and a worker that serves them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np

from kvstore.blocks import BlockHash, block_hashes
from kvstore.codec import BlockCodec
from kvstore.host.tier import HostTier
from kvstore.layout import KVLayout
from kvstore.peer.server import PeerServer
from kvstore.tier import BlockMeta, chain_metas

ROOT = BlockHash(b"f" * 32)
NAMESPACE = bytes(range(32))
HARMED = 3  # the position, in every chain, of the block that is harmed
VERSION_AT = 9  # in a block's header: behind magic, length and the head of the record's list, which takes three bytes


@dataclass(frozen=True, slots=True)
class Shape:
    """How much is stored and asked for.

    Attributes:
        layout: of a block. chains, blocks: so many prefixes of so many blocks each. requests: during the fault.
    """

    layout: KVLayout
    chains: int = 8
    blocks: int = 8
    requests: int = 24


SMALL = Shape(KVLayout(layers=2, kv_heads=2, k_dim=32, v_dim=32, dtype="float32", block_size=16), 4, 6, 8)
FULL = Shape(KVLayout(layers=4, kv_heads=4, k_dim=64, v_dim=64, dtype="float32", block_size=16))


def shape_of(chains: int) -> Shape:
    """SMALL or FULL, whichever has so many chains; for processes that are told by a number."""
    return next(shape for shape in (SMALL, FULL) if shape.chains == chains)


def chain(shape: Shape, number: int) -> list[BlockMeta]:
    """The metadata of one prefix; no two share a block."""
    size = shape.layout.block_size
    names = block_hashes([number, *range(1, size * shape.blocks)], ROOT, size)
    return chain_metas(names, before=ROOT, root=ROOT, ttl_s=3600.0)


def payload(name: BlockHash, layout: KVLayout) -> memoryview:
    """The bytes that a block of this name holds."""
    numbers = np.random.Generator(np.random.PCG64(int.from_bytes(name[:16], "little")))
    return memoryview(numbers.bytes(layout.block_nbytes))


def worker(shape: Shape, port: int, secret: str) -> PeerServer:
    """A worker that holds all chains; port zero: one that is free."""
    host = HostTier(shape.layout, shape.chains * shape.blocks * shape.layout.block_nbytes, clock=time.monotonic)
    for number in range(shape.chains):
        metas = chain(shape, number)
        host.write(metas, [payload(meta.hash, shape.layout) for meta in metas])
    return PeerServer(host, codec=BlockCodec(shape.layout, NAMESPACE), secret=secret, port=port)


def serve(chains: int, port: int, secret: str) -> None:
    """The process of a `worker`. Says its address, and ends when its standard input does."""
    print(worker(shape_of(chains), port, secret).address, flush=True)
    sys.stdin.read()
