"""Block identity: what a block is called, and what makes two blocks the same.

Covers: the hash scheme, tenant roots, the chain over a token list. Does not cover: what a block's bytes look like
(`layout`, `codec`) or where it lies (`tier`).

A block is a full run of `block_size` tokens. Its name covers those tokens, every token before them, and everything else
that changes the K/V bytes: weights, layout, dtype, adapter, parallelism, tenant. Two blocks with one name hold the same
bytes, so a name can be looked up anywhere: in another worker, in Redis, after a restart.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from struct import Struct
from typing import NewType, cast

# SHA-256, 32 bytes. The store and Redis compare all of them; index and events carry the first SHORT_HASH_BYTES.
BlockHash = NewType("BlockHash", bytes)

SHORT_HASH_BYTES = 16
SCHEME_VERSION = 1
_LITTLE_ENDIAN_U32 = "I"
_new_sha256 = hashlib.sha256().copy  # cheaper than a call of `hashlib.sha256`, which looks its method up


@dataclass(frozen=True, slots=True)
class HashScheme:
    """Everything that salts a chain. Two ends whose schemes differ in any field share no block.

    Attributes:
        model_fingerprint: SHA-256 over every byte of the weights and the config; never a path or a time.
        layout: `KVLayout.describe()`: shapes, dtype and block size in words.
        block_size: tokens a block.
        adapter: digest of the LoRA adapter; empty without one.
        canonical: whether the engine ran in bit-exact mode.
        tp_size, tp_rank: tensor parallelism; each rank stores its own share. All ranks name blocks by rank 0's chain,
        and keep their shares apart by their own `digest`.
        version: of these rules.
    """

    model_fingerprint: bytes
    layout: str
    block_size: int
    adapter: bytes = b""
    canonical: bool = False
    tp_size: int = 1
    tp_rank: int = 0
    version: int = SCHEME_VERSION

    def digest(self) -> bytes:
        """SHA-256 of all fields in a canonical form, 32 bytes: the namespace of the blocks of every tenant."""
        fields = (
            self.model_fingerprint,
            self.layout.encode(),
            self.block_size.to_bytes(4, "little"),
            self.adapter,
            bytes([self.canonical]),
            self.tp_size.to_bytes(4, "little"),
            self.tp_rank.to_bytes(4, "little"),
            self.version.to_bytes(4, "little"),
        )
        # Lengths go in, so that no two field lists run into the same bytes.
        return hashlib.sha256(b"".join(len(f).to_bytes(4, "little") + f for f in fields)).digest()

    def root(self, tenant_salt: bytes) -> BlockHash:
        """The parent of a tenant's first blocks, 32 bytes. The server derives `tenant_salt`, never a client."""
        return BlockHash(hashlib.sha256(b"warmkv root\0" + self.digest() + tenant_salt).digest())

    def differences(self, other: HashScheme) -> list[str]:
        """Names of the fields in which the two differ; empty when blocks can be shared."""
        return [name for name in self.__slots__ if getattr(self, name) != getattr(other, name)]


def block_hashes(token_ids: Sequence[int], root: BlockHash, block_size: int) -> list[BlockHash]:
    """Names of the full blocks of `token_ids`, first to last: `hash_i = SHA-256(hash_{i-1} || tokens as u32 LE)`.

    A partial last block has no name. 32k tokens take 1 to 3 ms, most of it inside SHA-256: two compressions a block,
    each of which waits for the one before, and the library's calls around them.

    Raises:
        OverflowError: a token id is negative or does not fit 32 bits.
    """
    packed = array(_LITTLE_ENDIAN_U32, token_ids)
    if packed.itemsize != 4:  # pragma: no cover - no platform that we know
        raise RuntimeError("array('I') is not 32 bits wide on this platform")
    if not _is_little_endian():
        packed.byteswap()
    data, pieces = packed.tobytes(), _pieces_of(block_size * 4)
    parent, names = bytes(root), list[bytes]()
    for (tokens,) in pieces.iter_unpack(data[: len(data) - len(data) % pieces.size]):
        context = _new_sha256()
        context.update(parent + tokens)
        parent = context.digest()
        names.append(parent)
    return cast("list[BlockHash]", names)  # one cast for all: a call a block would show


def shared_blocks(left: Sequence[BlockHash], right: Sequence[BlockHash]) -> int:
    """Leading blocks that two chains have in common. O(log blocks): a name covers all blocks before it."""
    return bisect_left(range(min(len(left), len(right))), True, key=lambda place: left[place] != right[place])


def short(name: BlockHash) -> bytes:
    """The first 16 bytes: what index and events carry."""
    return name[:SHORT_HASH_BYTES]


@cache
def _pieces_of(nbytes: int) -> Struct:
    return Struct(f"{nbytes}s")


def _is_little_endian() -> bool:
    return array("H", [1]).tobytes()[0] == 1
