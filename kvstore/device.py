"""The device tier: the paged K/V pool that attention reads. `pool` keeps its books, this adds its bytes.

One tensor of bytes, block-major: `[blocks + 1, layers, layer_nbytes]`. A block is one contiguous run, so that taking
it out or putting it in is one copy; attention sees the same memory as strided K and V views. Block number `num_blocks`
is the scratch block: padding rows write there and nobody reads it.

Owned by the engine's thread; only `stats` may be called from another. On a GPU every copy that is made here goes
through the current stream: what was queued before is finished before bytes leave, and bytes that come in precede what
is queued after. Blocks that come from host, and that go there, are copied beside it by the `copier`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kvstore.blocks import BlockHash
from kvstore.copier import Copier, CudaCopier
from kvstore.errors import TierError
from kvstore.layout import Area, KVLayout
from kvstore.pool import BlockPool
from kvstore.quantised import QuantisedRows, Rows
from kvstore.tier import BlockMeta, Clock, Delivery, Honours

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Landing:
    """Where a lower tier puts bytes that are on their way into device blocks.

    Attributes:
        block_ids: private blocks that the caller holds references of.
        buffers: one writable buffer of `block_nbytes` a block; any thread may fill them.
    """

    block_ids: list[int]
    buffers: list[memoryview]
    _staging: torch.Tensor | None = field(default=None, repr=False)


class DeviceTier(BlockPool):
    """The paged pool.

    Attributes:
        layout: what a block holds. scratch_block: the block for padding writes.
        copier: copies blocks from and to host beside the steps; None: copies are made at once.
    """

    honours = Honours(capacity=True, ttl=True, named_eviction=True, injected_clock=True)

    def __init__(
        self,
        layout: KVLayout,
        capacity_bytes: int,
        *,
        clock: Clock,
        wall_clock: Clock = time.time,
        device: torch.device | str = "cpu",
        poison: bool = False,
        copier: Copier | None = None,
    ) -> None:
        """Reserve `capacity_bytes` rounded down to whole blocks, and one block more.

        Args:
            layout: shapes, dtypes and block size.
            capacity_bytes: for blocks that can be allocated.
            clock: what TTLs go by. wall_clock: seconds since the epoch; what fixed ends of lifetimes go by.
            device: where the tensor lies.
            copier: copies blocks beside the steps; None: a `CudaCopier` on a GPU, else none.
            poison: fill free blocks with NaN, so that reading one shows. For tests: it writes every freed block.

        Raises:
            TierError: the capacity is less than a block, or the device has no such room.
        """
        num_blocks = capacity_bytes // layout.block_nbytes
        if num_blocks < 1:
            raise TierError(
                f"the device tier's {capacity_bytes} bytes hold no block of {layout.block_nbytes}; give it more bytes"
            )
        super().__init__(num_blocks, layout.block_nbytes, clock=clock, wall_clock=wall_clock)
        self.layout = layout
        self.scratch_block = num_blocks
        self._pool = _reserve(layout, num_blocks + 1, torch.device(device))
        self._raw = raw = self._pool.view(num_blocks + 1, layout.block_nbytes)
        self._host_view: Bytes | None = raw.numpy() if raw.device.type == "cpu" else None
        self._poison = poison
        self.copier = copier or (CudaCopier(raw) if raw.device.type == "cuda" else None)
        self._freed(range(num_blocks))

    @property
    def device(self) -> torch.device:
        """Where the pool lies."""
        return self._pool.device

    def kv(self, layer: int) -> tuple[Rows, Rows]:
        """K and V of one layer, views of the pool: `[blocks + 1, block_size, kv_heads, k_dim]` and `[..., v_dim]`.

        Strided: only the last three dimensions are contiguous. Tensors, or `QuantisedRows` of a quantised layout.
        """
        areas, shape = self.layout.areas, self.layout
        return (
            self._rows(layer, areas.k, areas.k_scales, shape.k_dim),
            self._rows(layer, areas.v, areas.v_scales, shape.v_dim),
        )

    def _rows(self, layer: int, area: Area, scales: Area | None, dim: int) -> Rows:
        dtype: torch.dtype = getattr(torch, self.layout.dtype)
        if scales is None:
            return self._view(layer, area, dtype, dim)
        codes, by_row = self._view(layer, area, torch.int8, dim), self._view(layer, scales, torch.bfloat16, 1)
        return QuantisedRows(codes, by_row.squeeze(-1), self.layout.kv_dtype, dtype)

    def _view(self, layer: int, area: Area, dtype: torch.dtype, dim: int) -> torch.Tensor:
        numbers = self._pool[:, layer, area.start : area.start + area.nbytes].view(dtype)
        return numbers.view(self.num_blocks + 1, self.layout.block_size, self.layout.kv_heads, dim)

    def payloads(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The bytes of blocks, to be read before the caller gives up the thread or the references.

        On the CPU these are the pool's own bytes, not a copy. On a GPU: one gather, one copy into pinned memory.
        """
        if self._host_view is not None:
            return [memoryview(self._host_view[block_id]) for block_id in block_ids]
        index = self._index(block_ids)
        staging = torch.empty((len(block_ids), self.block_nbytes), dtype=torch.uint8, pin_memory=True)
        staging.copy_(self._raw.index_select(0, index))
        return [memoryview(row) for row in staging.numpy()]

    def inject(self, block_ids: Sequence[int], payloads: Sequence[memoryview]) -> None:
        """Write the bytes of private blocks."""
        landing = self.landing(block_ids)
        for buffer, payload in zip(landing.buffers, payloads, strict=True):
            _copy(buffer, payload)
        self.land(landing, len(block_ids))

    def landing(self, block_ids: Sequence[int]) -> Landing:
        """Buffers for bytes of private blocks; `land` takes them in. Keep the references until then.

        On the CPU the buffers are the pool's own bytes; on a GPU they are pinned memory.
        """
        if self._host_view is not None:
            return Landing(list(block_ids), [memoryview(self._host_view[block_id]) for block_id in block_ids])
        staging = torch.empty((len(block_ids), self.block_nbytes), dtype=torch.uint8, pin_memory=True)
        return Landing(list(block_ids), [memoryview(row) for row in staging.numpy()], staging)

    def land(self, landing: Landing, count: int) -> None:
        """Take in the first `count` buffers of a landing. Does not wait for the GPU."""
        if landing._staging is None or count == 0:
            return
        index = self._index(landing.block_ids[:count])
        # The caching host allocator keeps pinned bytes until the stream has read them.
        self._raw.index_copy_(0, index, landing._staging[:count].to(self.device, non_blocking=True))
        if self.copier is not None:
            self.copier.follow_compute()

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        """As `Tier.read`; it cannot fail."""
        block_ids = self.acquire(hashes)
        for buffer, payload in zip(into, self.payloads(block_ids), strict=False):
            _copy(buffer, payload)
        self.release(block_ids)
        count = len(block_ids)
        return Delivery(count, self.why_missing(hashes[count]) if count < len(hashes) else None)

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        """As `Tier.write`: stores what has room beside the referenced blocks."""
        block_ids: list[int] = []
        for meta, payload in zip(metas, payloads, strict=True):
            if self.holds(meta.hash):
                block_ids.append(self.reference(meta.hash))
                continue
            room = self.allocate(1)
            if room is None:
                self._store_failures["full"] += 1
                break
            self.inject(room, [payload])
            block_ids += room
        self.commit(block_ids, metas[: len(block_ids)])
        self.release(block_ids)
        return len(block_ids)

    def close(self) -> None:
        """Give the memory back once no view of it is left."""
        if self.copier is not None:
            self.copier.close()
        self.copier = None
        self._pool = self._raw = torch.empty(0)
        self._host_view = None

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        """For a GPU: from pageable memory it would be copied only when the step in flight has ended."""
        return torch.tensor(block_ids, dtype=torch.int64, pin_memory=True).to(self.device, non_blocking=True)

    def _freed(self, block_ids: Sequence[int]) -> None:
        if self._poison and len(block_ids) > 0:
            self._raw[list(block_ids)] = 0xFF  # NaN in every dtype, as numbers and as scales


def _reserve(layout: KVLayout, blocks: int, device: torch.device) -> torch.Tensor:
    shape = (blocks, layout.layers, layout.layer_nbytes)
    try:
        # Written once now, so that no page fault is paid inside a step and a lack of memory shows at start.
        return torch.empty(shape, dtype=torch.uint8, device=device).fill_(0)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        needed = blocks * layout.block_nbytes
        raise TierError(f"{device} has no room for {needed} bytes of K/V; give the device tier fewer bytes") from error


def _copy(into: memoryview, payload: memoryview) -> None:
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(payload, np.uint8))
