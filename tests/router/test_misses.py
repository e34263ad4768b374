from __future__ import annotations

from kvstore.events import BlockRemoved, BlockStored, RemovalCause, TierName
from router.index import PrefixIndex
from router.misses import AnswerMemory, explain_miss
from router.protocol import Prompt

ROOT = b"r" * 32


def index_with(*blocks: bytes) -> PrefixIndex:
    index = PrefixIndex(lambda: 0.0)
    index.join("a", 1)
    index.begin_snapshot("a", 1)
    index.snapshot("a", 1, [BlockStored(TierName.DEVICE, blocks)])
    index.end_snapshot("a", 1)
    return index


def test_a_prompt_whose_blocks_are_all_held_misses_nothing() -> None:
    assert explain_miss(index_with(b"1", b"2"), [b"1", b"2"], None) is None


def test_the_first_missing_block_is_named_with_its_cause() -> None:
    index = index_with(b"1", b"2")
    index.apply("a", 1, [BlockRemoved(TierName.DEVICE, (b"2",), RemovalCause.EXPIRED)])
    missing = explain_miss(index, [b"1", b"2", b"3"], None)
    assert missing is not None
    assert (missing.reason, missing.block) == ("expired", 1)
    assert explain_miss(index, [b"1", b"9"], None).reason == "never_seen"  # type: ignore[union-attr]


def test_an_answer_that_came_back_as_other_ids_is_recognised() -> None:
    memory = AnswerMemory()
    memory.remember(ROOT, "Q: hi A:", " hello there ", [b"1", b"2", b"3"])
    text = "Q: hi A: hello there Q: more A:"
    prompt = Prompt([], text, (len("Q: hi A: hello there"),))
    at = memory.retokenized_at(ROOT, prompt, [b"1", b"2x", b"3x", b"4x"])
    assert at == 2
    missing = explain_miss(index_with(b"1", b"2", b"3"), [b"1", b"2x", b"3x", b"4x"], at)
    assert missing is not None
    assert (missing.reason, missing.block) == ("retokenized", 1)
    assert "token_ids" in missing.detail


def test_an_answer_under_the_same_ids_is_not_retokenized() -> None:
    memory = AnswerMemory()
    memory.remember(ROOT, "Q A", "yes", [b"1", b"2"])
    assert memory.retokenized_at(ROOT, Prompt([], "Q Ayes Q", (6,)), [b"1", b"2", b"3"]) is None


def test_a_miss_behind_the_answer_is_not_its_fault() -> None:
    missing = explain_miss(index_with(b"1"), [b"1", b"2"], 0)
    assert missing is not None
    assert missing.reason == "never_seen"


def test_templates_that_strip_answers_are_recognised_too() -> None:
    memory = AnswerMemory()
    memory.remember(ROOT, "QA", "\n yes \n", [b"1"])
    assert memory.retokenized_at(ROOT, Prompt([], "QAyes", (5,)), [b"x"]) == 0


def test_another_tenants_conversation_is_not_remembered_for_this_one() -> None:
    memory = AnswerMemory()
    memory.remember(ROOT, "QA", "yes", [b"1"])
    assert memory.retokenized_at(b"s" * 32, Prompt([], "QAyes", (5,)), [b"x"]) is None


def test_memory_is_bounded() -> None:
    memory = AnswerMemory(max_entries=2)
    for n in range(5):
        memory.remember(ROOT, f"Q{n}", "yes", [b"1"])
    assert memory.retokenized_at(ROOT, Prompt([], "Q0yes", (5,)), [b"x"]) is None
    assert memory.retokenized_at(ROOT, Prompt([], "Q4yes", (5,)), [b"x"]) == 0
