"""The fleet record on disk, for the time when no worker and no router lives that knows it.

Covers: reading and writing one small file of JSON. Does not cover: agreeing on a record (`fleet`): while a worker
lives, its record wins where it is newer.

What an operator wrote into the settings since counts more than what was in force before: the file holds the settings'
policy beside the record, and where they have changed the policy of the settings is in force, with the history kept.
Drained workers are not taken over: a worker that starts anew takes requests.
"""

from __future__ import annotations

import json
import logging
import os
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


def restored(path: Path, configured: FleetRecord) -> FleetRecord:
    """The record to start with. `configured`: as the settings have it. A file that cannot be used is reported."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        record = from_wire(ParseDict(kept["record"], worker_pb2.FleetRecord()))
        settings = ParseDict(kept["settings"], common_pb2.PolicySetting())
        _check(record)
    except FileNotFoundError:
        return configured
    except (OSError, ValueError, KeyError, TypeError, ParseError, InvalidRequest) as error:
        log.warning(
            "the kept policy cannot be read, so the settings count; remove the file, or put back a copy of it",
            extra={"path": str(path), "why": str(error)},
        )
        return configured
    if settings != configured.setting.to_wire():
        return replace(configured, clears=record.clears, changes=record.changes, shadow=record.shadow)
    return replace(record, drained=frozenset())


def keeper(path: Path, configured: PolicySetting) -> Callable[[FleetRecord], None]:
    """What writes records to the file, whole or not at all. A disk that fails is reported, and the fleet goes on."""

    def keep(record: FleetRecord) -> None:
        text = json.dumps(
            {"settings": MessageToDict(configured.to_wire()), "record": MessageToDict(record.to_wire())}, indent=1
        )
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError as error:
            log.warning(
                "the policy could not be kept, so a restart of the whole fleet forgets it; look at the disk",
                extra={"path": str(path), "why": str(error)},
            )

    return keep


def _check(record: FleetRecord) -> None:
    checked_weights(find_policy(record.policy), record.weights)
    if record.shadow is not None:
        checked_weights(find_policy(record.shadow.name), record.shadow.weights)
