"""Views of blocks in the host tier: who looks at which bytes, and until when.

A view keeps a slot's bytes in place for a reader that works on its own time, as the write-behind queue and the peer
server do. Each has an owner and a deadline. One that is open past its deadline is not taken away, since somebody may
still read the bytes; it is reported until it ends, by its owner's name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from kvstore.errors import InvariantError
from kvstore.host.books import Slot
from kvstore.tier import BlockMeta

VIEW_S = 600.0  # far above every deadline and retry of a tier that a view's bytes go to

logger = logging.getLogger(__name__)


class Keeper(Protocol):
    """The tier that gave a view."""

    def generation(self, slot: Slot) -> int:
        """How often the slot has been given back."""
        ...

    def end_view(self, view: BlockView) -> None:
        """Let the slot go."""
        ...


@dataclass(slots=True, eq=False)
class BlockView:
    """A block's bytes, kept in place until the view ends, even if the block is removed meanwhile.

    A context manager: the view ends with it. Ending it twice does nothing.

    Attributes:
        meta: the block, as it was when the view was opened. payload: its bytes, read-only.
        owner: who reads, in a word. deadline: on the tier's clock; the view is reported when it is still open then.
    """

    meta: BlockMeta
    payload: memoryview
    owner: str
    deadline: float
    slot: Slot
    generation: int
    keeper: Keeper
    reported: bool = False

    @property
    def is_valid(self) -> bool:
        """Whether the bytes are still this block's: always while the view is open, later until the slot is reused.

        Who reads without an open view asks again after reading.
        """
        return self.keeper.generation(self.slot) == self.generation

    def __enter__(self) -> BlockView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keeper.end_view(self)


class Views:
    """The open views. Whoever calls it holds the tier's lock. O(1), and O(open views) once a deadline has passed."""

    def __init__(self) -> None:
        self._open: set[BlockView] = set()
        self._first_due = float("inf")  # no later than any deadline of an open view

    def __len__(self) -> int:
        return len(self._open)

    def open(self, views: Iterable[BlockView], deadline: float) -> None:
        """Take in views of that deadline."""
        self._open.update(views)
        if deadline < self._first_due:
            self._first_due = deadline

    def end(self, view: BlockView) -> bool:
        """It ends; whether it was open."""
        try:
            self._open.remove(view)
        except KeyError:
            return False
        return True

    def overdue(self, now: float) -> list[BlockView]:
        """Those that are open past their deadline."""
        if now < self._first_due:
            return []
        self._first_due = min((view.deadline for view in self._open), default=float("inf"))
        return [view for view in self._open if view.deadline <= now]

    def report(self, now: float) -> None:
        """Log each overdue view once."""
        for view in self.overdue(now):
            if not view.reported:
                view.reported = True
                logger.warning(
                    "a view of a host block is overdue", extra={"owner": view.owner, "by_s": now - view.deadline}
                )

    def problem(self, now: float) -> str:
        """The overdue views in words; empty when there are none."""
        overdue = self.overdue(now)
        if not overdue:
            return ""
        owners = ", ".join(f"{count} of {owner}" for owner, count in sorted(Counter(v.owner for v in overdue).items()))
        return (
            f"views of host blocks are overdue ({owners}); find out what that reader waits for, or restart the worker"
        )

    def check(self, now: float) -> None:
        """Audit the deadlines.

        Raises:
            InvariantError: a view is open past its deadline.
        """
        if problem := self.problem(now):
            raise InvariantError(problem)
