"""Rotary positions whose frequencies depend on the lengths at hand, which stored K/V must not.

transformers scales two kinds of rotary embedding by the largest position of a forward: `longrope` has one set of
frequencies up to a length and another beyond, `dynamic` stretches them with the length. A forward of ours is a packed
step of many sequences, and its K/V outlive it: a short prompt beside a long one would get other K than alone, under the
same name. Up to the length that the weights were first trained for nothing is scaled, so up to there both are served.
"""

from __future__ import annotations

from typing import Any

_HELD = "default"  # a kind that transformers leaves alone in the forward; the frequencies were made before
_OTHER = "choose a model whose positions are scaled by a constant (llama3, yarn) or not at all"


def changing_positions(config: Any, context_length: int | None) -> str | None:
    """Why a model of this text config must not be given sequences so long, and what to do; None: it may.

    `context_length`: tokens; None: as many as it was made for.
    """
    made_for = getattr(config, "max_position_embeddings", None)
    longest = context_length or made_for
    for kind, constant in _constant_up_to(config):
        if constant is None:
            return f"{config.model_type}: its config.json does not say from which length on {kind} scales; {_OTHER}"
        if longest is None or longest > constant:
            return (
                f"{config.model_type}: beyond {constant} tokens its positions ({kind}) are scaled by the longest"
                " sequence of a step, so that what is stored would depend on what else was computed; set"
                f" model.context_length to at most {constant}, or {_OTHER}"
            )
    return None


def hold_positions(model: Any) -> None:
    """Keep a model's rotary frequencies as they were made, for a model that `changing_positions` allows.

    They would stay so in any case. But transformers looks at the positions of each forward to find out, for which the
    host waits for the device; and no such forward can be captured.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            module.rope_type = {layer: _held(kind) for layer, kind in kinds.items()}
        elif isinstance(kinds, str):
            module.rope_type = _held(kinds)


def _held(kind: str) -> str:
    return _HELD if _is_scaled_by_length(kind) else kind


def _is_scaled_by_length(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _constant_up_to(config: Any) -> list[tuple[str, int | None]]:
    """Kinds that are scaled by the length, and the length up to which they are not; None: it is not told."""
    given = getattr(config, "rope_parameters", None) or {}
    each = [given, *(value for value in given.values() if isinstance(value, dict))]  # some have one for a kind of layer
    found = []
    for parameters in each:
        kind = str(parameters.get("rope_type", _HELD))
        if not _is_scaled_by_length(kind):
            continue
        length = getattr(config, "max_position_embeddings", None)
        if kind == "longrope":
            beside = getattr(config, "original_max_position_embeddings", None)
            length = parameters.get("original_max_position_embeddings", beside)
        found.append((kind, length))
    return found
