"""Tails: blocks that come from the back of a prefix while somebody computes its front."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.device import DeviceTier
from kvstore.errors import MissReason
from kvstore.events import TierName
from kvstore.host.tier import HostTier
from kvstore.store import Acquisition, ReadTiers, TieredStore
from kvstore.tail import PATIENCE, Tail
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock, chain, names, payload, payloads
from tests.kvstore.gated_tier import GatedTier, until
from tests.kvstore.late_copier import LateCopier

COUNT = 64
PIECE = 2  # of so many blocks
METAS = chain(COUNT)
COMPUTE_MS = LOAD_MS = 10.0  # a block


class Rig:
    """A store over a shared tier that holds a chain, and a naive account of who holds which device block."""

    def __init__(
        self,
        *,
        device_blocks: int = 200,
        host_blocks: int = 100,
        load_ms: float = LOAD_MS,
        copier: LateCopier | None = None,
    ) -> None:
        self.clock = ManualClock(0.0)
        self.copier = copier
        nbytes = LAYOUT.block_nbytes
        self.shared = GatedTier(self.clock)
        self.device = DeviceTier(LAYOUT, device_blocks * nbytes, clock=self.clock, poison=True, copier=copier)
        if copier is not None:
            copier.device = self.device
        self.host = HostTier(LAYOUT, host_blocks * nbytes, clock=self.clock) if host_blocks else None
        self.store = TieredStore(LAYOUT, self.device, self.host, self.shared, clock=self.clock, default_ttl_s=None)
        self.shared.write(METAS, payloads(METAS))
        self.store.pump()
        self.source = self.store._promoter.sources[TierName.REDIS]
        self.source.estimate.observe(100 * nbytes, 100 * load_ms)
        self.front: list[int] = []
        self.tails: list[Tail] = []

    def acquire(self, metas: list[BlockMeta] = METAS, **options: object) -> Acquisition:
        asked = {"reads": ReadTiers(), "compute_ms": lambda first, count: COMPUTE_MS * count, "root": METAS[0].root}
        return self.store.acquire_from_both_ends(names(metas), **(asked | options))

    def tail(self) -> Tail:
        acquisition = self.acquire()
        assert acquisition.done
        assert acquisition.tail is not None
        self.front = list(acquisition.block_ids)
        self.tails.append(acquisition.tail)
        return acquisition.tail

    def copy(self) -> None:
        """What is being copied is there, and is taken in."""
        if self.copier is not None:
            self.copier.make_all()
            self.store.pump()

    def copied(self) -> list[int]:
        """Blocks that a copy holds: on their way up for a tail or an acquisition, or down to host."""
        promoter = self.store._promoter
        coming = [block for piece, _ in promoter._tails.landings._coming for block in piece.block_ids.values()]
        if promoter._landings is not None:
            coming += [block for each in promoter._landings._coming for block in each.block_ids]
        spilling = self.store._spilling
        return coming + ([] if spilling is None else [block for spill in spilling._spills for block in spill.block_ids])

    def come(self, pieces: int) -> None:
        """So many pieces end, and are taken in."""
        ended = self.shared.ended
        self.shared.let_go(pieces)
        until(lambda: self.shared.ended == ended + pieces)
        until(lambda: self.shared.begun > self.shared.ended or not self._reads())
        self.store.pump()

    def ends(self) -> None:
        """The thread has nothing more to do."""
        until(lambda: not self._reads())
        self.store.pump()

    def _reads(self) -> bool:
        promoter = self.store._promoter
        futures = [*(run.future for run in promoter._tails._runs), *promoter._loader._running.values()]
        return any(not future.done() for future in futures)

    def compute(self, count: int) -> None:
        """The front makes so many blocks more."""
        metas = METAS[len(self.front) : len(self.front) + count]
        block_ids = self.store.allocate(len(metas))
        assert block_ids is not None
        self.device.inject(block_ids, payloads(metas))
        self.store.commit(block_ids, metas)
        self.front += block_ids

    def take(self, tail: Tail) -> int:
        block_ids, tiers = tail.take(len(self.front))
        assert tiers == [TierName.REDIS] * len(block_ids)
        self.front += block_ids
        return len(block_ids)

    def assert_right(self) -> None:
        got = [bytes(each) for each in self.device.payloads(self.front)]
        assert got == [bytes(payload(meta.hash)) for meta in METAS[: len(got)]]

    def finish(self) -> None:
        self.assert_right()
        self.store.release(self.front)
        for tail in self.tails:
            tail.cancel()
        self.shared.open()
        self.ends()
        self.copy()
        self.store.check()
        assert [block for block in range(self.device.num_blocks) if self.device.refs(block)] == []
        assert self.source.pending_blocks == 0
        assert self.source.stuck == 0
        self.store.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.finish()


def test_blocks_come_from_the_back_and_are_taken_over_where_the_front_meets_them(rig: Rig) -> None:
    tail = rig.tail()
    rig.come(8)
    assert rig.shared.reads[:8] == [names(METAS[at : at + PIECE]) for at in range(COUNT - PIECE, COUNT - 17, -PIECE)]
    assert len(tail.block_ids) == 8 * PIECE
    assert rig.take(tail) == 0
    tail.passed(COUNT - 16)
    rig.compute(COUNT - 16)
    rig.shared.let_go()  # the one that is being read now is behind the front
    rig.ends()
    assert rig.shared.begun == 9
    assert rig.take(tail) == 16
    assert tail.is_over


def test_the_front_goes_to_where_both_meet_and_then_in_the_time_of_a_piece(rig: Rig) -> None:
    tail = rig.tail()
    assert tail.reach(0) == COUNT // 2
    assert tail.expected == COUNT // 2
    rig.come(4)
    assert tail.reach(0) == (COUNT - 4 * PIECE) // 2
    tail.passed(50)
    assert tail.reach(50) == 3
    assert tail.reach(54) == PIECE  # up to the piece that is being read now


def test_a_piece_that_takes_longer_draws_the_meeting_place_nearer_to_it(rig: Rig) -> None:
    tail = rig.tail()
    until(lambda: rig.shared.begun == 1)
    rig.clock.now += 0.05
    assert tail.reach(0) == COUNT // 2 - 2  # for as much of the load as should have come by now
    rig.clock.now += 10.0
    rig.store.pump()
    assert tail.is_over, "a tier that is silent is waited for no more"
    assert rig.source.stuck == 1
    assert tail.reach(0) is None
    assert rig.acquire().tail is None
    rig.compute(COUNT)
    rig.shared.open()
    rig.ends()
    assert rig.source.stuck == 0


def test_a_piece_may_be_late_by_so_much(rig: Rig) -> None:
    tail = rig.tail()
    until(lambda: rig.shared.begun == 1)
    rig.clock.now += PATIENCE * PIECE * LOAD_MS / 1e3 + 0.04
    rig.store.pump()
    assert not tail.is_over
    rig.come(1)
    assert len(tail.block_ids) == PIECE


def test_what_came_late_is_used_where_the_front_has_not_passed(rig: Rig) -> None:
    tail = rig.tail()
    rig.come(2)
    rig.clock.now += 10.0
    rig.store.pump()
    assert tail.reach(0) == COUNT - 2 * PIECE
    rig.shared.let_go()
    rig.ends()
    assert tail.reach(0) == COUNT - 3 * PIECE
    rig.compute(COUNT - 3 * PIECE)
    assert rig.take(tail) == 3 * PIECE


def test_blocks_that_both_made_are_there_once(rig: Rig) -> None:
    tail = rig.tail()
    rig.come(1)
    until(lambda: rig.shared.begun == 2)
    tail.passed(COUNT - PIECE - 1)  # into the middle of what is being read
    rig.compute(COUNT - PIECE - 1)
    rig.come(1)
    assert len(tail.block_ids) == PIECE + 1
    rig.ends()
    assert rig.take(tail) == PIECE + 1
    assert rig.device.stats().blocks == COUNT


def test_a_block_that_somebody_else_brought_is_shared(rig: Rig) -> None:
    tail = rig.tail()
    until(lambda: rig.shared.begun == 1)
    last = METAS[-1:]
    (block,) = rig.store.allocate(1) or [-1]
    rig.device.inject([block], payloads(last))
    rig.store.commit([block], last)
    rig.come(1)
    assert tail.block_ids[-1] == block
    assert rig.device.refs(block) == 2
    rig.store.release([block])
    tail.cancel()


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_who_cancels_gets_nothing_and_leaves_nothing(rig: Rig, pieces: int) -> None:
    tail = rig.tail()
    rig.come(pieces)
    until(lambda: rig.shared.begun == pieces + 1)
    tail.cancel()
    tail.cancel()
    assert tail.is_over
    assert tail.take(COUNT - 1) == ([], [])
    rig.shared.let_go()
    rig.ends()
    assert rig.shared.begun == pieces + 1
    assert tail.block_ids == []


def test_a_cancelled_acquisition_takes_its_tail_along(rig: Rig) -> None:
    acquisition = rig.acquire()
    rig.come(2)
    acquisition.cancel()
    assert acquisition.tail is not None
    assert acquisition.tail.block_ids == []


@pytest.mark.parametrize("how", ["raises", "is cut", "refuses"])
def test_a_tier_that_fails_half_way_costs_only_what_is_missing(rig: Rig, how: str) -> None:
    tail = rig.tail()
    rig.come(3)
    shared = rig.shared
    if how == "raises":
        shared.raises = RuntimeError("broken")
    else:
        shared.read_limit, shared.ends = (1, MissReason.DEADLINE) if how == "is cut" else (0, MissReason.BUSY)
    rig.come(1)
    rig.ends()
    held = 3 * PIECE
    assert len(tail.block_ids) == held + (how == "is cut")
    if how == "is cut":  # a hole lies behind what came of the last piece
        rig.compute(COUNT - held - PIECE)
        assert rig.take(tail) == 1
        assert tail.reach(len(rig.front)) == 1
        rig.compute(1)
    else:
        assert tail.reach(0) == COUNT - held
        rig.compute(COUNT - held)
    assert rig.take(tail) == held
    assert tail.is_over


@pytest.mark.parametrize("everything", [True, False])
def test_what_is_cleared_meanwhile_comes_nowhere(rig: Rig, everything: bool) -> None:
    tail = rig.tail()
    rig.come(2)
    until(lambda: rig.shared.begun == 3)
    rig.store.clear(**({} if everything else {"prefix": METAS[10].hash}))
    assert tail.is_over
    rig.shared.open()
    rig.ends()
    assert rig.device.stats().blocks == 0
    assert rig.host is not None
    assert rig.host.stats().blocks == 0


def test_blocks_that_came_are_in_host_too(rig: Rig) -> None:
    tail = rig.tail()
    rig.come(3)
    assert rig.host is not None
    assert all(rig.host.holds(meta.hash) for meta in METAS[-3 * PIECE :])
    tail.cancel()


def test_the_estimate_learns_once_and_the_score_nothing(rig: Rig) -> None:
    seen: list[tuple[int, float]] = []
    rig.source.observe = lambda count, ms: seen.append((count, ms))  # type: ignore[method-assign]
    tail = rig.tail()
    rig.come(5)
    tail.cancel()
    rig.shared.let_go()
    rig.ends()
    assert [count for count, _ in seen] == [PIECE]
    assert rig.source.score.loads == 0


def test_reads_that_begin_slowly_are_made_larger(rig: Rig) -> None:
    nbytes = LAYOUT.block_nbytes
    rig.source.estimate = type(rig.source.estimate)()
    for count in (1, 40, 1, 40):
        rig.source.estimate.observe(count * nbytes, 20.0 + 8.0 * count)
    tail = rig.tail()
    rig.come(1)
    assert len(tail.block_ids) == 20
    assert tail._pace.piece == 20
    assert tail._pace.block_ms == pytest.approx(9.0)


def test_the_room_that_the_front_needs_is_not_taken() -> None:
    rig = Rig(device_blocks=COUNT + 2)
    tail = rig.tail()
    held = rig.store.allocate(10)
    assert held is not None
    rig.come(1)
    assert tail.is_over
    assert rig.device.available == COUNT + 2 - 10
    rig.store.release(held)
    rig.finish()


def refuses(rig: Rig, **options: object) -> None:
    """No tail is begun, and the acquisition is what `acquire` gives."""
    acquisition = rig.acquire(**options)
    assert acquisition.tail is None
    acquisition.cancel()


@pytest.mark.parametrize(
    ("load_ms", "options"),
    [
        (0.4 * COMPUTE_MS, {}),
        (20 * COMPUTE_MS, {}),
        (LOAD_MS, {"compute_ms": lambda first, count: float("inf")}),
        (LOAD_MS, {"compute_ms": lambda first, count: 0.1 * count}),
        (LOAD_MS, {"reads": ReadTiers(shared=False)}),
        (LOAD_MS, {"reads": ReadTiers(device=False)}),
    ],
)
def test_it_is_not_done_where_it_is_no_better(load_ms: float, options: dict[str, object]) -> None:
    rig = Rig(load_ms=load_ms)
    rig.shared.is_open = True
    refuses(rig, **options)
    rig.store.close()


def test_it_is_not_done_before_anything_was_measured() -> None:
    rig = Rig()
    rig.source.estimate = type(rig.source.estimate)()
    rig.shared.is_open = True
    refuses(rig)
    rig.store.close()


def test_it_is_not_done_where_only_the_piece_takes_long_and_not_the_block() -> None:
    """So it looks after a first read, which found nothing."""
    rig = Rig()
    rig.source.estimate = type(rig.source.estimate)()
    rig.source.estimate.observe(0, LOAD_MS)
    rig.shared.is_open = True
    refuses(rig)
    rig.store.close()


def test_it_is_not_done_without_room_for_all_of_the_prompt() -> None:
    rig = Rig(device_blocks=COUNT - 1)
    rig.shared.is_open = True
    refuses(rig)
    rig.store.close()


def test_what_is_near_comes_first_and_the_tail_begins_behind_it(rig: Rig) -> None:
    rig.compute(7)
    rig.store.release(rig.front)
    tail = rig.tail()
    assert len(rig.front) == tail.first == 7
    tail.cancel()


def test_what_is_near_further_back_is_not_loaded_around(rig: Rig) -> None:
    rig.compute(COUNT)
    rig.store.release(rig.front)
    rig.front = []
    assert rig.store.flush(30)
    near = names(METAS[:40])
    for tier in (rig.device, rig.host):
        assert tier is not None
        tier.remove(near, "evicted")  # type: ignore[arg-type]
    refuses(rig)


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_prefix_that_is_near_is_not_even_asked_about(rig: Rig, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.compute(COUNT)
    rig.store.release(rig.front)
    if where == "host":
        rig.device.clear()
    monkeypatch.setattr(rig.store._promoter._tails, "start", lambda acquisition: pytest.fail("asked"))
    acquisition = rig.acquire()
    assert acquisition.done
    rig.front = acquisition.block_ids
    assert len(rig.front) == COUNT
    monkeypatch.undo()


@pytest.fixture
def late() -> Iterator[Rig]:
    """Pieces are copied beside the steps, when a test says so."""
    rig = Rig(copier=LateCopier())
    yield rig
    rig.finish()


def found(rig: Rig) -> int:
    """How many of the chain's blocks the device gives to whoever asks."""
    return sum(rig.device.holds(meta.hash) for meta in METAS)


def test_a_piece_is_there_when_it_has_been_copied_and_not_before(late: Rig) -> None:
    tail, room = late.tail(), late.device.available
    late.come(2)
    assert (tail.block_ids, found(late)) == ([], 0)
    assert late.device.available == room - 2 * PIECE
    assert late.copier.locked >= 2 * PIECE  # read into memory that the device copies from
    assert tail.reach(0) == (COUNT - 2 * PIECE) // 2, "what is being copied will be there"
    late.copier.make_one()
    assert tail.block_ids == []
    late.store.pump()
    assert (len(tail.block_ids), found(late)) == (PIECE, PIECE)
    late.copy()
    late.compute(COUNT - 2 * PIECE)
    assert late.take(tail) == 2 * PIECE


def test_a_front_that_comes_up_to_a_copy_goes_on_by_a_block(late: Rig) -> None:
    tail = late.tail()
    late.come(2)
    late.compute(COUNT - 2 * PIECE)
    tail.passed(len(late.front))
    late.shared.open()
    late.ends()
    assert not tail.is_over
    assert (tail.reach(len(late.front) - 3), tail.reach(len(late.front))) == (3, 1)
    assert late.take(tail) == 0
    late.compute(1)
    tail.passed(len(late.front))
    late.copy()
    assert len(tail.block_ids) == 2 * PIECE - 1, "what the front has passed is given back"
    assert late.take(tail) == 2 * PIECE - 1
    assert late.device.stats().blocks == COUNT


def test_a_front_that_passes_a_copy_needs_nothing_of_it(late: Rig) -> None:
    tail = late.tail()
    late.come(1)
    late.compute(COUNT)
    tail.passed(COUNT)
    assert tail.is_over
    assert tail.reach(COUNT) is None
    late.shared.open()
    late.ends()
    late.copy()
    assert tail.block_ids == []
    assert late.device.stats().blocks == COUNT


def test_memory_that_is_being_copied_is_not_read_into_again(late: Rig) -> None:
    tail = late.tail()
    for _ in range(12):
        late.come(1)
    assert late.copier.locked >= 12 * PIECE
    late.copy()
    late.compute(COUNT - 12 * PIECE)
    assert late.take(tail) == 12 * PIECE
    late.assert_right()


@pytest.mark.parametrize("how", ["given up", "cleared", "computed by the front", "closed"])
def test_blocks_of_a_tail_that_is_over_are_the_copys_until_it_ends(late: Rig, how: str) -> None:
    tail, room = late.tail(), late.device.available
    late.come(2)
    if how == "given up":
        tail.cancel()
    elif how == "cleared":
        late.shared.raises = RuntimeError("nothing comes any more")
        late.shared.open()
        late.ends()  # whoever is read no more, but copied, is found too
        late.store.clear()
    elif how == "closed":
        late.store._promoter.close()
    else:
        tail.passed(COUNT)
    late.store.check()
    if how == "closed":
        assert not late.copier.running, "closing waits for copies"
    else:
        assert late.device.available == room - 2 * PIECE
        assert late.store.allocate(room - 2 * PIECE + 1) is None
    late.copy()
    assert tail.is_over
    assert late.device.available == room
    assert found(late) == 0


def test_a_block_that_came_by_other_means_while_it_was_copied_is_shared(late: Rig) -> None:
    tail, last = late.tail(), METAS[-1:]
    late.come(1)
    (block,) = late.store.allocate(1) or [-1]
    late.device.inject([block], payloads(last))
    late.store.commit([block], last)
    late.copy()
    assert tail.block_ids[-1] == block
    assert late.device.refs(block) == 2
    assert late.device.stats().blocks == PIECE
    late.store.release([block])


def test_waiting_ends_when_a_piece_was_copied(late: Rig) -> None:
    tail = late.tail()
    late.come(1)
    late.store.wait(0.0)
    assert late.store.copies == 1
    late.copier.make_all()
    late.store.wait(30.0)
    late.store.pump()
    assert len(tail.block_ids) == PIECE
    assert late.store.copies == 0


class TailMachine(RuleBasedStateMachine):
    """Fronts that compute, tails that come, fail, and are given up, in a device that is too small for all of them."""

    copies_late = False

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(device_blocks=2 * COUNT, host_blocks=30, copier=LateCopier() if self.copies_late else None)
        self.fronts: list[tuple[list[int], Tail | None]] = []

    @rule()
    def start(self) -> None:
        if len(self.fronts) < 3:
            acquisition = self.rig.acquire(compute_ms=lambda first, count: COMPUTE_MS * count)
            if not acquisition.done:
                acquisition.cancel()
            else:
                self.fronts.append((acquisition.block_ids, acquisition.tail))

    @rule(number=st.integers(0, 2), length=st.integers(1, 40), commits=st.booleans())
    def compute(self, number: int, length: int, commits: bool) -> None:
        if number >= len(self.fronts):
            return
        front, tail = self.fronts[number]
        reach = None if tail is None else tail.reach(len(front))
        length = min(length, COUNT - len(front), COUNT if reach is None else reach)
        if length == 0 or (block_ids := self.rig.store.allocate(length)) is None:
            return
        metas = METAS[len(front) : len(front) + length]
        if tail is not None:
            tail.passed(len(front) + length)
        self.rig.device.inject(block_ids, payloads(metas))
        if commits:
            self.rig.store.commit(block_ids, metas)
        front += block_ids

    @rule(number=st.integers(0, 2))
    def take(self, number: int) -> None:
        if number < len(self.fronts):
            front, tail = self.fronts[number]
            if tail is not None:
                front += tail.take(len(front))[0]
                assert len(front) <= COUNT

    @rule(number=st.integers(0, 2))
    def end(self, number: int) -> None:
        if number < len(self.fronts):
            front, tail = self.fronts.pop(number)
            if tail is not None:
                tail.cancel()
            self.rig.store.release(front)

    @rule(count=st.integers(1, 10))
    def pieces_come(self, count: int) -> None:
        self.rig.shared.let_go(count)
        self.settle()

    @rule(count=st.integers(2, 6))
    def pieces_come_step_by_step(self, count: int) -> None:
        for _ in range(count):
            self.pieces_come(1)
            self.rig.store.pump()

    def settle(self) -> None:
        """Whatever a thread can do without a permit has been done, so that a run can be repeated."""
        shared = self.rig.shared
        tails = self.rig.store._promoter._tails
        until(
            lambda: (
                all(run.future.done() for run in tails._runs)
                or (shared.begun > shared.ended and (shared._permits == 0 and not shared.is_open))
            )
        )

    @rule()
    def pump(self) -> None:
        self.rig.store.pump()

    @rule(limit=st.sampled_from([None, None, 0, 1]), raises=st.sampled_from([None, None, RuntimeError("broken")]))
    def reads_fail(self, limit: int | None, raises: Exception | None) -> None:
        self.rig.shared.read_limit, self.rig.shared.raises = limit, raises
        self.rig.shared.ends = MissReason.DEADLINE

    @rule(seconds=st.sampled_from([0.01, 0.1, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.rig.clock.now += seconds
        # What the last reads took is not what the next ones are said to take.
        self.rig.source.estimate = type(self.rig.source.estimate)()
        self.rig.source.estimate.observe(100 * LAYOUT.block_nbytes, 100 * LOAD_MS)

    @rule(at=st.sampled_from([None, 10, 50]))
    def clear(self, at: int | None) -> None:
        self.rig.store.clear(**({} if at is None else {"prefix": METAS[at].hash}))
        self.rig.shared.raises = None
        self.rig.shared.write(METAS, payloads(METAS))
        self.rig.store.pump()

    @rule(start=st.integers(0, COUNT - 1))
    def the_device_forgets(self, start: int) -> None:
        self.rig.device.remove(names(METAS[start:]), "evicted")  # type: ignore[arg-type]

    @invariant()
    def books_balance_and_every_byte_is_right(self) -> None:
        self.settle()
        self.rig.store.check()
        held = [0] * self.rig.device.num_blocks
        for front, tail in self.fronts:
            got = [bytes(each) for each in self.rig.device.payloads(front)]
            assert got == [bytes(payload(meta.hash)) for meta in METAS[: len(got)]]
            for block in (*front, *(() if tail is None else tail.block_ids)):
                held[block] += 1
            assert tail is None or tail.reach(len(front)) != 0 or len(front) in tail._held, "somebody waits"
            for place, block in () if tail is None else tail._held.items():
                assert bytes(self.rig.device.payloads([block])[0]) == bytes(payload(METAS[place].hash))
        for block in self.rig.copied():
            held[block] += 1
        assert held == [self.rig.device.refs(block) for block in range(self.rig.device.num_blocks)]

    def teardown(self) -> None:
        for front, tail in self.fronts:
            if tail is not None:
                tail.cancel()
            self.rig.store.release(front)
        self.rig.shared.raises = None
        self.rig.finish()


class LateCopiesMachine(TailMachine):
    """The same where what comes is copied beside the steps, and the copies end when chance says so."""

    copies_late = True

    @rule(count=st.integers(1, 4))
    def copies_end(self, count: int) -> None:
        for _ in range(min(count, len(self.rig.copier.running))):
            self.rig.copier.make_one()


TailMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTailMachine = TailMachine.TestCase
LateCopiesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLateCopiesMachine = LateCopiesMachine.TestCase
