"""A model whose answers can be worked out by hand: what it stores for a token follows from all tokens before it.

Its rows are whole numbers in the pool, each made of the row before and the token, and the next token follows from the
sum of all rows of the context. So a block that is stale, torn, another's or never written changes the answer.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvstore.layout import KVLayout
from tests.workers.engine_rig import model_folder
from workers.attention.step import KVViews, Span, Step

VOCAB = 1024
FIRST_TOKEN = 10  # those below are special in the tokenizer
LAYOUT = KVLayout(layers=1, kv_heads=1, k_dim=1, v_dim=1, dtype="float32", block_size=4)
_EXACT = 0xFFFFFF  # whole numbers up to here are exact in float32


def row(before: int, token: int) -> int:
    """What is stored for a token behind a row; `before` of the first token is zero."""
    return zlib.crc32(before.to_bytes(4, "little") + token.to_bytes(4, "little")) & _EXACT


def next_token(rows: Sequence[int]) -> int:
    """What follows a context of these rows."""
    return FIRST_TOKEN + sum(rows) % (VOCAB - FIRST_TOKEN)


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What the model says to a prompt, without any cache."""
    rows: list[int] = []
    tokens = list(prompt)
    for token in tokens:
        rows.append(row(rows[-1] if rows else 0, token))
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(rows))
        rows.append(row(rows[-1], tokens[-1]))
    return tokens[len(prompt) :]


class ArithmeticRunner:
    """Stands where a `ModelRunner` stands. Keeps its numbers in the pool and nowhere else.

    Attributes:
        room: most rows of a step; a larger one is out of memory. not_finite: the next step's logits are not numbers.
        steps: sizes of the steps so far.
    """

    def __init__(self) -> None:
        self.folder = SimpleNamespace(tokenizer_file=model_folder() / "tokenizer.json")
        self.device = torch.device("cpu")
        self.backend = None
        self.vocab_size = VOCAB
        self.room = math.inf
        self.not_finite = False
        self.steps: list[int] = []

    def forward(
        self,
        kv: KVViews,
        spans: Sequence[Span],
        token_ids: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[int],
    ) -> Tensor:
        """As `ModelRunner.forward`."""
        self.steps.append(len(token_ids))
        logits = torch.zeros(len(rows), VOCAB)
        keys, values = kv[0]
        for span in spans:
            self._write(span, token_ids, positions, keys, values)
            if len(token_ids) > self.room:
                continue  # some are written, and then there is no memory
            last = span.row + span.length - 1
            if last in rows:
                logits[list(rows).index(last), next_token(_rows(span.block_table, span.context, keys))] = 10.0
        if len(token_ids) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        if self.not_finite:
            self.not_finite = False
            return logits * math.nan
        return logits

    def forward_tensors(self, step: Step, ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        """As `ModelRunner.forward_tensors`."""
        return self.forward(step.kv, step.spans, ids.tolist(), positions.tolist(), wanted.tolist())

    def _write(self, span: Span, ids: Sequence[int], positions: Sequence[int], keys: Tensor, values: Tensor) -> None:
        start = span.context - span.length
        before = int(_rows(span.block_table, start, keys)[-1]) if start else 0
        for offset in range(span.length):
            place = start + offset
            assert positions[span.row + offset] == place
            before = row(before, ids[span.row + offset])
            at = span.block_table[place // LAYOUT.block_size], place % LAYOUT.block_size
            keys[at] = float(before)
            values[at] = float(before)


def _rows(table: Sequence[int], count: int, keys: Tensor) -> list[int]:
    """The first rows of a context; int() raises for NaN, which free blocks are full of."""
    size = LAYOUT.block_size
    return [int(keys[table[place // size], place % size, 0, 0]) for place in range(count)]


def info_fields() -> dict[str, Any]:
    """What `EngineInfo` needs to know of it, but for its scheme."""
    return {
        "model": "arithmetic",
        "tokenizer_sha256": b"",
        "context_length": 200,
        "vocab_size": VOCAB,
        "block_nbytes": LAYOUT.block_nbytes,
        "device": "cpu",
        "eos_token_ids": (),
    }
