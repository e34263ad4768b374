"""Why the first block that no tier holds is missing.

Covers: the order in which reasons are considered, and the memory that recognises a chat whose earlier turn has other
blocks than when it was answered: `retokenized`, its answer was sent back as text, which often does not encode to the
ids that were sampled; `template_break`, the chat template writes the turn otherwise once another one follows (it drops
thoughts, moves the system prompt, tells the time). Does not cover: evictions and losses as such (`index.gone`).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from router.holders import Gone
from router.index import PrefixIndex
from router.protocol import EarlierAnswer, Prompt

_DETAIL = {
    Gone.EVICTED: "It was cached and was dropped to make room; give the tiers more memory, or add a shared tier.",
    Gone.EXPIRED: "It was cached and its time to live ended; raise ttl_seconds, or use it more often.",
    Gone.CLEARED: "It was cached and an operator cleared it; the next request caches it again.",
    Gone.WORKER_LOST: "It was cached on a worker that is gone; a shared tier would have kept it.",
}


class Changed(StrEnum):
    """Why an earlier turn of a chat has other blocks than when it was answered."""

    RETOKENIZED = "retokenized"
    TEMPLATE_BREAK = "template_break"


_CHANGED_DETAIL = {
    Changed.RETOKENIZED: (
        "An earlier answer came back as text and encodes to other ids than were sampled; send the answer's token_ids"
        " with the message."
    ),
    Changed.TEMPLATE_BREAK: (
        "The chat template writes an earlier turn otherwise than when it was answered; `warmkv doctor --model DIR` says"
        " what it changes, and a template that only appends keeps the cache."
    ),
}
_NEVER_SEEN = "No worker has computed it, or so long ago that this router forgot; the next request caches it."


@dataclass(frozen=True, slots=True)
class Missing:
    """Why, at which block, and one sentence for people."""

    reason: str
    block: int
    detail: str


class ChangedTurn(NamedTuple):
    """An earlier turn with other blocks than when it was answered, and the last block that differs."""

    why: Changed
    block: int


@dataclass(frozen=True, slots=True)
class _Answered:
    """The last block of a prompt and its answer, as sampled; digests of the text that they were."""

    last_block: bytes
    position: int
    texts: frozenset[bytes]


class AnswerMemory:
    """Which blocks a conversation had when an answer of it was sampled. Bounded: the oldest are forgotten.

    Texts are kept as digests only.
    """

    def __init__(self, *, max_entries: int = 16_384) -> None:
        self._seen: OrderedDict[bytes, _Answered] = OrderedDict()
        self._max_entries = max_entries

    def remember(self, root: bytes, said: bytes, rendered: str, answer: str, hashes: Sequence[bytes]) -> None:
        """A prompt was answered.

        Args:
            said: digest of the conversation with the answer (`said_digests`). rendered: the prompt's text.
            hashes: names of the blocks of prompt and answer, as sampled.
        """
        if not hashes:
            return
        # Templates strip what they splice in, or not.
        texts = _digests(rendered, {answer, answer.strip()})
        key = root + said
        self._seen[key] = _Answered(hashes[-1], len(hashes) - 1, texts)
        self._seen.move_to_end(key)
        if len(self._seen) > self._max_entries:
            self._seen.popitem(last=False)

    def changed_turn(
        self, root: bytes, prompt: Prompt, answers: Sequence[EarlierAnswer], hashes: Sequence[bytes]
    ) -> ChangedTurn | None:
        """The last earlier turn that this prompt repeats under other names; None: there is none."""
        for answer in reversed(answers):
            earlier = self._seen.get(root + answer.said)
            if earlier is None:
                continue
            if earlier.position < len(hashes) and hashes[earlier.position] == earlier.last_block:
                return None
            text = None if answer.end is None else _digest(prompt.rendered[: answer.end])
            why = Changed.RETOKENIZED if text in earlier.texts else Changed.TEMPLATE_BREAK
            return ChangedTurn(why, earlier.position)
        return None


def said_digests(messages: Iterable[tuple[str, str]]) -> Iterator[bytes]:
    """After each message (role, content) a digest of the conversation so far; spaces around contents do not count."""
    digest = hashlib.blake2b(digest_size=16)
    for role, content in messages:
        text = content.strip().encode("utf-8", "surrogatepass")
        digest.update(f"{role}\0{len(text)}\0".encode() + text)
        yield digest.digest()


def explain_miss(index: PrefixIndex, hashes: Sequence[bytes], changed: ChangedTurn | None) -> Missing | None:
    """The first block that nobody holds; None when all are held."""
    position = next((n for n, block in enumerate(hashes) if not index.held(block)), None)
    if position is None:
        return None
    cause = index.gone(hashes[position])
    if cause is not None:
        return Missing(str(cause), position, _DETAIL[cause])
    if changed is not None and position <= changed.block:
        return Missing(str(changed.why), position, _CHANGED_DETAIL[changed.why])
    return Missing("never_seen", position, _NEVER_SEEN)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.rstrip().encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _digests(start: str, ends: Iterable[str]) -> frozenset[bytes]:
    """Of the start with each of the ends; the start, which may be long, is read once."""
    begun, found = hashlib.blake2b(start.encode("utf-8", "surrogatepass"), digest_size=16), set()
    for end in ends:
        if not (kept := end.rstrip()):
            found.add(_digest(start))
            continue
        digest = begun.copy()
        digest.update(kept.encode("utf-8", "surrogatepass"))
        found.add(digest.digest())
    return frozenset(found)
