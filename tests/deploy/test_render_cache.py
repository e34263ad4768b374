"""What the `warmkv cache` commands print, where it is more than filling in a table."""

from __future__ import annotations

import pytest

from deploy.render_cache import in_chains, size_text
from warmkv.v1 import admin_pb2


def block(name: str, parent: str = "", worker: str = "w0", first: int = 0) -> admin_pb2.CachedBlock:
    return admin_pb2.CachedBlock(worker=worker, hash=name, parent=parent, tenant="t", first_token=first)


def test_blocks_stand_behind_the_ones_before_them() -> None:
    shuffled = [
        block("d", "b", first=32),
        block("x", "w", "w1", first=16),
        block("b", "a", first=16),
        block("a"),
        block("c", "b", first=32),
        block("a", worker="w1"),
        block("orphan", "gone", first=64),
    ]
    ordered = in_chains(shuffled)
    assert [(each.worker, each.hash) for each in ordered] == [
        ("w0", "a"),
        ("w0", "b"),
        ("w0", "d"),
        ("w0", "c"),
        ("w0", "orphan"),
        ("w1", "a"),
        ("w1", "x"),
    ]


def test_places_that_the_worker_did_not_tell_follow_from_the_block_before() -> None:
    blocks = [
        block("a"),
        *(admin_pb2.CachedBlock(worker="w0", hash=name, parent=before) for before, name in ("ab", "bc")),
    ]
    lost = admin_pb2.CachedBlock(worker="w0", hash="z", parent="gone")
    for each in blocks:
        each.tokens = 16
    ordered = {each.hash: each for each in in_chains([*blocks, lost])}
    assert [ordered[name].first_token for name in "abc"] == [0, 16, 32]
    assert not ordered["z"].HasField("first_token")
    assert not blocks[1].HasField("first_token"), "the answer itself stays as it is"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (1 << 45, "32.0 TiB")]
)
def test_sizes_are_written_as_people_read_them(size: int, text: str) -> None:
    assert size_text(size) == text
