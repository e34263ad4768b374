"""How many tokens a tenant may use: a token bucket for each, that fills by the second and holds one minute's quota.

Pure, on an injected clock. What is taken is an expectation, corrected when the request has ended; so a bucket can be
overdrawn, and then fills up before its tenant is admitted again. In a fleet each router gives out its part: the quota
divided by the number of routers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_PERIOD_S = 60.0
_FEW_BUCKETS = 64  # below this many none is looked at, which saves looking


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class TokenQuotas:
    """The buckets.

    Args:
        limits: tokens a minute of the fleet, by tenant. default: of each tenant that has no own; None: unlimited.
        routers: how many routers share the quotas now, at least 1.
    """

    def __init__(
        self,
        limits: Mapping[str, int],
        default: int | None,
        clock: Callable[[], float],
        *,
        routers: Callable[[], int] = lambda: 1,
    ) -> None:
        self._limits = dict(limits)
        self._default = default
        self._clock = clock
        self._routers = routers
        self._buckets: dict[str, _Bucket] = {}
        self._forget_above = _FEW_BUCKETS

    def limit(self, tenant: str) -> float | None:
        """This router's part of the tenant's tokens a minute; None: unlimited."""
        limit = self._limits.get(tenant, self._default)
        return None if limit is None else limit / max(1, self._routers())

    def wait_s(self, tenant: str, tokens: float) -> float:
        """Seconds until a request that takes so many tokens would be admitted; zero: now. Changes nothing.

        One that takes more than a whole minute's quota is admitted when the bucket is full, and overdraws it.
        """
        limit = self.limit(tenant)
        if limit is None:
            return 0.0
        missing = min(tokens, limit) - self._level(tenant, limit)
        return missing * _PERIOD_S / limit if missing > 0 else 0.0

    def take(self, tenant: str, tokens: float) -> None:
        """Take from the bucket, or give back with a negative number; a bucket may be overdrawn, never overfull."""
        limit = self.limit(tenant)
        if limit is None:
            return
        level = min(limit, self._level(tenant, limit) - tokens)
        if level < limit:
            self._buckets[tenant] = _Bucket(level, self._clock())
            self._forget()
        else:
            self._buckets.pop(tenant, None)  # full: as if it had never been used

    def _level(self, tenant: str, limit: float) -> float:
        bucket = self._buckets.get(tenant)
        if bucket is None:
            return limit
        return min(limit, bucket.tokens + (self._clock() - bucket.at) * limit / _PERIOD_S)

    def _forget(self) -> None:
        """Drop buckets that are full, as if they had never been used; looks only when their number has doubled."""
        if len(self._buckets) <= self._forget_above:
            return
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if not self._is_full(name)}
        self._forget_above = max(_FEW_BUCKETS, 2 * len(self._buckets))

    def _is_full(self, tenant: str) -> bool:
        limit = self.limit(tenant)
        return limit is None or self._level(tenant, limit) >= limit
