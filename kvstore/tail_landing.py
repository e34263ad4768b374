"""Pieces of tails on their way into device blocks: at once, or on a GPU copied beside the steps.

Where the device has a copier a piece goes into private blocks, which nobody else references and no step reads. They are
named, held for the tail and announced at the next `pump` after the copy has ended; until then the memory that they come
from belongs to the copy, too, whatever becomes of the tail meanwhile. What another one has brought by then is shared.

Covers: from bytes in a load's buffers to blocks that a tail holds. Does not cover: reads, and whether there is room
(`tails`), loads that somebody waits for (`landing`). For the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from kvstore.blocks import BlockHash
from kvstore.copier import Copy
from kvstore.device import DeviceTier
from kvstore.errors import InvariantError
from kvstore.loading import Load
from kvstore.tail import Tail
from kvstore.tier import BlockMeta

OnLanded = Callable[[Iterable[BlockHash]], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Blocks of a tail whose bytes lie in the buffers of a load. `metas`, `block_ids`: private ones, by place."""

    tail: Tail
    load: Load
    metas: Mapping[int, BlockMeta]
    block_ids: Mapping[int, int]


class TailLandings:
    """The pieces that are being copied, in their order."""

    def __init__(self, device: DeviceTier, *, end: Callable[[Load], None], on_landed: OnLanded) -> None:
        """`end`: takes the buffers of a load back. `on_landed`: hears what came."""
        self._device, self._copier, self._end, self._on_landed = device, device.copier, end, on_landed
        self._coming: list[tuple[_Piece, Copy]] = []

    def __len__(self) -> int:
        """How many copies run."""
        return len(self._coming)

    @property
    def tails(self) -> list[Tail]:
        """Whose pieces are being copied."""
        return [piece.tail for piece, _ in self._coming]

    def start(self, tail: Tail, load: Load, passed: int) -> None:
        """Put what a load brought, but for so many blocks at its front, into the device, which has room for it.

        Raises:
            InvariantError: it has not.
        """
        metas = dict(enumerate(load.arrived[passed:], load.first + passed))
        fresh = self._share(tail, metas)
        block_ids = self._device.allocate(len(fresh))
        if block_ids is None:
            raise InvariantError("the device has fewer blocks than it said a moment ago")
        buffers = [load.buffers[place - load.first] for place in fresh]
        piece = _Piece(tail, load, fresh, dict(zip(fresh, block_ids, strict=True)))
        if self._copier is None or not fresh:
            self._device.inject(block_ids, buffers)
            self._land(piece)
            return
        tail.copied_from_now(fresh)
        rows = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        self._coming.append((piece, self._copier.copy_in(rows, block_ids)))

    def pump(self) -> None:
        """Hand over what has been copied."""
        while self.any_landed():
            piece, _ = self._coming.pop(0)
            self._land(piece)

    def any_landed(self) -> bool:
        """Whether `pump` would hand over something."""
        return bool(self._coming) and self._coming[0][1].is_done()

    def finish(self) -> None:
        """Wait for all copies."""
        for _, copy in self._coming:
            copy.wait()
        self.pump()

    def check(self) -> None:
        """Audit what is being copied.

        Raises:
            InvariantError: a block has a name or another holder before its bytes are there, or is free, or the memory
                that they come from was given back.
        """
        for piece, _ in self._coming:
            blocks = piece.block_ids.values()
            if any(self._device.refs(block) != 1 or self._device.meta(block) is not None for block in blocks):
                raise InvariantError("a block that is being copied for a tail is not the copy's own")
            if not piece.load.buffers:
                raise InvariantError("the memory that a tail's blocks are copied from was given back")

    def _land(self, piece: _Piece) -> None:
        """The bytes are there: name the blocks and hold them for the tail, as far as it wants them still."""
        tail, block_ids = piece.tail, piece.block_ids
        tail.copied(block_ids)
        wanted = {} if tail.cancelled else {at: meta for at, meta in piece.metas.items() if at >= tail.floor}
        fresh = self._share(tail, wanted)
        self._device.commit([block_ids[place] for place in fresh], list(fresh.values()))
        self._device.release([block for place, block in block_ids.items() if place not in fresh])
        tail.hold({place: block_ids[place] for place in fresh})
        self._on_landed(meta.hash for meta in fresh.values())
        self._end(piece.load)

    def _share(self, tail: Tail, metas: Mapping[int, BlockMeta]) -> dict[int, BlockMeta]:
        """Hold for a tail what the device has of these; the others."""
        near = {place: meta.hash for place, meta in metas.items() if self._device.holds(meta.hash)}
        tail.hold({place: self._device.reference(name) for place, name in near.items()})
        self._device.prolong(list(near.values()), tail.wish.lifetime)
        self._on_landed(near.values())
        return {place: meta for place, meta in metas.items() if place not in near}
