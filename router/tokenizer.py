"""From an input to token ids, once a request: tokenizer.json, the chat template, and earlier answers spliced in.

Covers: limits on what is encoded, the three forms of input, exact splicing of earlier answers. Does not cover: the
context length against `max_tokens` (`core`), hashing (`kvstore.blocks`).

Splicing: the text of a sampled answer often does not encode to the ids that were sampled. A chat that carries those
ids gets them back verbatim: the rendered text is cut at the answer, the pieces between answers are encoded on their
own, and the ids stand where the text stood. The tokens of one turn's prompt, followed by its answer, are then a prefix
of the next turn's prompt, so every block of them is found again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer

from router.chat_template import Answer, ChatTemplate, Message, Rendering, load_chat_template
from router.errors import InvalidRequest
from router.model_folder import ModelFacts, ModelFolderError, read_model_facts
from router.protocol import Prompt
from warmkv.v1 import inference_pb2

# Encoding a text holds the interpreter lock, some 0.7 s a MiB; longer ones go to a thread, where a batch lets it go.
INLINE_BYTES = 16 << 10
BYTES_PER_ID = 4
# Rendering costs some microseconds a message and may hold the loop up.
MAX_MESSAGES = 4096
_THREADS = 2

T = TypeVar("T")


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

    async def encode(self, input: inference_pb2.Input) -> Prompt:
        """The token ids of an input.

        Raises:
            InvalidRequest: nothing to encode, too many bytes, ids out of range, or a chat that the template refuses.
        """
        kind = input.WhichOneof("kind")
        if kind == "text":
            return await self._encode_text(input.text)
        if kind == "chat":
            return await self._encode_chat(input.chat)
        if kind == "token_ids":
            return self._check_ids(input.token_ids.ids)
        raise InvalidRequest("the input is not set. Set one of text, chat and token_ids.", field="input")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def close(self) -> None:
        """End the threads; encodings that wait are dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _encode_text(self, text: str) -> Prompt:
        size = len(text.encode())
        self._check_size(size, "input.text")
        if not text:
            raise InvalidRequest("the prompt is empty. Send at least one token.", field="input.text")
        (ids,) = await self._run(size, lambda: self._encode_pieces([text], add_special_tokens=True))
        return _prompt(ids, text)

    async def _encode_chat(self, chat: inference_pb2.Chat) -> Prompt:
        size = chat.ByteSize()
        self._check_size(size, "input.chat.messages")
        if len(chat.messages) > MAX_MESSAGES:
            raise InvalidRequest(
                f"the conversation has {len(chat.messages)} messages, and {MAX_MESSAGES} are allowed. "
                "Leave out old ones, or join neighbours.",
                field="input.chat.messages",
            )
        for i, message in enumerate(chat.messages):
            self._check_range(message.token_ids, f"input.chat.messages[{i}].token_ids")
        return await self._run(size, lambda: self._render_and_encode(chat))

    def _render_and_encode(self, chat: inference_pb2.Chat) -> Prompt:
        if self._template is None:
            raise InvalidRequest(
                "the model has no chat template. Send text or token ids, or put a chat_template.jinja into its folder.",
                field="input.chat",
            )
        generate = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        messages = [Message(m.role, m.content or self.decode(m.token_ids)) for m in chat.messages]
        rendering = self._template.render(messages, add_generation_prompt=generate)
        spliced = [answer for answer in rendering.answers if chat.messages[answer.message].token_ids]
        pieces = self._encode_pieces(_between(rendering, spliced), add_special_tokens=False)
        ids = pieces[0]
        for answer, piece in zip(spliced, pieces[1:], strict=True):
            ids = ids + self._without_end(chat.messages[answer.message].token_ids, piece) + piece
        return _prompt(ids, rendering.text, tuple(a.end for a in rendering.answers if a not in spliced))

    def _without_end(self, answer: Sequence[int], following: Sequence[int]) -> list[int]:
        """An answer's ids less a last end token that the template writes as well."""
        ids = list(answer)
        repeated = following and ids[-1] == following[0] and ids[-1] in self._end_ids
        return ids[:-1] if repeated else ids

    def _encode_pieces(self, pieces: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        batch = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        """Short work here and now, long work in a thread."""
        return work() if size <= INLINE_BYTES else await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _check_ids(self, ids: Sequence[int], where: str = "input.token_ids.ids") -> Prompt:
        self._check_size(len(ids) * BYTES_PER_ID, where)
        if not ids:
            raise InvalidRequest("the prompt is empty. Send at least one token.", field=where)
        self._check_range(ids, where)
        return Prompt(list(ids), "")

    def _check_range(self, ids: Sequence[int], where: str) -> None:
        if ids and max(ids) >= self.vocab_size:
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


def _between(rendering: Rendering, answers: Sequence[Answer]) -> list[str]:
    """The pieces of a rendering that lie before, between and after the answers."""
    edges = [0, *(edge for answer in answers for edge in (answer.start, answer.end)), len(rendering.text)]
    return [rendering.text[start:end] for start, end in list(pairwise(edges))[::2]]


def _prompt(ids: list[int], rendered: str, answer_ends: tuple[int, ...] = ()) -> Prompt:
    if not ids:
        raise InvalidRequest("the prompt encodes to no tokens. Send at least one.", field="input")
    return Prompt(ids, rendered, answer_ends)
