"""What is refused at the door of an overloaded router, why, and when to come back.

Covers: deadlines that cannot be met, quotas, the bounds of the queue. Does not cover: limits on requests in flight
(`admission`). Every check raises or does nothing; none changes anything.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from router.config import OverloadConfig
from router.errors import DeadlineUnreachable, Overloaded, QuotaExceeded
from router.fair_queue import FairQueue
from router.forecast import MOST, Forecast, Parts
from router.quotas import TokenQuotas

_SOONEST_S = 0.1
_LATEST_S = 60.0
_DEFAULT_S = 1.0
_ROOM = 0.1  # come back when a tenth of the queue has left it: not all who were refused for one place


class Refusals:
    """The checks."""

    def __init__(self, config: OverloadConfig, queue: FairQueue[Any], quotas: TokenQuotas, forecast: Forecast) -> None:
        self._config = config
        self._queue = queue
        self._quotas = quotas
        self._forecast = forecast

    def check_quota(self, tenant: str, tokens: float) -> None:
        """Raises QuotaExceeded unless the tenant has so many tokens left."""
        wait_s = self._quotas.wait_s(tenant, tokens)
        if wait_s <= 0.0:
            return
        limit = self._quotas.limit(tenant) or 0.0
        raise QuotaExceeded(
            f"Tenant {tenant!r} has used its {limit:,.0f} tokens a minute on this router; send the request again in"
            f" {wait_s:.1f} s, or ask the operator for a higher quota.",
            retry_after_s=max(_SOONEST_S, wait_s),
            limit="tokens_per_minute",
            tokens_per_minute=f"{limit:.0f}",
            request_tokens=f"{tokens:.0f}",
        )

    def check_deadline(self, left_ms: float, parts: Parts) -> None:
        """Raises DeadlineUnreachable when the answer would be late even if the forecast were far too high.

        `left_ms`: until the deadline.
        """
        if parts.total_ms * MOST <= left_ms or (predicted_ms := self._forecast.likely_ms(parts)) <= left_ms:
            return
        retry_s = min(_LATEST_S, max(_SOONEST_S, (predicted_ms - left_ms) / 1000.0))
        raise DeadlineUnreachable(
            f"The answer would be complete in about {_seconds(predicted_ms)} ({_seconds(parts.wait_ms)} of it in this"
            f" router's queue, {_seconds(parts.own_ms)} until the first token) and the deadline is in"
            f" {_seconds(max(0.0, left_ms))}; send it again in {retry_s:.1f} s, allow more time, or add workers.",
            retry_after_s=retry_s,
            limit="deadline",
            predicted_ms=f"{predicted_ms:.0f}",
            wait_ms=f"{parts.wait_ms:.0f}",
            first_token_ms=f"{parts.wait_ms + parts.own_ms:.0f}",
            deadline_ms=f"{max(0.0, left_ms):.0f}",
        )

    def check_room(self, tenant: str, tokens: int) -> None:
        """Raises Overloaded, naming the limit, unless one more request of this tenant may wait."""
        config, queue = self._config, self._queue
        requests, held = queue.held_by(tenant)
        whose = f"Tenant {tenant!r} has"
        self._check("max_queued", "This router has", len(queue) + 1, config.max_queued, "requests")
        self._check("max_queued_per_tenant", whose, requests + 1, config.max_queued_per_tenant, "requests")
        if queue:  # one prompt alone may be larger: else it could never be served
            self._check(
                "max_queued_tokens", "This router has", queue.tokens + tokens, config.max_queued_tokens, "tokens"
            )
        if requests:
            self._check(
                "max_queued_tokens_per_tenant", whose, held + tokens, config.max_queued_tokens_per_tenant, "tokens"
            )

    def check_wait(self, waited_s: float, wait_ms: float, *, stuck: Collection[str] = ()) -> None:
        """Raises Overloaded when a request has waited for as long as any may.

        Args:
            waited_s: so far. wait_ms: predicted to come; of one that has yet to begin it counts, at its best.
            stuck: the workers, if all that take requests are.
        """
        longest = self._config.max_queue_wait_s
        if waited_s <= longest and (waited_s or self._forecast.waits.likely_ms(wait_ms) <= longest * 1000.0):
            return
        waits = f"has waited for {waited_s:.0f} s" if waited_s else f"would wait for about {_seconds(wait_ms)}"
        remedy = "send it again later, add workers, or raise router.max_queue_wait."
        if stuck:
            remedy = (
                f"all workers that take requests ({', '.join(sorted(stuck))}) are far behind with the first tokens of"
                " what they were sent; look into their logs, restart those that hang or add workers, and send it again."
            )
        raise Overloaded(
            f"The request {waits} in this router's queue, where none waits for more than {longest:g} s; {remedy}",
            retry_after_s=min(_LATEST_S, max(_DEFAULT_S, wait_ms / 1000.0 - longest)),
            limit="max_queue_wait",
        )

    def _check(self, limit: str, whose: str, wanted: int, most: int, what: str) -> None:
        if wanted <= most:
            return
        raise Overloaded(
            f"{whose} as many {what} waiting as router.{limit} allows ({most:,}); send the request again later, add"
            " workers, or raise the limit.",
            retry_after_s=self._room_in_s(),
            limit=limit,
        )

    def _room_in_s(self) -> float:
        wait_s = self._forecast.wait_ms(self._queue.work_ms * _ROOM) / 1000.0
        return min(_LATEST_S, max(_SOONEST_S, wait_s)) if wait_s else _DEFAULT_S


def _seconds(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 1000.0 else f"{ms / 1000.0:.1f} s"
