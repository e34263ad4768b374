"""The driver against a client that answers by itself: the order of requests, what is retold, what is repeated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from deploy.closed_loop import Driver, turns_done
from deploy.workload import WorkloadShape, make_workload
from warmkv.client import ChatMessage, WarmkvError
from warmkv.v1 import common_pb2, inference_pb2

SHAPE = WorkloadShape(tenants=("acme",), chats_per_tenant=2, turns=3, questions=2)


class Answer:
    """A stream of one piece."""

    text, token_ids = "fine", (7, 8)

    def __init__(self, tokens: int, error: WarmkvError | None) -> None:
        self.error = error
        self.usage = inference_pb2.Usage(
            prompt_tokens=tokens, prompt_tokens_by_fate=common_pb2.TokensByFate(computed=tokens)
        )
        self.route = inference_pb2.Route(worker="w0", reason="prefix")

    async def __aiter__(self) -> AsyncIterator[object]:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        yield object()


class Client:
    """Remembers what it was asked."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[list[ChatMessage]] = []
        self.fail_at = fail_at

    def generate(self, *, messages: list[ChatMessage], **options: Any) -> Answer:
        self.asked.append(list(messages))
        error = WarmkvError("lost", code=grpc.StatusCode.UNAVAILABLE) if len(self.asked) - 1 == self.fail_at else None
        return Answer(sum(len(message.content) for message in messages), error)


def play(client: Client, **options: Any) -> tuple[Driver, Any]:
    driver = Driver({"acme": client}, users=options.pop("users", 1))  # type: ignore[dict-item]
    return driver, asyncio.run(driver.run("act", make_workload(SHAPE), **options))


def test_a_chat_retells_its_history_with_the_token_ids_of_its_answers() -> None:
    client = Client()
    _, act = play(client)
    assert len(act.results) == make_workload(SHAPE).requests
    chats = [asked for asked in client.asked if len(asked) > 2]
    for asked in chats:
        answers = [message for message in asked if message.role == "assistant"]
        assert answers
        assert all(tuple(answer.token_ids) == (7, 8) for answer in answers)
        assert [message.role for message in asked[:3]] == ["system", "user", "assistant"]


def test_document_questions_stand_alone() -> None:
    client = Client()
    play(client)
    documents = [asked for asked in client.asked if asked[0].content.startswith("Document")]
    assert documents
    assert all(len(asked) == 2 for asked in documents)


def test_between_two_turns_of_a_session_all_others_have_had_one() -> None:
    _, act = play(Client())
    turns = [result.turn for result in act.results]
    assert turns == sorted(turns)


def test_another_act_can_repeat_just_what_one_answered() -> None:
    client = Client()
    _, first = play(client, budget_s=0.0)
    assert first.results == ()
    _, whole = play(Client(), turns=dict.fromkeys((session.name for session in make_workload(SHAPE).sessions), 1))
    assert turns_done(whole) == {session.name: 1 for session in make_workload(SHAPE).sessions}


def test_a_session_whose_request_failed_ends_and_the_failure_is_told() -> None:
    _, act = play(Client(fail_at=0))
    assert act.failed == 1
    failed = next(result for result in act.results if not result.ok)
    assert "lost" in failed.error
    assert [result.turn for result in act.results if result.session == failed.session] == [0]


@pytest.mark.parametrize(("one_each", "count"), [(False, 4), (True, 2)])
def test_a_replay_asks_the_last_question_of_every_session_or_of_every_prefix(one_each: bool, count: int) -> None:
    client = Client()
    driver, _ = play(client)
    last = {tuple(asked) for asked in client.asked}
    client.asked.clear()
    replayed = asyncio.run(driver.replay("again", one_each=one_each))
    assert len(replayed.results) == len(client.asked) == count
    assert {tuple(asked) for asked in client.asked} <= last
    assert len({asked[0].content for asked in client.asked}) == 2
