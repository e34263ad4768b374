"""A Hugging Face model folder, seen as files: what is in it, whether it is whole, and its fingerprint.

Covers: config.json, safetensors weights, end tokens, the tokenizer's digest. Does not cover: what the model computes
(`models`). Knows neither transformers nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HASH_THREADS = 4
_FINGERPRINT_RULES = b"warmkv model fingerprint 1\0"


class ModelFolderError(ValueError):
    """The folder is missing, incomplete or damaged. The message ends with what to do."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that was found whole.

    Attributes:
        config: config.json. weight_files: sorted by name.
        eos_token_ids: of generation_config.json, else of config.json.
        tokenizer_sha256: of tokenizer.json, 32 bytes.
    """

    path: Path
    config: Mapping[str, Any]
    weight_files: tuple[Path, ...]
    eos_token_ids: tuple[int, ...]
    tokenizer_sha256: bytes

    @property
    def tokenizer_file(self) -> Path:
        """Its tokenizer.json."""
        return self.path / "tokenizer.json"

    def fingerprint(self) -> bytes:
        """SHA-256 over the digests of config.json and every weight file, 32 bytes.

        Covers every byte that decides what the model computes; neither path nor time. Two folders with one
        fingerprint can share blocks.

        Raises:
            ModelFolderError: a file cannot be read.
        """
        files = [self.path / "config.json", *self.weight_files]
        try:
            with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="fingerprint") as pool:
                digests = list(pool.map(_sha256, files))
        except OSError as error:
            raise ModelFolderError(
                f"{error.filename} cannot be read ({error.strerror}); check its permissions"
            ) from error
        total = hashlib.sha256(_FINGERPRINT_RULES)
        for file, digest in zip(files, digests, strict=True):
            total.update(file.name.encode() + b"\0" + digest)
        return total.digest()


def open_model_folder(path: str | Path) -> ModelFolder:
    """Look the folder over: every file that is needed is there and whole.

    Raises:
        ModelFolderError: it is not; says which file and what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder} is not a folder; give the path of a downloaded Hugging Face model folder")
    config = _read_json(folder / "config.json")
    weights = _weight_files(folder)
    for file in weights:
        _check_weights(file)
    return ModelFolder(
        path=folder,
        config=config,
        weight_files=weights,
        eos_token_ids=_end_tokens(folder, config),
        tokenizer_sha256=_tokenizer_digest(folder / "tokenizer.json"),
    )


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelFolderError(f"{file} is missing; copy the whole model folder") from None
    except OSError as error:
        raise ModelFolderError(f"{file} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{file} holds no JSON object; fetch it again")
    return content


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        raise ModelFolderError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; copy the whole folder, or convert pickled weights "
            "(pytorch_model.bin), which are not loaded because they can run code, with save_pretrained"
        )
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelFolderError(f"{folder / INDEX} has no weight_map; fetch it again")
    return tuple(folder / name for name in sorted(set(shards.values())))


def _check_weights(file: Path) -> None:
    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except FileNotFoundError:
        raise ModelFolderError(f"{file} is missing; copy the whole model folder") from None
    except OSError as error:
        raise ModelFolderError(f"{file} cannot be read ({error}); check its permissions") from error
    except SafetensorError as error:
        raise ModelFolderError(f"{file} is damaged or cut short ({error}); fetch it again") from error


def _end_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    found = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    if found is None:
        found = config.get("eos_token_id")
    if found is None and isinstance(text := config.get("text_config"), dict):
        found = text.get("eos_token_id")
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise ModelFolderError(f"eos_token_id of {folder} is {found!r}; make it a token id or a list of them")
    return tuple(tokens)


def _tokenizer_digest(file: Path) -> bytes:
    try:
        return _sha256(file)
    except FileNotFoundError:
        raise ModelFolderError(
            f"{file} is missing; save the model's fast tokenizer into the folder (AutoTokenizer, save_pretrained)"
        ) from None
    except OSError as error:
        raise ModelFolderError(f"{file} cannot be read ({error.strerror}); check its permissions") from error


def _sha256(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
