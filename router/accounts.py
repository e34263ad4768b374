"""What follows from a request: times and prediction errors, the bill, refusals, and what its answer may explain later.

Covers: whom to tell of a first token, of the end, of a refusal. Does not cover: the walk of a request (`core`), what
each of those told does with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from kvstore.blocks import block_hashes, short
from router.board import Recent
from router.errors import Draining, Overloaded, RouterError
from router.ledger import Entry, Ledger
from router.metrics import Metrics
from router.misses import AnswerMemory
from router.protocol import Encoder
from router.request import PreparedPrompt, Request
from router.waiting_room import WaitingRoom
from router.watching import Watchers


class Accounts:
    """Of one router.

    Attributes:
        ledger: totals. answers: what was said, for turns that come back under other names. refused: requests, by limit.
    """

    def __init__(
        self,
        metrics: Metrics,
        recent: Recent,
        room: WaitingRoom,
        watchers: Watchers,
        encoder: Encoder,
        clock: Callable[[], float],
    ) -> None:
        self.ledger = Ledger()
        self.answers = AnswerMemory()
        self.refused: Counter[str] = Counter()
        self._metrics, self._recent, self._room, self._watchers = metrics, recent, room, watchers
        self._encoder, self._clock = encoder, clock

    def first_token(self, work: Request, now: float) -> None:
        """A request has its first token."""
        self._recent.first_token(work.ttft_ms)
        self._metrics.observe_ttft(now - work.started)
        if work.choice is not None:
            predicted_ms = work.choice.predicted_ttft_ms
            self._metrics.observe_ttft_error(now - work.sent_at, predicted_ms, work.choice.worker)
        if work.guest is not None:
            self._room.answered(work.guest)
        if work.record is not None:
            work.record.ttft_ms = work.ttft_ms

    def gap(self, seconds: float, tokens: int) -> None:
        """So many tokens of an answer came so long after those before."""
        self._metrics.observe_gap(seconds, tokens)
        self._room.tokens_came(seconds, tokens)

    def paused(self, seconds: float, tokens: int) -> None:
        """So many tokens came so long after those before, at another worker: a pause, and no pace of answers."""
        self._metrics.observe_gap(seconds, tokens)
        self._metrics.observe_pause(seconds)
        self._recent.paused(seconds * 1000.0)

    def settle(self, work: Request, entry: Entry) -> None:
        """It has ended, and no worker is at it any more."""
        self.ledger.record(entry)
        self._room.settle(work.guest, entry)
        self._metrics.count(entry)
        self._metrics.observe_request(self._clock() - work.started)
        if work.record is not None and entry.fates:
            work.record.reused_tokens = entry.reused
        self._watchers.ended(work, entry)

    def refuse(self, error: RouterError) -> None:
        """Count an error, if it is a refusal."""
        if isinstance(error, Overloaded | Draining):
            limit = error.metadata.get("limit", error.reason.lower())
            self.refused[limit] += 1
            self._metrics.refused.labels(limit).inc()

    def remember_answer(self, work: Request, prepared: PreparedPrompt) -> None:
        """So that a next turn under other names can be told why it missed."""
        if len(work.answer_ids) < 2:
            return
        size = prepared.question.block_size
        full = len(prepared.question.hashes) * size
        # Without the last token: an end token is the template's business.
        tail = [*prepared.prompt.token_ids[full:], *work.answer_ids[:-1]]
        parent = prepared.chain.last or prepared.root
        names = [*prepared.question.hashes, *(short(name) for name in block_hashes(tail, parent, size))]
        answer = "".join(work.answer)
        said = self._encoder.said(prepared.given, answer)
        self.answers.remember(prepared.root, said, prepared.prompt.rendered, answer, names)
