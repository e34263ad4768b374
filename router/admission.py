"""Who may start a request now. Covers: limits on requests in flight, in all and for a tenant, and draining.

Does not cover: turns, quotas and deadlines (`waiting_room`) or prompt sizes (`core`). Pure; nothing waits here: a
caller that must not start is told when to come back. Requests that wait for their turn are in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from router.errors import Draining, Overloaded


class Admission:
    """Counts requests in flight."""

    def __init__(self, max_in_flight: int, max_per_tenant: int) -> None:
        self._max_in_flight = max_in_flight
        self._max_per_tenant = max_per_tenant
        self._tenants: Counter[str] = Counter()
        self._draining = False

    @property
    def in_flight(self) -> int:
        """Requests that were admitted and have not ended."""
        return self._tenants.total()

    @property
    def draining(self) -> bool:
        """Whether nothing new is admitted for good."""
        return self._draining

    def drain(self) -> None:
        """Admit nothing more."""
        self._draining = True

    @contextmanager
    def admitted(self, tenant: str) -> Iterator[None]:
        """Hold a place while the block runs.

        Raises:
            Draining: the router ends. Overloaded: a limit is reached; carries when to try again.
        """
        self._check(tenant)
        self._tenants[tenant] += 1
        try:
            yield
        finally:
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant]

    def _check(self, tenant: str) -> None:
        if self._draining:
            raise Draining("This router is shutting down; send the request to another router.", retry_after_s=1.0)
        if self.in_flight >= self._max_in_flight:
            raise Overloaded(
                f"{self._max_in_flight} requests are in flight, which is this router's limit; try again in a second,"
                " add workers, or raise max_in_flight.",
                retry_after_s=1.0,
                limit="max_in_flight",
            )
        if self._tenants[tenant] >= self._max_per_tenant:
            raise Overloaded(
                f"Tenant {tenant!r} has {self._max_per_tenant} requests in flight, which is its limit; wait for one to"
                " end, or raise max_in_flight_per_tenant.",
                retry_after_s=1.0,
                limit="max_in_flight_per_tenant",
            )
