"""What a simulated worker says of itself: its scheme and sizes, made up or read from a model folder without weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from kvstore.blocks import HashScheme
from kvstore.layout import KVLayout
from workers.config import WorkerConfig
from workers.protocol import EngineInfo

DEFAULT_VOCABULARY = 32_000
DEFAULT_CONTEXT = 8192


def simulated_info(
    *,
    fingerprint: bytes,
    layout: KVLayout,
    model: str = "simulated",
    tokenizer_sha256: bytes = b"",
    context_length: int = DEFAULT_CONTEXT,
    vocab_size: int = DEFAULT_VOCABULARY,
    eos_token_ids: tuple[int, ...] = (),
) -> EngineInfo:
    """What a simulated worker says of itself. Workers of one fleet need one fingerprint and one layout."""
    return EngineInfo(
        scheme=HashScheme(fingerprint, layout.describe(), layout.block_size),
        model=model,
        tokenizer_sha256=tokenizer_sha256,
        context_length=context_length,
        vocab_size=vocab_size,
        block_nbytes=layout.block_nbytes,
        device="simulated",
        eos_token_ids=eos_token_ids,
    )


def info_for(config: WorkerConfig) -> EngineInfo:
    """The same from a worker's settings. The model folder may lack weights, or be missing altogether.

    The fingerprint covers config.json only, so it never equals that of a worker with real weights.
    """
    folder = Path(config.model_dir)
    settings = _json(folder / "config.json")
    return simulated_info(
        fingerprint=hashlib.sha256(b"simulated\0" + json.dumps(settings, sort_keys=True).encode()).digest(),
        layout=_layout(settings, config),
        model=config.model_name,
        tokenizer_sha256=_sha256(folder / "tokenizer.json"),
        context_length=config.context_length or _positive(settings.get("max_position_embeddings"), DEFAULT_CONTEXT),
        vocab_size=_positive(settings.get("vocab_size"), DEFAULT_VOCABULARY),
        eos_token_ids=tuple(_ids(settings.get("eos_token_id"))),
    )


def _layout(settings: Mapping[str, object], config: WorkerConfig) -> KVLayout:
    heads = _positive(settings.get("num_attention_heads"), 8)
    head_dim = _positive(settings.get("head_dim"), max(1, _positive(settings.get("hidden_size"), 512) // heads))
    layout = KVLayout(
        layers=_positive(settings.get("num_hidden_layers"), 8),
        kv_heads=_positive(settings.get("num_key_value_heads"), heads),
        k_dim=head_dim,
        v_dim=head_dim,
        dtype="float32",
        kv_dtype=config.kv_dtype,
    )
    size = config.block_size
    return layout.with_chosen_block_size() if size is None else replace(layout, block_size=size)


def _positive(value: object, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default


def _ids(value: object) -> Iterator[int]:
    values = value if isinstance(value, list) else [value]
    return (each for each in values if isinstance(each, int))


def _json(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""
