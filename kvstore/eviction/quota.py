"""Quotas with borrowing, on top of any eviction policy. Pure.

Each root (a tenant) may have a share of the capacity; roots without one have together what no share takes. A share that
is not used may be used by others, and is given back under pressure: victims come from the root that is furthest over
its share, by the policy's order among its own entries. A root within its share never loses an entry to one that is
over: when nothing of the roots over their shares may go, room is made of the newcomer's own entries, or not at all.

Since the shares fit the capacity, a full tier in which a root wants more of its own share has another one over its
share. O(log n) an operation beside the policy's: the roots over their shares stand in a ranking by excess.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic

from kvstore.eviction.order import Hint, Key, Order, Ranking

_OTHERS = object()  # the roots without a share


@dataclass(slots=True, eq=False)
class _Tenant(Generic[Key]):
    share: int
    order: Order[Key]
    entries: int = 0

    @property
    def excess(self) -> int:
        return self.entries - self.share


class QuotaOrder(Generic[Key]):
    """One order of the same policy for each root, and whose turn it is."""

    def __init__(self, make: Callable[[int], Order[Key]], capacity: int, shares: Mapping[Hashable, int]) -> None:
        """Take the shares, in entries by root; `make` gives an order for so many entries.

        Raises:
            ValueError: a share is negative, or together they are more than the capacity.
        """
        rest = capacity - sum(shares.values())
        if rest < 0 or min(shares.values(), default=0) < 0:
            raise ValueError(
                f"shares of {dict(shares)} do not fit {capacity} entries; make them smaller, none negative"
            )
        sizes = {**shares, _OTHERS: rest}
        self._tenants = {root: _Tenant(size, make(max(1, size))) for root, size in sizes.items()}
        self._owners: dict[Key, _Tenant[Key]] = {}
        self._by_excess: Ranking[_Tenant[Key]] = Ranking()  # the greatest first
        for tenant in self._tenants.values():
            self._count(tenant, 0)

    def __contains__(self, key: Key) -> bool:
        return key in self._owners[key].order

    def add(self, key: Key, hint: Hint) -> None:
        """As `Order.add`."""
        tenant = self._owners[key] = self._tenant(hint.root)
        tenant.order.add(key, hint)
        self._count(tenant, 1)

    def use(self, key: Key, *, again: bool) -> None:
        """As `Order.use`."""
        self._owners[key].order.use(key, again=again)

    def offer(self, key: Key) -> None:
        """As `Order.offer`."""
        self._owners[key].order.offer(key)

    def withdraw(self, key: Key) -> None:
        """As `Order.withdraw`."""
        self._owners[key].order.withdraw(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """As `Order.remove`."""
        tenant = self._owners.pop(key)
        tenant.order.remove(key, evicted=evicted)
        self._count(tenant, -1)

    def first(self, kept: Container[Key], root: Hashable | None) -> Key | None:
        """As `Order.first`: of the roots over their shares, the greatest excess first; then of `root` itself. When it
        is not known for whom room is made, then of the others too, so that the tier never stands still.
        """
        own = None if root is None else self._tenant(root)
        tried: set[_Tenant[Key]] = set()
        while (tenant := self._by_excess.first(tried)) is not None and (tenant.excess > 0 or own is None):
            if (key := tenant.order.first(kept, root)) is not None:
                return key
            tried.add(tenant)
        return None if own is None else own.order.first(kept, root)

    def _tenant(self, root: Hashable | None) -> _Tenant[Key]:
        return self._tenants.get(root) or self._tenants[_OTHERS]

    def _count(self, tenant: _Tenant[Key], change: int) -> None:
        tenant.entries += change
        self._by_excess.set(tenant, (-tenant.excess,))
