"""What a worker tells eviction policies of a conversation: the unit, and through a real engine to its host tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks import BlockHash, block_hashes
from kvstore.eviction.policies import hint_of
from kvstore.lifetime import Lifetime
from kvstore.tier import BlockMeta, prolonged
from tests.workers.engine_rig import BLOCK_SIZE, Rig, make_rig, prompts
from workers import conversations
from workers.conversations import Conversations, Turn
from workers.protocol import Job, SamplingParams

ROOT = BlockHash(b"r" * 32)
SYSTEM = list(range(100, 132))  # two whole blocks
USER = 7


def job_of(tokens: Sequence[int], turn: int | None) -> Job:
    return Job("a", tokens, ROOT, block_hashes(tokens, ROOT, BLOCK_SIZE), SamplingParams(max_tokens=1), turn=turn)


def told(turn: Turn) -> tuple[float | None, int | None]:
    return turn.think_s, turn.new_tokens


def hints(rig: Rig, job: Job, first: int) -> set[tuple[int | None, float | None, int | None]]:
    """What the host tier was told of a job's blocks from `first` on."""
    found = [rig.store.host.find(name) for name in job.block_hashes[first:]]
    assert found
    assert None not in found
    return {(hint.turn, hint.think_s, hint.new_tokens) for hint in map(hint_of, found)}


def test_the_host_tier_is_told_of_the_turn_before_and_of_what_this_one_adds():
    rig = make_rig(host_blocks=100)
    clock = [1000.0]
    rig.engine._clock = lambda: clock[0]
    said = prompts(1, lengths=(100,))[0]
    first = rig.job("1", said, max_tokens=40, turn=1)
    [answer] = rig.run(first)
    assert hints(rig, first, 0) == {(1, None, 100)}
    clock[0] += 42.0
    said = said + answer.token_ids + prompts(1, lengths=(60,), seed=1)[0]
    second = rig.job("2", said, max_tokens=3, turn=2)
    rig.run(second)
    new = (100 + len(answer.token_ids)) // BLOCK_SIZE
    assert hints(rig, second, new) == {(2, 42.0, len(said) - 100)}
    assert hints(rig, first, 0) == {(1, None, 100)}
    rig.close()


def test_an_answer_tells_chats_apart_that_end_on_the_same_block_of_a_prompt():
    rig = make_rig(host_blocks=100)
    clock = [0.0]
    rig.engine._clock = lambda: clock[0]
    opened = []
    for number in range(2):
        clock[0] = 10.0 * number
        said = [*SYSTEM, USER + number]
        [answer] = rig.run(rig.job(number, said, max_tokens=2 * BLOCK_SIZE, turn=1))
        opened.append(said + answer.token_ids)
    clock[0] = 100.0
    goes_on = rig.job("on", opened[0] + prompts(1, lengths=(40,))[0], max_tokens=1, turn=2)
    rig.run(goes_on)
    assert hints(rig, goes_on, len(opened[0]) // BLOCK_SIZE) == {(2, 100.0, len(goes_on.token_ids) - len(SYSTEM) - 1)}
    rig.close()


def test_an_answer_too_short_for_a_block_leaves_a_prompt_what_it_is():
    rig = make_rig(host_blocks=100)
    rig.engine._clock = lambda: 5.0
    rig.run(rig.job("a", [*SYSTEM, USER], max_tokens=2, turn=1))
    other = rig.job("b", [*SYSTEM, *prompts(1, lengths=(40,))[0]], max_tokens=1, turn=1)
    rig.run(other)
    assert hints(rig, other, 2) == {(1, None, 72)}
    goes_on = rig.job("c", [*SYSTEM, USER, *prompts(1, lengths=(40,), seed=3)[0]], max_tokens=1, turn=2)
    rig.run(goes_on)
    assert hints(rig, goes_on, 2) == {(2, 0.0, 40)}
    rig.close()


def test_what_is_not_stored_of_a_block_is_no_part_of_what_it_is():
    [name] = block_hashes(SYSTEM[:BLOCK_SIZE], ROOT, BLOCK_SIZE)
    meta = BlockMeta(name, ROOT, ROOT, 60.0, turn=2)
    told_more = replace(meta, think_s=1.5, new_tokens=7)
    assert (told_more, hash(told_more)) == (meta, hash(meta))
    assert prolonged(told_more, Lifetime(90.0)).new_tokens == 7


def test_a_first_turn_is_new_as_a_whole_and_an_unknown_one_is_not_guessed():
    seen = Conversations()
    assert told(seen.arrived(job_of(SYSTEM, 1), 0.0)) == (None, len(SYSTEM))
    assert told(seen.arrived(job_of([*range(50)], 5), 1.0)) == (None, None)
    assert told(seen.arrived(job_of([*range(200, 250)], None), 1.0)) == (None, None)
    assert told(seen.arrived(job_of([3], 1), 1.0)) == (None, 1)


@pytest.mark.parametrize("number", [None, 1, 3])
def test_steps_of_one_turn_are_known_by_the_answers_that_they_hold(number: int | None):
    seen = Conversations()
    first = seen.arrived(job_of([*range(40)], number), 5.0)
    seen.answered(first, block_hashes([*range(64)], ROOT, BLOCK_SIZE)[-1])
    assert told(seen.arrived(job_of([*range(90)], number), 7.5)) == (2.5, 50)
    other = told(seen.arrived(job_of([*range(100)], number), 8.0))
    assert other == (None, 100 if number == 1 else None), "it may be another one that begins alike"


def test_a_turn_is_measured_from_the_one_before_it_and_from_no_other():
    seen = Conversations()
    seen.arrived(job_of([*range(40)], 1), 0.0)
    assert told(seen.arrived(job_of([*range(90)], 3), 9.0)) == (None, None), "the second turn was served elsewhere"
    assert told(seen.arrived(job_of([*range(40)], 2), 9.0)) == (None, None), "no turn adds nothing"


def test_chats_that_ended_on_one_block_are_not_mistaken_for_one_another():
    seen = Conversations()
    for number in range(2):
        seen.arrived(job_of([*SYSTEM, USER + number], 1), float(number))
    later = [*SYSTEM, USER, *range(200, 240)]
    assert told(seen.arrived(job_of(later, 2), 50.0)) == (None, None)
    assert told(seen.arrived(job_of([*later, *range(300, 340)], 3), 60.0)) == (10.0, 40)


@settings(max_examples=60, deadline=None)
@given(
    chats=st.lists(
        st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 500.0)), min_size=1, max_size=5), min_size=1, max_size=4
    ),
    order=st.randoms(use_true_random=False),
)
def test_chats_in_any_order_are_told_what_a_list_of_them_says(chats: list[list[tuple[int, float]]], order) -> None:
    seen, now = Conversations(), 0.0
    prompt = [[1000 + chat] * BLOCK_SIZE for chat in range(len(chats))]
    served: list[list[tuple[float, int]]] = [[] for _ in chats]  # when, and how many tokens
    queue = [chat for chat, turns in enumerate(chats) for _ in turns]
    order.shuffle(queue)
    for chat in queue:
        added, later = chats[chat][len(served[chat])]
        now += later
        prompt[chat] = prompt[chat] + [order.randrange(1000) for _ in range(added)]
        turn = seen.arrived(job_of(prompt[chat], len(served[chat]) + 1), now)
        before = served[chat][-1] if served[chat] else None
        wanted = (None, len(prompt[chat])) if before is None else (now - before[0], len(prompt[chat]) - before[1])
        assert told(turn) == pytest.approx(wanted)
        served[chat].append((now, len(prompt[chat])))


def test_only_so_many_turns_are_remembered_the_latest_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversations, "_REMEMBERED", 3)
    seen = Conversations()
    chats = [[number] * 20 for number in range(5)]
    for number, chat in enumerate(chats):
        seen.arrived(job_of(chat, 1), float(number))
    assert len(seen._latest) == 3
    assert told(seen.arrived(job_of([*chats[4], *range(30)], 2), 10.0)) == (6.0, 30)
    assert told(seen.arrived(job_of([*chats[0], *range(30)], 2), 10.0)) == (None, None)


def test_a_chat_that_goes_on_within_one_block_is_as_late_as_its_last_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversations, "_REMEMBERED", 2)
    seen = Conversations()
    seen.arrived(job_of([1] * 17, 1), 0.0)
    seen.arrived(job_of([2] * 17, 1), 1.0)
    assert told(seen.arrived(job_of([1] * 20, 2), 2.0)) == (2.0, 3)
    seen.arrived(job_of([3] * 17, 1), 3.0)
    assert told(seen.arrived(job_of([1] * 40, 3), 4.0)) == (2.0, 20)
