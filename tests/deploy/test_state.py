"""The record of the own Ray: whose process it is, who may read it."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deploy.state import (
    ClusterRecord,
    StateProblem,
    default_state_dir,
    lives,
    may_lead,
    read_record,
    remove_record,
    write_record,
)


@pytest.fixture
def record() -> ClusterRecord:
    own = psutil.Process()
    return ClusterRecord("127.0.0.2:1", own.pid, own.create_time(), "/tmp/x", "token")


def test_a_record_comes_back_as_it_was_written_and_only_its_owner_may_read_it(
    tmp_path: Path, record: ClusterRecord
) -> None:
    write_record(tmp_path / "deep" / "state", record)
    assert read_record(tmp_path / "deep" / "state") == record
    path = tmp_path / "deep" / "state" / "cluster.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["cluster.json"]
    remove_record(path.parent)
    assert read_record(path.parent) is None
    remove_record(path.parent)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 99}', '{"version": 2, "pid": 1}'])
def test_a_record_that_cannot_be_read_is_a_problem_with_a_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / "cluster.json").write_text(content)
    with pytest.raises(StateProblem, match=r"cluster\.json"):
        read_record(tmp_path)


def test_a_process_lives_until_it_is_gone(record: ClusterRecord) -> None:
    assert lives(record)
    assert may_lead(record)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child = replace(record, pid=process.pid, started_at=psutil.Process(process.pid).create_time())
    assert lives(child)
    assert process.stdin is not None
    process.stdin.close()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert not lives(child), "nobody has waited for it yet, but it does nothing any more"
    assert may_lead(child)
    process.wait()
    assert not lives(child)
    assert may_lead(child), "its session may go on without it"


def test_a_number_that_somebody_else_has_now_is_not_ours(record: ClusterRecord) -> None:
    earlier = replace(record, started_at=record.started_at - 3600)
    assert not lives(earlier)
    assert not may_lead(earlier)


def test_the_folder_is_chosen_by_the_environment(tmp_path: Path) -> None:
    assert default_state_dir({"WARMKV_STATE_DIR": "/a", "XDG_STATE_HOME": "/b"}) == Path("/a")
    assert default_state_dir({"XDG_STATE_HOME": "/b"}) == Path("/b/warmkv")
    assert default_state_dir({}) == Path.home() / ".local/state/warmkv"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, record: ClusterRecord) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateProblem, match="--state-dir"):
        write_record(tmp_path / "file" / "state", record)


def test_the_record_names_its_version(tmp_path: Path, record: ClusterRecord) -> None:
    write_record(tmp_path, record)
    assert json.loads((tmp_path / "cluster.json").read_text())["version"] == 2
