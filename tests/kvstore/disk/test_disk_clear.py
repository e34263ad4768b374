"""What was cleared from the disk tier stays gone, log or no log, and to clear is cheap."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvstore.blocks import BlockHash
from kvstore.disk.folder import SLAB_SUFFIX, SURVIVORS_SUFFIX
from kvstore.disk.tier import DiskTier
from kvstore.errors import TierError
from kvstore.events import RemovalCause
from tests.kvstore.blocks_for_tests import OTHER_ROOT, ROOT, buffers, chain, names, payloads, read_verified
from tests.kvstore.disk.disk_for_tests import FaultyFiles, Place, log_file, slab_file
from tests.kvstore.disk.test_disk_kill import CHAINS, LENGTH, SLOTS, run_and_kill


def read_back(tier: DiskTier, hashes: list[BlockHash]) -> int:
    return read_verified(tier, hashes)


@pytest.fixture
def files() -> FaultyFiles:
    return FaultyFiles()


@pytest.fixture
def place(tmp_path: Path, files: FaultyFiles) -> Place:
    return Place(tmp_path / "blocks", files=files)


def lose_the_log(place: Place) -> DiskTier:
    """As `Place.crash`, and the log is gone as well."""
    place.abandon()
    log_file(place.folder).unlink()
    return place._come_back(0.0)


def test_to_clear_many_blocks_takes_a_few_writes_and_none_comes_back_without_the_log(
    tmp_path: Path, files: FaultyFiles
) -> None:
    place = Place(tmp_path / "blocks", blocks=80, files=files)
    cleared, kept = chain(60), chain(9, root=OTHER_ROOT)
    for metas in (cleared, kept):
        place.tier.write(metas, payloads(metas))
    files.calls = 0
    assert place.tier.clear(root=ROOT) == 60
    assert files.calls <= 4
    tier = lose_the_log(place)
    assert (tier.stats().blocks, read_back(tier, names(kept))) == (9, 9)
    tier.check()
    again = chain(4, first_token=8)
    tier.write(again, payloads(again))
    tier.clear(prefix=kept[5].hash)
    tier = lose_the_log(place)
    assert (tier.stats().blocks, read_back(tier, names(kept)), read_back(tier, names(again))) == (9, 5, 4)


def test_what_left_the_tier_before_its_root_was_cleared_does_not_come_back_either(place: Place) -> None:
    evicted, kept = chain(3), chain(2, root=OTHER_ROOT)
    for metas in (evicted, kept):
        place.tier.write(metas, payloads(metas))
    place.tier.remove(names(evicted), RemovalCause.EVICTED)
    place.tier.clear(root=ROOT)
    tier = lose_the_log(place)
    assert (tier.stats().blocks, tier.match(names(kept))) == (2, 2)


@pytest.mark.parametrize("harm", ["missing", "garbage", "older"])
def test_without_the_survivors_no_cleared_block_comes_back(place: Place, harm: str) -> None:
    metas = chain(6)
    path = slab_file(place.folder).with_suffix(SURVIVORS_SUFFIX)
    place.tier.write(metas, payloads(metas))
    place.tier.clear(prefix=metas[4].hash)
    older = path.read_bytes()
    place.tier.clear(prefix=metas[2].hash)
    after = chain(1, first_token=9)
    place.tier.write(after, payloads(after))
    match harm:
        case "missing":
            path.unlink()
        case "garbage":
            path.write_bytes(b"\x93" * path.stat().st_size)
        case "older":
            path.write_bytes(older)
    tier = lose_the_log(place)
    assert (tier.match(names(metas)), read_back(tier, names(after))) == (0, 1)
    tier.check()


def test_a_block_that_is_cleared_while_it_is_written_does_not_come_back(place: Place, files: FaultyFiles) -> None:
    metas = chain(2)
    cleared: list[int] = []

    def clear() -> None:
        files.before_write = None
        cleared.append(place.tier.clear(root=ROOT))

    files.before_write = clear
    place.tier.write(metas, payloads(metas))
    assert (cleared, place.tier.stats().blocks) == ([0], 0)
    assert lose_the_log(place).stats().blocks == 0


def test_a_clear_that_the_disk_refuses_is_made_good_when_it_does_not(place: Place, files: FaultyFiles) -> None:
    metas = chain(4)
    place.tier.write(metas, payloads(metas))
    files.writes, files.suffix = errno.EIO, SLAB_SUFFIX
    assert place.tier.clear(prefix=metas[1].hash) == 3
    files.writes = 0
    place.tier.sweep()
    assert lose_the_log(place).match(names(metas)) == 1


@pytest.mark.parametrize("cause", [RemovalCause.CLEARED, RemovalCause.INVALID])
def test_a_block_that_goes_while_it_is_read_is_absent_and_not_wrong(
    place: Place, files: FaultyFiles, caplog: pytest.LogCaptureFixture, cause: RemovalCause
) -> None:
    metas = chain(2)
    place.tier.write(metas, payloads(metas))
    read = files.preadv

    def remove_first(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        files.preadv = read  # type: ignore[method-assign]
        assert place.tier.remove(names(metas), cause) == 2
        return read(fd, buffers, offset)

    files.preadv = remove_first  # type: ignore[method-assign]
    found = place.tier.read(names(metas), buffers(2)).count
    assert place.tier.stats().misses == ({} if found == 2 else {"absent": 1})
    assert "wrong" not in caplog.text
    place.tier.check()
    assert place.tier.stats().used_bytes == 0


def test_a_lease_never_waits_for_the_device(place: Place, files: FaultyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    place.tier._space.index.is_incomplete = True  # a record could not be written
    monkeypatch.setattr(files, "sync", lambda fd: pytest.fail("waited for the device"))
    assert place.tier.lease(names(metas), 60.0) == 3
    assert place.tier.end_leases(names(metas[2:])) == 1
    monkeypatch.undo()
    place.wait(5.1)
    place.tier.sweep()
    assert place.crash().stats().leased == 2


def test_nothing_that_was_removed_comes_back_after_a_kill_that_costs_the_log(tmp_path: Path) -> None:
    gone = 0
    for seed in range(6):
        folder = tmp_path / str(seed)
        removed: set[int] = set()  # chains whose tails were removed and not written since
        for words in run_and_kill(folder, seed):
            match words[0]:
                case "removed":
                    removed.add(int(words[1]))
                case "write":
                    removed.discard(int(words[1]))
        log_file(folder).unlink()
        place = Place(folder, blocks=SLOTS)
        for token in range(CHAINS):
            hashes = names(chain(LENGTH, first_token=token))
            assert all(read_back(place.tier, [name]) == place.tier.match([name]) for name in hashes)
            if token in removed:
                assert [place.tier.match([name]) for name in hashes[2:]] == [0, 0]
        gone += len(removed)
        place.tier.check()
        place.tier.close()
    assert gone > 0


LOG = (".log", ".new")


@pytest.mark.parametrize("comes_back", [Place.crash, Place.restart])
@pytest.mark.parametrize("clear", ["root", "prefix", "remove", "all"])
def test_what_is_cleared_while_the_log_takes_nothing_does_not_come_back(
    place: Place, files: FaultyFiles, clear: str, comes_back: Callable[[Place], DiskTier]
) -> None:
    cleared, kept = chain(4), chain(3, root=OTHER_ROOT)
    for metas in (cleared, kept):
        place.tier.write(metas, payloads(metas))
    files.writes, files.suffix = errno.ENOSPC, LOG
    match clear:
        case "root":
            assert place.tier.clear(root=ROOT) == 4
        case "prefix":
            assert place.tier.clear(prefix=cleared[0].hash) == 4
        case "remove":
            assert place.tier.remove(names(cleared), RemovalCause.CLEARED) == 4
        case "all":
            assert place.tier.clear() == 7
    assert "read-only" in place.tier.stats().problem
    place.tier.check()
    if comes_back is Place.crash:
        place.abandon()
    else:
        place.tier.close()
    files.writes = 0
    tier = place.open()
    left = 0 if clear == "all" else 3
    assert (tier.match(names(cleared)), read_back(tier, names(kept)), tier.stats().blocks) == (0, left, left)
    assert place.restart().stats().blocks == left
    place.tier.check()


def test_what_was_written_before_a_log_is_forsaken_is_there_after_a_crash_and_what_comes_after_too(
    place: Place, files: FaultyFiles
) -> None:
    cleared, kept, after = chain(2), chain(2, root=OTHER_ROOT), chain(2, first_token=5)
    for metas in (cleared, kept):
        place.tier.write(metas, payloads(metas))
    files.writes, files.suffix = errno.ENOSPC, LOG
    place.tier.clear(root=ROOT)
    files.writes = 0
    place.wait(5.1)
    assert place.tier.write(after, payloads(after)) == 2
    assert place.tier.stats().problem == ""
    tier = place.crash()
    assert (read_back(tier, names(kept)), read_back(tier, names(after)), tier.stats().blocks) == (2, 2, 4)


def test_where_survivors_cannot_be_named_what_is_kept_is_lost_and_not_what_is_cleared_kept(
    place: Place, files: FaultyFiles
) -> None:
    cleared, kept = chain(2), chain(2, root=OTHER_ROOT)
    for metas in (cleared, kept):
        place.tier.write(metas, payloads(metas))
    files.writes, files.suffix = errno.ENOSPC, (*LOG, SURVIVORS_SUFFIX)
    assert place.tier.clear(root=ROOT) == 2
    assert read_back(place.tier, names(kept)) == 2
    place.abandon()
    files.writes = 0
    assert place.open().stats().blocks == 0


@pytest.mark.parametrize("everything", [True, False])
def test_a_disk_that_takes_no_word_of_a_clear_is_told_to_the_operator(
    place: Place, files: FaultyFiles, everything: bool
) -> None:
    metas = chain(4)
    place.tier.write(metas, payloads(metas))
    files.writes = errno.EIO
    for _ in range(2):
        with pytest.raises(TierError, match=r"dmesg.*then clear again"):
            place.tier.clear(root=None if everything else ROOT)
        assert place.tier.stats().blocks == 0
        assert place.tier.stats().used_bytes == 0
    files.writes = 0
    assert place.tier.clear(root=None if everything else ROOT) == 0
    assert place.crash().stats().blocks == 0
    place.tier.check()


def test_the_survivors_have_their_room_from_the_start(place: Place) -> None:
    path = slab_file(place.folder).with_suffix(SURVIVORS_SUFFIX)
    room, metas = path.stat().st_size, chain(4)
    assert room > 0
    place.tier.write(metas, payloads(metas))
    place.tier.clear(prefix=metas[2].hash)
    assert path.stat().st_size == room


def test_a_block_that_is_cleared_while_another_stamp_is_written_makes_the_next_one_due(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = chain(2), chain(2, root=OTHER_ROOT)
    for metas in (first, second):
        place.tier.write(metas, payloads(metas))
    space, is_due = place.tier._space, threading.Event()
    real, flush = space.lock, space.index.flush
    other = threading.Thread(target=lambda: place.tier.clear(root=OTHER_ROOT))

    class Lock:
        """When the survivors are known and nobody holds the lock, another clear comes as far as its own stamp."""

        def __enter__(self) -> None:
            real.acquire()

        def __exit__(self, *args: object) -> None:
            real.release()
            if known and other.ident is None and threading.current_thread() is not other:
                other.start()
                assert is_due.wait(10.0)

    def flush_and_tell() -> None:
        flush()
        if threading.current_thread() is other:
            is_due.set()

    known: list[int] = []
    held_slots = space.books.held_slots
    monkeypatch.setattr(space.books, "held_slots", lambda: known.extend([1]) or held_slots())
    monkeypatch.setattr(space.index, "flush", flush_and_tell)
    monkeypatch.setattr(space, "lock", Lock())
    assert place.tier.clear(root=ROOT) == 2
    other.join()
    monkeypatch.undo()
    assert lose_the_log(place).stats().blocks == 0
