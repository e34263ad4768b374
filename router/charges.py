"""What a request is expected to take, in tokens, and what it took: the currency of fair shares and quotas.

Covers: the weights of tokens, the expected length of answers, settling. Does not cover: whose turn it is
(`fair_queue`) or how much is left (`quotas`). Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from router.config import OverloadConfig
from router.fair_queue import FairQueue
from router.ledger import Entry
from router.quotas import TokenQuotas

_FIRST_GUESS = 128.0  # tokens of an answer of a tenant that has had none
_NEWEST = 1 / 16  # weight of the newest answer in a mean
_MOST_MEANS = 4096  # tenants come from outside: those whose answers ended longest ago are forgotten


@dataclass(slots=True)
class Charge:
    """What was charged for a request and is settled at its end.

    Attributes:
        cost: tokens of work, for its tenant's turn. quota: tokens, of its tenant's quota. max_tokens: of an answer.
        sent: whether it has gone to a worker; until then its turn is charged nothing. samples: answers to the prompt.
    """

    tenant: str
    cost: float
    quota: float
    max_tokens: int
    sent: bool = False
    samples: int = 1


class Charges:
    """Estimates, and settles against a queue and the quotas.

    An answer is expected to be as long as those of the tenant to requests that allowed about as many tokens (up to
    the same power of two) were in the mean: who allows ten times more has asked for something else.
    """

    def __init__(self, config: OverloadConfig, queue: FairQueue[Any], quotas: TokenQuotas) -> None:
        self._cached_weight = config.cached_token_weight
        self._output_weight = config.output_token_weight
        self._queue = queue
        self._quotas = quotas
        self._answers: OrderedDict[tuple[str, int], float] = OrderedDict()

    def expected(
        self, tenant: str, *, prompt_tokens: int, cached_tokens: int, max_tokens: int, samples: int = 1
    ) -> Charge:
        """For a prompt of which so much is predicted to be cached, and so many answers. Charges nothing."""
        prompt = self._prompt(prompt_tokens - cached_tokens, cached_tokens)
        answer = samples * self.answer_tokens(tenant, max_tokens, unknown=_FIRST_GUESS)
        return Charge(tenant, prompt + self._output_weight * answer, prompt + answer, max_tokens, samples=samples)

    def answer_tokens(self, tenant: str, max_tokens: int, *, unknown: float) -> float:
        """How long an answer is expected to be; `unknown`: of a tenant that has had none like it."""
        return min(float(max_tokens), self._answers.get(_kind(tenant, max_tokens), unknown))

    def settle(self, charge: Charge, entry: Entry) -> None:
        """The request has ended, and no worker is at it any more.

        One that no worker reported on, because it was lost, keeps what it was charged: it took nobody knows what.
        One that ended in its worker's queue took nothing.
        """
        if charge.sent and entry.begun and not entry.fates:
            return
        prompt = self._prompt(entry.fates.get("computed", 0), entry.reused)
        if charge.sent:
            self._queue.settle(charge.tenant, prompt + self._output_weight * entry.generated_tokens - charge.cost)
        self._quotas.take(charge.tenant, prompt + entry.generated_tokens - charge.quota)
        if entry.code == "OK":
            self._learn(_kind(charge.tenant, charge.max_tokens), entry.generated_tokens / charge.samples)

    def _prompt(self, computed: int, cached: int) -> float:
        return computed + self._cached_weight * cached

    def _learn(self, kind: tuple[str, int], generated: float) -> None:
        mean = self._answers.pop(kind, float(generated))
        self._answers[kind] = mean + (generated - mean) * _NEWEST
        if len(self._answers) > _MOST_MEANS:
            self._answers.popitem(last=False)


def _kind(tenant: str, max_tokens: int) -> tuple[str, int]:
    return tenant, max_tokens.bit_length()
