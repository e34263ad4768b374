"""Cutting models into shares: which are served, which are refused and why, and that a wrong cut is seen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.workers.ranks_rig import SIZE, meet, on_all_ranks, one_at_a_time
from tests.workers.test_models import EXPERTS, _save
from workers.models import ModelNotSupported, ModelRunner
from workers.tensor_parallel import shard
from workers.tensor_parallel.shard import NotDivisible, cut_model


def _load(folder: Path, meeting: Path) -> list[ModelRunner | ModelNotSupported]:
    def load(rank: int) -> ModelRunner | ModelNotSupported:
        try:
            return ModelRunner.load(folder, ranks=meet(meeting, rank))
        except ModelNotSupported as refused:
            return refused

    with one_at_a_time():
        return on_all_ranks(load)


@pytest.mark.parametrize(
    ("architecture", "options", "kv_heads"),
    [
        ("llama", {}, 1),
        ("llama", {"attention_bias": True, "mlp_bias": True}, 1),
        ("llama", {"tie_word_embeddings": True}, 1),
        ("llama", {"vocab_size": 301}, 1),
        ("qwen2", {}, 1),
        ("qwen3", {"head_dim": 32}, 1),
        ("mistral", {"sliding_window": 20}, 1),
        ("gemma2", {"head_dim": 32, "sliding_window": 20}, 1),
        ("gemma3_text", {"head_dim": 32, "sliding_window": 20}, 1),
        ("phi", {"num_key_value_heads": 4}, 2),
    ],
)
def test_dense_models_are_cut_and_agree_with_the_whole(tmp_path: Path, architecture: str, options: dict, kv_heads: int):
    # `load` compares each rank's logits over paged K/V with those of the whole model.
    found = _load(_save(tmp_path / "model", architecture, **options), tmp_path)
    assert not any(isinstance(each, ModelNotSupported) for each in found), found
    assert [runner.layout.kv_heads for runner in found] == [kv_heads] * SIZE
    assert found[0].fingerprint == found[1].fingerprint


@pytest.mark.parametrize(
    ("architecture", "options", "why"),
    [
        ("llama", {"num_key_value_heads": 1}, "2 ranks cannot share out evenly"),
        ("llama", {"intermediate_size": 129}, "has 129 features"),
        ("gpt2", {}, "says of no layer how it is cut"),
        ("phi3", {"pad_token_id": 0}, "not supported"),
        ("qwen3_moe", {"head_dim": 32, **EXPERTS}, "not supported"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_to_do(tmp_path: Path, architecture: str, options: dict, why: str):
    for refused in _load(_save(tmp_path / "model", architecture, **options), tmp_path):
        assert isinstance(refused, ModelNotSupported)
        assert why in str(refused)
        assert "tensor_parallel" in str(refused)


def test_a_wrong_cut_is_seen_before_anything_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = shard._own

    def first_rows(name, weight, dim, group):
        rank = 0 if "k_proj" in name else group.rank  # both ranks get the same heads
        return whole(name, weight, dim, SimpleNamespace(rank=rank, size=group.size))

    monkeypatch.setattr(shard, "_own", first_rows)
    for refused in _load(_save(tmp_path / "model", "llama"), tmp_path):
        assert "differ from its own" in str(refused)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(model_type="toy", num_attention_heads=2, num_key_value_heads=2)
        )
        self.tp_plan = {"up": "colwise", "down": "rowwise"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def _block() -> _Block:
    torch.manual_seed(1)
    return _Block().requires_grad_(False)


def test_a_bias_behind_a_sum_is_added_once(tmp_path: Path):
    x = torch.randn(3, 6)
    wanted = _block()(x)
    blocks = [_block() for _ in range(SIZE)]

    def share(rank: int) -> tuple[torch.Tensor, int]:
        model = blocks[rank]
        cut_model(model, meet(tmp_path, rank))
        return model(x), sum(each.numel() for each in model.parameters())

    for found, numbers in on_all_ranks(share):
        torch.testing.assert_close(found, wanted)
        assert numbers == (6 * 8 + 8 + 8 * 5) // 2 + 5


def test_an_unknown_way_to_cut_is_refused():
    model = _block()
    model.tp_plan = {"up": "diagonal"}
    with pytest.raises(NotDivisible, match="'diagonal'"):
        cut_model(model, SimpleNamespace(rank=0, size=2))
