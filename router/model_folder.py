"""Reads the small files of a Hugging Face model folder. Does not read weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Under which name configurations say how long a sequence may be.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")


class ModelFolderError(ValueError):
    """A model folder is not what it should be. The message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the router must know of a model besides its tokenizer.

    Attributes:
        vocab_size: ids are below it. context_length: longest sequence, tokens. eos_token_ids: the model's end tokens.
    """

    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]


def read_model_facts(folder: Path) -> ModelFacts:
    """Facts from config.json and generation_config.json (which comes first for end tokens).

    Raises:
        ModelFolderError: the folder or config.json is missing or lacks a fact.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is no folder. Give the path of a Hugging Face model folder.")
    path = folder / "config.json"
    config = read_json_object(path)
    # Models of several modalities keep the language model's facts one level down.
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    ends = read_json_object(folder / "generation_config.json", missing_ok=True).get("eos_token_id")
    if ends is None:
        ends = config.get("eos_token_id", text.get("eos_token_id"))
    length = next((text[key] for key in _LENGTH_KEYS if key in text), None)
    return ModelFacts(
        vocab_size=_positive(text.get("vocab_size"), "vocab_size", path),
        context_length=_positive(length, " or ".join(_LENGTH_KEYS), path),
        eos_token_ids=_ids(ends, folder),
    )


def read_json_object(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """A JSON file that holds one object; empty for a missing one with `missing_ok`.

    Raises:
        ModelFolderError: it is missing, cannot be read, or holds something else.
    """
    if missing_ok and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFolderError(f"{path} is missing. Give a complete Hugging Face model folder.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error}). Restore the file.") from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} does not hold a JSON object. Restore the file.")
    return value


def _positive(value: object, key: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelFolderError(f"{path}: {key} is missing or no positive whole number ({value!r}). Correct the file.")
    return value


def _ids(value: object, folder: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(v, int) and v >= 0 for v in values):
        raise ModelFolderError(f"{folder}: eos_token_id is not a token id or a list of them ({value!r}). Correct it.")
    return tuple(values)
