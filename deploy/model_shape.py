"""The K/V layout of a model from its config.json alone: for sizing a store before anything is downloaded or started.

Covers: decoder-only models of the types that are listed here, each compared with the layout that a worker learns by a
probe forward. Does not cover, and refuses by name: latent attention (MLA), layers that keep other state (hybrid,
linear, convolution), encoder-decoders, quantised weights, and every type that is not listed. Where a field is missing
whose default is not the same for all models of a type, that is an error and not a guess.

Layers with a sliding window count in full: a block holds all layers, whatever of it their attention still looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from kvstore.layout import DTYPE_BYTES, UNQUANTISED, KVLayout

# Attention without groups: as many K/V heads as heads.
_UNGROUPED = frozenset({"gpt2", "gpt_neox", "opt"})
# Without `num_key_value_heads` they have as many K/V heads as heads, and without `head_dim` hidden_size / heads.
_LIKE_LLAMA = frozenset(
    {"arcee", "cohere", "granite", "granitemoe", "llama", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3"}
)
# Must say `num_key_value_heads`; without `head_dim` hidden_size / heads.
_GROUPED = frozenset({"exaone4", "mistral", "mixtral", "phimoe", "qwen2", "qwen2_moe", "smollm3", "starcoder2"})
# Must say both: their defaults are numbers of one size of the model.
_EXPLICIT = frozenset(
    {"ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_oss", "helium", "minimax_m2"}
) | {"ministral3", "qwen3", "qwen3_moe", "seed_oss"}

ASKS = _GROUPED | _EXPLICIT  # for a field that is missing
KNOWN_TYPES = _UNGROUPED | _LIKE_LLAMA | ASKS
_ALIASES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd"}
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


class ModelShapeError(ValueError):
    """The layout cannot be told from config.json. The message ends with what to do."""


def layout_of_config(config: Mapping[str, Any], *, dtype: str = "auto", kv_dtype: str = UNQUANTISED) -> KVLayout:
    """The layout of one block, with the block size that workers choose.

    Args:
        config: a Hugging Face config.json. dtype: of the weights in memory; `auto`: what the configuration says.
        kv_dtype: one of `kvstore.layout.KV_DTYPES`, what is stored.

    Raises:
        ModelShapeError: the model is of a kind that is not covered, or a field is missing or makes no sense.
    """
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, Mapping) else config
    kind = text.get("model_type") or config.get("model_type")
    _check_kind(str(kind), config, text)
    heads = _positive(text, "num_attention_heads")
    layout = KVLayout(
        layers=_positive(text, "num_hidden_layers"),
        kv_heads=_kv_heads(str(kind), text, heads),
        k_dim=(dim := _head_dim(str(kind), text, heads)),
        v_dim=dim,
        dtype=_dtype(config, text, dtype),
        kv_dtype=kv_dtype,
    )
    return layout.with_chosen_block_size()


def _check_kind(kind: str, config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    if text.get("kv_lora_rank"):
        _refuse(kind, "it has latent attention (kv_lora_rank), whose K/V is not one pair for each head")
    if config.get("is_encoder_decoder"):
        _refuse(kind, "it is an encoder-decoder")
    if others := set(text.get("layer_types") or ()) - _PLAIN_LAYERS:
        _refuse(kind, f"its layers of type {', '.join(sorted(map(str, others)))} keep other state than plain K/V")
    if text.get("quantization_config") or config.get("quantization_config"):
        _refuse(kind, "its weights are quantised, which workers do not serve")
    if kind not in KNOWN_TYPES:
        _refuse(
            kind, f"its K/V layout has not been compared with a running model (known: {', '.join(sorted(KNOWN_TYPES))})"
        )


def _kv_heads(kind: str, text: Mapping[str, Any], heads: int) -> int:
    if kind in _UNGROUPED or (kind in _LIKE_LLAMA and text.get("num_key_value_heads") is None):
        return heads
    return _positive(text, "num_key_value_heads")


def _head_dim(kind: str, text: Mapping[str, Any], heads: int) -> int:
    if kind in _EXPLICIT or (kind not in _UNGROUPED and text.get("head_dim") is not None):
        return _positive(text, "head_dim")
    hidden = _positive(text, "hidden_size")
    if hidden % heads:
        raise ModelShapeError(f"hidden_size {hidden} is no multiple of {heads} heads; correct config.json")
    return hidden // heads


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any], wanted: str) -> str:
    said = [part.get(key) for part in (text, config) for key in ("dtype", "torch_dtype")]
    found = wanted if wanted != "auto" else next((str(name) for name in said if name), None)
    if found is None:
        raise ModelShapeError("config.json says no dtype; say it by --set model.dtype=bfloat16")
    if found not in DTYPE_BYTES:
        raise ModelShapeError(
            f"K/V of dtype {found} cannot be stored; say one of {', '.join(DTYPE_BYTES)} by --set model.dtype=bfloat16"
        )
    return found


def _positive(text: Mapping[str, Any], field: str) -> int:
    value = text.get(field)
    if value is None and field in _ALIASES:
        value = text.get(_ALIASES[field])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelShapeError(
            f"config.json says {field} = {value!r}, and a positive whole number is needed; correct config.json"
        )
    return value


def _refuse(kind: str, why: str) -> NoReturn:
    raise ModelShapeError(
        f"the K/V of model_type {kind} cannot be told from config.json: {why}; "
        "start a worker with it, and read the block size in `warmkv cache ls`"
    )
