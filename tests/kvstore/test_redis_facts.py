"""Reading INFO and naming remedies."""

from __future__ import annotations

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from kvstore.redis.facts import ServerFacts, parse_info, remedy

INFO = (
    b"# Server\r\nredis_version:7.0.15\r\nrun_id:f00\r\n# Memory\r\nused_memory:123\r\nmaxmemory:1048576\r\n"
    b"maxmemory_policy:allkeys-lru\r\n# Cluster\r\ncluster_enabled:0\r\n"
)


def test_info_is_read() -> None:
    assert parse_info(INFO) == ServerFacts((7, 0), "f00", 1 << 20, 123, "allkeys-lru", False)
    assert parse_info(INFO).advice() == ""


@pytest.mark.parametrize(
    ("version", "lengthens"), [(b"6.2.14", False), (b"7.0.15", True), (b"7", True), (b"10.1", True), (b"odd", False)]
)
def test_only_servers_from_7_know_gt(version: bytes, lengthens: bool) -> None:
    assert parse_info(INFO.replace(b"7.0.15", version)).can_only_lengthen is lengthens


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"maxmemory:1048576", b"maxmemory:0", "set maxmemory and"),
        (b"allkeys-lru", b"noeviction", "set maxmemory-policy allkeys-lru"),
        (b"maxmemory:1048576", b"maxmemory:1048576\r\ntotal_system_memory:1100000", "set maxmemory to three quarters"),
        (b"used_memory:123", b"used_memory:123\r\naof_enabled:1", "set appendonly no"),
        (b"cluster_enabled:0", b"cluster_enabled:1", "write redis+cluster://"),
    ],
)
def test_a_bad_configuration_is_named_with_what_to_do(old: bytes, new: bytes, words: str) -> None:
    assert words in parse_info(INFO.replace(old, new)).advice()


def test_settings_that_info_does_not_tell_are_judged_too() -> None:
    facts = parse_info(INFO)
    kept = facts.with_settings([[b"save", b"3600 1 300 100"], [b"maxmemory-clients", b"0"]])
    assert "set save ''" in kept.advice()
    assert "set maxmemory-clients" in kept.hint()
    fine = facts.with_settings([[b"save", b""], [b"maxmemory-clients", b"10%"]])
    assert (fine.advice(), fine.hint()) == ("", "")
    unknown = facts.with_settings([redis.ResponseError("NOPERM"), []])
    assert (unknown.advice(), unknown.hint()) == ("", "")


def test_several_faults_are_named_together() -> None:
    both = parse_info(INFO.replace(b"allkeys-lru", b"noeviction") + b"aof_enabled:1\r\n").advice()
    assert "maxmemory-policy allkeys-lru; " in both
    assert "appendonly no" in both


@given(st.binary(max_size=200))
def test_odd_info_is_no_error(text: bytes) -> None:
    parse_info(text).advice()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (redis.AuthenticationError("x"), "right user and password"),
        (redis.exceptions.NoPermissionError("x"), "ACL SETUSER"),
        (redis.BusyLoadingError("x"), "is loading"),
        (redis.OutOfMemoryError("x"), "maxmemory-policy allkeys-lru"),
        (redis.ReadOnlyError("x"), "its primary"),
        (redis.TimeoutError("x"), "does not answer in time"),
        (TimeoutError("x"), "does not answer in time"),
        (redis.InvalidResponse("x"), "does not speak RESP"),
        (redis.ResponseError("ERR x"), "refused a command (ERR x)"),
        (redis.ConnectionError("x"), "cannot be reached (x)"),
        (OSError("x"), "cannot be reached (x)"),
    ],
)
def test_every_error_has_a_remedy_that_names_the_server(error: Exception, words: str) -> None:
    text = remedy(error, "redis://here", str(error))
    assert text.startswith("redis://here ")
    assert words in text


@pytest.mark.parametrize(
    ("before", "now", "inherits"),
    [
        ("a" * 40, b"master_replid:" + b"a" * 40, True),  # a replica of it
        ("a" * 40, b"master_replid:" + b"b" * 40 + b"\r\nmaster_replid2:" + b"a" * 40, True),  # that took over from it
        ("a" * 40, b"master_replid:" + b"b" * 40 + b"\r\nmaster_replid2:" + b"0" * 40, False),
        ("0" * 40, b"master_replid:" + b"b" * 40 + b"\r\nmaster_replid2:" + b"0" * 40, False),
        ("", b"run_id:f00", False),
    ],
)
def test_only_a_replica_goes_on_with_what_another_server_held(before: str, now: bytes, inherits: bool) -> None:
    assert parse_info(now).inherits(ServerFacts(data=before)) is inherits
