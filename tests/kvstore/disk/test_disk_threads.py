"""Threads that meet in the disk tier at the worst moment, each made by a seam: nothing here waits for luck."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.disk import index as index_module
from kvstore.disk import space as space_module
from kvstore.disk.entries import Entry
from kvstore.disk.lock import LOCK_NAME
from kvstore.disk.log import Found, Kind
from kvstore.errors import InvariantError
from kvstore.events import RemovalCause
from tests.kvstore.blocks_for_tests import OTHER_ROOT, ROOT, chain, names, payloads
from tests.kvstore.disk.disk_for_tests import SLOT, FaultyFiles, Place, log_file

PATIENCE_S = 10.0


def elsewhere(work: Callable[[], object]) -> None:
    """Do it in another thread; it must not have to wait for this one."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it waits for us"
    assert raised == []


@pytest.fixture
def files() -> FaultyFiles:
    return FaultyFiles()


@pytest.fixture
def place(tmp_path: Path, files: FaultyFiles) -> Place:
    return Place(tmp_path / "blocks", files=files)


def test_two_threads_that_find_the_log_long_start_one_rewrite(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    metas = chain(2)
    place.tier.write(metas, payloads(metas))
    monkeypatch.setattr(index_module, "SPARE_LOG_BYTES", -(10**9))
    starts: list[threading.Thread] = []
    start = threading.Thread.start

    def start_slowly(thread: threading.Thread) -> None:
        if thread.name == "kvstore-disk-log":
            starts.append(thread)
            if len(starts) == 1:
                elsewhere(lambda: place.tier.lease(names(metas), 50.0))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_slowly)
    place.tier.lease(names(metas), 40.0)
    monkeypatch.undo()
    assert len(starts) == 1
    place.tier.close()
    assert not starts[0].is_alive()


def test_no_rewrite_starts_when_the_tier_is_closed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    metas = chain(2)
    place.tier.write(metas, payloads(metas))
    index = place.tier._space.index
    place.tier.close()
    monkeypatch.setattr(index_module, "SPARE_LOG_BYTES", -(10**9))
    index.rewrite_when_long()
    assert index._thread is None


def test_a_system_without_another_thread_does_without_a_rewrite(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    metas = chain(2)
    place.tier.write(metas, payloads(metas))
    monkeypatch.setattr(index_module, "SPARE_LOG_BYTES", -(10**9))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert place.tier.lease(names(metas), 40.0) == 2
    monkeypatch.undo()
    assert place.crash().stats().leased == 2


@pytest.mark.parametrize("wait", ["sync", "sync_folder"])
def test_a_lease_does_not_wait_for_a_rewrite_that_waits_for_the_device(
    place: Place, files: FaultyFiles, monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    seen: list[object] = []

    def meanwhile(what: object) -> None:
        seen.append(what)
        elsewhere(lambda: place.tier.lease(names(metas), 60.0))

    monkeypatch.setattr(files, wait, meanwhile)
    place.tier._space.index.rewrite()
    monkeypatch.undo()
    assert len(seen) == 1
    place.tier.check()
    assert place.crash().stats().leased == 3


def test_a_lease_does_not_wait_for_a_flush_that_waits_for_the_device(
    place: Place, files: FaultyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    monkeypatch.setattr(files, "sync", lambda fd: elsewhere(lambda: place.tier.lease(names(metas), 60.0)))
    place.tier.flush()
    monkeypatch.undo()
    assert place.crash().stats().leased == 3


def test_a_block_that_goes_while_the_disk_refuses_writes_costs_no_slot(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    metas = chain(4)
    place.tier.write(metas[:3], payloads(metas[:3]))
    space = place.tier._space

    def refuse() -> bool:
        if not space.lock.locked():  # another thread comes in between
            place.tier.remove(names(metas)[1:2], RemovalCause.EVICTED)
        return False

    monkeypatch.setattr(space.health, "may_write", refuse)
    assert place.tier.write(metas, payloads(metas)) == 3
    monkeypatch.undo()
    place.tier.check()
    assert place.tier.stats().used_bytes == place.tier.stats().blocks * SLOT
    place.tier.clear()
    assert place.tier.stats().used_bytes == 0


def test_the_audit_finds_a_slot_that_nobody_fills_any_more(place: Place) -> None:
    place.tier.check()
    with place.tier._lock:
        place.tier._books.reserve(chain(1))
    with pytest.raises(InvariantError, match="writes that have ended"):
        place.tier.check()


def test_a_block_that_is_cleared_when_the_log_knows_it_and_nobody_else_does_not_come_back_after_a_kill(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metas, kept = chain(3), chain(2, root=OTHER_ROOT)
    place.tier.write(kept, payloads(kept))
    index, killed = place.tier._space.index, tmp_path / "killed"
    flush = index.flush
    log_nbytes = log_file(place.folder).stat().st_size

    def flush_and_clear() -> None:
        flush()
        if not killed.exists() and log_file(place.folder).stat().st_size > log_nbytes:
            monkeypatch.undo()
            assert place.tier.clear(root=ROOT) == 0
            place.tier.check()
            shutil.copytree(place.folder, killed)  # what a process that is killed now leaves
            (killed / LOCK_NAME).unlink()

    monkeypatch.setattr(index, "flush", flush_and_clear)
    place.tier.write(metas, payloads(metas))
    assert killed.exists()
    place.tier.check()
    other = Place(killed)
    assert (other.tier.stats().blocks, other.tier.match(names(kept))) == (2, 2)
    other.tier.close()
    assert place.crash().stats().blocks == 2
    place.tier.check()


def test_a_lease_that_ends_while_the_log_is_rewritten_ends_in_the_new_log(place: Place) -> None:
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    place.tier.lease(names(metas), None)
    books = place.tier._books
    entry = books.entry(metas[1].hash)
    assert entry is not None

    class Ending(Entry):
        """Another thread ends the lease when it has just been looked at."""

        @property  # type: ignore[misc]
        def lease(self) -> tuple[float, float | None] | None:
            looks.append(self.index)
            return (0.0, None) if len(looks) == 1 else None

    looks: list[int] = []
    ending = Ending.__new__(Ending)
    for name in ("index", "meta", "sequence", "used", "order"):
        setattr(ending, name, getattr(entry, name))
    assert [record[0] for record in books.journal.all([ending])] == [Kind.STORED, Kind.LEASED]
    assert looks == [entry.index]


def test_nobody_waits_while_an_audit_compares_the_log(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    metas, more = chain(3), chain(2, first_token=1)
    place.tier.write(metas, payloads(metas))
    replay, seen = index_module.replay, []

    def slowly(records: list[Found]) -> dict[int, Found]:
        elsewhere(lambda: place.tier.lease(names(metas), 50.0))
        elsewhere(lambda: seen.append(place.tier.write(more, payloads(more))))
        return replay(records)

    monkeypatch.setattr(index_module, "replay", slowly)
    place.tier.check()
    assert seen == [2]
    place.tier.check()


def test_audits_read_the_headers_of_all_slots_in_turn(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_module, "AUDITED_SLOTS", 2)
    metas = chain(5)
    place.tier.write(metas, payloads(metas))
    slab, asked = place.tier._space.slab, []
    page = slab.page
    monkeypatch.setattr(slab, "page", lambda slot: asked.append(slot) or page(slot))
    for _ in range(3):
        place.tier.check()
    assert sorted(asked) == sorted(place.tier._books.held_slots())
    place.tier.check()
    assert asked[5:] == asked[:2]


def test_the_audit_finds_a_log_that_lacks_a_removal(place: Place) -> None:
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    with place.tier._lock:
        place.tier._books.unpin(place.tier._books.take_out(names(metas)[2:], RemovalCause.EVICTED))
        place.tier._books.journal.take()  # nobody appends it
    with pytest.raises(InvariantError, match="other blocks than its books"):
        place.tier.check()
