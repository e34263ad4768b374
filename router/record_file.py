"""The fleet record on disk, for the time when no worker and no router lives that knows it.

Covers: reading and writing one small file of JSON. Does not cover: agreeing on a record (`fleet`): while a worker
lives, its record wins where it is newer.

What an operator wrote into the settings since counts more than what was in force before: the file holds the settings'
policy beside the record, and where they have changed the policy of the settings is in force, as one more change.
Drained workers are not taken over: a worker that starts anew takes requests.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from router.errors import InvalidRequest
from router.fleet_record import FleetRecord, from_wire
from router.policy import checked_weights, find_policy
from router.policy_history import PolicySetting
from warmkv.v1 import common_pb2, worker_pb2

log = logging.getLogger(__name__)

_LEFT_BEHIND_S = 60.0  # a file that was being written so long ago: its writer was killed


def restored(path: Path, configured: FleetRecord, *, time_ms: int) -> FleetRecord:
    """The record to start with. A file that cannot be used is reported, and set aside if it is its content.

    Args:
        configured: the record as the settings have it. time_ms: now, milliseconds since 1970.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return configured
    except OSError as error:
        log.warning(
            "the kept policy cannot be read, so the settings count; give this user the right to read the file",
            extra={"path": str(path), "why": str(error)},
        )
        return configured
    try:
        kept = json.loads(text)
        record = from_wire(ParseDict(kept["record"], worker_pb2.FleetRecord()))
        settings = ParseDict(kept["settings"], common_pb2.PolicySetting())
        _check(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ParseError, InvalidRequest) as error:
        log.warning(
            "the kept policy cannot be read, so the settings count; its file is set aside, to be looked at or removed",
            extra={"path": str(_set_aside(path)), "why": str(error)},
        )
        return configured
    if settings != configured.setting.to_wire():
        return record.restarted_with(configured, time_ms=time_ms)
    return replace(record, drained=frozenset())


def keeper(path: Path, configured: PolicySetting) -> Callable[[FleetRecord], None]:
    """What writes records to the file, whole or not at all. A disk that fails is reported, and the fleet goes on."""

    def keep(record: FleetRecord) -> None:
        text = json.dumps(
            {"settings": MessageToDict(configured.to_wire()), "record": MessageToDict(record.to_wire())}, indent=1
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_behind(path)
            _write_whole(path, text)
        except OSError as error:
            log.warning(
                "the policy could not be kept, so a restart of the whole fleet forgets it; look at the disk",
                extra={"path": str(path), "why": str(error)},
            )

    return keep


def _write_whole(path: Path, text: str) -> None:
    """All of it or nothing, whenever this process or the machine ends."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # else a power cut may undo the renaming
    finally:
        os.close(folder)


def _remove_left_behind(path: Path) -> None:
    """What routers that were killed in the middle had begun to write."""
    for new in path.parent.glob(f"{path.name}.*.new"):
        if time.time() - new.stat().st_mtime > _LEFT_BEHIND_S:
            new.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    """Where it is now; the same place if it cannot be moved."""
    aside = path.with_name(f"{path.name}.unreadable")
    try:
        return path.replace(aside)
    except OSError:
        return path


def _check(record: FleetRecord) -> None:
    checked_weights(find_policy(record.policy), record.weights)
    if record.shadow is not None:
        checked_weights(find_policy(record.shadow.name), record.shadow.weights)
