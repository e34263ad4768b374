"""The fleet secret in the state folder: made once, never shown, never replaced by itself."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.kept_secret import FILE, keep_secret, kept_secret
from deploy.layers import load_settings
from deploy.state import ClusterRecord, StateProblem, remove_record, write_record
from deploy.up import check_secret


def test_it_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    assert kept_secret(folder) is None
    made = keep_secret(folder)
    assert len(bytes.fromhex(made)) == 32
    assert (kept_secret(folder), keep_secret(folder)) == (made, made)
    assert stat.S_IMODE((folder / FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert keep_secret(tmp_path / "other") != made


def test_the_end_of_an_own_ray_leaves_it(tmp_path: Path) -> None:
    made = keep_secret(tmp_path)
    write_record(tmp_path, ClusterRecord("127.0.0.2:1", 1, 0.0, "/tmp/x", "t"))
    remove_record(tmp_path)
    assert kept_secret(tmp_path) == made


def test_many_that_start_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        assert len(set(threads.map(lambda _: keep_secret(tmp_path), range(64)))) == 1
    assert sorted(os.listdir(tmp_path)) == [FILE, "lock"]


@pytest.mark.parametrize("damage", ["", "ab" * 31, "ab" * 33, "zz" * 32, "é" * 32, "ab" * 32 + "\n\n"], ids=ascii)
def test_a_damaged_one_is_a_problem_that_tells_the_remedy_and_not_the_secret(tmp_path: Path, damage: str) -> None:
    (tmp_path / FILE).write_text(damage, encoding="utf-8")
    for read in (kept_secret, keep_secret):
        with pytest.raises(StateProblem, match="remove it: the next start makes another one") as problem:
            read(tmp_path)
        assert "abab" not in str(problem.value)
    assert (tmp_path / FILE).read_text(encoding="utf-8") == damage, "what may be mended is not overwritten"


def test_one_that_others_can_read_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep_secret(tmp_path)
    assert caplog.messages == []
    (tmp_path / FILE).chmod(0o640)
    keep_secret(tmp_path)
    assert any("chmod 600" in message for message in caplog.messages)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateProblem, match="--state-dir"):
        keep_secret(tmp_path / "file" / "state")


def test_a_damaged_one_is_found_before_anything_is_started_and_only_where_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("damaged")
    with pytest.raises(StateProblem, match="damaged"):
        check_secret(load_settings(environ={}).settings, tmp_path)
    check_secret(load_settings(environ={}, flags={"auth.fleet_secret": "mine"}).settings, tmp_path)
    check_secret(load_settings(environ={}, flags={"ray.address": "127.0.0.1:1"}).settings, tmp_path)
