"""Bringing a prompt's prefix to the device: which tier delivers each block, and the loads that take their time.

Device blocks are referenced at once. Blocks in host RAM are copied by the engine's thread, so many bytes a step:
what is left of a long prefix follows at the next `Promoter.pump`, and others decode meanwhile. What lies in a slow tier
(disk, the shared tier) is read by an I/O thread into memory of its own. `pump` then allocates device blocks for what
came, and registers them: a question that finds nothing evicts nothing, a load that is given up holds no device block,
and nobody sees a block before its bytes are whole. Blocks that another acquisition is loading are waited for, not
loaded twice. On a GPU all of them are copied beside the steps, by `landing`.

A prefetch is a load without an owner: it ends in host, and who comes meanwhile waits for it. Who can compute the front
of a prefix while its back is loaded does not wait: its acquisition ends with what is near, and has a tail.

Covers: acquisitions, and what becomes of blocks that arrive. Does not cover: which slow tier to read (`slow_reads`),
the reads (`loading`), prefetches (`prefetching`), tails (`tails`), plans (`planning`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from kvstore.acquisition import Acquisition, PlannedRun, Promise, Wish
from kvstore.blocks import BlockHash
from kvstore.device import DeviceTier
from kvstore.events import TierName
from kvstore.host.tier import HostTier
from kvstore.landing import POLL_S, Coming, Landings
from kvstore.loading import FindMeta, Load, Loader
from kvstore.patience import DEFAULT_SLACK_S, limits
from kvstore.planning import plan
from kvstore.prefetching import Prefetcher
from kvstore.promised import Promised
from kvstore.slow_reads import SlowReads, until_device
from kvstore.source import Source
from kvstore.tail_landing import TailLandings
from kvstore.tails import Tails
from kvstore.tier import BlockMeta, Clock, HintedTier

RESERVE_SHARE = 64  # of the device's blocks one in so many is left by loads, for sequences that run
HOST_STEP_NBYTES = 256 << 20  # tens of milliseconds of copying
CLOSE_WAIT_S = 5.0
LOOK_AGAIN_S = 0.02  # while somebody waits for what others make

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
        peers: HintedTier | None = None,
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
            peers: the one of `slow` whose owners may be making what is wanted; None: there is none.
        """
        self._device, self._host, self._clock, self._on_read = device, host, clock, on_read
        self._slack_s = slack_s
        self._reserve = device.num_blocks // RESERVE_SHARE
        near = [] if host is None else [Source(host, device.block_nbytes, clock=clock, believed=None)]
        self.sources = {source.name: source for source in (*near, *(source for source, _ in slow))}
        self._loader = Loader(
            [source for source, _ in slow],
            host,
            device.block_nbytes,
            clock=clock,
            wall_clock=wall_clock,
            io_threads=io_threads,
            make_buffer=None if device.copier is None else device.copier.buffer,
        )
        self._reads = SlowReads(device, host, slow, self._loader, slack_s=slack_s)
        self._prefetcher = Prefetcher(device, host, self._reads)
        self._tails = Tails(
            device,
            self._reads,
            self._loader,
            [source for source, _ in slow],
            clock=clock,
            reserve=self._reserve,
            on_read=on_read,
            on_landed=self._prefetcher.used,
        )
        self._kept_for_waiters: list[int] = []  # device blocks, referenced until those who wait have taken them
        self._copies_a_step = max(1, host_step_nbytes // device.block_nbytes)
        self._copies_left = self._copies_a_step
        self._promised = Promised(peers, clock=clock, slack_s=slack_s, on_news=self._loader.arrived.set)
        self._landings = None if device.copier is None else Landings(device.copier)
        self._paused: list[Acquisition] = []  # host holds more of them than one step may copy; longest ago first

    def start(self, wish: Wish) -> Acquisition:
        """Take what is near and start to load the rest."""
        acquisition = Acquisition(wish, self._device.release)
        acquisition.started = self._clock()
        self._promised.begin(acquisition)
        self._advance(acquisition)
        return acquisition

    def expect(self, promise: Promise) -> None:
        """Another worker is making these blocks: who acquires them from now on may wait for them."""
        self._promised.learn(promise)

    def promise_broken(self, address: str, ticket: BlockHash) -> None:
        """As `Promised.broken`."""
        self._promised.broken(address, ticket)

    def prefetch(self, wish: Wish) -> int:
        """As `Prefetcher.start`."""
        return self._prefetcher.start(wish)

    def plan(self, wish: Wish) -> list[PlannedRun]:
        """As `planning.plan`."""
        return plan(wish, self._device, self.sources.values())

    def pump(self) -> None:
        """Register what has arrived, and go on with the acquisitions that waited for it, or waited long enough, or for
        this step."""
        finished = self._loader.take_finished()
        for coming in () if self._landings is None else self._landings.take_landed():
            self._land_coming(coming)
        self._go_on_copying()
        for load in finished:
            self._settle(load)
        for load in self._loader.find_stuck():
            took_ms = 1e3 * (self._clock() - load.started)
            load.source.gave_up(len(load.metas), took_ms, load.wish.price(load.first, len(load.metas)))
        for load, acquisition in self._loader.overdue():
            load.leave(acquisition)
            self._resume(acquisition, load, self._land_early(load, acquisition))
            self._end_keeping()
        for acquisition in self._promised.due():
            self._advance(acquisition)
        self._tails.pump()

    def wait(self, timeout_s: float) -> None:
        """Sleep until something arrived, or the timeout. Any thread may wait."""
        until = time.monotonic() + timeout_s
        while (running := self._running_copies) and time.monotonic() < until:
            if any(copies.any_landed() for copies in running) or self._loader.arrived.wait(POLL_S):
                return
        if not running:
            self._loader.wait(min(timeout_s, LOOK_AGAIN_S) if self._promised else timeout_s)

    def used(self, names: Iterable[BlockHash]) -> None:
        """As `Prefetcher.used`."""
        self._prefetcher.used(names)

    def metas(self) -> list[BlockMeta]:
        """Blocks that are being loaded."""
        coming = [] if self._landings is None else self._landings.metas()
        return self._loader.metas() + self._tails.metas() + coming

    def discard(self, names: set[BlockHash]) -> None:
        """As `Loader.discard`; what is being copied is registered nowhere either, and nothing that others
        make is waited for any more.
        """
        self._loader.discard(names)
        self._tails.discard(names)
        self._promised.cut()
        if self._landings is not None:
            self._landings.discard(names)

    def close(self) -> None:
        """Take in the loads that end soon, and give the others up. Nothing is loaded any more."""
        self._reads.closed = True
        self._tails.close(CLOSE_WAIT_S)
        hanging = self._loader.close(CLOSE_WAIT_S)
        self.pump()
        for load in hanging:
            for acquisition in load.interested:
                load.leave(acquisition)
                self._resume(acquisition, load, self._land_early(load, acquisition))
                self._end_keeping()
        for coming in () if self._landings is None else self._landings.take_all():
            self._land_coming(coming)
        for acquisition in (*self._paused, *self._promised.close()):
            acquisition.done = True
        self._paused.clear()

    def check(self) -> None:
        """Audit the loads.

        Raises:
            InvariantError: see `Loader.check` and `Tails.check`.
        """
        self._loader.check()
        self._tails.check()

    # --- acquiring ---

    def _advance(self, acquisition: Acquisition) -> None:
        """Take blocks tier by tier until the prefix ends, or a load must be waited for."""
        self._take_device(acquisition)
        self._keep_rest(acquisition)
        self._take_rest(acquisition)

    def _take_rest(self, acquisition: Acquisition) -> None:
        while self._take_device(acquisition) or self._take_host(acquisition):
            pass
        busy = acquisition.is_paused or acquisition.is_landing
        if not (busy or self._await_load(acquisition) or self._promised.holds(acquisition)):
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
        if (
            self._join_landing(acquisition)
            or host is None
            or not wish.reads.host
            or acquisition.tried.get(host.name) == position
        ):
            return False
        rest = acquisition.rest
        run = until_device(self._device, wish, rest[: host.match(rest)])
        source, count = self.sources[host.name], min(len(run), self._room)
        names = run[: source.affordable(count, wish.price(position, count))]
        if names and self._copies_left == 0 and self._landings is None:
            self._pause(acquisition)
            return False
        acquisition.tried[host.name] = position
        names = names[: self._copies_left] if self._landings is None else names
        host.prolong(names, wish.lifetime)
        metas = host.find_run(names)
        block_ids = self._device.allocate(len(metas)) if metas else None
        if block_ids is None:
            return False
        if self._landings is not None:
            self._start_landing(self._landings, host, acquisition, metas, block_ids)
            return False
        started, landing = self._clock(), self._device.landing(block_ids)
        count = host.read([meta.hash for meta in metas], landing.buffers).count
        self._device.land(landing, count)
        self._copies_left -= count
        source.observe(count, 1e3 * (self._clock() - started))
        fates = [self._prefetcher.origin(meta.hash, host.name) for meta in metas[:count]]
        self._register(acquisition, block_ids, metas[:count], fates)
        return count > 0

    def _join_landing(self, acquisition: Acquisition) -> bool:
        """Wait for what comes next where it is being copied already."""
        rest = acquisition.rest
        if self._landings is None or not rest or not acquisition.wish.reads.device:
            return False
        joined = self._landings.join(rest[0], acquisition)
        acquisition.is_landing |= joined
        return joined

    def _start_landing(
        self,
        landings: Landings,
        host: HostTier,
        acquisition: Acquisition,
        metas: list[BlockMeta],
        block_ids: list[int],
    ) -> None:
        """Copy them beside the steps; `pump` goes on when they are there."""
        count = landings.start_from_host(
            host, acquisition, metas, block_ids, lambda name: self._prefetcher.origin(name, host.name), self._clock()
        )
        self._device.release(block_ids[count:])
        acquisition.is_landing = True

    def _land_coming(self, coming: Coming) -> None:
        """Blocks have been copied: name them, hand them over, and go on with who waited for them."""
        interested, owner, landed = coming.interested, coming.acquisition, [] if coming.discarded else coming.metas
        for acquisition in interested:
            acquisition.is_landing = False
        if coming.load is None:
            self._score_copy(coming)
        if coming.discarded:
            self._device.release(coming.block_ids)
        elif owner is None or owner.cancelled:
            self._device.commit(coming.block_ids, coming.metas)
            self._kept_for_waiters += coming.block_ids
        else:
            self._register(owner, coming.block_ids, coming.metas, coming.fates)
        for acquisition in interested:
            acquisition.is_cut |= coming.discarded
            if coming.load is not None and acquisition in coming.readers:
                self._resume(acquisition, coming.load, landed)
                continue
            if acquisition is not owner:
                acquisition.arrived.update(zip((meta.hash for meta in landed), coming.fates, strict=False))
            self._take_rest(acquisition)
        self._end_keeping()

    def _score_copy(self, coming: Coming) -> None:
        took_ms = coming.copy.took_ms()
        if took_ms is None:
            took_ms = 1e3 * (self._clock() - coming.started)
        self.sources[coming.tier].observe(len(coming.block_ids), took_ms)

    def _await_load(self, acquisition: Acquisition) -> bool:
        """Join or start a load of what comes next; False: there is none to wait for."""
        wish, position, rest = acquisition.wish, acquisition.position, acquisition.rest
        if not rest or acquisition.is_cut:
            return False
        running = self._loader.get(rest[0])
        if running is not None and self._may_join(acquisition, running):
            running.waiters.append(acquisition)
            return True
        if wish.from_both_ends and not self._promised.knows(acquisition):
            acquisition.tail = self._tails.start(acquisition)
            if acquisition.tail is not None:
                return False
        names = self._reads.unheld(wish, rest)[: min(self._room, self._reads.most)]
        source, count = self._reads.cheapest(wish, position, names, acquisition.tried)
        if source is None:
            return False
        metas = self._reads.metas(wish, position, count, acquisition)
        acquisition.slack_s = self._reads.slack_left(acquisition, source)
        found = self._reads.limits(source, wish, position, count, acquisition.slack_s)
        load = Load(source, metas, wish, position, acquisition, found)
        self._reads.start(load)
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
        acquisition.slack_s = self._reads.slack_left(acquisition, load.source)
        found = limits(
            list(due) or [len(load.metas)],
            load_ms=lambda stop: due.get(stop, 0.0),
            compute_ms=lambda stop: wish.price(position, min(most, stop - before)) if stop > before else 0.0,
            slack_s=acquisition.slack_s,
        )
        acquisition.limits = [(limit.stop, now + limit.seconds) for limit in found]
        return True

    # --- what arrived ---

    def _settle(self, load: Load) -> None:
        """A load has ended: see to what it brought, and give its buffers back once nothing reads them."""
        self._score(load)
        if not load.discarded:
            self._on_read(load.source, load.metas, len(load.arrived), load.is_next_gone)
        interested = load.interested
        if not interested and load.owner is None and not load.discarded:
            self._prefetcher.remember(load)
        if not self._begin_landing(load, interested):
            self._hand_over(load, interested)
            self._loader.end(load)
        if load.budget and not (load.is_short or load.discarded or load.is_stuck):
            self._prefetcher.go_on(load)

    def _begin_landing(self, load: Load, interested: Sequence[Acquisition]) -> bool:
        """Copy what came beside the steps, and go on when it is there; False: nothing came that could be."""
        # What a load brought to those who left it early is in the device by now: the rest follows the same way.
        if self._landings is None or not interested or load.discarded or load.landed:
            return False
        self._keep_rest(interested[0] if load.owner is None else load.owner)
        count = min(len(load.arrived), self._room)
        block_ids = self._device.allocate(count) if count else None
        if block_ids is None:
            return False
        for acquisition in interested:
            acquisition.is_landing = True
        self._landings.start_from_load(load, block_ids, lambda: self._loader.end(load), self._clock())
        return True

    def _hand_over(self, load: Load, interested: Sequence[Acquisition]) -> None:
        """Put what came into the device at once, and go on with who waited for it."""
        landed = self._land(load, interested) if interested and not load.discarded else []
        for acquisition in interested:
            acquisition.is_cut |= load.discarded
            self._resume(acquisition, load, landed)
        self._end_keeping()
        if load.owner is not None and load.owner.cancelled:
            load.owner.cancel()  # what landed for the others was registered under its name

    def _score(self, load: Load) -> None:
        if load.ms is None or load.is_stuck:
            return
        load.source.observe(len(load.arrived), load.ms)
        compute_ms = load.wish.price(load.first, len(load.arrived)) if load.arrived else None
        if compute_ms is not None:
            load.source.score.add(load.ms, compute_ms)

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
            acquisition.came_short(len(load.arrived), self._clock())
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

    @property
    def copies(self) -> int:
        """Batches that are being copied to the device beside the steps."""
        return sum(len(copies) for copies in self._running_copies)

    @property
    def _running_copies(self) -> list[Landings | TailLandings]:
        return [copies for copies in (self._landings, self._tails.landings) if copies]

    @property
    def _room(self) -> int:
        """Device blocks that loads may take now."""
        return max(0, self._device.available - self._reserve)
