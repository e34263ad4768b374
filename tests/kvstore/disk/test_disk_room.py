"""What the disk tier takes of a disk that others need, too, and what it says of one that is too small."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvstore.disk import room as room_module
from kvstore.disk.log import SPARE_LOG_BYTES
from tests.kvstore.blocks_for_tests import chain, names, payloads
from tests.kvstore.disk.disk_for_tests import SLOT, FaultyFiles, NoDirectFiles, Place, slab_file

MIB = 1 << 20
SMALL = SPARE_LOG_BYTES + 2 * MIB  # a disk that has room for the log at its longest, and for a few blocks
MANY = 4 * MIB // SLOT


def fill(place: Place, blocks: int) -> None:
    for token in range(-(-blocks // 20)):
        metas = chain(20, first_token=token)
        place.tier.write(metas, payloads(metas))


def test_a_disk_that_is_too_small_is_not_eaten_up_and_the_tier_evicts(tmp_path: Path) -> None:
    files = FaultyFiles(disk=SMALL)
    place = Place(tmp_path, blocks=MANY, files=files)
    free, total = files.room(tmp_path)
    assert free > total * room_module.FLOOR_SHARE + SPARE_LOG_BYTES
    slots = place.tier.num_slots
    assert 20 < slots < MANY
    assert f"keeps {slots}" in place.tier.stats().problem
    fill(place, slots + 60)
    stats = place.tier.stats()
    assert (stats.blocks, stats.store_failures) == (slots, {})
    assert stats.removals["evicted"] >= 60
    assert files.room(tmp_path)[0] > total * room_module.FLOOR_SHARE
    place.tier.check()
    assert place.restart().num_slots == slots  # what it has taken is its own
    place.tier.close()


def test_room_that_comes_back_is_told_and_taken_at_the_next_start(tmp_path: Path) -> None:
    files = FaultyFiles(disk=SMALL)
    place = Place(tmp_path, blocks=MANY, files=files)
    assert "free " in place.tier.stats().problem
    files.disk = 64 * MIB
    assert "room now: restart" in place.tier.stats().problem
    place.restart()
    assert (place.tier.num_slots, place.tier.stats().problem) == (MANY, "")
    place.tier.close()


def test_what_a_refused_reservation_took_is_given_back_and_the_file_grows_to_the_floor(tmp_path: Path) -> None:
    class Quota(FaultyFiles):
        """The disk looks large enough, until somebody asks for its room."""

        def reserve(self, fd: int, nbytes: int) -> bool:
            FaultyFiles(disk=None).reserve(fd, nbytes // 2)
            raise OSError(errno.ENOSPC, "No space left on device")

    files = Quota(disk=64 * MIB)
    place = Place(tmp_path, blocks=200, files=files)
    assert files.taken(slab_file(tmp_path)) <= 2 * SLOT
    assert "free room" in place.tier.stats().problem
    fill(place, 40)
    assert place.tier.stats().blocks == 40
    files.disk = SMALL - 2 * MIB  # somebody else took it
    metas = chain(20, first_token=3)
    assert place.tier.write(metas, payloads(metas)) == 0
    assert place.tier.stats().store_failures == {"full": 20}
    assert "read-only" in place.tier.stats().problem
    files.disk = 64 * MIB
    place.wait(1.1)
    fill(place, 200)
    assert (place.tier.stats().blocks, place.tier.stats().problem) == (200, "")  # nothing is left to take
    place.tier.close()


def test_where_no_room_can_be_reserved_blocks_that_lie_there_are_written_over_on_a_full_disk(tmp_path: Path) -> None:
    class Growing(NoDirectFiles, FaultyFiles):
        pass

    files = Growing(disk=64 * MIB)
    place = Place(tmp_path, blocks=20, files=files)
    fill(place, 20)
    files.disk = 0
    metas = chain(20, first_token=7)
    assert place.tier.write(metas, payloads(metas)) == 20
    assert place.tier.match(names(metas)) == 20
    place.tier.close()


@pytest.mark.parametrize("disk", [0, MIB])
def test_a_disk_without_any_room_opens_and_keeps_nothing(tmp_path: Path, disk: int) -> None:
    files = FaultyFiles(disk=64 * MIB)
    place = Place(tmp_path, files=files, blocks=MANY)
    place.tier.close()
    slab_file(tmp_path).unlink()
    files.disk = disk
    place.open()
    assert place.tier.num_slots == 1
    assert "no room" in place.tier.stats().problem
    place.tier.close()
