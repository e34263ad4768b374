"""A small, real Hugging Face model folder, made offline: for the demo, the tests and the benchmarks.

Covers: a byte-level BPE tokenizer trained on English text that ships with every CPython (`pydoc_data.topics`), a chat
template, random Llama- or Qwen3-shaped weights. Does not cover: sense. The model babbles, but it is loaded by the same
code as any other model, and the same shape and seed give the same bytes.

    python -m workers.tiny DIR --layers 8 --hidden 512 --heads 8

The files are written without torch or transformers, whose import would take longer than all the rest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
BEGIN, END_OF_TEXT, END_OF_TURN, TURN, MESSAGE = "<|begin|>", "<|endoftext|>", "<|end|>", "<|turn|>", "<|message|>"
SPECIAL_TOKENS = (END_OF_TEXT, BEGIN, END_OF_TURN, TURN, MESSAGE)
_BYTES = 256

# Every message ends with its own end token and text between two special tokens is encoded alone. So the tokens of a
# turn with its generation prompt, and of the answer, are a prefix of the next turn's tokens: what was cached is found.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|turn|>{{ message['role'] }}<|message|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant<|message|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What to make.

    Attributes:
        architecture: one of ARCHITECTURES. vocab: at least 512. dtype: float32, bfloat16 or float16.
        context_length: tokens. seed: of the weights. spread: standard deviation of the weights; larger ones give
        answers with more variety.
    """

    architecture: str = "llama"
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 2048
    dtype: str = "float32"
    context_length: int = 8192
    seed: int = 0
    spread: float = 0.05

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.architecture!r}; choose one of {', '.join(ARCHITECTURES)}")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError("heads must divide hidden, and kv_heads must divide heads; change one of them")
        if self.dtype not in _ENCODERS:
            raise ValueError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(_ENCODERS)}")
        if self.vocab < 2 * _BYTES:
            raise ValueError(f"vocab must be at least {2 * _BYTES}: {_BYTES} bytes, special tokens and some merges")


def make_model_folder(path: str | Path, shape: ModelShape | None = None) -> Path:
    """Write config.json, generation_config.json, model.safetensors, tokenizer files and chat template; the folder.

    The same shape gives the same bytes.
    """
    folder, shape = Path(path), shape or ModelShape()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(shape)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    special = {"bos_token_id": ids[BEGIN], "eos_token_id": ids[END_OF_TURN], "pad_token_id": ids[END_OF_TEXT]}
    _write_json(folder / "config.json", {**_config(shape), **special})
    ends = [ids[END_OF_TURN], ids[END_OF_TEXT]]
    _write_json(folder / "generation_config.json", {**special, "eos_token_id": ends})
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(shape))
    _write_weights(folder / "model.safetensors", shape)
    return folder


def _train_tokenizer(shape: ModelShape) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    bpe.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    return bpe


def _tokenizer_config(shape: ModelShape) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "model_max_length": shape.context_length,
        "clean_up_tokenization_spaces": False,
    }


def _config(shape: ModelShape) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES[shape.architecture]],
        "model_type": shape.architecture,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": _inner(shape),
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "initializer_range": shape.spread,
        "dtype": shape.dtype,
    }


def _inner(shape: ModelShape) -> int:
    return shape.hidden * 3


def _tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint, in its order; one-dimensional ones are the weights of norms."""
    hidden, inner, head = shape.hidden, _inner(shape), shape.hidden // shape.heads
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (heads * head, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        if shape.architecture == "qwen3":
            yield f"{prefix}.self_attn.q_norm.weight", (head,)
            yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab, hidden)


def _write_weights(path: Path, shape: ModelShape) -> None:
    rng, encode = np.random.Generator(np.random.PCG64(shape.seed)), _ENCODERS[shape.dtype]
    arrays, specs = [], {}  # specs point into the arrays, which must live as long
    for name, sizes in _tensors(shape):
        is_norm = len(sizes) == 1
        values = np.ones(sizes, "f4") if is_norm else shape.spread * rng.standard_normal(sizes, dtype="f4")
        array = encode(values)
        arrays.append(array)
        specs[name] = TensorSpec(dtype=shape.dtype, shape=sizes, data_ptr=array.ctypes.data, data_len=array.nbytes)
    serialize_file(specs, str(path), {"format": "pt"})
    # Written readable for its owner only; workers may run as somebody else.
    path.chmod(0o644)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of the floats, which is what the type is; random values need no rounding to even."""
    return (values.view("<u4") >> 16).astype("<u2")


_ENCODERS: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "float32": lambda values: values.astype("<f4"),
    "bfloat16": _bfloat16,
    "float16": lambda values: values.astype("<f2"),
}


def _write_json(path: Path, fields_of: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields_of, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a folder from the command line."""
    parser = argparse.ArgumentParser(description="Make a small random model folder.")
    parser.add_argument("folder", type=Path)
    for field in fields(ModelShape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    make_model_folder(options.pop("folder"), ModelShape(**options))


if __name__ == "__main__":
    main()
