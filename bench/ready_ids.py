"""An encoder for loads of ready token ids, which need no tokenizer."""

from __future__ import annotations

from router.protocol import EarlierAnswer, Prompt
from warmkv.v1 import inference_pb2


class ReadyIds:
    """Takes ready ids only."""

    tokenizer_sha256 = b""
    vocab_size = None

    async def encode(self, input: inference_pb2.Input, *, group: str = "") -> Prompt:
        """As they are."""
        return Prompt(list(input.token_ids.ids))

    async def earlier_answers(self, input: inference_pb2.Input, prompt: Prompt) -> tuple[EarlierAnswer, ...]:
        """None: ids are no chat."""
        return ()

    def said(self, input: inference_pb2.Input, answer: str) -> bytes:
        """Never asked of ids."""
        return b""
