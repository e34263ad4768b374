"""Sequences whose constraint is being compiled: they wait here, so that no other one waits for them.

Owned by the engine's thread. What is compiled already is not waited for.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from kvstore.tier import Clock
from workers.grammars import ConstraintError, Grammar, Grammars
from workers.protocol import JobError
from workers.row_state import row_state
from workers.sequence import Sequence

COMPILE_LIMIT_S = 60.0  # the first one may wait for the tokenizer on a busy machine


@dataclass(frozen=True, slots=True)
class _Guest:
    sequence: Sequence
    grammar: Future[Grammar]
    until: float


class Anteroom:
    """In the order in which they came.

    Args:
        limit_s: a constraint that takes longer is refused; its thread goes on, for it cannot be ended.
    """

    def __init__(self, grammars: Grammars, clock: Clock, *, limit_s: float = COMPILE_LIMIT_S) -> None:
        self._grammars, self._clock, self._limit_s = grammars, clock, limit_s
        self._guests: list[_Guest] = []

    def __len__(self) -> int:
        """How many wait."""
        return len(self._guests)

    @property
    def compiling(self) -> list[Future[Grammar]]:
        """What they wait for."""
        return [guest.grammar for guest in self._guests]

    def add(self, sequence: Sequence) -> None:
        """Let it wait for its grammar, if it has a constraint; `leaving` gives it back with its state."""
        constraint = sequence.job.sampling.constraint
        if constraint is None:
            raise ValueError("only sequences with a constraint wait for one; give the others to the scheduler")
        self._guests.append(_Guest(sequence, self._grammars.compile(constraint), self._clock() + self._limit_s))

    def remove(self, sequence: Sequence) -> None:
        """It has ended; one that is not here: nothing happens."""
        self._guests = [guest for guest in self._guests if guest.sequence is not sequence]

    def leaving(self) -> list[tuple[Sequence, JobError | None]]:
        """Those that may run now, their state made, and those that never will, with the reason."""
        if not self._guests:
            return []
        now = self._clock()
        leaving = [guest for guest in self._guests if guest.grammar.done() or guest.until <= now]
        self._guests = [guest for guest in self._guests if guest not in leaving]
        return [(guest.sequence, self._enter(guest)) for guest in leaving]

    def _enter(self, guest: _Guest) -> JobError | None:
        if not guest.grammar.done():
            message = f"the constraint was not compiled within {self._limit_s:g} s; simplify it"
            return JobError("CONSTRAINT_TOO_COMPLEX", message)
        failure = guest.grammar.exception()
        if failure is None:
            sequence, grammar = guest.sequence, guest.grammar.result()
            sequence.row = row_state(sequence.job.sampling, sequence.prompt_ids, sequence.generated_ids, grammar)
            return None
        if isinstance(failure, ConstraintError):
            return JobError("INVALID_CONSTRAINT", f"the constraint cannot be used: {failure}; correct it")
        message = f"the constraint's library failed on it or on this model's tokenizer ({failure}); try without it"
        return JobError("CONSTRAINT_FAILED", message)
