"""Committed blocks on their way from the device to host, and to the slow tiers behind it, beside the steps.

A block that is on its way is referenced, so that nobody may evict and overwrite it; its slot in host is reserved, and
its place in the slow tiers' queues is taken, only when its bytes are there. The order of commits is kept. Without a
copier nothing of this is used: the store copies at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.blocks import BlockHash
from kvstore.copier import Bytes, Copier, Copy
from kvstore.device import DeviceTier
from kvstore.events import TierName
from kvstore.host.tier import HostTier, HostWriting
from kvstore.tier import BlockMeta

Admitted = Mapping[TierName, Sequence[bool]]
OnSpilled = Callable[[Sequence[BlockMeta], Sequence[memoryview | None], Admitted], None]


@dataclass(slots=True)
class _Spill:
    """Blocks of one commit. `apart`: by place, the bytes of those that found no slot in host and that a slow tier
    wants; the others are taken from host, or from the device, should host lose them."""

    block_ids: list[int]
    metas: list[BlockMeta]
    admitted: Admitted
    writing: HostWriting | None
    apart: dict[int, Bytes]
    copy: Copy
    discarded: set[BlockHash] = field(default_factory=set)


class Spilling:
    """The blocks on their way down. For the engine's thread."""

    def __init__(self, device: DeviceTier, host: HostTier | None, copier: Copier, on_spilled: OnSpilled) -> None:
        """`on_spilled` hears of blocks whose bytes have arrived, in the order of commits."""
        self._device, self._host, self._copier, self._on_spilled = device, host, copier, on_spilled
        self._spills: deque[_Spill] = deque()

    def __len__(self) -> int:
        """Commits that are on their way."""
        return len(self._spills)

    def start(self, block_ids: Sequence[int], metas: Sequence[BlockMeta], admitted: Admitted) -> None:
        """Blocks were computed and named, and the step that wrote them has ended: begin to copy them."""
        held = [self._device.reference(meta.hash) for meta in metas]
        writing = None if self._host is None else self._host.begin_write(metas)
        apart = self._rows_apart(0 if writing is None else writing.count, admitted, len(metas))
        rows = dict(apart if writing is None else [*writing.rows, *apart.items()])
        copy = self._copier.copy_out([block_ids[place] for place in rows], list(rows.values()))
        self._spills.append(_Spill(held, list(metas), admitted, writing, apart, copy))

    def settled(self, names: Sequence[BlockHash]) -> int:
        """How many leading ones of these are not on their way."""
        on_their_way = {meta.hash for spill in self._spills for meta in spill.metas}
        return next((place for place, name in enumerate(names) if name in on_their_way), len(names))

    def pump(self) -> None:
        """Let those be found whose bytes have arrived."""
        while self._spills and self._spills[0].copy.is_done():
            self._end(self._spills.popleft())

    def settle(self) -> None:
        """Wait for all."""
        while self._spills:
            self._spills[0].copy.wait()
            self._end(self._spills.popleft())

    def discard(self, names: set[BlockHash]) -> None:
        """These are cleared: whatever arrives of them goes nowhere. Host drops what is being written by itself."""
        for spill in self._spills:
            spill.discarded |= names.intersection(meta.hash for meta in spill.metas)

    def _rows_apart(self, first: int, admitted: Admitted, count: int) -> dict[int, Bytes]:
        """Memory for those from the first one on that host does not take and a slow tier wants."""
        wanted = [place for place in range(first, count) if any(each[place] for each in admitted.values())]
        return dict(zip(wanted, self._copier.buffers(len(wanted)), strict=True)) if wanted else {}

    def _end(self, spill: _Spill) -> None:
        if spill.writing is not None and self._host is not None:
            self._host.end_write(spill.writing)
        kept = [place for place, meta in enumerate(spill.metas) if meta.hash not in spill.discarded]
        payloads = [None if (row := spill.apart.get(place)) is None else row.data for place in kept]
        admitted = {tier: [each[place] for place in kept] for tier, each in spill.admitted.items()}
        self._on_spilled([spill.metas[place] for place in kept], payloads, admitted)
        self._device.release(spill.block_ids)
