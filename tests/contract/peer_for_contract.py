"""A peer tier for the contract suite: it reads over a real socket, and its owner's hands write."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.events import RemovalCause
from kvstore.host.tier import HostTier
from kvstore.peer.tier import PeerTier
from kvstore.tier import BlockMeta
from tests.kvstore.peer.peers_for_tests import CODEC, FLEET, PATIENT_S


class PeerAndItsOwner(PeerTier):
    """A `PeerTier`, but what it may not do its owner does: write, remove, clear, lease."""

    def __init__(self, address: str, owner: HostTier, codec: BlockCodec = CODEC) -> None:
        super().__init__(address, codec=codec, secret=FLEET, timeout_s=PATIENT_S)
        self._owner = owner

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        assert super().write(metas, payloads) == 0
        return self._owner.write(metas, payloads)

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        assert super().remove(hashes, cause) == 0
        return self._owner.remove(hashes, cause)

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        assert super().clear(root=root, prefix=prefix) == 0
        return self._owner.clear(root=root, prefix=prefix)
