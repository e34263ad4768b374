"""No forward that is served asks the device anything on its way: on a GPU such a step could not be captured."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.workers.engine_rig import SHAPE, model_folder
from workers.attention.captured import INPUTS
from workers.attention.paged_inputs import PagedInputs
from workers.attention.step import Step
from workers.model_folder import open_model_folder
from workers.models import ModelRunner
from workers.positions import hold_positions
from workers.random_model import random_model, random_runner

ASKS = {"is_nonzero", "_local_scalar_dense", "item", "nonzero", "masked_select", "unique2", "_unique2", "equal"}
ROWS = 4
BASE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": SHAPE.vocab,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [8.0] * 8,
        "original_max_position_embeddings": 64,
    },
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
FAMILIES = [
    ("llama", {}),
    ("llama", DYNAMIC),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
    ("mistral", {"sliding_window": 20}),
    ("phi3", {}),
    ("phi3", LONGROPE),
    ("gemma", {"head_dim": 16}),
    ("gemma2", {"head_dim": 16, "sliding_window": 20}),
    ("gemma3_text", {"head_dim": 16, "sliding_window": 20}),
    ("gpt_oss", {"head_dim": 16, "sliding_window": 20, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("qwen3_moe", {"head_dim": 16, **EXPERTS}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("gpt2", {"pad_token_id": None}),  # with one, as its checkpoints have none, it looks for it in each step
    ("gpt_neox", {}),
    ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
]


class Asked(TorchDispatchMode):
    """Counts operators that make the host wait for what the device has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in ASKS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Silent:
    """Attention that asks nothing: what is asked besides is the model's own."""

    def attend_paged(self, inputs, key_pool, value_pool, query, key, value, **scoring):
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])


def captured_forward(model: ModelRunner) -> Counter[str]:
    """What a step asks that reads tensors alone, as graphs are captured of it."""
    zeros = torch.zeros(ROWS, dtype=torch.int64)
    inputs = PagedInputs(zeros - 1, torch.arange(ROWS + 1), zeros, zeros[:, None], longest=1)
    kv = [(torch.zeros(1, 16, 2, 16), torch.zeros(1, 16, 2, 16))] * model.layout.layers
    step = Step(kv, 16, (), zeros[:0], zeros[:0], Silent(), plan={INPUTS: inputs})
    with Asked() as asked:
        model.forward_tensors(step, zeros, zeros, torch.arange(ROWS))
    return asked.seen


@pytest.mark.parametrize(("architecture", "options"), FAMILIES)
def test_a_captured_forward_asks_the_device_nothing(architecture: str, options: dict):
    model = random_model({"model_type": architecture, **BASE, **options}, device="cpu", dtype="float32")
    hold_positions(model)  # as `ModelRunner.load` does
    assert captured_forward(random_runner(model, open_model_folder(model_folder()))) == {}


def test_what_asks_is_seen():
    model = random_model({"model_type": "phi3", **BASE, **LONGROPE}, device="cpu", dtype="float32")
    assert captured_forward(random_runner(model, open_model_folder(model_folder()))) == {"is_nonzero": 1}
