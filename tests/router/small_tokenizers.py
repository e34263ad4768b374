"""Tokenizers small enough to be trained in a test: of bytes, as Llama and Qwen have, and with metaspace, as Mistral."""

import argparse
import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEMPLATES = Path(__file__).parent / "templates"
FAMILIES = ("llama3", "qwen3", "mistral", "gemma")
SPECIAL = [
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
    "<s>", "</s>", "[INST]", "[/INST]", "<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>",
]  # fmt: skip
# family: beginning and end of a text
ENDS = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<end_of_turn>"),
    "features": ("<bos>", "<eos>"),
}


def template(family: str) -> str:
    return (TEMPLATES / f"{family}.jinja").read_text()


@cache
def tokenizer_json(kind: str) -> str:
    """`bytes` or `metaspace`; 600 tokens, trained on the text of a standard module."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", unk_token="<unk>"))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        extra = []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback()])
        alphabet = list(" \n" + "".join(chr(c) for c in range(33, 127)))
        extra = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600 + len(extra), initial_alphabet=alphabet, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator([Path(argparse.__file__).read_text()[:50_000]], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in extra])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    # What files carry from training must not bite at serving.
    tokenizer.enable_truncation(max_length=8)
    return tokenizer.to_str()


def write_model_folder(folder: Path, family: str = "llama3", kind: str = "bytes", **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer.from_str(tokenizer_json(kind))
    bos, eos = ENDS[family]
    settings = {
        "vocab_size": tokenizer.get_vocab_size() + 8,
        "max_position_embeddings": 2048,
        "eos_token_id": tokenizer.token_to_id(eos),
    }
    (folder / "tokenizer.json").write_text(tokenizer_json(kind))
    (folder / "config.json").write_text(json.dumps(settings | config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": {"content": eos}}))
    (folder / "chat_template.jinja").write_text(template(family))
    return folder
