"""From an input to token ids, once a request: tokenizer.json, the chat template, and earlier answers spliced in.

Covers: limits on what is encoded, the three forms of input, exact splicing of earlier answers. Does not cover: the
context length against `max_tokens` (`core`), hashing (`kvstore.blocks`).

Texts are encoded by pieces between special tokens, and the pieces are remembered (`segment_memo`).

Splicing: the text of a sampled answer often does not encode to the ids that were sampled. A chat that carries those
ids gets them back verbatim: the rendered text is cut at the answer, the pieces between answers are encoded on their
own, and the ids stand where the text stood. The tokens of one turn's prompt, followed by its answer, are then a prefix
of the next turn's prompt, so every block of them is found again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer

from kvstore.token_ids import BYTES_PER_ID, u32
from router.chat_template import Answer, ChatTemplate, Message, Rendering, load_chat_template
from router.errors import InvalidRequest
from router.misses import said_digests
from router.model_folder import ModelFacts, ModelFolderError, read_model_facts
from router.protocol import EarlierAnswer, Prompt
from router.segment_memo import Encoded, SegmentMemo
from router.sent_ids import SentIds, SentIdsMemo
from warmkv.v1 import inference_pb2

# Encoding a text holds the interpreter lock, some 0.7 s a MiB; longer ones go to a thread, where a batch lets it go.
INLINE_BYTES = 16 << 10
# Rendering takes some milliseconds a MiB, and finding answers in it ten times that.
_RENDER_INLINE_BYTES = 1 << 20
_LOCATE_INLINE_BYTES = 256 << 10
# Rendering costs some microseconds a message and may hold the loop up.
MAX_MESSAGES = 4096
_THREADS = 2

T = TypeVar("T")

log = logging.getLogger(__name__)


class PromptEncoder:
    """Encodes the inputs of one model. Safe to use from one event loop.

    Attributes:
        vocab_size: ids are below it. context_length: longest sequence, tokens. eos_token_ids: the model's end tokens.
        tokenizer_sha256: of tokenizer.json's bytes, 32 bytes; equal to the workers' or they are refused.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        facts: ModelFacts,
        template: ChatTemplate | None,
        *,
        tokenizer_sha256: bytes,
        max_prompt_bytes: int,
    ) -> None:
        self.vocab_size = facts.vocab_size
        self.context_length = facts.context_length
        self.eos_token_ids = facts.eos_token_ids
        self.tokenizer_sha256 = tokenizer_sha256
        self._max_prompt_bytes = max_prompt_bytes
        self._template = template
        self._tokenizer = tokenizer
        # Limits and padding that the file may carry are meant for training.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special = (i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._end_ids = frozenset((*facts.eos_token_ids, *special))
        self._sent = SentIdsMemo()
        self._memo = SegmentMemo(tokenizer)
        if not self._memo.works:
            log.info("this tokenizer cannot be asked piece by piece, so each prompt is encoded whole")
        self._around_text = _around_text(tokenizer)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenize")

    @classmethod
    def load(
        cls, model_dir: str | Path, *, max_prompt_bytes: int = 16 << 20, now: Callable[[], datetime] = datetime.now
    ) -> PromptEncoder:
        """The encoder of a model folder; weights are not needed.

        Raises:
            ModelFolderError: a file is missing or broken; the message names it.
        """
        folder = Path(model_dir)
        facts = read_model_facts(folder)
        path = folder / "tokenizer.json"
        try:
            data = path.read_bytes()
            tokenizer = Tokenizer.from_str(data.decode())
        except FileNotFoundError as error:
            raise ModelFolderError(f"{path} is missing. Give a complete Hugging Face model folder.") from error
        except Exception as error:  # tokenizers raises bare Exception for whatever it cannot read
            raise ModelFolderError(f"{path} is no tokenizer ({error}). Restore the file.") from error
        template = load_chat_template(folder, now=now)
        sha256 = hashlib.sha256(data).digest()
        return cls(tokenizer, facts, template, tokenizer_sha256=sha256, max_prompt_bytes=max_prompt_bytes)

    @property
    def has_template(self) -> bool:
        """Whether chats can be encoded."""
        return self._template is not None

    async def encode(self, input: inference_pb2.Input, *, group: str = "") -> Prompt:
        """The token ids of an input. What was encoded for a trust group is remembered for that group.

        Raises:
            InvalidRequest: nothing to encode, too many bytes, ids out of range, or a chat that the template refuses.
        """
        kind = input.WhichOneof("kind")
        if kind == "text":
            return await self._encode_text(input.text, group)
        if kind == "chat":
            return await self._encode_chat(input.chat, group)
        if kind == "token_ids":
            return self._check_ids(input.token_ids.ids)
        raise InvalidRequest("the input is not set. Set one of text, chat and token_ids.", field="input")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def answer_ids(self, text: str) -> list[int]:
        """Ids that a model could have sampled for a text: nothing set before or after it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def close(self) -> None:
        """End the threads; encodings that wait are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def earlier_answers(self, input: inference_pb2.Input, prompt: Prompt) -> tuple[EarlierAnswer, ...]:
        """The assistant messages of a chat, in order; of other inputs none. `prompt`: what `encode` made of it."""
        chat = input.chat
        if input.WhichOneof("kind") != "chat" or self._template is None:
            return ()
        messages = self._messages(chat)
        work = partial(self._template.render, messages, add_generation_prompt=_wants_cue(chat))
        rendering = await self._run(chat.ByteSize(), work, inline_bytes=_LOCATE_INLINE_BYTES)
        ends = {answer.message: answer.end for answer in rendering.answers} if rendering.text == prompt.rendered else {}
        return tuple(
            EarlierAnswer(said, ends.get(i), spliced=bool(chat.messages[i].token_ids))
            for i, said in enumerate(said_digests((m.role, m.content) for m in messages))
            if messages[i].role == "assistant"
        )

    def said(self, input: inference_pb2.Input, answer: str) -> bytes:
        """Digest of a chat and its answer; equal to that of an `EarlierAnswer` of the next turn."""
        *_, said = said_digests([*((m.role, m.content) for m in self._messages(input.chat)), ("assistant", answer)])
        return said

    async def _encode_text(self, text: str, group: str) -> Prompt:
        size = len(text.encode())
        self._check_size(size, "input.text")
        if not text:
            raise InvalidRequest("the prompt is empty. Send at least one token.", field="input.text")
        if self._around_text is None:
            whole = partial(self._tokenizer.encode_batch_fast, [text], add_special_tokens=True)
            (encoding,) = await self._run(size, whole)
            return _prompt(Encoded(u32(encoding.ids), max(encoding.ids, default=-1)), text)
        (found,) = await self._encode_pieces([text], group)
        before, after = self._around_text
        largest = max((found.largest, *before, *after))
        return _prompt(Encoded(before + found.ids + after, largest), text)

    async def _encode_chat(self, chat: inference_pb2.Chat, group: str) -> Prompt:
        if len(chat.messages) > MAX_MESSAGES:
            raise InvalidRequest(
                f"the conversation has {len(chat.messages)} messages, and {MAX_MESSAGES} are allowed. "
                "Leave out old ones, or join neighbours.",
                field="input.chat.messages",
            )
        found = [self._sent.of(message, group=group) for message in chat.messages]
        size = sum(own.message_bytes for own in found)
        self._check_size(size, "input.chat.messages")
        sent = {i: own for i, own in enumerate(found) if own.ids}
        for i, own in sent.items():
            self._check_range(own.ids, own.largest, f"input.chat.messages[{i}].token_ids")
        inline_bytes = _LOCATE_INLINE_BYTES if sent else _RENDER_INLINE_BYTES
        rendering = await self._run(size, lambda: self._rendered(chat, sent), inline_bytes=inline_bytes)
        encoded = await self._encode_pieces(_between(rendering), group)
        return _prompt(self._spliced(sent, rendering.answers, encoded), rendering.text)

    def _rendered(self, chat: inference_pb2.Chat, located: Collection[int]) -> Rendering:
        if self._template is None:
            raise InvalidRequest(
                "the model has no chat template. Send text or token ids, or put a chat_template.jinja into its folder.",
                field="input.chat",
            )
        return self._template.render(self._messages(chat), add_generation_prompt=_wants_cue(chat), located=located)

    def _messages(self, chat: inference_pb2.Chat) -> list[Message]:
        return [Message(m.role, m.content or self.decode(m.token_ids)) for m in chat.messages]

    def _spliced(self, sent: Mapping[int, SentIds], answers: Sequence[Answer], encoded: Sequence[Encoded]) -> Encoded:
        """Answers by their own ids between the pieces that were encoded."""
        if not answers:
            return encoded[0]
        ids, largest = encoded[0].ids[:], max(piece.largest for piece in encoded)
        for answer, piece in zip(answers, encoded[1:], strict=True):
            own = sent[answer.message]
            ids += self._without_end(own.ids, piece.ids)
            ids += piece.ids
            largest = max(largest, own.largest)
        return Encoded(ids, largest)

    def _without_end(self, answer: array[int], following: Sequence[int]) -> array[int]:
        """An answer's ids less a last end token that the template writes as well."""
        repeated = following and answer[-1] == following[0] and answer[-1] in self._end_ids
        return answer[:-1] if repeated else answer

    async def _encode_pieces(self, texts: Sequence[str], group: str) -> list[Encoded]:
        """Each text on its own. Only what is not remembered is encoded."""
        memo = self._memo
        cut = [memo.pieces(text) if memo.works else [("", text)] for text in texts]
        known, unknown = memo.recall((piece for pieces in cut for piece in pieces), group=group)
        if unknown:
            # A character may take four bytes; this is about time, not about memory.
            size = sum(len(text) for _, text in unknown)
            new = await self._run(size, lambda: memo.encode(unknown))
            known.update(zip(unknown, new, strict=True))
            if memo.works:
                memo.remember(unknown, new, group=group)
        return [memo.joined(pieces, known) for pieces in cut]

    async def _run(self, size: int, work: Callable[[], T], *, inline_bytes: int = INLINE_BYTES) -> T:
        """Short work here and now, long work in a thread."""
        return work() if size <= inline_bytes else await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _check_ids(self, ids: Sequence[int], where: str = "input.token_ids.ids") -> Prompt:
        self._check_size(len(ids) * BYTES_PER_ID, where)
        if not ids:
            raise InvalidRequest("the prompt is empty. Send at least one token.", field=where)
        listed = list(ids)
        largest = max(listed)
        self._check_range(listed, largest, where)
        return Prompt(u32(listed), "", largest)

    def _check_range(self, ids: Sequence[int], largest: int, where: str) -> None:
        if largest >= self.vocab_size:
            position, bad = next((i, token) for i, token in enumerate(ids) if token >= self.vocab_size)
            raise InvalidRequest(
                f"token id {bad} at position {position} is outside the vocabulary of {self.vocab_size}. "
                f"Send ids from 0 to {self.vocab_size - 1}, made by this model's tokenizer.",
                field=where,
                position=str(position),
                vocab_size=str(self.vocab_size),
            )

    def _check_size(self, size: int, where: str) -> None:
        if size > self._max_prompt_bytes:
            raise InvalidRequest(
                f"the prompt has {size} bytes, and {self._max_prompt_bytes} are allowed. Send a shorter one, "
                "or have the operator raise max_prompt_bytes.",
                field=where,
                bytes=str(size),
                max_prompt_bytes=str(self._max_prompt_bytes),
            )


def _wants_cue(chat: inference_pb2.Chat) -> bool:
    return chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True


def _around_text(tokenizer: Tokenizer) -> tuple[array[int], array[int]] | None:
    """The ids that the tokenizer sets before and after a text; None: they depend on the text."""
    found = set()
    for text in ("a", "bc d", "1\n2"):
        with_ends = tokenizer.encode(text, add_special_tokens=True).ids
        alone = tokenizer.encode(text, add_special_tokens=False).ids
        start = next((i for i in range(len(with_ends)) if with_ends[i : i + len(alone)] == alone), None)
        if start is None:
            return None
        found.add((tuple(with_ends[:start]), tuple(with_ends[start + len(alone) :])))
    if len(found) != 1:
        return None
    before, after = found.pop()
    return u32(before), u32(after)


def _between(rendering: Rendering) -> list[str]:
    """The pieces of a rendering that lie before, between and after its answers."""
    edges = [0, *(edge for answer in rendering.answers for edge in (answer.start, answer.end)), len(rendering.text)]
    return [rendering.text[start:end] for start, end in list(pairwise(edges))[::2]]


def _prompt(encoded: Encoded, rendered: str) -> Prompt:
    if not encoded.ids:
        raise InvalidRequest("the prompt encodes to no tokens. Send at least one.", field="input")
    return Prompt(encoded.ids, rendered, largest_id=encoded.largest)
