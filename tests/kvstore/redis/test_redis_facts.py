"""Reading INFO and naming remedies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from kvstore.redis.facts import ServerFacts, parse_info, remedy
from kvstore.redis.judgement import judge, judge_events

INFO = (
    b"# Server\r\nredis_version:7.0.15\r\nrun_id:f00\r\n# Memory\r\nused_memory:123\r\nmaxmemory:1048576\r\n"
    b"maxmemory_policy:allkeys-lru\r\n# Cluster\r\ncluster_enabled:0\r\n"
)


def test_info_is_read() -> None:
    assert parse_info(INFO) == ServerFacts((7, 0), "f00", 1 << 20, 123, "allkeys-lru", False)
    assert judge(parse_info(INFO)) == []


@pytest.mark.parametrize(
    ("version", "lengthens"), [(b"6.2.14", False), (b"7.0.15", True), (b"7", True), (b"10.1", True), (b"odd", False)]
)
def test_only_servers_from_7_know_gt(version: bytes, lengthens: bool) -> None:
    assert parse_info(INFO.replace(b"7.0.15", version)).can_only_lengthen is lengthens


def wrong(facts: ServerFacts, **known: Any) -> str:
    return "; ".join(str(advice) for advice in judge(facts, **known) if advice.is_wrong)


def better(facts: ServerFacts, **known: Any) -> str:
    return "; ".join(str(advice) for advice in judge(facts, **known) if not advice.is_wrong)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"maxmemory:1048576", b"maxmemory:0", "set maxmemory and"),
        (b"allkeys-lru", b"noeviction", "set maxmemory-policy allkeys-lru"),
        (b"maxmemory:1048576", b"maxmemory:1048576\r\ntotal_system_memory:1100000", "set maxmemory to three quarters"),
        (b"used_memory:123", b"used_memory:123\r\naof_enabled:1", "set appendonly no"),
        (b"cluster_enabled:0", b"cluster_enabled:1", "write redis+cluster://"),
        (b"used_memory:123", b"used_memory:1300000", "cannot evict enough; look for clients"),
    ],
)
def test_a_bad_configuration_is_named_with_what_to_do(old: bytes, new: bytes, words: str) -> None:
    facts = parse_info(INFO.replace(old, new))
    assert words in wrong(facts)
    assert better(facts) == ""


def test_a_server_without_eviction_says_how_much_is_left_when_it_is_nearly_full() -> None:
    facts = parse_info(INFO.replace(b"allkeys-lru", b"noeviction").replace(b":1048576", b":%d" % (100 << 20)))
    assert "left" not in wrong(facts)
    assert "refuses writes at 100 MiB (4 MiB are left); set" in wrong(replace(facts, used_memory=96 << 20))


def test_memory_that_does_not_count_against_the_limit_is_none_of_it() -> None:
    full = parse_info(INFO.replace(b":123", b":1300000") + b"mem_not_counted_for_evict:300000\r\n")
    assert wrong(full) == ""


def test_what_could_be_better_is_no_fault() -> None:
    facts = parse_info(INFO)
    assert "evicts by volatile-ttl" in better(replace(facts, policy="volatile-ttl"))
    assert "older than 7.0" in better(replace(facts, version=(6, 2)))
    assert "room for 32 blocks of 32768 bytes at most; raise maxmemory" in better(facts, block_nbytes=32 << 10)
    for made in (replace(facts, policy="volatile-ttl"), replace(facts, version=(6, 2)), facts):
        assert wrong(made, block_nbytes=32 << 10) == ""
    assert better(facts, block_nbytes=16 << 10) == ""


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("", "CONFIG SET notify-keyspace-events Egxe "),
        ("Kx", "CONFIG SET notify-keyspace-events KxEge "),
        ("KA", "CONFIG SET notify-keyspace-events KAE "),
        ("AE", ""),
        ("xegE$", ""),
    ],
)
def test_what_a_watch_lacks_is_named_with_the_flags_that_are_there(flags: str, remedy: str) -> None:
    found = "".join(map(str, judge_events(flags)))
    assert remedy in found
    assert bool(remedy) is bool(found)


def test_settings_that_info_does_not_tell_are_judged_too() -> None:
    facts = parse_info(INFO)
    kept = facts.with_settings([[b"save", b"3600 1 300 100"], [b"maxmemory-clients", b"0"]])
    assert "set save ''" in wrong(kept)
    assert "set maxmemory-clients" in better(kept)
    assert judge(facts.with_settings([[b"save", b""], [b"maxmemory-clients", b"10%"]])) == []
    assert judge(facts.with_settings([redis.ResponseError("NOPERM"), []])) == []


def test_several_faults_are_named_together() -> None:
    both = wrong(parse_info(INFO.replace(b"allkeys-lru", b"noeviction") + b"aof_enabled:1\r\n"))
    assert "maxmemory-policy allkeys-lru; " in both
    assert "appendonly no" in both


@given(st.binary(max_size=200))
def test_odd_info_is_no_error(text: bytes) -> None:
    judge(parse_info(text), block_nbytes=1)


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
