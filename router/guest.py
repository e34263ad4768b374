"""A request at the door of the workers: what is asked, what it was charged, and what was forecast of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from router.charges import Charge
from router.decide import Choice, Question
from router.forecast import NOTHING, Parts


@dataclass(slots=True, eq=False)
class Guest:
    """A request at the door. Times are on the router's clock but for `deadline`, which is on the event loop's.

    Attributes:
        max_tokens: of an answer. samples: answers that it wants. send: gives it to a worker; called at most once.
        charge: what it was charged, once it was let in. parts: the newest forecast of it.
        foreseen_wait_ms: what was forecast when it began to wait, which is `queued_at`. waited_ms: how long it did.
        sent_at: when it went to a worker; first_at: when it had its first token; zero: not yet.
        not_before: when its worker may have room; waits_for: that worker.
        alone_until: when it is told that no worker is left which can take it, though others are there.
    """

    tenant: str
    priority: int
    question: Question
    max_tokens: int
    deadline: float | None
    send: Callable[[Choice], None]
    samples: int = 1
    charge: Charge | None = None
    parts: Parts = NOTHING
    foreseen_wait_ms: float = 0.0
    queued_at: float = 0.0
    waited_ms: float = 0.0
    sent_at: float = 0.0
    first_at: float = 0.0
    not_before: float = 0.0
    waits_for: str = ""
    alone_until: float | None = None
    left: asyncio.Future[None] | None = field(default=None, repr=False)
