"""Drives a workload through the public client in a closed loop: a session's next request waits for its last answer.

Covers: the order of requests, retelling the history, timing as the client sees it. Does not cover: what is asked
(`deploy.workload`) or what it came to (`deploy.summary`).

Sessions wait in one first-in-first-out queue and a fixed number of users take turns from it, so between two turns of
one session all the others have had one: this is what makes caches small compared with the traffic, as in production.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field

from deploy.summary import Act, Result
from deploy.workload import Session, Workload
from warmkv.client import AsyncClient, AsyncStream, ChatMessage, WarmkvError

OnResult = Callable[[Result], None]


@dataclass(slots=True)
class _Conversation:
    """One session's progress."""

    session: Session
    turn: int = 0
    messages: list[ChatMessage] = field(default_factory=list)

    def next_messages(self) -> list[ChatMessage]:
        """What to send next: a chat's whole history, or the document with one question."""
        said = ChatMessage("user", self.session.turns[self.turn])
        if self.session.kind == "chat":
            return [ChatMessage("system", self.session.system), *self.messages, said]
        return [ChatMessage("system", self.session.system), said]

    def answered(self, text: str, token_ids: list[int]) -> None:
        """Take the answer into the history, with its own token ids, so that the next turn hits it exactly."""
        said = ChatMessage("user", self.session.turns[self.turn])
        self.messages += [said, ChatMessage("assistant", text, tuple(token_ids))]
        self.turn += 1


@dataclass(slots=True)
class Driver:
    """Runs acts.

    Attributes:
        clients: one for each tenant, with its API key. users: how many requests are in flight at most.
        answer_tokens: length of every answer. on_result: called after each request.
    """

    clients: Mapping[str, AsyncClient]
    users: int = 4
    answer_tokens: int = 12
    on_result: OnResult = lambda _result: None
    _asked: dict[str, tuple[Session, list[ChatMessage]]] = field(default_factory=dict)

    async def run(
        self, name: str, workload: Workload, *, budget_s: float | None = None, turns: Mapping[str, int] | None = None
    ) -> Act:
        """One act: every session to its end, or for `budget_s` seconds, or for as many turns of each as `turns` says.

        A user whose queue is empty leaves; the turns that others still hold come back to those who stay.
        """
        queue = deque(_Conversation(s) for s in workload.sessions if _limit(s, turns) > 0)
        started, results = time.perf_counter(), list[Result]()

        async def user() -> None:
            while queue and (budget_s is None or time.perf_counter() - started < budget_s):
                conversation = queue.popleft()
                result = await self._turn(conversation, time.perf_counter() - started)
                results.append(result)
                self.on_result(result)
                if result.ok and conversation.turn < _limit(conversation.session, turns):
                    queue.append(conversation)

        await self._with_users(user)
        return Act(name, tuple(results), time.perf_counter() - started)

    async def replay(self, name: str, *, one_each: bool = False) -> Act:
        """Ask again what each session asked last, with the same number of users.

        With `one_each`, only one session of those that share a system prompt or a document, so that no replayed prefix
        is warmed by another one.
        """
        chosen = {
            session.system if one_each else session.name: (session, asked) for session, asked in self._asked.values()
        }
        queue = deque(chosen.values())
        started, results = time.perf_counter(), list[Result]()

        async def user() -> None:
            while queue:
                session, messages = queue.popleft()
                result, _ = await self._ask(session, 0, messages, time.perf_counter() - started)
                results.append(result)
                self.on_result(result)

        await self._with_users(user)
        return Act(name, tuple(results), time.perf_counter() - started)

    async def _with_users(self, user: Callable[[], Coroutine[None, None, None]]) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.users):
                group.create_task(user())

    async def _turn(self, conversation: _Conversation, started_s: float) -> Result:
        session, messages = conversation.session, conversation.next_messages()
        self._asked[session.name] = session, messages
        result, stream = await self._ask(session, conversation.turn, messages, started_s)
        if result.ok:
            conversation.answered(stream.text, list(stream.token_ids))
        return result

    async def _ask(
        self, session: Session, turn: int, messages: list[ChatMessage], started_s: float
    ) -> tuple[Result, AsyncStream]:
        sent = time.perf_counter()
        stream = self.clients[session.tenant].generate(
            messages=messages, max_tokens=self.answer_tokens, temperature=0.0, ignore_eos=True
        )
        first: float | None = None
        try:
            async for _piece in stream:
                first = first or time.perf_counter()
        except WarmkvError as error:
            return Result(session.name, turn, session.tenant, started_s, error=str(error)), stream
        now = time.perf_counter()
        by_fate = stream.usage.prompt_tokens_by_fate
        result = Result(
            session.name,
            turn,
            session.tenant,
            started_s,
            ttft_s=(first or now) - sent,
            duration_s=now - sent,
            prompt_tokens=stream.usage.prompt_tokens,
            fates={field.name: value for field, value in by_fate.ListFields()},
            worker=stream.route.worker,
            reason=stream.route.reason,
        )
        return result, stream


def turns_done(act: Act) -> dict[str, int]:
    """How many turns of each session an act answered: what another act must repeat to be compared with it."""
    done: dict[str, int] = {}
    for result in act.answered:
        done[result.session] = max(done.get(result.session, 0), result.turn + 1)
    return done


def _limit(session: Session, turns: Mapping[str, int] | None) -> int:
    return len(session.turns) if turns is None else turns.get(session.name, 0)
