"""What a disk, its files, its owners and its clock can do to the disk tier: never a wrong byte, never an exception."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgpack
import pytest

from kvstore import buffers as buffers_module
from kvstore.blocks import BlockHash
from kvstore.buffers import PAGE_NBYTES, aligned
from kvstore.codec import BlockCodec
from kvstore.disk.lock import LOCK_NAME
from kvstore.disk.log import SPARE_LOG_BYTES
from kvstore.disk.tier import DiskTier
from kvstore.errors import TierError
from kvstore.events import BlockRemoved, RemovalCause
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock, buffers, chain, names, payloads, read_verified
from tests.kvstore.disk.disk_for_tests import (
    CODEC,
    SLOT,
    FaultyFiles,
    Place,
    capacity,
    flip,
    log_file,
    payload_at,
    slab_file,
)


def read_back(tier: DiskTier, hashes: list[BlockHash]) -> int:
    return read_verified(tier, hashes)


@pytest.fixture
def files() -> FaultyFiles:
    return FaultyFiles()


@pytest.fixture
def place(tmp_path: Path, files: FaultyFiles) -> Place:
    return Place(tmp_path / "blocks", files=files)


def slot_of(place: Place, name: BlockHash) -> int:
    entry = place.tier._space.books.entry(name)
    assert entry is not None
    return entry.index


def test_a_flipped_bit_anywhere_in_a_block_is_a_miss_and_the_block_goes(place: Place) -> None:
    metas = chain(1)
    offsets = [0, 5, 60, 200, 505, 511, 4096, 4096 + LAYOUT.block_nbytes - 1]
    for number, offset in enumerate(offsets, 1):
        place.tier.write(metas, payloads(metas))
        place.tier.drain_events()
        slot = slot_of(place, metas[0].hash)
        flip(slab_file(place.folder), payload_at(slot) - 4096 + offset)
        assert read_back(place.tier, names(metas)) == 0
        assert sum(place.tier.stats().misses.values()) == number
        assert set(place.tier.stats().misses) <= {"corrupt", "foreign"}
        assert [e.cause for e in place.tier.drain_events() if isinstance(e, BlockRemoved)] == [RemovalCause.INVALID]
        place.tier.check()
        assert place.tier.stats().used_bytes == 0
    place.tier.write(metas, payloads(metas))
    assert read_back(place.tier, names(metas)) == 1


def test_a_wrong_block_in_the_middle_shortens_the_prefix(place: Place) -> None:
    metas = chain(5)
    place.tier.write(metas, payloads(metas))
    flip(slab_file(place.folder), payload_at(slot_of(place, metas[2].hash)))
    assert read_back(place.tier, names(metas)) == 2
    assert place.tier.match(names(metas)) == 2
    assert place.tier.stats().misses == {"corrupt": 1}


def test_one_blocks_bytes_in_anothers_slot_are_foreign(place: Place) -> None:
    metas = chain(2)
    place.tier.write(metas, payloads(metas))
    first, second = (slot_of(place, name) for name in names(metas))
    data = bytearray(slab_file(place.folder).read_bytes())
    data[payload_at(second) - 4096 :][:SLOT] = b""
    source = bytes(data[payload_at(first) - 4096 : payload_at(first) - 4096 + SLOT])
    with slab_file(place.folder).open("r+b") as file:
        file.seek(payload_at(second) - 4096)
        file.write(source)
    assert read_back(place.tier, names(metas)) == 1
    assert place.tier.stats().misses == {"foreign": 1}
    place.tier.check()


def test_a_header_of_another_version_is_foreign(place: Place) -> None:
    metas = chain(1)
    place.tier.write(metas, payloads(metas))
    at = payload_at(slot_of(place, metas[0].hash)) - 4096
    with slab_file(place.folder).open("r+b") as file:
        file.seek(at)
        head = bytearray(file.read(512))
        length = int.from_bytes(head[4:6], "little")
        fields = msgpack.unpackb(head[6 : 6 + length])
        fields[0] = 99
        record = msgpack.packb(fields)
        file.seek(at + 4)
        file.write(len(record).to_bytes(2, "little") + record)
    assert read_back(place.tier, names(metas)) == 0
    assert place.tier.stats().misses == {"foreign": 1}


@pytest.mark.parametrize("reopens", [True, False])
def test_a_truncated_file_costs_the_blocks_that_it_lost(place: Place, reopens: bool) -> None:
    metas = chain(4)
    place.tier.write(metas, payloads(metas))
    cut = payload_at(slot_of(place, metas[2].hash)) + 7
    if reopens:
        place.abandon()
    os.truncate(slab_file(place.folder), cut)
    tier = place.open() if reopens else place.tier
    assert read_back(tier, names(metas)) == 2
    assert sum(tier.stats().misses.values()) == 1
    assert set(tier.stats().misses) <= {"truncated", "corrupt"}
    tier.check()
    assert tier.write(metas, payloads(metas)) == 4
    assert read_back(tier, names(metas)[:3]) == 3


def test_a_file_that_is_too_long_is_cut(place: Place) -> None:
    metas = chain(4)
    place.tier.write(metas, payloads(metas))
    place.abandon()
    with slab_file(place.folder).open("ab") as file:
        file.write(b"x" * 100_000)
    assert read_back(place.open(), names(metas)) == 4
    assert slab_file(place.folder).stat().st_size == capacity(8)


@pytest.mark.parametrize("garbage", [b"", b"hello", b"\xff" * 5000, bytes(5000)])
def test_a_slab_that_is_none_is_begun_anew(place: Place, garbage: bytes) -> None:
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    place.abandon()
    slab_file(place.folder).write_bytes(garbage)
    tier = place.open()
    assert tier.stats().blocks == 0
    assert tier.write(metas, payloads(metas)) == 3
    assert read_back(place.restart(), names(metas)) == 3


def test_a_slab_of_another_version_is_begun_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    place.tier.close()
    monkeypatch.setattr("kvstore.disk.slab_format.SLAB_VERSION", 2)
    assert place.open().stats().blocks == 0
    place.tier.check()


def test_a_slab_that_is_deleted_while_open_goes_on_and_says_so(place: Place) -> None:
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    slab_file(place.folder).unlink()
    assert read_back(place.tier, names(metas)) == 3
    assert "deleted" in place.tier.stats().problem
    assert "restart" in place.tier.stats().problem
    tier = place.restart()
    assert (tier.stats().blocks, tier.stats().problem) == (0, "")  # the log of another slab says nothing
    tier.check()


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "foreign", "middle"])
def test_without_a_whole_log_the_slots_are_asked(place: Place, damage: str) -> None:
    metas, evicted = chain(5, ttl_s=50.0), chain(3, first_token=1)
    place.tier.write(evicted, payloads(evicted))
    for start in (0, 2):
        place.wait(1.0)
        part = metas[start : start + 3]
        place.tier.write(part, payloads(part))
    place.tier.remove(names(evicted)[2:], RemovalCause.CLEARED)
    place.abandon()
    path = log_file(place.folder)
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(b"\x07" * 3000)
        case "foreign":
            path.write_bytes(path.read_bytes().replace(b"warmkv log\x01", b"warmkv log\x63"))
        case "middle":
            flip(path, path.stat().st_size // 3)
    tier = place.open()
    assert (tier.match(names(metas)), tier.match(names(evicted))) == (5, 2)
    assert read_back(tier, names(metas)) == 5
    tier.check()
    place.wait(51.0)
    assert tier.match(names(metas)) == 0
    assert read_back(place.crash(), names(evicted)) == 2  # and the log is whole again


def test_slots_tell_no_uses_so_blocks_die_early_and_never_late(place: Place) -> None:
    metas = chain(2, ttl_s=10.0)
    place.tier.write(metas, payloads(metas))
    place.wait(8.0)
    assert read_back(place.tier, names(metas)) == 2
    place.tier.close()
    log_file(place.folder).unlink()
    assert place._come_back(3.0).match(names(metas)) == 0


def test_a_log_that_is_cut_anywhere_loses_the_last_write_at_most(place: Place) -> None:
    metas = chain(6)
    for meta in metas:
        place.tier.write([meta], payloads([meta]))
    place.abandon()
    whole, slab = log_file(place.folder).read_bytes(), slab_file(place.folder).read_bytes()
    held = []
    for length in range(len(whole), len(whole) - 200, -1):
        log_file(place.folder).write_bytes(whole[:length])
        slab_file(place.folder).write_bytes(slab)
        held.append(place.open().stats().blocks)
        assert read_back(place.tier, names(metas)) == held[-1]
        place.tier.check()
        place.abandon()
    assert held[0] == 6
    assert held[1] == 5
    assert set(held[1:]) <= {5, 4}


def test_zeros_behind_the_log_are_room_that_was_never_written(place: Place) -> None:
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    place.abandon()
    with log_file(place.folder).open("ab") as file:
        file.write(bytes(9999))
    tier = place.open()
    assert tier.match(names(metas)) == 3
    more = chain(5)[3:]
    tier.write(more, payloads(more))
    assert place.crash().match(names(metas + more)) == 5


# A full or failing disk.


@pytest.mark.parametrize("suffix", [".slab", (".log", ".new")])
@pytest.mark.parametrize(
    ("code", "reason", "remedy"),
    [(errno.ENOSPC, "full", "free room"), (errno.EIO, "error", "dmesg"), (errno.EROFS, "error", "mount it read-write")],
)
def test_a_disk_that_refuses_writes_is_read_only_and_recovers_by_itself(
    place: Place, files: FaultyFiles, code: int, reason: str, remedy: str, suffix: str | tuple[str, ...]
) -> None:
    old, new = chain(3), chain(2, first_token=1)
    place.tier.write(old, payloads(old))
    files.writes, files.suffix = code, suffix
    assert place.tier.write(new, payloads(new)) == 0
    stats = place.tier.stats()
    assert stats.store_failures == {reason: 2}
    assert remedy in stats.problem
    assert stats.healthy
    assert read_back(place.tier, names(old)) == 3
    assert place.tier.match(names(new)) == 0
    place.tier.check()

    calls = files.calls
    assert place.tier.write(old + new, payloads(old + new)) == 3  # what is held counts, and nobody asks the disk
    assert files.calls == calls
    place.wait(1.1)
    place.tier.write(new, payloads(new))  # a probe
    assert files.calls > calls

    files.writes = 0
    place.wait(5.1)
    assert place.tier.write(new, payloads(new)) == 2
    assert place.tier.stats().problem == ""
    place.tier.check()
    tier = place.crash()
    assert (read_back(tier, names(old)), read_back(tier, names(new))) == (3, 2)


def test_a_log_that_alone_cannot_be_written_is_begun_anew(place: Place, files: FaultyFiles) -> None:
    metas = chain(3)
    files.writes, files.suffix = errno.EIO, ".log"
    assert place.tier.write(metas, payloads(metas)) == 3 or place.tier.write(metas, payloads(metas)) == 3
    place.tier.check()
    files.writes = 0
    assert read_back(place.crash(), names(metas)) == 3


def test_probes_come_every_few_seconds_at_most(place: Place, files: FaultyFiles) -> None:
    metas, probes = chain(1), 0
    files.writes = errno.ENOSPC
    for _ in range(600):
        before = files.calls
        place.tier.write(metas, payloads(metas))
        place.tier.sweep()
        probes += files.calls > before
        place.wait(0.1)
    assert 10 <= probes <= 20


def test_a_disk_that_fills_up_in_the_middle_of_a_batch_keeps_its_prefix(place: Place, files: FaultyFiles) -> None:
    metas = chain(5)

    def fill_up() -> None:
        if files.calls == calls + 3:
            files.writes, files.suffix = errno.ENOSPC, ".slab"

    calls = files.calls
    files.before_write = fill_up
    count = place.tier.write(metas, payloads(metas))
    files.before_write = None
    assert 0 < count < 5
    assert place.tier.match(names(metas)) == count
    assert read_back(place.tier, names(metas)) == count
    assert place.tier.stats().store_failures == {"full": 5 - count}
    place.tier.check()
    assert read_back(place.crash(), names(metas)) == count


def test_what_is_removed_while_the_disk_refuses_is_written_down_when_it_does_not(
    place: Place, files: FaultyFiles
) -> None:
    metas = chain(4)
    place.tier.write(metas, payloads(metas))
    files.writes = errno.ENOSPC
    assert place.tier.remove(names(metas)[3:], RemovalCause.EVICTED) == 1
    assert place.tier.stats().problem != ""
    files.writes = 0
    place.wait(5.1)
    place.tier.sweep()
    assert place.tier.stats().problem == ""
    assert place.crash().match(names(metas)) == 3


def test_a_disk_that_refuses_reads_is_a_miss_and_then_costs_nothing(place: Place, files: FaultyFiles) -> None:
    metas = chain(6)
    place.tier.write(metas, payloads(metas))
    files.reads = errno.EIO
    for meta in metas:
        assert read_back(place.tier, [meta.hash]) == 0
    stats = place.tier.stats()
    assert stats.misses == {"error": 3, "breaker": 3}
    assert not stats.healthy
    assert "dmesg" in stats.problem
    files.reads = 0
    place.wait(5.1)
    assert read_back(place.tier, names(metas)[3:4]) == 1  # the probe
    assert read_back(place.tier, names(metas)[3:]) == 3
    assert place.tier.stats().healthy
    assert place.tier.stats().problem == ""
    assert read_back(place.tier, names(metas)) == 6  # none was dropped for it
    place.tier.check()


def test_a_device_that_is_away_for_long_costs_no_block(place: Place, files: FaultyFiles) -> None:
    metas = chain(6)
    place.tier.write(metas, payloads(metas))
    place.tier.lease(names(metas)[:1], None)
    files.reads = errno.EIO
    for _ in range(100):
        place.wait(1.0)
        for meta in metas:
            assert read_back(place.tier, [meta.hash]) == 0
    files.reads = 0
    place.wait(10.0)
    assert place.tier.stats().removals == {}
    assert read_back(place.tier, names(metas)[:1]) == 1  # the probe
    assert read_back(place.tier, names(metas)) == 6


@pytest.mark.parametrize("leased", [True, False])
def test_a_slot_that_alone_cannot_be_read_twice_is_given_up_and_written_elsewhere(
    place: Place, files: FaultyFiles, monkeypatch: pytest.MonkeyPatch, leased: bool
) -> None:
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    if leased:
        place.tier.lease(names(metas), None)
    bad, read = payload_at(slot_of(place, metas[1].hash)) - PAGE_NBYTES, files.preadv

    def refuse(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == bad:
            raise OSError(errno.EIO, "Input/output error")
        return read(fd, buffers, offset)

    monkeypatch.setattr(files, "preadv", refuse)
    for _ in range(2):
        assert read_back(place.tier, names(metas)[1:2]) == 0
    assert place.tier.match(names(metas)) == 3  # no other slot was read since the first time
    assert read_back(place.tier, names(metas)[:1]) == 1
    assert read_back(place.tier, names(metas)[1:2]) == 0
    assert place.tier.match(names(metas)) == (3 if leased else 1)
    assert place.tier.stats().misses == ({"error": 3} if leased else {"error": 2, "unreadable": 1})
    assert place.tier.stats().removals == ({} if leased else {"invalid": 1})
    place.tier.check()


def test_a_deadline_that_has_passed_is_a_miss_and_drops_nothing(place: Place) -> None:
    metas = chain(2)
    place.tier.write(metas, payloads(metas))
    assert place.tier.read(names(metas), buffers(2), deadline_s=-1.0).count == 0
    assert place.tier.stats().misses == {"deadline": 1}
    assert read_back(place.tier, names(metas)) == 2


FILL = """
import resource, sys
from pathlib import Path
from tests.kvstore.blocks_for_tests import chain, names, payloads
from tests.kvstore.disk.disk_for_tests import Place, capacity

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
place = Place(folder, blocks=64)
metas = chain(40)
assert "free room" in place.tier.stats().problem
count = place.tier.write(metas, payloads(metas))
stats = place.tier.stats()
assert 0 < count < 40, count
assert stats.store_failures == {"full": 40 - count}, stats
assert "read-only" in stats.problem and stats.healthy
assert place.tier.match(names(metas)) == count
place.tier.check()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
place.wait(1.1)
assert place.tier.write(metas, payloads(metas)) == 40
assert "read-only" not in place.tier.stats().problem
place.tier.close()
print("done")
"""


def test_a_file_that_the_system_does_not_let_grow_is_a_full_disk_for_real(tmp_path: Path) -> None:
    """A limit on file sizes is the full disk that needs no rights to make; the kernel refuses, nothing is simulated."""
    command = [sys.executable, "-c", textwrap.dedent(FILL), str(tmp_path / "blocks"), str(capacity(20))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout.strip() == "done", result.stderr


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    """A file system of 8 MiB."""
    point = tmp_path / "tiny"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(point)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small file system here")
    return point


def test_a_file_system_that_is_too_small_is_filled_up_to_a_floor_and_no_further(tiny_disk: Path) -> None:
    try:
        place = Place(tiny_disk / "blocks", blocks=2000)
        assert "no room" in place.tier.stats().problem
        slots = place.tier.num_slots
        assert 20 < slots < 500
        for token in range(slots // 20 + 3):  # it evicts
            metas = chain(20, first_token=token)
            assert place.tier.write(metas, payloads(metas)) == 20
        assert place.tier.stats().blocks == slots
        usage = shutil.disk_usage(tiny_disk)
        assert usage.free > usage.total // 20 + SPARE_LOG_BYTES // 2
        subprocess.run(["mount", "-o", "remount,size=64m", str(tiny_disk)], check=True)
        assert "restart" in place.tier.stats().problem
        assert read_back(place.restart(), names(metas)) == 20
        assert (place.tier.stats().problem, place.tier.num_slots) == ("", 2000)
        place.tier.close()
    finally:
        subprocess.run(["umount", "-l", str(tiny_disk)], check=True)


# The folder and its owner.


def test_a_living_owner_keeps_its_folder_and_is_named(place: Place) -> None:
    with pytest.raises(TierError, match=f"process {os.getpid()} .* give each worker a folder of its own"):
        DiskTier(place.folder, capacity(8), codec=CODEC, clock=ManualClock())
    metas = chain(2)
    assert place.tier.write(metas, payloads(metas)) == 2
    place.tier.close()
    place.open().close()


def test_a_dead_owners_folder_is_taken_over(tmp_path: Path) -> None:
    program = """
    import os, signal, sys
    from pathlib import Path
    from tests.kvstore.blocks_for_tests import chain, payloads
    from tests.kvstore.disk.disk_for_tests import Place
    place = Place(Path(sys.argv[1]))
    place.tier.write(chain(3), payloads(chain(3)))
    print("written", flush=True)
    signal.pause()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "blocks")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
        with pytest.raises(TierError, match=f"process {child.pid} "):
            Place(tmp_path / "blocks")
        child.kill()
    assert read_back(Place(tmp_path / "blocks").tier, names(chain(3))) == 3


@pytest.mark.parametrize("record", [b"", b"\xc1garbage", b"\x01"])
def test_a_lock_file_with_any_record_can_be_taken(tmp_path: Path, record: bytes) -> None:
    (tmp_path / LOCK_NAME).write_bytes(record)
    Place(tmp_path).tier.close()


def test_where_there_are_no_locks_the_record_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    place = Place(tmp_path)
    with pytest.raises(TierError, match="in use by process"):
        Place(tmp_path)
    place.abandon()
    record = msgpack.packb((2**22 + 5, os.uname().nodename, "another boot", False))
    (tmp_path / LOCK_NAME).write_bytes(record)
    place.open().close()
    place.open().close()


def test_a_path_that_is_a_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TierError, match="name a folder"):
            Place(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_we_may_not_write_to_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forbidding(FaultyFiles):
        def open(self, path: Path, flags: int) -> int:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with pytest.raises(TierError, match="see that we may write there"):
        Place(tmp_path, files=Forbidding())
    Place(tmp_path).tier.close()  # and nobody owns the folder


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_with_the_remedy(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TierError, match="writ"):
        Place(tmp_path / "blocks")


def test_another_namespace_finds_nothing_of_ours(place: Place) -> None:
    metas = chain(2)
    place.tier.write(metas, payloads(metas))
    place.tier.close()
    other = DiskTier(place.folder, capacity(40), codec=BlockCodec(LAYOUT, b"x" * 32), clock=ManualClock())
    assert other.read(names(metas), buffers(2)).count == 0
    other.close()


def test_after_a_power_cut_a_misplaced_block_is_no_error_of_the_books(place: Place) -> None:
    """The slab reached the device, the log's last records did not: the log names what was there before."""
    metas, new = chain(8), chain(1, first_token=1)
    place.tier.write(metas, payloads(metas))
    log = log_file(place.folder).read_bytes()
    place.tier.write(new, payloads(new))
    place.abandon()
    log_file(place.folder).write_bytes(log)
    (place.folder / LOCK_NAME).write_bytes(msgpack.packb((1, os.uname().nodename, "another boot", False)))
    tier = place.open()
    tier.check()
    assert read_back(tier, names(metas)) == 7
    assert tier.stats().misses == {"foreign": 1}
    tier.check()


def test_the_limit_for_file_sizes_is_as_before() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize("direct", [True, False])
def test_nothing_of_the_process_memory_is_written_behind_a_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    def used_before(nbytes: int) -> memoryview:
        memory = aligned(nbytes)
        memory[:] = b"\xa5" * nbytes
        return memory

    monkeypatch.setattr(buffers_module, "aligned", used_before)
    place, metas = Place(tmp_path, options={"direct": direct}), chain(4)
    for _ in range(2):  # and again, in buffers that were read into
        assert place.tier.write(metas, payloads(metas)) == 4
        assert read_back(place.tier, names(metas)) == 4
        place.tier.clear()
    place.tier.close()
    data = slab_file(tmp_path).read_bytes()
    for slot in range(4):
        end = payload_at(slot)
        assert data[end - PAGE_NBYTES :][:4] == b"WKVB"
        assert data[end - PAGE_NBYTES + 536 : end] == bytes(PAGE_NBYTES - 536)


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_a_tier_that_cannot_be_opened_leaves_no_file_open(tmp_path: Path, fails_at: int) -> None:
    class Counting(FaultyFiles):
        """Every call is counted, and one fails."""

        left = fails_at
        opened = 0

        def _count(self) -> None:
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.EIO, "Input/output error")

        def open(self, path: Path, flags: int) -> int:
            self._count()
            fd = super().open(path, flags)
            self.opened += 1
            return fd

        def close(self, fd: int) -> None:
            super().close(fd)
            self.opened -= 1

        def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            self._count()
            return super().preadv(fd, buffers, offset)

        def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            self._count()
            return super().pwritev(fd, buffers, offset)

    files = Counting()
    with suppress(TierError):
        Place(tmp_path, files=files).tier.close()
    assert files.left <= 0
    assert files.opened == 0


def test_files_of_slabs_that_are_no_more_are_deleted_and_strangers_are_not(place: Place) -> None:
    metas = chain(2)
    place.tier.write(metas, payloads(metas))
    place.tier.close()
    other = f"{b'o'.hex() * 8}-640"
    orphans = [f"{other}.log", f"{other}.held", f"{other}.new", log_file(place.folder).with_suffix(".new").name]
    another = f"{b'k'.hex() * 8}-7"  # which has its slab
    strangers = ["notes.log", "mine.held", "x.new", f"{another}.slab", f"{another}.log"]
    for name in orphans + strangers:
        (place.folder / name).write_bytes(b"x")
        os.utime(place.folder / name, (place.wall.now, place.wall.now))
    tier = place.open()
    there = {path.name for path in place.folder.iterdir()}
    assert there.isdisjoint(orphans)
    assert there.issuperset(strangers)
    assert read_back(tier, names(metas)) == 2


def test_without_locks_an_owner_on_another_host_is_alive_until_a_person_says_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    record = tmp_path / LOCK_NAME
    record.write_bytes(msgpack.packb((7, "an-earlier-pod", "a boot", False)))
    with pytest.raises(TierError, match=f"process 7 on an-earlier-pod.*delete {record} if it has ended"):
        Place(tmp_path)
    record.unlink()
    Place(tmp_path).tier.close()
