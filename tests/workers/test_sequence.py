from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvstore.blocks import BlockHash, block_hashes
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from workers.protocol import Job, SamplingParams
from workers.sequence import Sequence

ROOT = BlockHash(b"r" * 32)
PROMPT = list(range(10))


def _sequence(*, arrival: int = 1, **options: object) -> Sequence:
    names = block_hashes(PROMPT, ROOT, 4)
    job = Job("a", PROMPT, ROOT, names, SamplingParams(max_tokens=9), **options)
    return Sequence(job, arrival, 0.0, list(PROMPT), list(names), SimpleNamespace())


def test_blocks_of_generated_tokens_go_on_with_the_prompts_chain():
    sequence = _sequence()
    sequence.token_ids += [50, 51, 52]
    assert sequence.names(3, 4) == block_hashes([*PROMPT, 50, 51], ROOT, 4)
    metas = sequence.metas(1, 3, 4, Lifetime(60.0))
    assert [meta.hash for meta in metas] == sequence.hashes[1:]
    assert [meta.parent for meta in metas] == sequence.hashes[:2]
    assert {(meta.root, meta.ttl_s) for meta in metas} == {(ROOT, 60.0)}
    assert sequence.metas(0, 1, 4, Lifetime(None))[0].parent == ROOT


@pytest.mark.parametrize(("tokens", "blocks"), [(9, 2), (10, 2), (12, 2), (13, 3)])
def test_one_token_stays_to_be_computed(tokens: int, blocks: int):
    sequence = _sequence()
    sequence.token_ids = list(range(tokens))
    assert len(sequence.readable(4)) == blocks


def test_a_job_that_reads_nothing_has_nothing_readable():
    assert _sequence(no_read=True).readable(4) == []


def test_fates_count_what_arrived_and_stay_when_it_resumes():
    sequence = _sequence()
    sequence.take(
        SimpleNamespace(
            block_ids=[4, 2], fates=[TierName.DEVICE, TierName.REDIS], load_ms=7.0, made_elsewhere=0, tail=None
        ),
        4,
    )
    assert sequence.fates == {"computed": 2, "device": 4, "redis": 4}
    assert (sequence.num_computed, sequence.num_committed, sequence.remaining) == (8, 2, 2)
    sequence.reset()
    sequence.take(SimpleNamespace(block_ids=[], fates=[], load_ms=99.0, made_elsewhere=0, tail=None), 4)
    assert sequence.fates == {"computed": 2, "device": 4, "redis": 4}
    assert (sequence.load_ms, sequence.num_cached_tokens, sequence.num_computed) == (7.0, 8, 0)


def test_rank_is_priority_then_arrival():
    order = [_sequence(arrival=3, priority=2), _sequence(arrival=1), _sequence(arrival=2), _sequence(priority=-1)]
    shuffled = [order[place] for place in (2, 0, 3, 1)]
    assert sorted(shuffled, key=lambda sequence: sequence.rank) == order


def test_what_comes_from_its_back_counts_as_found_until_the_first_token_only():
    sequence = _sequence()
    tail = SimpleNamespace()
    sequence.take(SimpleNamespace(block_ids=[], fates=[], load_ms=0.0, made_elsewhere=0, tail=tail), 4)
    sequence.block_table, sequence.num_computed = [3], 4
    sequence.join([5], [TierName.REDIS], 4)
    assert (sequence.block_table, sequence.num_computed, sequence.num_committed) == ([3, 5], 8, 0)
    assert sequence.fates == {"computed": 6, "redis": 4}
    assert sequence.first_outside == 1
    sequence.committed(1)
    assert sequence.num_committed == 2
    sequence.reset()
    sequence.take(SimpleNamespace(block_ids=[], fates=[], load_ms=0.0, made_elsewhere=0, tail=tail), 4)
    sequence.join([5], [TierName.REDIS], 4)
    assert sequence.num_committed == 1
    assert sequence.fates == {"computed": 6, "redis": 4}
