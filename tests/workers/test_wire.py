"""Translation between the wire and the engine's plain data, and the refusal of foreign jobs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import block_hashes
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, RemovalCause, TierName
from kvstore.layout import KVLayout
from kvstore.lifetime import Lifetime
from kvstore.tier import TierStats
from kvstore.token_ids import unpacked
from tests.workers.stream_client import job, split
from warmkv import versions
from warmkv.v1 import common_pb2, kv_events_pb2, worker_pb2
from workers.job_wire import JobRefused, Refusal, job_from_wire
from workers.protocol import Constraint, FinishReason, JobError, Load, Output, PeerHint, TokenLogprob
from workers.simulated_info import simulated_info
from workers.wire import (
    clear_done_to_wire,
    event_to_wire,
    hello_to_wire,
    load_to_wire,
    output_to_wire,
    snapshot_pieces,
    stored_to_wire,
)

INFO = simulated_info(
    fingerprint=b"f" * 32, layout=KVLayout(2, 2, 8, 8, "float32", 16), context_length=128, vocab_size=1000
)


def good_job() -> worker_pb2.Job:
    return job(INFO.scheme, 7, list(range(40)))


def refusal(message: worker_pb2.Job) -> str:
    with pytest.raises(JobRefused) as refused:
        job_from_wire(message, job_id=(1, 7), info=INFO, now=0.0)
    assert refused.value.error.message == str(refused.value)
    return refused.value.error.reason


def test_a_good_job_arrives_with_full_hashes_that_the_worker_derived_itself() -> None:
    message = good_job()
    message.priority = -2
    message.cache.ttl_seconds = 9
    message.cache.no_store = True
    got = job_from_wire(message, job_id=(1, 7), info=INFO, now=100.0)
    root = INFO.scheme.root(b"tenant")
    assert list(got.block_hashes) == block_hashes(list(range(40)), root, 16)
    assert (got.root, got.job_id, got.priority, got.lifetime, got.no_store, got.no_read) == (
        root,
        (1, 7),
        -2,
        Lifetime(9.0),
        True,
        False,
    )
    assert got.deadline is None


def test_a_fixed_end_a_priority_and_a_turn_reach_the_job() -> None:
    plain = job_from_wire(good_job(), job_id=(1, 7), info=INFO, now=0.0)
    assert (plain.lifetime, plain.keep_priority, plain.turn) == (None, 0, None)
    message = good_job()
    message.cache.expires_at = 1_900_000_000
    message.cache.keep_priority = 4000
    message.turn = 3
    got = job_from_wire(message, job_id=(1, 7), info=INFO, now=0.0)
    assert (got.lifetime, got.keep_priority, got.turn) == (Lifetime(0.0, 1_900_000_000.0), 100, 3)


def test_a_deadline_counts_on_the_engines_clock() -> None:
    message = good_job()
    message.deadline_ms = 1500
    assert job_from_wire(message, job_id=(1, 7), info=INFO, now=100.0).deadline == 101.5


def test_a_chain_of_another_scheme_is_refused() -> None:
    message = good_job()
    message.chain_root = b"x" * 32
    assert refusal(message) == Refusal.CHAIN_ROOT_MISMATCH


def test_a_chain_of_another_tenant_is_refused() -> None:
    message = good_job()
    message.tenant_salt = b"another tenant"
    assert refusal(message) == Refusal.CHAIN_ROOT_MISMATCH


@pytest.mark.parametrize("hashes", [b"", b"y" * 32, b"y" * 31])
def test_block_hashes_that_are_not_those_of_the_tokens_are_refused(hashes: bytes) -> None:
    message = good_job()
    message.block_hashes = hashes
    assert refusal(message) == Refusal.BLOCK_HASH_MISMATCH


def test_a_prompt_may_come_id_by_id() -> None:
    message = good_job()
    token_ids = list(unpacked(message.packed_token_ids))
    message.ClearField("packed_token_ids")
    message.token_ids.extend(token_ids)
    assert job_from_wire(message, job_id=(1, 7), info=INFO, now=0.0).token_ids == token_ids


def test_how_much_another_worker_generated_reaches_the_job() -> None:
    message = good_job()
    tokens = len(unpacked(message.packed_token_ids))
    message.sampling.max_tokens = 7
    message.resumed_tokens = 6
    got = job_from_wire(message, job_id=(1, 7), info=INFO, now=0.0)
    assert (got.resumed, got.num_prompt) == (6, tokens - 6)
    message.sampling.ClearField("max_tokens")
    whole = job_from_wire(message, job_id=(1, 7), info=INFO, now=0.0)
    assert whole.sampling.max_tokens == INFO.context_length - (tokens - 6), "an answer gets no shorter by a handover"


@pytest.mark.parametrize("resumed", [7, 8, 10_000])
def test_a_resumption_that_leaves_nothing_to_do_is_refused(resumed: int) -> None:
    message = good_job()
    message.sampling.max_tokens = 7
    message.resumed_tokens = resumed
    assert refusal(message) == Refusal.INVALID_RESUMPTION


def test_a_resumption_without_a_prompt_is_refused() -> None:
    message = good_job()
    message.sampling.max_tokens = 10_000
    message.resumed_tokens = len(unpacked(message.packed_token_ids))
    assert refusal(message) == Refusal.INVALID_RESUMPTION


def test_half_an_id_is_refused() -> None:
    message = good_job()
    message.packed_token_ids += b"12"
    assert refusal(message) == Refusal.BLOCK_HASH_MISMATCH


def test_a_prompt_without_tokens_is_refused() -> None:
    assert refusal(job(INFO.scheme, 7, [])) == Refusal.EMPTY_PROMPT


def test_a_token_outside_of_the_vocabulary_is_refused() -> None:
    assert refusal(job(INFO.scheme, 7, [1, 1000])) == Refusal.TOKEN_OUT_OF_RANGE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("logprobs", 21),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
    ],
)
def test_sampling_values_out_of_range_are_refused(field: str, value: float) -> None:
    message = good_job()
    setattr(message.sampling, field, value)
    assert refusal(message) == Refusal.INVALID_SAMPLING


def test_bias_and_constraints_that_make_no_sense_are_refused() -> None:
    for sampling in (
        common_pb2.SamplingParams(logit_bias={1: math.nan}),
        common_pb2.SamplingParams(logit_bias={1: 101.0}),
        common_pb2.SamplingParams(logit_bias={1000: 1.0}),
        common_pb2.SamplingParams(constraint=common_pb2.Constraint()),
        common_pb2.SamplingParams(constraint=common_pb2.Constraint(regex="a"), ignore_eos=True),
    ):
        message = good_job()
        message.sampling.CopyFrom(sampling)
        assert refusal(message) == Refusal.INVALID_SAMPLING


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        ({"json_schema": "{}"}, Constraint("json_schema", "{}")),
        ({"regex": "a+"}, Constraint("regex", "a+")),
        ({"grammar": "start: /a/"}, Constraint("grammar", "start: /a/")),
        ({"json_object": True}, Constraint("json_object")),
    ],
)
def test_a_constraint_arrives_with_its_kind(sent: dict[str, Any], got: Constraint) -> None:
    message = good_job()
    message.sampling.ignore_eos = False
    message.sampling.constraint.CopyFrom(common_pb2.Constraint(**sent))
    assert job_from_wire(message, job_id=(1, 7), info=INFO, now=0.0).sampling.constraint == got


def test_sampling_arrives_as_it_was_sent() -> None:
    message = good_job()
    message.sampling.CopyFrom(
        common_pb2.SamplingParams(
            max_tokens=5,
            temperature=0.5,
            top_p=0.25,
            top_k=3,
            min_p=0.125,
            seed=1 << 63,
            stop=["a", "b"],
            stop_token_ids=[4, 5],
            logprobs=2,
            ignore_eos=True,
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={9: 2.0, 3: -100.0},
        )
    )
    got = job_from_wire(message, job_id=(1, 7), info=INFO, now=0.0).sampling
    assert (got.max_tokens, got.temperature, got.top_p, got.top_k, got.min_p) == (5, 0.5, 0.25, 3, 0.125)
    assert (got.seed, got.stop, got.stop_token_ids) == (1 << 63, ("a", "b"), frozenset({4, 5}))
    assert (got.logprobs, got.ignore_eos) == (2, True)
    assert (got.repetition_penalty, got.presence_penalty, got.frequency_penalty) == (1.5, 0.5, -0.5)
    assert (got.logit_bias, got.constraint) == (((3, -100.0), (9, 2.0)), None)


def test_unset_sampling_has_the_documented_defaults_and_as_many_tokens_as_the_context_allows() -> None:
    message = good_job()
    message.sampling.Clear()
    got = job_from_wire(message, job_id=(1, 7), info=INFO, now=0.0).sampling
    assert (got.max_tokens, got.temperature, got.top_p, got.top_k, got.min_p) == (88, 1.0, 1.0, 0, 0.0)
    assert got.logprobs is None
    assert (got.repetition_penalty, got.presence_penalty, got.frequency_penalty) == (1.0, 0.0, 0.0)
    assert not got.needs_last_token


def test_an_output_arrives_whole() -> None:
    got = output_to_wire(
        Output(
            (1, 7),
            token_ids=[3],
            text=" three",
            logprobs=[TokenLogprob(3, -0.5, ((3, -0.5), (4, -1.0)))],
            finish=FinishReason.STOP,
            fates={"computed": 1, "device": 2, "host": 3, "disk": 4, "redis": 5, "peer": 6},
            completion_tokens=8,
            worker_ttft_ms=3.0,
            queue_ms=1.0,
            load_ms=0.5,
        ),
        7,
    )
    assert (got.job_id, list(got.token_ids), got.text, got.completion_tokens) == (7, [3], " three", 8)
    assert [(top.token_id, top.logprob) for top in got.logprobs[0].top] == [(3, -0.5), (4, -1.0)]
    assert got.finish_reason == common_pb2.FINISH_REASON_STOP
    assert got.fates == common_pb2.TokensByFate(computed=1, device=2, host=3, disk=4, redis=5, peer=6)
    assert (got.worker_ttft_ms, got.queue_ms, got.load_ms) == (3.0, 1.0, 0.5)
    assert not got.HasField("error")


def test_an_error_output_carries_reason_and_message() -> None:
    got = output_to_wire(Output((1, 7), finish=FinishReason.ERROR, error=JobError("WHY", "what to do")), 7)
    assert got.finish_reason == common_pb2.FINISH_REASON_ERROR
    assert (got.error.reason, got.error.message) == ("WHY", "what to do")


def test_every_finish_reason_tier_and_cause_has_its_word_on_the_wire() -> None:
    for reason in FinishReason:
        number = output_to_wire(Output((1, 7), finish=reason), 7).finish_reason
        assert common_pb2.FinishReason.Name(number) == f"FINISH_REASON_{reason.name}"
    for tier in TierName:
        cleared = event_to_wire(AllBlocksCleared(tier)).cleared
        assert common_pb2.Tier.Name(cleared.tier) == f"TIER_{tier.name}"
    for cause in RemovalCause:
        removed = event_to_wire(BlockRemoved(TierName.HOST, (b"h" * 16,), cause)).removed
        assert kv_events_pb2.RemovalCause.Name(removed.cause) == f"REMOVAL_CAUSE_{cause.name}"
        assert removed.hashes == b"h" * 16


@pytest.mark.parametrize(("ttl_s", "ttl_ms"), [(None, 0), (2.5, 2500), (0.0, 1), (0.0001, 1)])
def test_a_ttl_on_the_wire_is_zero_only_where_a_block_lives_for_ever(ttl_s: float | None, ttl_ms: int) -> None:
    message = stored_to_wire(BlockStored(TierName.REDIS, (b"h" * 16,), parent=b"p" * 16, ttl_s=ttl_s))
    assert (message.ttl_ms, message.parent) == (ttl_ms, b"p" * 16)


def test_the_hello_states_the_whole_scheme() -> None:
    hello = hello_to_wire(INFO, worker="w0", incarnation=12, protocol_version=versions.NEWEST)
    assert (hello.worker, hello.incarnation, hello.vocab_size, hello.context_length) == ("w0", 12, 1000, 128)
    fields = {field.name: getattr(hello.scheme, field.name) for field in hello.scheme.DESCRIPTOR.fields}
    assert fields == {name: getattr(INFO.scheme, name) for name in INFO.scheme.__slots__}
    assert hello.block_nbytes == INFO.block_nbytes


def test_a_worker_tells_where_it_serves_blocks_and_hears_who_else_does() -> None:
    hello = hello_to_wire(
        replace(INFO, peer_address="10.0.0.1:7"), worker="w0", incarnation=12, protocol_version=versions.NEWEST
    )
    assert (
        hello.peer_address,
        hello_to_wire(INFO, worker="w0", incarnation=12, protocol_version=versions.NEWEST).peer_address,
    ) == ("10.0.0.1:7", "")
    message = good_job()
    assert job_from_wire(message, job_id=(1, 7), info=INFO, now=0.0).peers == ()
    message.peers.extend(worker_pb2.PeerHint(address=f"w{n}:7", blocks=n) for n in range(5))
    got = job_from_wire(message, job_id=(1, 7), info=INFO, now=0.0)
    assert got.peers == (PeerHint("w0:7", 0), PeerHint("w1:7", 1), PeerHint("w2:7", 2)), "three are enough"


def test_load_carries_every_tier() -> None:
    stats = TierStats(used_bytes=1, capacity_bytes=2, blocks=3, misses={"absent": 4}, removals={"evicted": 5})
    got = load_to_wire(Load(running=1, waiting=2, steps=9, tiers={TierName.HOST: (stats, 0.5, 0.75)}))
    (tier,) = got.tiers
    assert (got.running, got.waiting, got.steps) == (1, 2, 9)
    assert (tier.tier, tier.read_latency_ms, tier.read_block_ms) == (common_pb2.TIER_HOST, 0.5, 0.75)
    assert (tier.blocks, dict(tier.misses), dict(tier.removals), tier.healthy) == (
        3,
        {"absent": 4},
        {"evicted": 5},
        True,
    )


def test_load_carries_what_room_there_is() -> None:
    got = load_to_wire(Load(answer_blocks=3, slots=8, answer_ms=1500.0, freed_blocks=2.5))
    assert (got.answer_blocks, got.slots, got.answer_ms, got.freed_blocks) == (3, 8, 1500.0, 2.5)


def test_what_a_clear_dropped_arrives_by_tier() -> None:
    got = clear_done_to_wire(3, {TierName.DEVICE: 1, TierName.HOST: 2, TierName.REDIS: 4}, "")
    assert (got.clear_id, got.device, got.host, got.disk, got.redis, got.error) == (3, 1, 2, 0, 4, "")


@given(st.lists(st.integers(1, 200), max_size=20), st.integers(100, 2000))
def test_a_snapshot_in_pieces_says_the_same_and_no_piece_is_too_large(lengths: list[int], piece_bytes: int) -> None:
    runs, number = [], 0
    for length in lengths:
        names = tuple((number + at).to_bytes(16, "big") for at in range(length))
        runs.append(BlockStored(TierName.DEVICE, names, parent=None))
        number += length
    pieces = list(snapshot_pieces(runs, piece_bytes=piece_bytes))
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(piece.ByteSize() for piece in pieces) <= piece_bytes + 10
    parents: dict[bytes, bytes] = {}
    for run in (run for piece in pieces for run in piece.blocks):
        parent = run.parent
        for each in split(run.hashes):
            parents[each], parent = parent, each
    expected = {each: run.hashes[at - 1] if at else b"" for run in runs for at, each in enumerate(run.hashes)}
    assert parents == expected
