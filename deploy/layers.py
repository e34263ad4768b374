"""Where settings come from: defaults, a TOML file, the environment, flags; each beats those before it.

Covers: reading the sources, merging them, remembering who set what, and errors that say where to correct what. The
sources are read by pydantic-settings; merging is ours because `warmkv config show` must name each value's origin.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError, TomlConfigSettingsSource

from deploy.settings import Settings
from kvstore.redis.address import mask_url

_MASK = "***"
_PREFIX, _DELIMITER = "WARMKV_", "__"


class Origin(StrEnum):
    """Who set a value."""

    DEFAULT = "default"
    FILE = "file"
    ENV = "env"
    FLAG = "flag"


class SettingsProblem(ValueError):
    """A setting is wrong. The message names it, where it was set, and what to write."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of `warmkv config show`; secrets are masked."""

    key: str
    value: str
    origin: Origin
    help: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and which layer set each key that is not a default."""

    settings: Settings
    origins: Mapping[str, Origin]

    def origin(self, key: str) -> Origin:
        """Who set `section.field`."""
        return self.origins.get(key, Origin.DEFAULT)

    def rows(self) -> list[Row]:
        """Every setting, in the order of the model."""
        return list(_rows(self))


def load_settings(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Loaded:
    """Read all layers.

    Args:
        file: TOML with a table for each section. environ: None: the process's. flags: values by `section.field`;
        those that are None were not given.

    Raises:
        SettingsProblem: a file is missing or broken, a key is unknown, a value is wrong.
    """
    layers = {
        Origin.FILE: {} if file is None else _read_file(file),
        Origin.ENV: _read_environment(os.environ if environ is None else environ),
        Origin.FLAG: _read_flags(flags or {}),
    }
    origins = {key: origin for origin, layer in layers.items() for key in _keys(layer)}
    merged: dict[str, Any] = {}
    for layer in layers.values():
        for section, values in layer.items():
            merged[section] = {**merged.get(section, {}), **_nones(values)} if isinstance(values, dict) else values
    try:
        return Loaded(Settings(**merged), origins)
    except ValidationError as error:
        raise SettingsProblem(_explain(error, origins, file)) from error


def known_keys() -> list[str]:
    """Every `section.field`."""
    return [f"{section}.{name}" for section, model in _sections() for name in model.model_fields]


def parse_assignments(texts: list[str]) -> dict[str, str]:
    """Flags from `section.field=value` texts.

    Raises:
        SettingsProblem: one has another form.
    """
    flags: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise SettingsProblem(f"--set {text}: write it as section.field=value, for example store.host_bytes=4GiB")
        flags[key.strip()] = value
    return flags


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsProblem(f"{path} is no file; give --config the path of a TOML file, or leave it out")
    try:
        return dict(TomlConfigSettingsSource(Settings, path).toml_data)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsProblem(f"{path} is not valid TOML ({error}); correct it") from error


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Variables of the form WARMKV_SECTION__FIELD; those without `__` belong to the command line's options."""
    own = {name: value for name, value in environ.items() if name.startswith(_PREFIX) and _DELIMITER in name}
    sections = {section for section, _ in _sections()}
    for name in own:
        section, _, field = name.removeprefix(_PREFIX).lower().partition(_DELIMITER)
        if section not in sections:
            raise SettingsProblem(f"{name}: there is no setting {section}.{field}{_nearest(f'{section}.{field}')}")
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in own.items()}
    try:
        return source()
    except SettingsError as error:
        raise SettingsProblem(
            f'the environment holds a table that is no JSON ({error}); write it like {{"load": 2.0}}'
        ) from error


def _read_flags(flags: Mapping[str, object]) -> dict[str, Any]:
    """Texts of tables are read as TOML."""
    layer: dict[str, Any] = {}
    for key, value in flags.items():
        if value is None:
            continue
        section, _, field = key.partition(".")
        layer.setdefault(section, {})[field] = _flag_value(value)
    return layer


def _flag_value(value: object) -> object:
    if isinstance(value, str) and value.startswith("{"):
        try:
            return tomllib.loads(f"value = {value}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise SettingsProblem(f"{value} is no TOML table ({error}); write it like {{load = 2.0}}") from error
    return value


def _nones(values: Mapping[str, Any]) -> dict[str, Any]:
    """The word `none` means no value in every source: TOML and the environment have no other way to say it."""
    return {name: None if value == "none" else value for name, value in values.items()}


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, field.annotation


def _keys(layer: Mapping[str, Any]) -> Iterator[str]:
    for section, values in layer.items():
        for field in values if isinstance(values, dict) else ():
            yield f"{section}.{field}"


def _explain(error: ValidationError, origins: Mapping[str, Origin], file: Path | None) -> str:
    return "; ".join(_explain_one(each, origins, file) for each in error.errors(include_url=False))


def _explain_one(each: Any, origins: Mapping[str, Origin], file: Path | None) -> str:
    key = ".".join(str(part) for part in each["loc"][:2])
    origin = next((origins[name] for name in origins if name == key or name.startswith(f"{key}.")), Origin.FILE)
    where = str(file) if origin is Origin.FILE and file is not None else f"set by {origin}"
    if len(each["loc"]) < 2 and each["type"] != "extra_forbidden":  # a rule over a whole section, or no table
        return f"{each['msg'].removeprefix('Value error, ')} [section {key}]; see: warmkv config show"
    if each["type"] == "extra_forbidden":
        return f"there is no setting {key} ({where}){_nearest(key)}"
    said = each["msg"].removeprefix("Value error, ")
    # A secret must not reach a log through its own error message.
    shown = "" if key in ("redis.url", "auth.fleet_secret") else f" (was {each['input']!r})"
    return (
        f"{key}: {said}{shown if shown and repr(each['input']) not in said else ''} [{where}]; see: warmkv config show"
    )


def _nearest(key: str) -> str:
    found = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else "; see: warmkv config show"


def _rows(loaded: Loaded) -> Iterator[Row]:
    for section, model in _sections():
        values = getattr(loaded.settings, section)
        dumped = values.model_dump(mode="json")
        for name, field in model.model_fields.items():
            key = f"{section}.{name}"
            value = _shown(getattr(values, name), dumped[name])
            yield Row(key, value, loaded.origin(key), field.description or "")


def _shown(value: object, dumped: object) -> str:
    if isinstance(value, SecretStr):
        text = value.get_secret_value()
        return mask_url(text) if "://" in text else _MASK
    if dumped is None:
        return "none"
    return str(dumped).lower() if isinstance(dumped, bool) else str(dumped)
