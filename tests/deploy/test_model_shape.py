"""The layout told from config.json, against the one that a probe forward of the same model learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deploy.model_shape import ASKS, KNOWN_TYPES, ModelShapeError, layout_of_config
from workers.models import ATTENTION, ModelRunner
from workers.tiny import ModelShape, make_model_folder

TINY: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ONE_HEAD_DIM = {"helium", "olmoe", "phi", "phi3"}  # transformers runs them with hidden_size / heads only
LLAMA = {"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA |= {"hidden_size": 4096, "torch_dtype": "bfloat16"}


def _probed(config: Any) -> str:
    """What a worker would learn, from random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=torch.float16).eval()
    runner = ModelRunner.__new__(ModelRunner)
    runner._model, runner.device = model, torch.device("cpu")
    return runner._probe(model.config.get_text_config()).with_chosen_block_size().describe()


@pytest.mark.parametrize("kind", sorted(KNOWN_TYPES))
@pytest.mark.parametrize("fields", [{"num_key_value_heads": 2, "head_dim": 32}, {}], ids=str)
def test_every_known_type_is_told_as_it_is_probed_or_a_field_is_asked_for(
    kind: str, fields: dict[str, int], tmp_path: Path
) -> None:
    if kind in ONE_HEAD_DIM and fields:
        fields = {**fields, "head_dim": 16}
    config = AutoConfig.for_model(kind, **TINY, **fields)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for field in ("num_key_value_heads", "head_dim"):
        if field not in fields:
            written.pop(field, None)  # as older files that do not have it
    if fields or kind not in ASKS:
        assert layout_of_config(written, dtype="float16").describe() == _probed(config)
        return
    with pytest.raises(ModelShapeError, match=r"(num_key_value_heads|head_dim) = None"):
        layout_of_config(written, dtype="float16")


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_small_models_of_the_demo_are_told_as_workers_load_them(tmp_path: Path, architecture: str) -> None:
    folder = make_model_folder(tmp_path, ModelShape(architecture=architecture, dtype="bfloat16"))
    told = layout_of_config(json.loads((folder / "config.json").read_text()))
    assert told == ModelRunner.load(folder).layout.with_chosen_block_size()


def test_llama_3_8b_stores_128_kib_a_token() -> None:
    layout = layout_of_config(LLAMA)
    assert (layout.token_nbytes, layout.block_nbytes, layout.block_size) == (128 << 10, 2 << 20, 16)
    assert layout_of_config(LLAMA, dtype="float32").token_nbytes == 256 << 10
    nested = {"model_type": "vision_and_llama", "text_config": LLAMA}
    assert layout_of_config(nested) == layout


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"kv_lora_rank": 512, "model_type": "deepseek_v3"}, "latent attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention keep other state"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"model_type": "falcon"}, "not been compared"),
        ({"model_type": None}, "not been compared"),
        ({"model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads = None"),
        ({"model_type": "qwen3"}, "head_dim = None"),
        ({"num_hidden_layers": "32"}, "positive whole number"),
        ({"num_attention_heads": True}, "positive whole number"),
        ({"hidden_size": 4097}, "no multiple"),
        ({"torch_dtype": None}, "model.dtype="),
        ({"torch_dtype": "float8_e4m3fn"}, "model.dtype="),
    ],
)
def test_what_is_not_covered_is_refused_by_name(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelShapeError, match=why) as refused:
        layout_of_config({**LLAMA, **changed})
    assert "; " in str(refused.value), "what to do"
