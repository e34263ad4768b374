"""Bringing a prompt's prefix to the device: which tier delivers each block, and the loads that take their time.

Device blocks are referenced at once; blocks in host RAM are copied at once (tens of microseconds each); what may lie in
the shared tier is read by an I/O thread into memory of its own. `Promoter.pump` then allocates device blocks for what
came, and registers them: a question that finds nothing evicts nothing, a load that is given up holds no device block,
and nobody sees a block before its bytes are whole. Blocks that another acquisition is loading are waited for, not
loaded twice.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from kvstore.blocks import BlockHash
from kvstore.device import DeviceTier
from kvstore.errors import InvariantError
from kvstore.estimate import TransferEstimate, worth_loading
from kvstore.events import TierName
from kvstore.host import HostTier
from kvstore.tier import BlockMeta, Clock, SharedTier, Tier, chain_metas, prolonged

ComputeMs = Callable[[int, int], float]  # (first block, number of blocks) -> predicted milliseconds to compute them

PROBE_AFTER_S = 10.0  # an estimate this old is measured again, even if it speaks against the tier ...
PROBE_BLOCKS = 4  # ... by a load of this many blocks
RESERVE_SHARE = 64  # of the device's blocks one in so many is left by loads, for sequences that run
MIN_DEADLINE_S = 0.02  # below this, the scheduler's jitter decides

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadTiers:
    """Which tiers a request may read from (directive no_read: none; the fleet record may forbid the shared one)."""

    device: bool = True
    host: bool = True
    shared: bool = True


class Acquisition:
    """Blocks of a prompt's prefix on their way to the device. Owned by the engine's thread.

    Until `done`, the sequence waits while others run. Then `block_ids` and `fates` hold the contiguous prefix that
    arrived whole: one device block, referenced for the caller, and the tier it came from, for each block. A load that
    failed only makes it shorter.
    """

    def __init__(
        self,
        promoter: Promoter,
        hashes: Sequence[BlockHash],
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None,
        ttl_s: float | None,
    ) -> None:
        self.block_ids: list[int] = []
        self.fates: list[TierName] = []
        self.done = False
        self.load_ms = 0.0
        self._promoter = promoter
        self._hashes = hashes
        self._reads = reads
        self._compute_ms = compute_ms
        self._root = root
        self._ttl_s = ttl_s
        self._started = 0.0
        self._cancelled = False
        self._looked = False  # one device miss is counted for an acquisition, where the first look-up ended
        self._host_tried = self._shared_tried = -1  # position at which the tier came up short
        self._arrived: set[BlockHash] = set()  # loaded by another acquisition that this one waited for

    def cancel(self) -> None:
        """Give all blocks back; bytes still on their way are thrown away when they arrive. Again: nothing happens."""
        self._cancelled = self.done = True
        self._promoter.give_back(self.block_ids)
        self.block_ids, self.fates = [], []

    @property
    def _position(self) -> int:
        return len(self.block_ids)

    def _take(self, block_ids: Sequence[int], fates: Sequence[TierName]) -> None:
        self.block_ids += block_ids
        self.fates += fates


@dataclass(slots=True, eq=False)
class _Load:
    """One read of the shared tier.

    Attributes:
        owner: who asked. waiters: acquisitions that want the same blocks.
        buffers: where the bytes are, made by the I/O thread. arrived: blocks that are whole, under the metadata that
        they were stored with; set by the I/O thread, valid once the load is finished.
        ms: how long it took; None: the tier was not asked.
        discarded: cleared meanwhile: nothing of it may be registered. Guarded by `lock`.
    """

    metas: list[BlockMeta]
    owner: Acquisition
    deadline_s: float | None
    waiters: list[Acquisition] = field(default_factory=list)
    buffers: list[memoryview] = field(default_factory=list)
    arrived: list[BlockMeta] = field(default_factory=list)
    ms: float | None = None
    discarded: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Promoter:
    """Runs acquisitions over a device tier, a host tier and a shared one.

    Attributes:
        estimates: measured reads, for each lower tier. arrived: set by I/O threads when `pump` has work.
    """

    def __init__(
        self,
        device: DeviceTier,
        host: HostTier | None,
        shared: SharedTier | None,
        *,
        clock: Clock,
        io_threads: int,
        on_shared_read: Callable[[list[BlockMeta], int], None],
    ) -> None:
        """`on_shared_read(metas, count)` hears of each finished read: what was asked for, how many came."""
        self._device, self._host, self._shared = device, host, shared
        self._clock = clock
        self._reserve = device.num_blocks // RESERVE_SHARE
        self._on_shared_read = on_shared_read
        self.estimates = {tier.name: TransferEstimate() for tier in (host, shared) if tier is not None}
        self._measured_at: dict[TierName, float] = {}
        self.arrived = threading.Event()
        self._loading: dict[BlockHash, _Load] = {}
        self._finished: deque[_Load] = deque()
        self._threads = ThreadPoolExecutor(io_threads, "kvstore-load") if shared is not None else None

    def start(self, acquisition: Acquisition) -> None:
        """Take what is near and start to load the rest."""
        acquisition._started = self._clock()
        self._advance(acquisition)

    def pump(self) -> None:
        """Register what has arrived, and go on with the acquisitions that waited for it."""
        self.arrived.clear()
        while self._finished:
            self._settle(self._finished.popleft())

    def give_back(self, block_ids: Sequence[int]) -> None:
        """Release blocks of a cancelled acquisition."""
        self._device.release(block_ids)

    def metas(self) -> list[BlockMeta]:
        """Blocks that are being loaded."""
        return [meta for load in set(self._loading.values()) for meta in load.metas]

    def discard(self, names: set[BlockHash]) -> None:
        """Blocks that are on their way are cleared: a load of any of them is registered nowhere.

        On return no I/O thread will write one of them to the host tier any more.
        """
        for load in set(self._loading.values()):
            if any(meta.hash in names for meta in load.metas):
                with load.lock:
                    load.discarded = True

    def close(self) -> None:
        """Wait for the loads that run, and take them in."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self.pump()

    def check(self) -> None:
        """Blocks being loaded are filed under their names.

        Raises:
            InvariantError: otherwise.
        """
        for name, load in self._loading.items():
            if all(meta.hash != name for meta in load.metas):
                raise InvariantError("a block is being loaded under another name")

    def _advance(self, acquisition: Acquisition) -> None:
        """Take blocks tier by tier until the prefix ends, or a load must be waited for."""
        self._take_device(acquisition)
        self._keep_rest(acquisition)
        while self._take_device(acquisition) or self._take_host(acquisition):
            pass
        if not self._await_shared(acquisition):
            acquisition.done = True
            acquisition.load_ms = 1e3 * (self._clock() - acquisition._started)

    def _keep_rest(self, acquisition: Acquisition) -> None:
        """Use what is held of the rest: else the room for an earlier block may be made by evicting a later one."""
        rest = acquisition._hashes[acquisition._position :]
        if rest and acquisition._reads.device:
            self._device.touch(rest)
        if rest and acquisition._reads.host and self._host is not None:
            self._host.touch(rest)

    def _take_device(self, acquisition: Acquisition) -> bool:
        rest = acquisition._hashes[acquisition._position :]
        if not (acquisition._reads.device and rest):
            return False
        if acquisition._looked and not self._device.holds(rest[0]):
            return False
        acquisition._looked = True
        block_ids = self._device.acquire(rest)
        self._device.prolong(rest[: len(block_ids)], acquisition._ttl_s)
        arrived = acquisition._arrived
        fates = [
            self._shared.name if self._shared is not None and name in arrived else TierName.DEVICE
            for name in rest[: len(block_ids)]
        ]
        acquisition._take(block_ids, fates)
        return bool(block_ids)

    def _take_host(self, acquisition: Acquisition) -> bool:
        position = acquisition._position
        if self._host is None or not acquisition._reads.host or acquisition._host_tried == position:
            return False
        acquisition._host_tried = position
        rest = acquisition._hashes[position:]
        run = self._until_device(acquisition, rest[: self._host.match(rest)])
        names = run[: self._affordable(self._host, acquisition, len(run))]
        self._host.prolong(names, acquisition._ttl_s)
        metas = self._host.find_run(names)
        block_ids = self._device.allocate(len(metas)) if metas else None
        if block_ids is None:
            return False
        started, landing = self._clock(), self._device.landing(block_ids)
        count = self._host.read([meta.hash for meta in metas], landing.buffers)
        self._device.land(landing, count)
        self._observe(self._host, count, 1e3 * (self._clock() - started))
        self._register(acquisition, block_ids, metas, count, self._host.name)
        return count > 0

    def _await_shared(self, acquisition: Acquisition) -> bool:
        """Join or start a load of what comes next; False: there is none to wait for."""
        rest = acquisition._hashes[acquisition._position :]
        if not (self._shared is not None and acquisition._reads.shared and rest):
            return False
        running = self._loading.get(rest[0])
        if running is not None and acquisition._reads.device:
            running.waiters.append(acquisition)
            return True
        if acquisition._shared_tried == acquisition._position:
            return False
        return self._start_load(acquisition, self._shared, rest)

    def _start_load(self, acquisition: Acquisition, shared: SharedTier, rest: Sequence[BlockHash]) -> bool:
        position = acquisition._position
        names = self._unheld(acquisition, rest)
        count = self._affordable(shared, acquisition, len(names))
        if count == 0 or self._threads is None:
            return False
        root = self._root_of(acquisition)
        before = acquisition._hashes[position - 1] if position > 0 else root
        metas = chain_metas(names[:count], before=before, root=root, ttl_s=acquisition._ttl_s)
        compute_ms = _known(acquisition._compute_ms(position, count))
        deadline_s = None if compute_ms is None else max(MIN_DEADLINE_S, compute_ms / 1e3)
        load = _Load(metas, acquisition, deadline_s)
        for name in names[:count]:
            self._loading.setdefault(name, load)
        self._threads.submit(self._read, load, shared)
        return True

    def _read(self, load: _Load, shared: SharedTier) -> None:
        """In an I/O thread: fetch, copy to host, report."""
        try:
            arrived = self._fetch(load, shared)
            with load.lock:
                if self._host is not None and arrived and not load.discarded:
                    self._host.write(arrived, load.buffers[: len(arrived)])
            load.arrived = arrived
        except Exception:
            # Tiers promise not to raise; if one does, the request must not wait for ever.
            logger.exception("load failed", extra={"tier": shared.name})
        finally:
            self._finished.append(load)
            self.arrived.set()

    def _fetch(self, load: _Load, shared: SharedTier) -> list[BlockMeta]:
        """Read; what arrived, with the longer one of its own TTL and the reader's."""
        # Memory that no block arrives in is never touched, and so costs nothing.
        load.buffers = [row.data for row in np.empty((len(load.metas), self._device.block_nbytes), np.uint8)]
        was_healthy, started = shared.stats().healthy, self._clock()
        count = shared.read([meta.hash for meta in load.metas], load.buffers, deadline_s=load.deadline_s)
        if count > 0 or was_healthy:  # else the breaker may have answered, which says nothing of reads
            load.ms = 1e3 * (self._clock() - started)
        stored = [shared.find(meta.hash) or meta for meta in load.metas[:count]]
        return [prolonged(own, meta.ttl_s) for own, meta in zip(stored, load.metas, strict=False)]

    def _settle(self, load: _Load) -> None:
        for meta in load.metas:
            if self._loading.get(meta.hash) is load:
                del self._loading[meta.hash]
        shared, owner = self._shared, load.owner
        if shared is None:
            raise InvariantError("a load finished without a shared tier")
        if load.ms is not None:
            self._observe(shared, len(load.arrived), load.ms)
        if not load.discarded:
            self._on_shared_read(load.metas, len(load.arrived))
        waiters = [waiter for waiter in load.waiters if not waiter._cancelled]
        wanted = not load.discarded and (waiters or not owner._cancelled)
        landed = self._land(load) if wanted else []
        for acquisition in (owner, *waiters):
            if not acquisition._cancelled:
                self._resume(acquisition, landed, short=len(landed) < len(load.metas))
        if owner._cancelled:
            owner.cancel()

    def _land(self, load: _Load) -> list[BlockMeta]:
        """Put what arrived into device blocks, as far as there is room, and hand them to the owner; what it was."""
        self._keep_rest(load.owner)
        metas = load.arrived[: self._room]
        block_ids = self._device.allocate(len(metas)) or []
        self._device.inject(block_ids, load.buffers[: len(block_ids)])
        tier = TierName.DEVICE if self._shared is None else self._shared.name
        self._register(load.owner, block_ids, metas, len(block_ids), tier)
        return metas

    def _resume(self, acquisition: Acquisition, arrived: list[BlockMeta], *, short: bool) -> None:
        acquisition._arrived.update(meta.hash for meta in arrived)
        if short:
            acquisition._shared_tried = self._position_after(acquisition)
        self._advance(acquisition)

    def _position_after(self, acquisition: Acquisition) -> int:
        """Where the prefix will end once what is in the device has been taken."""
        rest = acquisition._hashes[acquisition._position :]
        return acquisition._position + (self._device.match(rest) if acquisition._reads.device else 0)

    def _register(
        self, acquisition: Acquisition, block_ids: list[int], metas: list[BlockMeta], count: int, tier: TierName
    ) -> None:
        """The first `count` blocks are whole: name them and hand them over; free the others."""
        self._device.commit(block_ids[:count], metas[:count])
        self._device.release(block_ids[count:])
        acquisition._take(block_ids[:count], [tier] * count)

    def _until_device(self, acquisition: Acquisition, names: Sequence[BlockHash]) -> Sequence[BlockHash]:
        """The leading names that the device does not hold (all, for a request that must not read from it)."""
        if not acquisition._reads.device:
            return names
        return names[: next((i for i, name in enumerate(names) if self._device.holds(name)), len(names))]

    def _unheld(self, acquisition: Acquisition, names: Sequence[BlockHash]) -> Sequence[BlockHash]:
        """The leading names that only the shared tier can deliver, and that nobody is loading."""
        host = self._host if acquisition._reads.host else None
        names = self._until_device(acquisition, names)
        for count, name in enumerate(names):
            at_host = host is not None and count > 0 and host.holds(name)
            if at_host or name in self._loading:
                return names[:count]
        return names

    def _affordable(self, tier: Tier, acquisition: Acquisition, count: int) -> int:
        """How many of `count` blocks to load: all that have room, a few to measure again, or none."""
        count = min(count, self._room)
        if count == 0:
            return 0
        load_ms = self.estimates[tier.name].predict_ms(count * self._device.block_nbytes)
        if worth_loading(load_ms, _known(acquisition._compute_ms(acquisition._position, count))):
            return count
        age_s = self._clock() - self._measured_at[tier.name]
        return min(count, PROBE_BLOCKS) if age_s >= PROBE_AFTER_S else 0

    @property
    def _room(self) -> int:
        """Device blocks that loads may take now."""
        return max(0, self._device.available - self._reserve)

    def _observe(self, tier: Tier, count: int, ms: float) -> None:
        self.estimates[tier.name].observe(count * self._device.block_nbytes, ms)
        self._measured_at[tier.name] = self._clock()

    def _root_of(self, acquisition: Acquisition) -> BlockHash:
        """The chain's root: as given, or as the blocks before it have it, or empty for one that nobody told us."""
        if acquisition._root is not None:
            return acquisition._root
        known = self._device.meta(acquisition.block_ids[0]) if acquisition.block_ids else None
        return BlockHash(b"") if known is None else known.root


def _known(compute_ms: float) -> float | None:
    """A prediction that is not positive and finite says that nothing has been measured yet."""
    return compute_ms if 0 < compute_ms < float("inf") else None
