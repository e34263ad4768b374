"""Token ids of texts, remembered by the pieces between special tokens: a growing chat costs only its new turn.

Covers: cutting a text where its tokenizer cuts it before anything else, a bounded memory of what the pieces encode to,
and the test whether a tokenizer allows that. Does not cover: templates, or which ids stand before and after a text.

Why it is exact: a tokenizer first takes out the added tokens that are matched before normalization, leftmost and
longest first, and runs everything else (normalizer, pre-tokenizer, model) on the texts between them, each alone. All
that a piece may learn of its surroundings is whether it stands first (a leading space is put before it, or not). So a
piece behind a special token is encoded together with that token. Tokens that look at their neighbours (`single_word`),
or take spaces away from them (`lstrip`, `rstrip`), are no places to cut. A tokenizer that does not keep to this is
found out by a trial when it is loaded, and is then asked for whole texts.

What one trust group sent is remembered for that group alone: encoding takes some thirty times as long as remembering,
which a caller can measure, and nobody is to learn that another group has sent a text.
"""

from __future__ import annotations

import random
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from sys import getsizeof
from typing import NamedTuple

from tokenizers import Tokenizer

from kvstore.token_ids import BYTES_PER_ID, u32

MAX_BYTES = 128 << 20
_ENTRY_BYTES = 460  # CPython: the heads of key, array and tuple, and the books' own entry
_TRIALS = 200
_TRIAL_WORDS = ("a", " b", "  ", "\n\n", "é漢", "Hello", " wor ld", ".", "", "0.5", "\t", "\u2581", "x y ")

_Key = tuple[str, str]  # the token before a piece (empty: it stands first), and the piece


class Encoded(NamedTuple):
    """What a text encodes to, without the ids that a tokenizer sets around it. `largest`: of the ids; -1: none."""

    ids: array[int]
    largest: int


class SegmentMemo:
    """Encodes texts piece by piece. Owned by one event loop; `encode` alone may run in any thread.

    Attributes:
        works: whether this tokenizer can be asked piece by piece.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_bytes: int = MAX_BYTES) -> None:
        self._tokenizer = tokenizer
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._known: OrderedDict[tuple[str, _Key], Encoded] = OrderedDict()
        self._special, self._boundary, self._cuts_at_all = _special_tokens(tokenizer)
        self.works = bool(self._special) and self._keeps_the_rules()

    @property
    def nbytes(self) -> int:
        """Estimated memory of what is remembered; at most `max_bytes`, whatever was asked."""
        return self._nbytes

    def pieces(self, text: str) -> list[_Key]:
        """A text cut at its special tokens, each piece with the token before it."""
        found = self._boundary.split(text)
        if self._cuts_at_all:
            return [("", found[0]), *zip(found[1::2], found[2::2], strict=True)]
        pieces, before, piece = [], "", found[0]
        for token, after in zip(found[1::2], found[2::2], strict=True):
            if token in self._special:
                pieces.append((before, piece))
                before, piece = token, after
            else:
                piece += token + after
        return [*pieces, (before, piece)]

    def recall(self, pieces: Iterable[_Key], *, group: str = "") -> tuple[dict[_Key, Encoded], list[_Key]]:
        """What is remembered of these pieces, to keep, for it may be forgotten at any time; and those that must be
        encoded. Each once, and none that is empty.
        """
        known, found, unknown = self._known, dict[_Key, Encoded](), dict[_Key, None]()
        for piece in pieces:
            if not piece[1]:
                continue
            encoded = known.get((group, piece))
            if encoded is None:
                unknown[piece] = None
            else:
                found[piece] = encoded
                known.move_to_end((group, piece))
        return found, list(unknown)

    def encode(self, pieces: Sequence[_Key]) -> list[Encoded]:
        """The ids of each piece, without that of the token before it. Remembers nothing."""
        batch = self._tokenizer.encode_batch_fast([a + b for a, b in pieces], add_special_tokens=False)
        found = []
        for (before, _), encoding in zip(pieces, batch, strict=True):
            ids = encoding.ids
            found.append(Encoded(u32(ids[1:] if before else ids), max(ids, default=-1)))
        return found

    def remember(self, pieces: Sequence[_Key], encoded: Sequence[Encoded], *, group: str = "") -> None:
        """Keep what they encode to; the least recently used go. A piece over a quarter of the memory is not kept."""
        for piece, found in zip(pieces, encoded, strict=True):
            size = _nbytes(piece, found)
            if (group, piece) in self._known or size > self._max_bytes // 4:
                continue
            self._nbytes += size
            while self._nbytes > self._max_bytes:
                (_, oldest), gone = self._known.popitem(last=False)
                self._nbytes -= _nbytes(oldest, gone)
            self._known[group, piece] = found

    def joined(self, pieces: Iterable[_Key], encoded: Mapping[_Key, Encoded]) -> Encoded:
        """The ids of a whole text. `encoded` has every piece of it that is not empty."""
        ids, largest, special = u32(()), -1, self._special
        for piece in pieces:
            before, text = piece
            if before:
                token = special[before]
                ids.append(token)
                if token > largest:
                    largest = token
            if text:
                found = encoded[piece]
                ids += found.ids
                if found.largest > largest:
                    largest = found.largest
        return Encoded(ids, largest)

    def _keeps_the_rules(self) -> bool:
        """A trial: texts of words and special tokens in any order, whole and piece by piece."""
        rng = random.Random(0)
        words = [*_TRIAL_WORDS, *list(self._special)[:8]]
        texts = ["".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(_TRIALS)]
        whole = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, expected in zip(texts, whole, strict=True):
            pieces = self.pieces(text)
            asked = [piece for piece in pieces if piece[1]]
            if self.joined(pieces, dict(zip(asked, self.encode(asked), strict=True))).ids != u32(expected.ids):
                return False
        return True


def _special_tokens(tokenizer: Tokenizer) -> tuple[dict[str, int], re.Pattern[str], bool]:
    """The ids of tokens where a text can be cut, a pattern of all that are taken out before anything else, and whether
    those are the same.
    """
    added = tokenizer.get_added_tokens_decoder()
    first = {
        token.content: (number, token) for number, token in added.items() if token.content and not token.normalized
    }
    if any(token.single_word for token in added.values()) or not first:
        return {}, re.compile("(?!)"), False
    plain = {text: number for text, (number, token) in first.items() if not token.lstrip and not token.rstrip}
    longest_first = sorted(first, key=len, reverse=True)
    return plain, re.compile(f"({'|'.join(map(re.escape, longest_first))})"), len(plain) == len(first)


def _nbytes(piece: _Key, encoded: Encoded) -> int:
    return _ENTRY_BYTES + getsizeof(piece[1]) + BYTES_PER_ID * len(encoded.ids)
