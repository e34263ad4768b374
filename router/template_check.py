"""Whether a model's chat template lets a next turn find the blocks of the one before, and if not, what it changes.

Covers: made-up conversations, encoded turn by turn as the router encodes them: the ids of a prompt and its answer must
begin the next prompt. Does not cover: real conversations (`misses` names theirs as `template_break`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import takewhile
from pathlib import Path

from router.chat_template import Message, load_chat_template
from router.errors import InvalidRequest
from router.tokenizer import PromptEncoder
from warmkv.v1 import inference_pb2

_QUESTIONS = ("Name a city.", "And its river?", "Thank you. How long is it?")
_ANSWERS = ("Rome, the capital of Italy.", "The Tiber.")
_SYSTEM = "You answer briefly."
_SHOWN = 40  # characters of a difference
_LATER = {"minute": timedelta(minutes=1), "day": timedelta(days=1)}


@dataclass(frozen=True, slots=True)
class Break:
    """A conversation whose next turn does not begin with the one before.

    Attributes:
        what: the kind of conversation. turn: the later one, from 1. kept, of: leading tokens of the earlier turn and
        its answer that are found again, and all of them. was, now: the text there, then and now.
    """

    what: str
    turn: int
    kept: int
    of: int
    was: str
    now: str


async def breaks(encoder: PromptEncoder) -> list[Break]:
    """The first break of each kind of conversation. Kinds that the template refuses are left out."""
    found = []
    for what, system, answers in _kinds():
        try:
            found += [broken async for broken in _breaks(encoder, what, system, answers)][:1]
        except InvalidRequest:
            continue
    return found


def changes_with_time(folder: Path, *, now: Callable[[], datetime] = datetime.now) -> str:
    """`minute` or `day`, when a prompt is another one so much later; empty: it stays. Raises ModelFolderError."""
    start = now()
    for what, later in _LATER.items():
        texts = set()
        for at in (start, start + later):
            template = load_chat_template(folder, now=lambda at=at: at)  # type: ignore[misc]
            texts.add(template.render([Message("user", _QUESTIONS[0])]).text if template else "")
        if len(texts) > 1:
            return what
    return ""


def _kinds() -> list[tuple[str, str, Sequence[str]]]:
    thought = [f"<think>\nLet me see.\n</think>\n\n{answer}" for answer in _ANSWERS]
    spaced = [f" {answer}\n" for answer in _ANSWERS]
    return [
        ("a plain chat", "", _ANSWERS),
        ("a chat with a system prompt", _SYSTEM, _ANSWERS),
        ("answers with thoughts", "", thought),
        ("answers with spaces around them", "", spaced),
    ]


async def _breaks(encoder: PromptEncoder, what: str, system: str, answers: Sequence[str]) -> AsyncIterator[Break]:
    said = [inference_pb2.ChatMessage(role="system", content=system)] if system else []
    before, text = list[int](), ""
    for turn, question in enumerate(_QUESTIONS):
        said.append(inference_pb2.ChatMessage(role="user", content=question))
        prompt = await encoder.encode(inference_pb2.Input(chat=inference_pb2.Chat(messages=said)))
        kept = _common(before, prompt.token_ids)
        if kept < len(before):
            at = _common(text, prompt.rendered)
            yield Break(what, turn + 1, kept, len(before), text[at : at + _SHOWN], prompt.rendered[at : at + _SHOWN])
        if turn < len(answers):
            ids = encoder.answer_ids(answers[turn])
            before, text = [*prompt.token_ids, *ids], prompt.rendered + answers[turn]
            said.append(inference_pb2.ChatMessage(role="assistant", content=answers[turn], token_ids=ids))


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
