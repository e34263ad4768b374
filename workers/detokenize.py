"""Tokens to text, as they come: streaming detokenization and stop strings.

A character may span tokens and a stop string may span steps. So what could still become one is held back: bytes of an
unfinished character by `DecodeStream`, the longest tail that begins a stop string by `StopMatcher`. Together with
`flush` the pieces are exactly what decoding all tokens at once gives, cut before the first stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# Tokens before the stream's first one, so that a decoder that strips a leading space does not strip the first word's.
_CONTEXT_TOKENS = 6


class StopMatcher:
    """Passes text through until the first of some strings.

    Attributes:
        stopped: whether one was found; all text after it is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What is safe to show now: nothing of a stop string, nothing that may become one."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        buffer = self._held + text
        found = [at for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return buffer[: min(found)]
        held = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - held :]
        return buffer[: len(buffer) - held]

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._stream = self._begin(list(prompt[-_CONTEXT_TOKENS:]))
        self._pending: list[int] = []  # tokens that gave no text yet
        self._matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._matcher.stopped

    def push(self, token_id: int) -> str:
        """The text that this token completes; often empty."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # noqa: BLE001 - the library raises no narrower one
            return self._matcher.push(self._restart())
        if text is None:
            return ""
        self._context = (self._context + self._pending)[-_CONTEXT_TOKENS:]
        self._pending = []
        return self._matcher.push(text)

    def replay(self, token_ids: Sequence[int]) -> None:
        """Take in tokens whose text was told already: what was held back of it still comes, the rest does not.

        The pieces follow from the tokens alone, so this leads to the state in which they were told.
        """
        for token_id in token_ids:
            self.push(token_id)

    def flush(self) -> str:
        """The rest, at the end: unfinished characters as U+FFFD, and what looked like a stop string and was none."""
        text = self._matcher.push(self._rest())
        return text + self._matcher.flush()

    def _begin(self, context: list[int]) -> DecodeStream:
        """A stream that shows what follows the context, which must not end within a character."""
        while context and self._decode(context).endswith("\ufffd"):
            context.pop()
        self._context = context
        return DecodeStream(ids=list(context), skip_special_tokens=True)

    def _restart(self) -> str:
        """The text of the pending tokens, and a new stream behind them.

        Decoders with byte fallback read a run of byte tokens as a whole: a byte that makes the run invalid changes text
        that was shown already, and a stream cannot go on from there.
        """
        tokens = self._context + self._pending
        text = self._rest()
        self._stream = self._begin(tokens[-_CONTEXT_TOKENS:])
        return text

    def _rest(self) -> str:
        """The text of the pending tokens, behind as much of the context as they leave as it is."""
        pending, self._pending = self._pending, []
        for size in range(len(self._context) if pending else 0, 0, -1):
            before = self._decode(self._context[:size])
            whole = self._decode(self._context[:size] + pending)
            if whole.startswith(before):
                return whole[len(before) :]
        return self._decode(pending)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, without being all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
