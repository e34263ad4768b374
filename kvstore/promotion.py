"""Bringing a prompt's prefix to the device: which tier delivers each block, and the loads that take their time.

Device blocks are referenced at once. Blocks in host RAM are copied by the engine's thread, so many bytes a step:
what is left of a long prefix follows at the next `Promoter.pump`, and others decode meanwhile. What lies in a slow tier
(disk, the shared tier) is read by an I/O thread into memory of its own. `pump` then allocates device blocks for what
came, and registers them: a question that finds nothing evicts nothing, a load that is given up holds no device block,
and nobody sees a block before its bytes are whole. Blocks that another acquisition is loading are waited for, not
loaded twice.

A prefetch is a load without an owner: it ends in host, and who comes meanwhile waits for it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from kvstore.acquisition import Acquisition, PlannedRun, Wish
from kvstore.blocks import BlockHash
from kvstore.device import DeviceTier
from kvstore.events import TierName
from kvstore.host.tier import HostTier
from kvstore.loading import FindMeta, Load, Loader
from kvstore.patience import DEFAULT_SLACK_S, Limit, cap_s, limits, pieces
from kvstore.source import Source
from kvstore.tier import BlockMeta, Clock, chain_metas

RESERVE_SHARE = 64  # of the device's blocks one in so many is left by loads, for sequences that run
PREFETCH_SHARE = 4  # of the host tier's slots a prefetch may fill one in so many
MAX_PREFETCHED = 1 << 14
MAX_LOAD_NBYTES = 256 << 20  # of one read; what follows is read after it
HOST_STEP_NBYTES = 256 << 20  # tens of milliseconds of copying
CLOSE_WAIT_S = 5.0

OnRead = Callable[[Source, list[BlockMeta], int, bool], None]


class Promoter:
    """Runs acquisitions and prefetches over a device tier, a host tier and slow ones.

    Attributes:
        sources: the tiers below the device, by name.
    """

    def __init__(
        self,
        device: DeviceTier,
        host: HostTier | None,
        slow: Sequence[tuple[Source, FindMeta]],
        *,
        clock: Clock,
        io_threads: int,
        on_read: OnRead,
        slack_s: float = DEFAULT_SLACK_S,
        host_step_nbytes: int = HOST_STEP_NBYTES,
        wall_clock: Clock = time.time,
    ) -> None:
        """Take over the tiers.

        Args:
            device, host: the tiers.
            slow: further tiers, and what tells under which metadata a block is stored in each.
            clock: seconds.
            io_threads: reads of each slow tier at once.
            on_read: hears of each finished read: its tier, what was asked for, how many came, and whether the next one
                is known not to be there.
            slack_s: see `patience`.
            host_step_nbytes: copied from host between two calls of `pump`; at least one block is.
            wall_clock: seconds since the epoch; what fixed ends of lifetimes go by.
        """
        self._device, self._host, self._clock, self._on_read = device, host, clock, on_read
        self._slack_s = slack_s
        self._reserve = device.num_blocks // RESERVE_SHARE
        self._slow = [source for source, _ in slow]
        self._find = {source.name: find for source, find in slow}
        near = [] if host is None else [Source(host, device.block_nbytes, clock=clock, believed=None)]
        self.sources = {source.name: source for source in (*near, *self._slow)}
        self._loader = Loader(
            self._slow, host, device.block_nbytes, clock=clock, wall_clock=wall_clock, io_threads=io_threads
        )
        self._kept_for_waiters: list[int] = []  # device blocks, referenced until those who wait have taken them
        self._prefetched: OrderedDict[BlockHash, TierName] = OrderedDict()  # in host, and where they came from
        self._most = max(1, MAX_LOAD_NBYTES // device.block_nbytes)
        self._copies_a_step = max(1, host_step_nbytes // device.block_nbytes)
        self._copies_left = self._copies_a_step
        self._paused: list[Acquisition] = []  # host holds more of them than one step may copy; longest ago first
        self._closed = False

    def start(self, wish: Wish) -> Acquisition:
        """Take what is near and start to load the rest."""
        acquisition = Acquisition(wish, self._device.release)
        acquisition.started = self._clock()
        self._advance(acquisition)
        return acquisition

    def prefetch(self, wish: Wish) -> int:
        """Start to bring what only slow tiers hold to host; blocks that are on their way now because of it.

        One run at a time: when it has come, the next one follows. What is near already gets the lifetime that is named.
        """
        if not wish.lifetime.is_default:
            self._promise(wish)
        if self._host is None or not wish.reads.host:
            return 0
        return self._prefetch(wish, self._in_reach(wish), max(1, self._host.num_slots // PREFETCH_SHARE))

    def plan(self, wish: Wish) -> list[PlannedRun]:
        """Where each run of the prefix would come from, and what that costs. A question; nothing is asked of a server.

        The last run is what would be computed; the first one that is not loaded makes all that follow it computed.
        """
        runs: list[PlannedRun] = []
        first = 0
        while first < len(wish.hashes):
            run = self._plan_run(wish, first)
            if not run.load:
                left = len(wish.hashes) - first
                run = replace(run, count=left, compute_ms=wish.price(first, left))
            runs.append(run)
            first += run.count
        return runs

    def pump(self) -> None:
        """Register what has arrived, and go on with the acquisitions that waited for it, or waited long enough, or for
        this step."""
        finished = self._loader.take_finished()
        self._go_on_copying()
        for load in finished:
            self._settle(load)
            self._loader.end(load)
        for load in self._loader.find_stuck():
            took_ms = 1e3 * (self._clock() - load.started)
            load.source.gave_up(len(load.metas), took_ms, load.wish.price(load.first, len(load.metas)))
        for load, acquisition in self._loader.overdue():
            load.leave(acquisition)
            self._resume(acquisition, load, self._land_early(load, acquisition))
            self._end_keeping()

    def wait(self, timeout_s: float) -> None:
        """Sleep until something arrived, or the timeout. Any thread may wait."""
        self._loader.wait(timeout_s)

    def used(self, names: Iterable[BlockHash]) -> None:
        """These are in the device now: where a prefetch brought them from has been told, or does not matter."""
        for name in names if self._prefetched else ():
            self._prefetched.pop(name, None)

    def metas(self) -> list[BlockMeta]:
        """Blocks that are being loaded."""
        return self._loader.metas()

    def discard(self, names: set[BlockHash]) -> None:
        """As `Loader.discard`."""
        self._loader.discard(names)

    def close(self) -> None:
        """Take in the loads that end soon, and give the others up. Nothing is loaded any more."""
        self._closed = True
        hanging = self._loader.close(CLOSE_WAIT_S)
        self.pump()
        for load in hanging:
            for acquisition in load.interested:
                load.leave(acquisition)
                self._resume(acquisition, load, self._land_early(load, acquisition))
                self._end_keeping()
        for acquisition in self._paused:
            acquisition.done = True
        self._paused.clear()

    def check(self) -> None:
        """Audit the loads.

        Raises:
            InvariantError: see `Loader.check`.
        """
        self._loader.check()

    def _promise(self, wish: Wish) -> None:
        near = wish.hashes[: self._in_reach(wish)]
        if wish.reads.device:
            self._device.prolong(near, wish.lifetime)
        if wish.reads.host and self._host is not None:
            self._host.prolong(near, wish.lifetime)

    # --- acquiring ---

    def _advance(self, acquisition: Acquisition) -> None:
        """Take blocks tier by tier until the prefix ends, or a load must be waited for."""
        self._take_device(acquisition)
        self._keep_rest(acquisition)
        self._take_rest(acquisition)

    def _take_rest(self, acquisition: Acquisition) -> None:
        while self._take_device(acquisition) or self._take_host(acquisition):
            pass
        if not (acquisition.is_paused or self._await_load(acquisition)):
            acquisition.done = True
            acquisition.load_ms = 1e3 * (self._clock() - acquisition.started)

    def _go_on_copying(self) -> None:
        """A new step has begun: go on with those that the last one had no time for, the first of them for sure."""
        self._copies_left = self._copies_a_step
        paused, self._paused = self._paused, []
        for acquisition in paused:
            acquisition.is_paused = False
            if not acquisition.cancelled:
                self._take_rest(acquisition)

    def _pause(self, acquisition: Acquisition) -> None:
        """Go on in the next step, which must not be waited for: nothing else may be on its way."""
        acquisition.is_paused = True
        self._paused.append(acquisition)
        self._loader.arrived.set()

    def _keep_rest(self, acquisition: Acquisition) -> None:
        """Use what is held of the rest: else the room for an earlier block may be made by evicting a later one."""
        rest, reads = acquisition.rest, acquisition.wish.reads
        if rest and reads.device:
            self._device.touch(rest)
        if rest and reads.host and self._host is not None:
            self._host.touch(rest)

    def _take_device(self, acquisition: Acquisition) -> bool:
        rest = acquisition.rest
        if not (acquisition.wish.reads.device and rest):
            return False
        if acquisition.looked and not self._device.holds(rest[0]):
            return False
        acquisition.looked = True
        block_ids = self._device.acquire(rest)
        names = rest[: len(block_ids)]
        self._device.prolong(names, acquisition.wish.lifetime)
        acquisition.take(block_ids, [acquisition.arrived.get(name, TierName.DEVICE) for name in names])
        return bool(block_ids)

    def _take_host(self, acquisition: Acquisition) -> bool:
        host, wish, position = self._host, acquisition.wish, acquisition.position
        if host is None or not wish.reads.host or acquisition.tried.get(host.name) == position:
            return False
        rest = acquisition.rest
        run = self._until_device(wish, rest[: host.match(rest)])
        source, count = self.sources[host.name], min(len(run), self._room)
        names = run[: source.affordable(count, wish.price(position, count))]
        if names and self._copies_left == 0:
            self._pause(acquisition)
            return False
        acquisition.tried[host.name] = position
        names = names[: self._copies_left]
        host.prolong(names, wish.lifetime)
        metas = host.find_run(names)
        block_ids = self._device.allocate(len(metas)) if metas else None
        if block_ids is None:
            return False
        started, landing = self._clock(), self._device.landing(block_ids)
        count = host.read([meta.hash for meta in metas], landing.buffers).count
        self._device.land(landing, count)
        self._copies_left -= count
        source.observe(count, 1e3 * (self._clock() - started))
        fates = [self._prefetched.pop(meta.hash, host.name) for meta in metas[:count]]
        self._register(acquisition, block_ids, metas[:count], fates)
        return count > 0

    def _await_load(self, acquisition: Acquisition) -> bool:
        """Join or start a load of what comes next; False: there is none to wait for."""
        wish, position, rest = acquisition.wish, acquisition.position, acquisition.rest
        if not rest or acquisition.is_cut:
            return False
        running = self._loader.get(rest[0])
        if running is not None and self._may_join(acquisition, running):
            running.waiters.append(acquisition)
            return True
        names = self._unheld(wish, rest)[: min(self._room, self._most)]
        source, count = self._cheapest(wish, position, names, acquisition.tried)
        if source is None:
            return False
        metas = self._metas(wish, position, count, acquisition)
        load = Load(source, metas, wish, position, acquisition, self._limits(source, wish, position, count))
        self._load(load)
        acquisition.limits = [(limit.stop, load.started + limit.seconds) for limit in load.limits]
        return True

    def _may_join(self, acquisition: Acquisition, load: Load) -> bool:
        """Whether to wait for what another one loads; if so, as long as if it were its own."""
        wish, position = acquisition.wish, acquisition.position
        tier = load.source.name
        if not (wish.reads.device and wish.reads.allows(tier)) or acquisition.tried.get(tier) == position:
            return False
        before = next(i for i, meta in enumerate(load.metas) if meta.hash == wish.hashes[position])
        now, come = self._clock(), len(load.arrived)
        due = {limit.stop: 1e3 * (load.started + limit.healthy_s - now) for limit in load.limits if limit.stop > come}
        most = min(len(load.metas) - before, len(acquisition.rest))
        found = limits(
            list(due) or [len(load.metas)],
            load_ms=lambda stop: due.get(stop, 0.0),
            compute_ms=lambda stop: wish.price(position, min(most, stop - before)) if stop > before else 0.0,
            slack_s=self._slack_s,
        )
        acquisition.limits = [(limit.stop, now + limit.seconds) for limit in found]
        return True

    def _prefetch(self, wish: Wish, first: int, budget: int) -> int:
        names = self._unheld(wish, wish.hashes[first : first + min(budget, self._most)])
        source, count = self._cheapest(wish, first, names, {})
        if source is None:
            return 0
        most = cap_s(wish.price(first, count))  # nobody waits for it as yet
        found = [replace(limit, seconds=most) for limit in self._limits(source, wish, first, count)]
        self._load(Load(source, self._metas(wish, first, count), wish, first, None, found, budget=budget - count))
        return count

    def _load(self, load: Load) -> None:
        self._loader.start(load, self._find[load.source.name])

    def _cheapest(
        self, wish: Wish, first: int, names: Sequence[BlockHash], tried: dict[TierName, int]
    ) -> tuple[Source | None, int]:
        """The slow tier to read these leading blocks from, and how many; None: computing them is no slower.

        A tier that is known to hold the block goes before one that only may, then the one that takes less time a block.
        """
        best: tuple[tuple[bool, float], Source, int] | None = None
        for source in self._slow:
            if self._closed or not wish.reads.allows(source.name) or tried.get(source.name) == first:
                continue
            reach = source.reach(names)
            count = source.affordable(reach, wish.price(first, reach)) if reach else 0
            if count:
                ms = source.predict_ms(count) or 0.0  # what was never measured is tried
                rank = (not source.known(names[:1]), ms / count)
                if best is None or rank < best[0]:
                    best = (rank, source, count)
        return (None, 0) if best is None else best[1:]

    # --- what arrived ---

    def _settle(self, load: Load) -> None:
        self._score(load)
        if not load.discarded:
            self._on_read(load.source, load.metas, len(load.arrived), load.is_next_gone)
        interested = load.interested
        if not interested and load.owner is None and not load.discarded:
            self._remember(load)
        landed = self._land(load, interested) if interested and not load.discarded else []
        for acquisition in interested:
            acquisition.is_cut = load.discarded
            self._resume(acquisition, load, landed)
        self._end_keeping()
        if load.owner is not None and load.owner.cancelled:
            load.owner.cancel()  # what landed for the others was registered under its name
        if load.budget and not (load.is_short or load.discarded or load.is_stuck):
            self._go_on(load)

    def _go_on(self, load: Load) -> None:
        """The next run of a prefetch, if what came before is still there."""
        first = self._in_reach(load.wish)
        if first >= load.first + len(load.metas):
            self._prefetch(load.wish, first, load.budget)

    def _score(self, load: Load) -> None:
        if load.ms is None or load.is_stuck:
            return
        load.source.observe(len(load.arrived), load.ms)
        compute_ms = load.wish.price(load.first, len(load.arrived)) if load.arrived else None
        if compute_ms is not None:
            load.source.score.add(load.ms, compute_ms)

    def _remember(self, load: Load) -> None:
        """What was prefetched counts as coming from its tier when it is used, once."""
        for meta in load.arrived[len(load.landed) :]:
            self._prefetched[meta.hash] = load.source.name
        while len(self._prefetched) > MAX_PREFETCHED:
            self._prefetched.popitem(last=False)

    def _land(self, load: Load, interested: Sequence[Acquisition]) -> list[BlockMeta]:
        """Put what arrived into device blocks, as far as there is room, for the owner or for all; what it was."""
        if load.landed:
            return self._land_early(load, interested[0])
        self._keep_rest(interested[0] if load.owner is None else load.owner)
        metas = load.arrived[: self._room]
        block_ids = self._device.allocate(len(metas)) or []
        self._device.inject(block_ids, load.buffers[: len(block_ids)])
        if load.owner is not None:
            self._register(load.owner, block_ids, metas, [load.source.name] * len(metas))
        else:
            self._device.commit(block_ids, metas)
            self._kept_for_waiters += block_ids
        return metas

    def _land_early(self, load: Load, acquisition: Acquisition) -> list[BlockMeta]:
        """Put what has come of a load that somebody leaves into the device; what was put there so far."""
        first = len(load.landed)
        if load.discarded or len(load.arrived) == first:
            return load.landed
        self._keep_rest(acquisition)
        metas = load.arrived[first : first + self._room]
        block_ids = self._device.allocate(len(metas)) or []
        self._device.inject(block_ids, load.buffers[first : first + len(block_ids)])
        self._device.commit(block_ids, metas[: len(block_ids)])
        self._kept_for_waiters += block_ids  # let go now, what ends by now would expire before they have it
        load.landed += metas[: len(block_ids)]
        return load.landed

    def _end_keeping(self) -> None:
        block_ids, self._kept_for_waiters = self._kept_for_waiters, []
        self._device.release(block_ids)

    def _resume(self, acquisition: Acquisition, load: Load, landed: list[BlockMeta]) -> None:
        acquisition.arrived.update((meta.hash, load.source.name) for meta in landed)
        if len(landed) < len(load.metas):
            acquisition.tried[load.source.name] = self._position_after(acquisition)
        self._advance(acquisition)

    def _position_after(self, acquisition: Acquisition) -> int:
        """Where the prefix will end once what is in the device has been taken."""
        is_read = acquisition.wish.reads.device
        return acquisition.position + (self._device.match(acquisition.rest) if is_read else 0)

    def _register(
        self, acquisition: Acquisition, block_ids: list[int], metas: list[BlockMeta], fates: list[TierName]
    ) -> None:
        """The blocks of `metas` are whole: name them and hand them over; free the others."""
        count = len(metas)
        self.used([meta.hash for meta in metas])
        self._device.commit(block_ids[:count], metas)
        self._device.release(block_ids[count:])
        acquisition.take(block_ids[:count], fates)

    # --- questions ---

    def _until_device(self, wish: Wish, names: Sequence[BlockHash]) -> Sequence[BlockHash]:
        """The leading names that the device does not hold (all, for a request that must not read from it)."""
        if not wish.reads.device:
            return names
        return names[: next((i for i, name in enumerate(names) if self._device.holds(name)), len(names))]

    def _unheld(self, wish: Wish, names: Sequence[BlockHash]) -> Sequence[BlockHash]:
        """The leading names that only a slow tier can deliver, and that nobody is loading."""
        host = self._host if wish.reads.host else None
        names = self._until_device(wish, names)
        for count, name in enumerate(names):
            at_host = host is not None and count > 0 and host.holds(name)
            if at_host or name in self._loader:
                return names[:count]
        return names

    def _in_reach(self, wish: Wish) -> int:
        """How many leading blocks are in device or host, or on their way."""
        host = self._host if wish.reads.host else None
        for place, name in enumerate(wish.hashes):
            near = (wish.reads.device and self._device.holds(name)) or (host is not None and host.holds(name))
            if not near and name not in self._loader:
                return place
        return len(wish.hashes)

    def _plan_run(self, wish: Wish, first: int) -> PlannedRun:
        names = wish.hashes[first:]
        held = self._device.match(names) if wish.reads.device else 0
        if held:
            return PlannedRun(TierName.DEVICE, first, held, 0.0, wish.price(first, held), load=True)
        best: PlannedRun | None = None
        rest = self._until_device(wish, names)
        for source in self.sources.values():
            count = source.known(rest) if wish.reads.allows(source.name) else 0
            if not count:
                continue
            load_ms, compute_ms = source.predict_ms(count), wish.price(first, count)
            run = PlannedRun(source.name, first, count, load_ms, compute_ms, source.affordable(count, compute_ms) > 0)
            if best is None or _pace(run) < _pace(best):
                best = run
        if best is not None:
            return best
        return PlannedRun(None, first, len(names), None, wish.price(first, len(names)), load=False)

    @property
    def _room(self) -> int:
        """Device blocks that loads may take now."""
        return max(0, self._device.available - self._reserve)

    def _limits(self, source: Source, wish: Wish, first: int, count: int) -> list[Limit]:
        return limits(
            pieces(count, self._device.block_nbytes),
            load_ms=source.predict_ms,
            compute_ms=lambda blocks: wish.price(first, blocks),
            slack_s=self._slack_s,
        )

    def _metas(self, wish: Wish, first: int, count: int, acquisition: Acquisition | None = None) -> list[BlockMeta]:
        root = self._root_of(wish, acquisition)
        before = wish.hashes[first - 1] if first > 0 else root
        names, (ttl_s, until, _) = wish.hashes[first : first + count], wish.lifetime
        return chain_metas(names, before=before, root=root, ttl_s=ttl_s, until=until)

    def _root_of(self, wish: Wish, acquisition: Acquisition | None) -> BlockHash:
        """The chain's root: as given, or as the blocks before it have it, or empty for one that nobody told us."""
        if wish.root is not None:
            return wish.root
        block_ids = [] if acquisition is None else acquisition.block_ids
        known = self._device.meta(block_ids[0]) if block_ids else None
        return BlockHash(b"") if known is None else known.root


def _pace(run: PlannedRun) -> tuple[bool, float]:
    """What is loaded rather goes first, then what takes less time a block."""
    return not run.load, 0.0 if run.load_ms is None else run.load_ms / run.count
