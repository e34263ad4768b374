"""Sequences whose constraint is being compiled: they wait here, so that no other one waits for them.

Owned by the engine's thread. What is compiled already is not waited for. Where several ranks run the same engine, how
far each constraint is and what time it is are agreed on by all of them, so that a sequence leaves everywhere at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass
from enum import IntEnum

from workers.grammars import ConstraintError, Grammar, Grammars
from workers.protocol import JobError
from workers.row_state import row_state
from workers.sequence import Sequence

COMPILE_LIMIT_S = 60.0  # the first one may wait for the tokenizer on a busy machine


class Compiling(IntEnum):
    """How far a constraint is. Ranks agree on the least, so they go on when all have ended, well only if all did."""

    UNDER_WAY = 0
    FAILED = 1
    DONE = 2


@dataclass(slots=True, eq=False)
class _Guest:
    """`until`: when it is refused; None before the first step saw it."""

    sequence: Sequence
    grammar: Future[Grammar]
    until: float | None = None

    @property
    def state(self) -> Compiling:
        if not self.grammar.done():
            return Compiling.UNDER_WAY
        return Compiling.DONE if self.grammar.exception() is None else Compiling.FAILED


class Anteroom:
    """In the order in which they came.

    Args:
        limit_s: a constraint that takes longer is refused; its thread goes on, for it cannot be ended.
    """

    def __init__(self, grammars: Grammars, *, limit_s: float = COMPILE_LIMIT_S) -> None:
        self._grammars, self._limit_s = grammars, limit_s
        self._guests: list[_Guest] = []

    def __len__(self) -> int:
        """How many wait."""
        return len(self._guests)

    def __iter__(self) -> Iterator[Sequence]:
        """Who waits."""
        return (guest.sequence for guest in self._guests)

    def states(self) -> list[Compiling]:
        """How far this rank is with what each of them waits for."""
        return [guest.state for guest in self._guests]

    def add(self, sequence: Sequence) -> None:
        """Let it wait for its grammar, if it has a constraint; `leaving` gives it back with its state."""
        constraint = sequence.job.sampling.constraint
        if constraint is None:
            raise ValueError("only sequences with a constraint wait for one; give the others to the scheduler")
        self._guests.append(_Guest(sequence, self._grammars.compile(constraint)))

    def remove(self, sequence: Sequence) -> None:
        """It has ended; one that is not here: nothing happens."""
        self._guests = [guest for guest in self._guests if guest.sequence is not sequence]

    def leaving(self, states: Items[Compiling], now: float) -> list[tuple[Sequence, JobError | None]]:
        """Those that may run now, their state made, and those that never will, with the reason.

        `states`: how far what each waits for is, as all ranks agree. `now`: likewise, seconds.
        """
        leaving, staying = [], []
        for guest, state in zip(self._guests, states, strict=True):
            guest.until = now + self._limit_s if guest.until is None else guest.until
            if state is Compiling.UNDER_WAY and now < guest.until:
                staying.append(guest)
            else:
                leaving.append((guest.sequence, self._enter(guest, state)))
        self._guests = staying
        return leaving

    def _enter(self, guest: _Guest, state: Compiling) -> JobError | None:
        if state is Compiling.UNDER_WAY:
            message = f"the constraint was not compiled within {self._limit_s:g} s; simplify it"
            return JobError("CONSTRAINT_TOO_COMPLEX", message)
        if state is Compiling.DONE:
            sequence, grammar = guest.sequence, guest.grammar.result()
            sequence.row = row_state(sequence.job.sampling, sequence.prompt_ids, sequence.generated_ids, grammar)
            return None
        failure = guest.grammar.exception() or RuntimeError("another rank of the worker; its log says why")
        if isinstance(failure, ConstraintError):
            return JobError("INVALID_CONSTRAINT", f"the constraint cannot be used: {failure}; correct it")
        message = f"the constraint's library failed on it or on this model's tokenizer ({failure}); try without it"
        return JobError("CONSTRAINT_FAILED", message)
