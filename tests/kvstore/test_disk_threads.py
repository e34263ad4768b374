"""Threads that meet in the disk tier at the worst moment, each made by a seam: nothing here waits for luck."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.disk import index as index_module
from tests.kvstore.blocks_for_tests import chain, names, payloads
from tests.kvstore.disk_for_tests import FaultyFiles, Place

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
