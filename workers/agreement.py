"""What the ranks of one worker must agree on while each of them runs the same engine.

A worker of one rank (`ALONE`) agrees with itself at once; `tensor_parallel.agreement` asks the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import NamedTuple, Protocol

from workers.anteroom import Compiling
from workers.sampler import Sampled
from workers.scheduler import BlockStore
from workers.sequence import Sequence
from workers.stepping.holds import Holds


class Begun(NamedTuple):
    """What holds for all ranks in one step.

    Attributes:
        now: the time. grammars: of each constraint that is waited for, how far the rank is that is least far.
    """

    now: float
    grammars: Items[Compiling]


class Agreement(Protocol):
    """The places where ranks could part. Every rank calls the same methods in the same order."""

    def blocks(self, store: Holds) -> BlockStore:
        """What the scheduler shall see of this rank's store."""
        ...

    def begin(self, sequences: Iterable[Sequence], now: float, grammars: Items[Compiling]) -> Begun:
        """A step begins with these sequences, at `now` on this rank's clock, and with constraints that far compiled.

        Raises:
            RankLost: another rank is gone, or is not where this one is.
        """
        ...

    def tokens(self, sampled: dict[Sequence, Sampled]) -> dict[Sequence, Sampled]:
        """The tokens that hold for all ranks.

        Raises:
            RankLost: another rank is gone.
        """
        ...

    def failed(self, error: RuntimeError) -> None:
        """A forward failed on this rank.

        Raises:
            RankLost: the others have not failed, or not at the same place, so no step can follow.
        """
        ...


class _Alone:
    """The only rank."""

    def blocks(self, store: Holds) -> BlockStore:
        return store

    def begin(self, sequences: Iterable[Sequence], now: float, grammars: Items[Compiling]) -> Begun:
        return Begun(now, grammars)

    def tokens(self, sampled: dict[Sequence, Sampled]) -> dict[Sequence, Sampled]:
        return sampled

    def failed(self, error: RuntimeError) -> None:
        return


ALONE: Agreement = _Alone()
