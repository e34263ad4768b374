"""Tokenization in the router: a chat of 32k tokens cold, and once its history was seen; part of `bench.router`."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

from bench.report import Report
from router.tokenizer import PromptEncoder
from warmkv.v1 import inference_pb2
from workers.tiny import make_model_folder

_TURNS, _QUESTION, _ANSWER = 40, 600, 2400  # characters; about 34k tokens with the tiny model's tokenizer
_TEXT = "\n".join(topics.values())


def add_token_rows(report: Report, *, quick: bool) -> None:
    """Rows `tokenize_32k_*`: whole, as without a memory; with all of the history but the last turn seen."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model_folder(Path(folder) / "model")
        for name, with_ids in (("text", False), ("ids", True)):
            cold, seen = asyncio.run(_measured(model, rounds=5 if quick else 20, with_ids=with_ids))
            report.add(f"tokenize_32k_{name}_cold_ms", cold, "ms")
            report.add(f"tokenize_32k_{name}_seen_ms", seen, "ms", bar="<= 2")
        report.add("tokenize_32k_ready_ids_ms", asyncio.run(_of_ready_ids(model, 5 if quick else 20)), "ms", bar="<= 2")


async def _measured(model: Path, *, rounds: int, with_ids: bool) -> tuple[list[float], list[float]]:
    """Milliseconds of a chat that is new, and of its next turns. Answers come back as text, or with their ids."""
    cold, seen = [], []
    for number in range(rounds):
        encoder = PromptEncoder.load(model)
        chat = _chat(encoder, number, with_ids=with_ids)
        cold.append(await _ms(encoder, chat))
        for turn in range(5):
            chat.messages.append(inference_pb2.ChatMessage(role="assistant", content=f"Answer {turn}."))
            chat.messages.append(inference_pb2.ChatMessage(role="user", content=_TEXT[turn * 900 :][:300]))
            seen.append(await _ms(encoder, chat))
        encoder.close()
    return cold, seen


async def _of_ready_ids(model: Path, rounds: int) -> list[float]:
    """Milliseconds to read and check 32k ids that a caller made himself."""
    encoder, rng = PromptEncoder.load(model), random.Random(1)
    ids = [rng.randrange(encoder.vocab_size) for _ in range(32_768)]
    given = inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=ids))
    times = [await _timed(encoder, given) for _ in range(rounds)]
    encoder.close()
    return times


async def _ms(encoder: PromptEncoder, chat: inference_pb2.Chat) -> float:
    return await _timed(encoder, inference_pb2.Input(chat=chat))


async def _timed(encoder: PromptEncoder, given: inference_pb2.Input) -> float:
    start = time.process_time()  # tokenizers have threads of their own; what else the machine does is not counted
    await encoder.encode(given)
    return (time.process_time() - start) * 1e3


def _chat(encoder: PromptEncoder, number: int, *, with_ids: bool) -> inference_pb2.Chat:
    messages, at = [], 1000 * number
    for _ in range(_TURNS):
        for role, length in (("user", _QUESTION), ("assistant", _ANSWER)):
            text = _TEXT[at : at + length]
            ids = encoder.answer_ids(text) if with_ids and role == "assistant" else ()
            messages.append(inference_pb2.ChatMessage(role=role, content=text, token_ids=ids))
            at = (at + length) % (len(_TEXT) - 4000)
    messages.append(inference_pb2.ChatMessage(role="user", content="And now?"))
    return inference_pb2.Chat(messages=messages)
