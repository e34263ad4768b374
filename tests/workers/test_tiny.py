from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from workers.model_folder import open_model_folder
from workers.models import ModelRunner
from workers.tiny import CHAT_TEMPLATE, ModelShape, main, make_model_folder

SMALL = ModelShape(layers=1, hidden=32, heads=2, kv_heads=1, vocab=600, context_length=128)
FILES = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]


def test_the_same_shape_gives_the_same_bytes_and_leaves_the_random_state_alone(tmp_path: Path):
    before = torch.get_rng_state()
    one, other = make_model_folder(tmp_path / "a", SMALL), make_model_folder(tmp_path / "b", SMALL)
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert torch.equal(before, torch.get_rng_state())


def test_another_seed_gives_another_model_with_the_same_tokenizer(tmp_path: Path):
    one = open_model_folder(make_model_folder(tmp_path / "a", SMALL))
    other = open_model_folder(make_model_folder(tmp_path / "b", ModelShape(**{**_fields(SMALL), "seed": 1})))
    assert one.fingerprint() != other.fingerprint()
    assert one.tokenizer_sha256 == other.tokenizer_sha256


def test_a_turn_and_its_answer_are_a_prefix_of_the_next_turn(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(make_model_folder(tmp_path, SMALL))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ça va? 你好 <|end|"}]
    turn = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer.encode(" Oui.", add_special_tokens=False), tokenizer.eos_token_id]
    chat += [{"role": "assistant", "content": " Oui."}, {"role": "user", "content": "And you?"}]
    following = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert following[: len(turn) + len(answer)] == turn + answer


def test_text_survives_the_tokenizer(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(make_model_folder(tmp_path, SMALL))
    text = "  The class statement; naïve 你好 😀\n\tend"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_folder_holds_the_dtype_that_was_asked_for(tmp_path: Path, dtype: str):
    folder = make_model_folder(tmp_path, ModelShape(**{**_fields(SMALL), "dtype": dtype}))
    assert ModelRunner.load(folder).layout.dtype == dtype


def test_the_command_line_makes_a_folder_with_end_tokens_and_template(tmp_path: Path):
    main([str(tmp_path), "--architecture", "qwen3", "--layers", "1", "--hidden", "32", "--vocab", "600"])
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("change", "message"),
    [({"architecture": "bert"}, "architecture"), ({"heads": 3}, "heads"), ({"vocab": 100}, "vocab")],
)
def test_a_shape_that_cannot_be_is_refused(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ModelShape(**{**_fields(SMALL), **change})


def _fields(shape: ModelShape) -> dict[str, object]:
    return {name: getattr(shape, name) for name in shape.__slots__}
