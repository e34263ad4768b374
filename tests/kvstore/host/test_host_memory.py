"""How much memory there is: fake control groups of both versions, and the refusal of a tier that would not fit."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from kvstore.errors import TierError
from kvstore.host import tier as host_module
from kvstore.host.memory import available_bytes, cgroup_rooms
from kvstore.host.tier import HostTier
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own"


def test_every_group_of_version_two_above_the_process_counts(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/pod/container\n")
    root = tmp_path / "cgroup"
    put(root / "pod/container", memory__max="max", memory__current="50", memory__stat="anon 40\ninactive_file 10")
    put(root / "pod", memory__max="1000", memory__current="300", memory__stat="inactive_file 60\nactive_file 40")
    put(root, memory__stat="inactive_file 1")
    assert cgroup_rooms(root, own) == [800]
    assert available_bytes(root, own) == 800


def test_a_group_of_version_one_counts(tmp_path: Path, own: Path) -> None:
    own.write_text("5:cpu,cpuacct:/x\n4:memory:/job\n0::/\n")
    root = tmp_path / "cgroup"
    stat = "inactive_file 1\ntotal_inactive_file 20\ntotal_active_file 5"
    limits = {"memory__limit_in_bytes": "500", "memory__usage_in_bytes": "200"}
    put(root / "memory/job", memory__stat=stat, **limits)
    assert cgroup_rooms(root, own) == [325]


def test_in_a_container_that_sees_only_its_own_group_the_mount_counts(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/machine/path/that/is/not/here\n")
    put(tmp_path / "cgroup", memory__max="700", memory__current="100")
    assert cgroup_rooms(tmp_path / "cgroup", own) == [600]


def test_without_control_groups_the_machine_decides(tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cgroup_rooms(tmp_path, own) == []
    own.write_text("0::/\n")
    assert cgroup_rooms(tmp_path, own) == []
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       32768 kB\nMemFree:   100 kB\nMemAvailable:   3 kB\n")
    assert available_bytes(tmp_path, own, meminfo) == 3 << 10
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 123}))
    assert available_bytes(tmp_path, own, tmp_path / "not there") == 123
    meminfo.write_text("MemTotal:       32768 kB\n")  # a kernel before 3.14 does not say
    assert available_bytes(tmp_path, own, meminfo) == 123


def test_a_group_over_its_limit_has_no_room(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/\n")
    put(tmp_path / "cgroup", memory__max="100", memory__current="150")
    assert available_bytes(tmp_path / "cgroup", own) == 0


def test_this_machine_has_some_memory() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_a_tier_that_would_not_fit_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = 1 << 16
    nbytes = blocks * LAYOUT.block_nbytes
    monkeypatch.setattr(host_module, "available_bytes", lambda: nbytes - 1)
    with pytest.raises(TierError, match=r"asks for 6 MiB.*give the host tier fewer bytes, or raise the memory limit"):
        HostTier(LAYOUT, nbytes, clock=ManualClock())
    HostTier(LAYOUT, nbytes - LAYOUT.block_nbytes, clock=ManualClock()).close()


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(TierError, match="may take"):
        HostTier(LAYOUT, psutil.virtual_memory().total * 2, clock=ManualClock())
