"""Answers that go on at another worker, from the tokens that were handed out. Pure.

Covers: the job and the question of a request that is resumed, which workers can resume one, what its caller is told
when none does. Does not cover: when that happens (`attempts`), where it goes (`decide`).

What was generated counts as prompt for blocks and prices: its full blocks have names like any other, were spilled like
any other, and are found by them. For sampling, limits, text and the bill it stays what it is: the worker is told how
many of the tokens were generated before. Random draws follow from seed and position, text and stop strings from the
tokens, so nothing else has to travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvstore.blocks import block_hashes, short
from kvstore.token_ids import packed
from router.decide import Question
from router.errors import WorkerLost
from router.hash_memo import Names
from router.link import WorkerLink
from router.request import PreparedPrompt
from warmkv.v1 import worker_pb2

# Workers that speak an older protocol would take what was generated for a part of the prompt.
RESUMES_SINCE = 3
# How much longer than a new request an answer under way waits for a worker: its caller has read half of it.
PATIENCE = 10.0


def resumed(
    prepared: PreparedPrompt, job: worker_pb2.Job, generated: Sequence[int]
) -> tuple[PreparedPrompt, worker_pb2.Job]:
    """The prompt and the job as they go to the next worker; those that are given stay as they are.

    Args:
        prepared: the prompt as it was asked for. job: as it was made for it. generated: all tokens handed out since.
    """
    chain = _longer(prepared, generated)
    longer = replace(prepared, chain=chain, question=_question(prepared.question, chain, len(generated)))
    again = worker_pb2.Job()
    again.CopyFrom(job)
    again.job_id = 0
    del again.peers[:]
    again.ClearField("promise")
    again.packed_token_ids = job.packed_token_ids + packed(generated)
    again.block_hashes = b"".join(chain.short)
    again.resumed_tokens = len(generated)
    return longer, again


def unable(links: Iterable[WorkerLink]) -> frozenset[str]:
    """Workers that cannot resume an answer."""
    return frozenset(link.name for link in links if not link.hello or link.hello.protocol_version < RESUMES_SINCE)


def stopped(workers: Sequence[str], why: str, *, tokens: int) -> WorkerLost:
    """The error of an answer of which so many tokens came and that nobody goes on with. `workers`: it was left by."""
    return WorkerLost(
        f"Worker {' and '.join(workers)} was lost in the middle of the answer ({why}); the tokens that came, {tokens},"
        " are right. To have the rest, send the request again, its prompt is likely to be cached.",
        worker=",".join(workers),
        generated_tokens=str(tokens),
    )


def _longer(prepared: PreparedPrompt, generated: Sequence[int]) -> Names:
    """Names of all full blocks, those of the prompt hashed no second time."""
    size = prepared.question.block_size
    first = len(prepared.question.hashes) * size
    tail = block_hashes([*prepared.prompt.token_ids[first:], *generated], prepared.chain.last or prepared.root, size)
    short_names = [*prepared.chain.short, *(short(name) for name in tail)]
    return Names(short_names, prepared.chain.joined + b"".join(tail))


def _question(question: Question, chain: Names, generated: int) -> Question:
    return replace(question, hashes=chain.short, prompt_tokens=question.prompt_tokens + generated)
