"""What K/V is stored as, and what a token of it takes. A check of `warmkv doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from deploy.finding import Finding
from deploy.model_shape import ModelShapeError, layout_of_config
from deploy.quantities import size_text
from deploy.settings import Settings
from kvstore.layout import UNQUANTISED


def check_kv(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """The K/V type and its size, where a model folder is named and its config.json says enough."""
    if settings.model.dir is None:
        return
    stored = settings.engine.kv_dtype
    try:
        config = json.loads((Path(settings.model.dir) / "config.json").read_text(encoding="utf-8"))
        layout = layout_of_config(config, dtype=settings.model.dtype, kv_dtype=stored)
    except ModelShapeError:
        what = "as the model computes it" if stored == UNQUANTISED else f"as {stored}"
        yield Finding("ok", "kv", f"stored {what}; the workers will know how large a token of it is")
        return
    except (OSError, ValueError):  # told by the check of the model folder
        return
    nbytes = f"{size_text(layout.token_nbytes)} a token"
    if not layout.quantised:
        yield Finding("ok", "kv", f"{layout.dtype}, {nbytes}")
        return
    plain = replace(layout, kv_dtype=UNQUANTISED)
    yield Finding("ok", "kv", f"{stored}, {nbytes}; {size_text(plain.token_nbytes)} as {layout.dtype}")
