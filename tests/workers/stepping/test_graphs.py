"""Padding: which graph a step takes, that its real rows come out as without, and that the pool gets nothing else."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.device import DeviceTier
from tests.workers.engine_rig import BLOCK_SIZE, SHAPE, make_rig, prompts
from tests.workers.stepping.late_device import GARBAGE, LateDevice
from tests.workers.stepping.stepping_rig import buffered, gathering, late_rig
from workers.attention.step import Span
from workers.device.cpu import CpuDevice
from workers.protocol import SamplingParams
from workers.sampler import Row
from workers.scheduler import Chunk
from workers.stepping.buckets import Bucket, choose, decode_buckets, largest_first, tail_buckets
from workers.stepping.buffers import Capacity, HostBuffers
from workers.stepping.work import StepWork

MAX_RUNNING = 20
BUCKETS = [*decode_buckets(MAX_RUNNING), *tail_buckets(MAX_RUNNING, 256)]


def test_decodes_are_padded_to_1_2_4_and_multiples_of_8():
    assert [bucket.rows for bucket in decode_buckets(40)] == [1, 2, 4, 8, 16, 24, 32, 40]
    assert [bucket.rows for bucket in decode_buckets(20)] == [1, 2, 4, 8, 16, 20]
    assert [bucket.rows for bucket in decode_buckets(1)] == [1]
    assert [bucket.rows for bucket in tail_buckets(8, 100)] == [16, 64]


def test_a_warm_tail_beside_more_than_64_decodes_takes_a_graph_and_a_small_one_beside_few():
    buckets = tail_buckets(200, 2048)
    assert [(bucket.rows, bucket.sequences) for bucket in buckets] == [(16, 16), (64, 64), (256, 64), (256, 128)]
    assert choose(buckets, 40 + 100, 101, 40) == Bucket(256, 128, 256)
    assert choose(buckets, 200 + 20, 21, 200) == Bucket(256, 64, 256)
    assert choose(buckets, 40 + 128, 129, 40) is None


def test_the_largest_is_captured_first():
    assert [b.rows for b in largest_first(BUCKETS)] == [256, 64, 20, 16, 16, 8, 4, 2, 1]


@given(st.integers(1, 30), st.integers(1, 300), st.data())
def test_the_chosen_bucket_holds_the_step_and_none_smaller_does(sequences: int, rows: int, data: st.DataObject):
    rows = max(rows, sequences)
    longest = 1 if rows == sequences else data.draw(st.integers(2, rows))
    chosen = choose(BUCKETS, rows, sequences, longest)
    fitting = [b for b in BUCKETS if b.rows >= rows and b.sequences >= sequences and (b.longest == 1) == (longest == 1)]
    if chosen is None:
        assert not fitting
    else:
        assert chosen in fitting
        assert chosen.rows == min(b.rows for b in fitting)


class _Sequence:
    """As much of a sequence as a launcher looks at."""

    def __init__(self, sampling: SamplingParams) -> None:
        self.sampling = sampling


def _work(lengths: list[int], pasts: list[int], tables: list[list[int]], seed: int) -> StepWork:
    draw, work = random.Random(seed), StepWork([])
    for length, past, table in zip(lengths, pasts, tables, strict=True):
        stop = past + length
        work.chunks.append(Chunk(_Sequence(SamplingParams(1)), length))
        work.spans.append(Span(len(work.token_ids), length, stop, table[: -(-stop // BLOCK_SIZE)]))
        work.stops.append(stop)
        work.token_ids += [draw.randrange(5, SHAPE.vocab) for _ in range(length)]
        work.positions += range(past, stop)
        work.rows.append(len(work.token_ids) - 1)
        work.ready.append(work.chunks[-1].sequence)
        work.draws.append(Row(SamplingParams(1, temperature=0.0), stop))
    return work


def _numbers(tier: DeviceTier) -> torch.Tensor:
    """The whole pool, [blocks + 1, numbers of a block]."""
    return tier._pool.view(tier.num_blocks + 1, -1).view(torch.float32)


def _random_pool(tier: DeviceTier) -> None:
    raw = _numbers(tier)
    raw.copy_(torch.randn(raw.shape, generator=torch.Generator().manual_seed(5)))


def _tables(tier: DeviceTier, sequences: int, seed: int) -> list[list[int]]:
    blocks = list(range(tier.num_blocks))
    random.Random(seed).shuffle(blocks)
    return [blocks[n * 5 : n * 5 + 5] for n in range(sequences)]


def _cases() -> list[tuple[Bucket, int]]:
    """Every bucket, full and as empty as it is ever chosen."""
    cases = []
    for bucket in BUCKETS:
        fullest = min(bucket.sequences, bucket.rows - 1) if bucket.longest > 1 else bucket.sequences
        sizes = {fullest, bucket.sequences // 2 + 1 if bucket.longest == 1 else 1}
        cases += [(bucket, size) for size in sorted(sizes)]
    return cases


@pytest.mark.parametrize(("bucket", "sequences"), _cases())
def test_a_padded_step_gives_the_logits_of_the_real_rows_and_writes_their_blocks_only(bucket: Bucket, sequences: int):
    model, rig = gathering(), make_rig(device_blocks=5 * MAX_RUNNING + 7)
    tier = rig.device
    launcher = buffered(tier, CpuDevice(), model=model, buckets=[bucket], runs_ahead=False, max_running=MAX_RUNNING)
    draw = random.Random(bucket.rows * 31 + sequences)
    room = max(sequences + 1, bucket.rows - 3)
    lengths = [1] * sequences
    while bucket.longest > 1 and sum(lengths) < room:
        place = draw.randrange(sequences)
        if lengths[place] >= 60:
            if min(lengths) >= 60:
                break
            continue
        lengths[place] += 1
    pasts = [draw.randrange(0, 80 - length) if length < 80 else 0 for length in lengths]
    work = _work(lengths, pasts, _tables(tier, sequences, 3), seed=7)
    kv = [tier.kv(layer) for layer in range(tier.layout.layers)]

    _random_pool(tier)
    expected = model.forward(kv, work.spans, work.token_ids, work.positions, work.rows)
    wanted = _numbers(tier).clone()
    _random_pool(tier)
    launcher.buffers.memory.fill_(GARBAGE)  # nothing but the step's own numbers may be read
    taken: list[Bucket] = []
    replay = launcher._graphs.replay
    launcher._graphs.replay = lambda chosen: taken.append(chosen) or replay(chosen)
    work.draws = [Row(SamplingParams(1, temperature=0.0), 0) for _ in work.ready]
    flight = launcher.launch(work)
    assert taken == [bucket]
    logits = launcher._graphs._captured[bucket].logits[: len(work.ready)]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    tokens = [sampled.token_id for sampled in flight.sampled(lambda ready, logits: {}).values()]
    assert tokens == expected.argmax(-1).tolist()
    torch.testing.assert_close(_numbers(tier), wanted, atol=2e-5, rtol=1e-5)
    untouched = sorted(set(range(tier.num_blocks + 1)) - {b for span in work.spans for b in span.block_table})
    _random_pool_copy = _numbers(tier).clone()
    _random_pool(tier)
    assert torch.equal(_random_pool_copy[untouched], _numbers(tier)[untouched])
    rig.close()


def test_padding_is_written_over_what_an_earlier_step_left():
    capacity = Capacity(rows=32, sequences=8, width=5, block_size=BLOCK_SIZE)
    host = HostBuffers(LateDevice(), capacity)  # whose new memory is garbage
    bucket = Bucket(16, 8, 16)
    host.fill(_work([3] * 5, [20] * 5, [[9, 8, 7]] * 5, seed=1), bucket, None)
    host.fill(_work([1, 2], [15, 16], [[4], [2, 3]], seed=1), bucket, None)
    inputs = host.inputs(bucket)
    assert inputs.slots.tolist() == [4 * 16 + 15, 3 * 16, 3 * 16 + 1, *[-1] * 13]
    assert inputs.row_starts.tolist() == [0, 1, 3, 3, 3, 3, 3, 3, 3]
    assert inputs.contexts.tolist() == [16, 18, 0, 0, 0, 0, 0, 0]
    assert inputs.block_tables[0, :1].tolist() == [4]
    assert inputs.block_tables[1, :2].tolist() == [2, 3]
    assert (inputs.block_tables.shape, inputs.longest) == ((8, 5), 16)
    assert host.ids[3:16].tolist() == host.positions[3:16].tolist() == [0] * 13
    assert host.wanted.tolist() == [0, 2, *[0] * 6]


def test_capturing_leaves_the_pool_as_it_was_and_says_what_it_took(caplog: pytest.LogCaptureFixture):
    rig = make_rig(device_blocks=50)
    _random_pool(rig.device)
    before = _numbers(rig.device).clone()
    with caplog.at_level(logging.INFO, logger="workers.stepping.graphs"):
        buffered(rig.device, CpuDevice(), model=gathering(), buckets=BUCKETS, runs_ahead=False, max_running=MAX_RUNNING)
    assert torch.equal(_numbers(rig.device), before)
    (record,) = [record for record in caplog.records if record.message == "step graphs captured"]
    assert (record.graphs, record.largest) == (len(BUCKETS), 256)
    assert record.seconds >= 0
    assert record.mib == 0
    rig.close()


def test_warm_tails_and_decodes_are_replayed_and_long_prefills_are_not():
    rig = late_rig(LateDevice(), max_batch_tokens=512)
    launcher = rig.engine._pipeline._launcher
    taken: list[Bucket | None] = []
    choose_graph = launcher._graphs.choose
    launcher._graphs.choose = lambda *size: taken.append(choose_graph(*size)) or taken[-1]
    (prompt,) = prompts(1, lengths=(400,))
    rig.run(rig.job("cold", prompt, max_tokens=3, ignore_eos=True))
    rig.run(rig.job("warm", prompt, max_tokens=3, ignore_eos=True))
    assert [bucket and (bucket.rows, bucket.longest) for bucket in taken] == [
        None,
        (1, 1),
        (1, 1),
        (16, 16),
        (1, 1),
        (1, 1),
    ]
    rig.close()
