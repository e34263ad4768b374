"""What ranks tell one another: every job arrives as it was, and nothing else can be named."""

from __future__ import annotations

import dataclasses
import threading
import typing
from enum import Enum

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.lifetime import Lifetime
from tests.workers.ranks_rig import SIZE, meet, on_all_ranks
from workers.protocol import Job, Load, PeerHint, SamplingParams
from workers.tensor_parallel.lost import RankLost
from workers.tensor_parallel.messages import NotSendable, packed, sendable, unpacked

_SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 1 << 20),
    temperature=st.floats(0, 2),
    seed=st.integers(0, (1 << 64) - 1),
    stop=st.lists(st.text()).map(tuple),
    stop_token_ids=st.frozensets(st.integers(0, 1 << 20)),
    logprobs=st.none() | st.integers(0, 20),
    ignore_eos=st.booleans(),
)
_JOBS = st.builds(
    Job,
    job_id=st.tuples(st.integers(0, 9), st.integers(0, 1 << 40)) | st.text(),
    token_ids=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=40),
    root=st.binary(min_size=32, max_size=32).map(BlockHash),
    block_hashes=st.lists(st.binary(min_size=32, max_size=32).map(BlockHash), max_size=3),
    sampling=_SAMPLING,
    lifetime=st.none() | st.builds(Lifetime, st.none() | st.floats(0, 9), st.none() | st.floats(0, 9), st.booleans()),
    deadline=st.none() | st.floats(0, 1e9),
    peers=st.lists(st.builds(PeerHint, st.text(), st.integers(0, 9))).map(tuple),
    request_id=st.text(),
)


@given(_JOBS)
def test_a_job_arrives_as_it_was(job: Job) -> None:
    [told, found] = unpacked(packed(["submit", job]))
    assert told == "submit"
    assert found == job
    assert type(found.lifetime) is type(job.lifetime)
    assert type(found.sampling.stop) is tuple
    assert type(found.sampling.stop_token_ids) is frozenset
    assert hash(found.job_id) == hash(job.job_id)


def test_every_class_that_a_job_may_hold_can_travel() -> None:
    def classes(annotation):
        if isinstance(annotation, type) and (dataclasses.is_dataclass(annotation) or issubclass(annotation, Enum)):
            yield annotation
            if dataclasses.is_dataclass(annotation):
                for each in typing.get_type_hints(annotation).values():
                    yield from classes(each)
        for part in typing.get_args(annotation):
            yield from classes(part)

    assert set(classes(Job)) <= set(sendable().values())
    assert {Job, SamplingParams, Lifetime, PeerHint} <= set(sendable().values())


@pytest.mark.parametrize("value", [Load(), object(), [1, {"a": Load()}], 1j])
def test_nothing_else_can_travel(value: object) -> None:
    with pytest.raises(NotSendable):
        packed(value)


def test_no_other_class_can_be_named() -> None:
    forged = msgpack.packb(msgpack.ExtType(3, msgpack.packb(["Popen", {"args": "true"}])))
    with pytest.raises(KeyError):
        unpacked(forged)


@pytest.mark.parametrize("nbytes", [0, 1, 4087, 4088, 4089, 100_000])
def test_messages_of_any_length(tmp_path, nbytes: int) -> None:
    message = bytes(range(256)) * (nbytes // 256) + bytes(nbytes % 256)

    def talk(rank: int):
        group = meet(tmp_path, rank)
        told = group.message_of_first(message if rank == 0 else b"")
        return told, group.messages_of_all(message[: nbytes // (rank + 1)]), group.least([5 - rank, rank])

    for told, heard, least in on_all_ranks(talk):
        assert told == message
        assert heard == [message, message[: nbytes // 2]]
        assert least == [4, 0]


def test_ranks_that_do_not_come_are_not_waited_for_for_ever(tmp_path) -> None:
    from workers.tensor_parallel.group import RankGroup

    with pytest.raises(RankLost, match="rank 0 of 2"):
        RankGroup(tmp_path, 0, SIZE, join_timeout_s=0.5, timeout_s=0.5)


def test_a_rank_that_hangs_is_given_up_after_the_deadline(tmp_path) -> None:
    may_go = threading.Event()

    def talk(rank: int):
        group = meet(tmp_path, rank)
        group.set_timeout(1.0)
        if rank == 1:
            may_go.wait(60)
            return None
        try:
            group.least([1])
        except RankLost as lost:
            return lost
        finally:
            may_go.set()

    lost, _ = on_all_ranks(talk)
    assert "agreeing on numbers" in str(lost)
