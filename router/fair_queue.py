"""Whose turn it is when more is asked than the workers can take: a fair queue of requests. Pure and synchronous.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) over tenants, with costs that are settled when they are
known, as the virtual token counters of Sheng and others (OSDI 2024) are. A tenant has a virtual start: what it was
served so far, in tokens of work divided by its weight. The least start goes first; whoever comes back from idleness
starts at the virtual time, which is the start that was served last, so idleness earns nothing. While two tenants
wait, what they are served divided by their weights differs by at most one largest request of each. A tenant of any
weight is always served.

Within a tenant the higher priority goes first and equals in their order of arrival, but every `_OLDEST_EVERY`-th turn
of a tenant belongs to the request that waits longest: one that has n older ones of its tenant before it is served
after at most `_OLDEST_EVERY` * (n + 1) turns of the tenant, however many of higher priority come. A priority cannot
take anything from another tenant.

Invariants (`check`): requests, costs and tokens add up, a tenant's requests stand in their order, and exactly the
tenants with requests are looked at. Worst case: `next` and `ahead_ms` look at every tenant that waits.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_OLDEST_EVERY = 8
_FEW_TENANTS = 64  # below this many none is forgotten, which saves looking


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """A request that waits.

    Attributes:
        cost: tokens of work that it is expected to take: what its turn is charged. work_ms: of a worker's time.
        tokens: of its prompt, which wait with it. order: of arrival. body: whatever it is that waits.
    """

    tenant: str
    priority: int
    cost: float
    work_ms: float
    tokens: int
    order: int
    body: T

    @property
    def rank(self) -> tuple[int, int]:
        """Least first."""
        return -self.priority, self.order


@dataclass(slots=True)
class _Flow(Generic[T]):
    """A tenant. `ranked` and `arrived` hold the same tickets; `turns`: how many it has had."""

    weight: float
    start: float
    ranked: list[Ticket[T]] = field(default_factory=list)
    arrived: OrderedDict[int, Ticket[T]] = field(default_factory=OrderedDict)
    cost: float = 0.0
    work_ms: float = 0.0
    tokens: int = 0
    turns: int = 0

    def add(self, ticket: Ticket[T]) -> None:
        insort(self.ranked, ticket, key=lambda each: each.rank)
        self.arrived[ticket.order] = ticket
        self.cost += ticket.cost
        self.work_ms += ticket.work_ms
        self.tokens += ticket.tokens

    def drop(self, ticket: Ticket[T]) -> None:
        del self.arrived[ticket.order]
        self.ranked.remove(ticket)
        self.cost = self.cost - ticket.cost if self.ranked else 0.0  # no rounding errors are kept
        self.work_ms = self.work_ms - ticket.work_ms if self.ranked else 0.0
        self.tokens -= ticket.tokens

    def served_by(self, turn: float) -> float:
        """The share of what waits that is served before that virtual time."""
        return min(1.0, max(0.0, turn - self.start) * self.weight / self.cost) if self.cost else 1.0

    def first(self, skipped: Collection[Ticket[T]]) -> Ticket[T] | None:
        """Whose turn it is within the tenant."""
        waiting = self.arrived.values() if _is_oldests_turn(self.turns) else self.ranked
        return next((ticket for ticket in waiting if ticket not in skipped), None)

    def in_order(self) -> Iterator[Ticket[T]]:
        """All of them as they would be served if nothing came any more."""
        ranked, arrived, turns = iter(self.ranked), iter(self.arrived.values()), self.turns
        gone: set[int] = set()
        while len(gone) < len(self.ranked):
            source = arrived if _is_oldests_turn(turns) else ranked
            ticket = next(each for each in source if each.order not in gone)
            gone.add(ticket.order)
            turns += 1
            yield ticket


def _is_oldests_turn(turns: int) -> bool:
    return turns % _OLDEST_EVERY == _OLDEST_EVERY - 1


class FairQueue(Generic[T]):
    """Tickets of tenants.

    Args:
        weights: by tenant; 1 where none is given. All are positive.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._flows: dict[str, _Flow[T]] = {}
        self._waiting: dict[str, _Flow[T]] = {}
        self._virtual = 0.0
        self._orders = 0
        self._count = 0
        self._tokens = 0
        self._forget_above = _FEW_TENANTS

    def __len__(self) -> int:
        """How many wait."""
        return self._count

    @property
    def tokens(self) -> int:
        """Of the prompts that wait."""
        return self._tokens

    @property
    def work_ms(self) -> float:
        """Of workers' time that waits to be taken."""
        return sum(flow.work_ms for flow in self._waiting.values())

    def held_by(self, tenant: str) -> tuple[int, int]:
        """(requests, tokens of prompts) of a tenant that wait."""
        flow = self._waiting.get(tenant)
        return (len(flow.ranked), flow.tokens) if flow else (0, 0)

    def add(self, tenant: str, *, cost: float, work_ms: float, tokens: int, priority: int, body: T) -> Ticket[T]:
        """Queue a request."""
        ticket = Ticket(tenant, priority, cost, work_ms, tokens, self._orders, body)
        self._orders += 1
        flow = self._flow(tenant)
        if not flow.ranked:
            flow.start = max(flow.start, self._virtual)
            self._waiting[tenant] = flow
        flow.add(ticket)
        self._count += 1
        self._tokens += tokens
        return ticket

    def remove(self, ticket: Ticket[T]) -> bool:
        """Take one out that is not served; False when it is out already."""
        flow = self._waiting.get(ticket.tenant)
        if flow is None or ticket.order not in flow.arrived:
            return False
        flow.drop(ticket)
        if not flow.ranked:
            del self._waiting[ticket.tenant]
        self._count -= 1
        self._tokens -= ticket.tokens
        return True

    def next(self, skipped: Collection[Ticket[T]] = ()) -> Ticket[T] | None:
        """Whose turn it is, those left out that cannot be served now; None: nobody's. Changes nothing."""
        heads = [(flow.start, head.order, head) for flow in self._waiting.values() if (head := flow.first(skipped))]
        return min(heads)[2] if heads else None

    def serve(self, ticket: Ticket[T], cost: float) -> None:
        """Take one out and charge its tenant, with what is known of its cost by now.

        Raises:
            KeyError: it does not wait.
        """
        flow = self._waiting[ticket.tenant]
        if not self.remove(ticket):
            raise KeyError(ticket.order)
        flow.turns += 1
        self._advance(flow, cost)

    def charge(self, tenant: str, cost: float) -> None:
        """A request of the tenant is served without having waited."""
        flow = self._flow(tenant)
        if not flow.ranked:
            flow.start = max(flow.start, self._virtual)
        self._advance(flow, cost)

    def settle(self, tenant: str, difference: float) -> None:
        """A request that was charged took so much more (or less) than it was charged."""
        flow = self._flows.get(tenant)
        if flow is None:
            if difference <= 0:
                return  # forgotten, so at the virtual time already: nothing is owed
            flow = self._flow(tenant)
        flow.start += difference / flow.weight

    def ahead_ms(self, tenant: str, priority: int) -> float:
        """Work that would be served before a request that came now; exact to a request a tenant.

        Does not know of turns that belong to the oldest.
        """
        flow = self._flows.get(tenant)
        start = max(self._virtual, flow.start) if flow and not flow.ranked else flow.start if flow else self._virtual
        before = [each for each in flow.ranked if each.priority >= priority] if flow else []
        turn = start + sum(each.cost for each in before) / self._weight(tenant)
        others = (other for name, other in self._waiting.items() if name != tenant)
        return sum(each.work_ms for each in before) + sum(other.work_ms * other.served_by(turn) for other in others)

    def in_order(self) -> Iterator[tuple[Ticket[T], float]]:
        """(ticket, milliseconds of work before it) of all, in the order in which they would be served.

        Changes nothing.
        """
        flows = {name: (flow.in_order(), flow.weight) for name, flow in self._waiting.items()}
        heads = [_head(name, flow.start, flows[name][0]) for name, flow in self._waiting.items()]
        heap = [head for head in heads if head is not None]
        heapq.heapify(heap)
        ahead_ms = 0.0
        while heap:
            start, _, name, ticket = heapq.heappop(heap)
            yield ticket, ahead_ms
            ahead_ms += ticket.work_ms
            sequence, weight = flows[name]
            if (head := _head(name, start + ticket.cost / weight, sequence)) is not None:
                heapq.heappush(heap, head)

    def check(self) -> bool:
        """Whether the invariants hold."""
        flows = self._waiting.values()
        sums = (sum(len(f.ranked) for f in flows), sum(f.tokens for f in flows)) == (self._count, self._tokens)
        return sums and all(self._is_right(name, flow) for name, flow in self._flows.items())

    def _is_right(self, name: str, flow: _Flow[T]) -> bool:
        same = set(flow.arrived) == {t.order for t in flow.ranked} and len(flow.arrived) == len(flow.ranked)
        ordered = flow.ranked == sorted(flow.ranked, key=lambda t: t.rank)
        costs = abs(flow.cost - sum(t.cost for t in flow.ranked)) <= 1e-6 * (1.0 + flow.cost)
        work = abs(flow.work_ms - sum(t.work_ms for t in flow.ranked)) <= 1e-6 * (1.0 + flow.work_ms)
        tokens = flow.tokens == sum(t.tokens for t in flow.ranked)
        return same and ordered and costs and work and tokens and (name in self._waiting) == bool(flow.ranked)

    def _advance(self, flow: _Flow[T], cost: float) -> None:
        self._virtual = max(self._virtual, flow.start)
        flow.start += cost / flow.weight
        self._forget()

    def _flow(self, tenant: str) -> _Flow[T]:
        flow = self._flows.get(tenant)
        if flow is None:
            flow = self._flows[tenant] = _Flow(self._weight(tenant), self._virtual)
        return flow

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _forget(self) -> None:
        """Drop tenants that would start anew at the same place; looks only when their number has doubled."""
        if len(self._flows) <= self._forget_above:
            return
        self._flows = {n: f for n, f in self._flows.items() if f.ranked or f.start > self._virtual}
        self._forget_above = max(_FEW_TENANTS, 2 * len(self._flows))


def _head(name: str, start: float, sequence: Iterator[Ticket[T]]) -> tuple[float, int, str, Ticket[T]] | None:
    ticket = next(sequence, None)
    return None if ticket is None else (start, ticket.order, name, ticket)
