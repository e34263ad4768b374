"""The slab of the host tier: served at once, made ready in the background, page-locked where there is a GPU."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvstore.errors import InvariantError, TierError
from kvstore.host import slab as host_slab
from kvstore.host.slab import AT_ONCE_BYTES, STEP_BYTES, Bytes, CudaPinner, Slab

SLOT = 1 << 20
LARGE = 2 * AT_ONCE_BYTES // SLOT  # slots of a slab that is made ready by a thread
STEP = STEP_BYTES // SLOT


class _Gate:
    """Stands in for the touching of pages: counts it, and waits until told to go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.touched: list[int] = []

    def __call__(self, rows: Bytes) -> None:
        self.begun.set()
        assert self.go_on.wait(60)
        self.touched.append(len(rows))
        rows[:] = 0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Gate]:
    made = _Gate()
    monkeypatch.setattr(host_slab, "_touch", made)
    yield made
    made.go_on.set()


class _Pinner:
    """Notes what is page-locked."""

    def __init__(self, refuse_after: int = 1000) -> None:
        self.now: list[int] = []
        self.ever = 0
        self.refuse_after = refuse_after

    def pin(self, arena: Bytes) -> None:
        if self.ever == self.refuse_after:
            raise TierError("no more; raise the limit")
        self.ever += 1
        self.now.append(arena.ctypes.data)

    def unpin(self, arena: Bytes) -> None:
        self.now.remove(arena.ctypes.data)


def closed(slab: Slab) -> None:
    slab.close()
    assert slab.wait_ready(0)


def test_a_small_slab_is_ready_when_it_is_made() -> None:
    slab = Slab(5, 100)
    assert slab.wait_ready(0)
    assert [slab.take() for _ in range(6)] == [0, 1, 2, 3, 4, None]
    closed(slab)


def test_slots_do_not_overlap_and_lie_in_arenas_of_bounded_size() -> None:
    slab = Slab(10, 100, arena_bytes=350)
    for index in range(10):
        slab.row(index)[:] = index
    assert all((slab.row(index) == index).all() for index in range(10))
    assert [len(arena) for arena in slab._arenas] == [3, 3, 3, 1]
    closed(slab)


def test_a_slot_larger_than_an_arena_is_an_arena_of_its_own() -> None:
    slab = Slab(3, 1000, arena_bytes=100)
    assert [arena.shape for arena in slab._arenas] == [(1, 1000)] * 3
    closed(slab)


def test_a_large_slab_serves_before_any_of_it_is_touched(gate: _Gate) -> None:
    slab = Slab(LARGE, SLOT)
    assert gate.begun.wait(60)
    assert not slab.wait_ready(0)
    taken = [slab.take() for _ in range(LARGE - STEP)]
    assert len(set(taken)) == LARGE - STEP
    assert gate.touched == []
    slab.check([index for index in taken if index is not None])
    for index in taken:
        assert index is not None
        slab.row(index)[:] = 7
    gate.go_on.set()
    assert slab.wait_ready(60)
    assert all((slab.row(index) == 7).all() for index in taken if index is not None)
    assert slab.take() is not None
    closed(slab)


@pytest.mark.parametrize("arena_slots", [1, 3, LARGE])
def test_touched_slots_go_first(gate: _Gate, arena_slots: int) -> None:
    slab = Slab(LARGE, SLOT, arena_bytes=arena_slots * SLOT)
    assert gate.begun.wait(60)
    assert slab.take() == min(STEP, arena_slots)  # the first ones are being touched now
    gate.go_on.set()
    assert slab.wait_ready(60)
    assert sum(gate.touched) == LARGE - 1
    assert slab.fresh == 0
    closed(slab)


def test_a_slot_that_is_being_touched_is_waited_for_rather_than_denied(gate: _Gate) -> None:
    slab = Slab(LARGE, SLOT)
    assert gate.begun.wait(60)
    for _ in range(LARGE - STEP):
        slab.take()
    last: list[int | None] = []
    thread = threading.Thread(target=lambda: last.extend([slab.take() for _ in range(STEP + 1)]))
    thread.start()
    gate.go_on.set()
    thread.join(60)
    assert last == [*range(STEP), None]
    closed(slab)


def test_slots_are_never_lost_or_given_twice_while_the_slab_is_made_ready() -> None:
    slab, rng = Slab(LARGE, SLOT), random.Random(1)
    taken: set[int] = set()
    for _ in range(20_000):
        if taken and rng.random() < 0.5:
            slab.give_back(taken.pop())
        elif (index := slab.take()) is not None:
            assert index not in taken
            taken.add(index)
        else:
            assert len(taken) == LARGE
        assert slab.used == len(taken)
    slab.check(list(taken))
    assert slab.wait_ready(60)
    slab.check(list(taken))
    closed(slab)


def test_check_finds_a_slot_that_was_lost_or_is_used_twice() -> None:
    slab = Slab(4, 100)
    first, second = slab.take(), slab.take()
    assert (first, second) == (0, 1)
    slab.check([0, 1])
    for wrong in ([0], [0, 0], [0, 2]):
        with pytest.raises(InvariantError):
            slab.check(wrong)
    closed(slab)


def test_a_generation_ends_when_the_slot_is_given_back() -> None:
    slab = Slab(2, 100)
    index = slab.take()
    assert index is not None
    before = slab.generations[index]
    slab.give_back(index)
    assert slab.take() == index
    assert slab.generations[index] == before + 1
    closed(slab)


def test_closing_ends_the_thread_before_all_is_touched(gate: _Gate) -> None:
    slab = Slab(LARGE, SLOT)
    assert gate.begun.wait(60)
    closer = threading.Thread(target=slab.close)
    closer.start()
    while not slab._closed:
        pass
    gate.go_on.set()
    closer.join(60)
    assert gate.touched == [STEP]


def test_bytes_that_somebody_still_views_outlive_the_slab() -> None:
    slab = Slab(2, 100)
    row = slab.row(0)
    row[:] = 5
    closed(slab)
    assert (row == 5).all()


@pytest.mark.parametrize("slots", [7, LARGE])
def test_every_arena_is_page_locked_once_and_unlocked_at_close(slots: int) -> None:
    pinner = _Pinner()
    slab = Slab(slots, SLOT, pinner=pinner, arena_bytes=3 * SLOT)
    assert slab.wait_ready(60)
    assert sorted(pinner.now) == sorted({arena.ctypes.data for arena in slab._arenas})
    assert (pinner.ever, slab.pinned_bytes) == (len(slab._arenas), slots * SLOT)
    assert slab.problem == ""
    closed(slab)
    assert pinner.now == []


def test_arenas_are_page_locked_while_later_ones_are_not_touched_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    pinner, order = _Pinner(), []
    monkeypatch.setattr(host_slab, "_touch", lambda rows: order.append(pinner.ever))
    slab = Slab(LARGE, SLOT, pinner=pinner, arena_bytes=STEP_BYTES)
    assert slab.wait_ready(60)
    assert order == [*range(LARGE // STEP)]
    closed(slab)


def test_a_refusal_to_lock_pages_is_told_and_the_slab_serves(caplog: pytest.LogCaptureFixture) -> None:
    pinner = _Pinner(refuse_after=2)
    slab = Slab(9, SLOT, pinner=pinner, arena_bytes=SLOT)
    assert slab.problem.endswith("no more; raise the limit")
    assert len(caplog.records) == 1
    assert {slab.take() for _ in range(10)} == {*range(9), None}
    closed(slab)
    assert pinner.now == []


def test_address_space_that_the_system_refuses_is_an_error_with_a_remedy() -> None:
    with pytest.raises(TierError, match="give the host tier fewer bytes"):
        Slab(1, 1 << 62)


class _Cudart:
    def __init__(self, status: int) -> None:
        self.status, self.calls = status, list[tuple[str, int, int]]()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("register", address, nbytes))
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address, 0))
        return self.status


@pytest.mark.parametrize("status", [0, 2])
def test_arenas_are_registered_with_cuda(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    cudart = _Cudart(status)

    def check_error(code: int) -> None:
        if code:
            raise RuntimeError("out of memory")

    fake = SimpleNamespace(cudart=lambda: cudart, check_error=check_error, device=lambda device: threading.Lock())
    monkeypatch.setattr(torch, "cuda", fake)
    arena = np.zeros(100, np.uint8)
    pinner = CudaPinner("cuda:1")
    if status:
        with pytest.raises(TierError, match=r"cudaHostRegister failed: out of memory; .*ulimit"):
            pinner.pin(arena)
        return
    pinner.pin(arena)
    pinner.unpin(arena)
    assert cudart.calls == [("register", arena.ctypes.data, 100), ("unregister", arena.ctypes.data, 0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_page_locking_is_refused_in_words() -> None:
    with pytest.raises(TierError, match="cudaHostRegister failed"):
        CudaPinner().pin(np.zeros(100, np.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pytorch_takes_registered_arenas_for_pinned_memory() -> None:
    slab = Slab(LARGE, SLOT, pinner=CudaPinner())
    assert slab.wait_ready(60)
    rows = [torch.from_numpy(slab.row(index)) for index in (0, LARGE - 1)]
    assert all(row.is_pinned() for row in rows)
    rows[0][:] = 3
    assert bool((rows[0].to("cuda", non_blocking=True).cpu() == 3).all())
    closed(slab)
    assert not rows[0].is_pinned()
