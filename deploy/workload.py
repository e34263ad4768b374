"""The demo's and the benchmarks' workload: growing chats and document questions over real text, for several tenants.

Covers: who asks what, in which order inside a session. Does not cover: when (`deploy.closed_loop`).

The text is the language reference that ships with every CPython (`pydoc_data.topics`, some 460,000 characters).
Everything follows from the seed, so two acts, two machines and two policies see the same requests.

Two kinds of session, as in real traffic:

- a chat: a long system prompt that all chats of its tenant share, then turns that each carry the whole history;
- document questions: a long document that several sessions of its tenant ask about, one question after the other.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pydoc_data.topics import topics

DEFAULT_SEED = 7


@dataclass(frozen=True, slots=True)
class Session:
    """One user's sequence of requests; each waits for the answer to the one before.

    Attributes:
        tenant: whose API key it uses. kind: "chat" (history grows) or "document" (each question stands alone).
        name: for labels. system: the system prompt or the document's preamble. turns: what the user says.
    """

    tenant: str
    kind: str
    name: str
    system: str
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkloadShape:
    """How much there is of everything. Characters, because the tokenizer is not known here; about 3.5 make a token."""

    tenants: tuple[str, ...] = ("acme", "globex", "initech")
    chats_per_tenant: int = 4
    turns: int = 8
    documents_per_tenant: int = 1
    readers_per_document: int = 2
    questions: int = 4
    system_chars: int = 3000
    document_chars: int = 4500
    turn_chars: int = 480


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions, in the order in which they start."""

    sessions: tuple[Session, ...]
    answer_tokens: int = 12
    seed: int = DEFAULT_SEED

    @property
    def requests(self) -> int:
        """How many requests all sessions make."""
        return sum(len(session.turns) for session in self.sessions)


@cache
def _sentences() -> tuple[str, ...]:
    """The reference's sentences of 40 to 300 characters, white space folded."""
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    return tuple(s for s in re.split(r"(?<=[.?!]) ", text) if 40 <= len(s) <= 300)


@dataclass(slots=True)
class _Text:
    """Draws runs of consecutive sentences, so that what is made reads like the reference."""

    rng: random.Random
    sentences: tuple[str, ...] = field(default_factory=_sentences)

    def passage(self, chars: int) -> str:
        """Consecutive sentences of about that many characters, from a random place."""
        start = self.rng.randrange(len(self.sentences))
        return " ".join(self._take(start, chars))

    def _take(self, start: int, chars: int) -> Iterator[str]:
        taken = 0
        while taken < chars:
            sentence = self.sentences[start % len(self.sentences)]
            yield sentence
            taken += len(sentence) + 1
            start += 1


def make_workload(shape: WorkloadShape | None = None, *, seed: int = DEFAULT_SEED) -> Workload:
    """The workload of that shape; the same seed gives the same requests everywhere."""
    shape = shape or WorkloadShape()
    rng = random.Random(seed)
    text = _Text(rng)
    sessions = [session for tenant in shape.tenants for session in _tenant_sessions(tenant, shape, text)]
    rng.shuffle(sessions)
    return Workload(tuple(sessions), seed=seed)


def _tenant_sessions(tenant: str, shape: WorkloadShape, text: _Text) -> Iterator[Session]:
    system = f"You are the assistant of {tenant}. Answer from these notes only. {text.passage(shape.system_chars)}"
    for number in range(shape.chats_per_tenant):
        turns = tuple(f"Question {turn + 1}. {text.passage(shape.turn_chars)}" for turn in range(shape.turns))
        yield Session(tenant, "chat", f"{tenant}/chat-{number}", system, turns)
    for number in range(shape.documents_per_tenant):
        document = f"Document {number} of {tenant}. {text.passage(shape.document_chars)}"
        for reader in range(shape.readers_per_document):
            questions = tuple(
                f"What does it say here? {text.passage(shape.turn_chars)}" for _ in range(shape.questions)
            )
            yield Session(tenant, "document", f"{tenant}/document-{number}-{reader}", document, questions)
