"""Why the first block that no tier holds is missing.

Covers: the order in which reasons are considered, and the memory that recognises `retokenized`: a chat whose earlier
answer was sent back as text, which often does not encode to the ids that were sampled, so that its blocks have other
names. Does not cover: evictions and losses as such (`index.gone`).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from router.holders import Gone
from router.index import PrefixIndex
from router.protocol import Prompt

_DETAIL = {
    Gone.EVICTED: "It was cached and was dropped to make room; give the tiers more memory, or add a shared tier.",
    Gone.EXPIRED: "It was cached and its time to live ended; raise ttl_seconds, or use it more often.",
    Gone.CLEARED: "It was cached and an operator cleared it; the next request caches it again.",
    Gone.WORKER_LOST: "It was cached on a worker that is gone; a shared tier would have kept it.",
}
_RETOKENIZED = (
    "An earlier answer came back as text and encodes to other ids than were sampled; send the answer's token_ids with"
    " the message."
)
_NEVER_SEEN = "No worker has computed it, or so long ago that this router forgot; the next request caches it."


@dataclass(frozen=True, slots=True)
class Missing:
    """Why, at which block, and one sentence for people."""

    reason: str
    block: int
    detail: str


@dataclass(frozen=True, slots=True)
class _Conversation:
    last_block: bytes
    position: int


class AnswerMemory:
    """Which blocks a conversation's text had when its answer was sampled. Bounded: the oldest are forgotten.

    Texts are kept as digests only.
    """

    def __init__(self, *, max_entries: int = 16_384) -> None:
        self._seen: OrderedDict[bytes, _Conversation] = OrderedDict()
        self._max_entries = max_entries

    def remember(self, root: bytes, rendered: str, answer: str, hashes: Sequence[bytes]) -> None:
        """A prompt rendered to this text was answered with that one; `hashes` name the blocks of both, as sampled."""
        if not hashes:
            return
        entry = _Conversation(hashes[-1], len(hashes) - 1)
        # Templates strip what they splice in, or not.
        for text in {rendered + answer, rendered + answer.strip()}:
            key = _digest(root, text)
            self._seen[key] = entry
            self._seen.move_to_end(key)
        while len(self._seen) > self._max_entries:
            self._seen.popitem(last=False)

    def retokenized_at(self, root: bytes, prompt: Prompt, hashes: Sequence[bytes]) -> int | None:
        """Last block of the longest earlier answer that this prompt repeats under other names; None: there is none."""
        for end in reversed(prompt.answer_ends):
            earlier = self._seen.get(_digest(root, prompt.rendered[:end]))
            if earlier is None:
                continue
            same = earlier.position < len(hashes) and hashes[earlier.position] == earlier.last_block
            return None if same else earlier.position
        return None


def explain_miss(index: PrefixIndex, hashes: Sequence[bytes], retokenized_at: int | None) -> Missing | None:
    """The first block that nobody holds; None when all are held."""
    position = next((n for n, block in enumerate(hashes) if not index.held(block)), None)
    if position is None:
        return None
    cause = index.gone(hashes[position])
    if cause is not None:
        return Missing(str(cause), position, _DETAIL[cause])
    if retokenized_at is not None and position <= retokenized_at:
        return Missing("retokenized", position, _RETOKENIZED)
    return Missing("never_seen", position, _NEVER_SEEN)


def _digest(root: bytes, text: str) -> bytes:
    return hashlib.sha256(root + text.rstrip().encode("utf-8", "surrogatepass")).digest()[:16]
