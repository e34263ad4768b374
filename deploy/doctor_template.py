"""Does the model's chat template let a next turn find the blocks of the one before? A check of `warmkv doctor`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from deploy.finding import Finding
from deploy.settings import Settings
from router.template_check import Break, breaks, changes_with_time


def check_template(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Whether a chat's next turn finds the blocks of the one before, where a model folder is named."""
    from router.model_folder import ModelFolderError
    from router.tokenizer import PromptEncoder

    if settings.model.dir is None:
        return
    try:
        encoder = PromptEncoder.load(settings.model.dir)
        period = changes_with_time(Path(settings.model.dir))
    except ModelFolderError:  # told by the check of the model folder
        return
    if not encoder.has_template:
        yield Finding("ok", "template", "the model has none; chats are refused, texts and token ids are served")
        return
    found = asyncio.run(breaks(encoder))
    encoder.close()
    for broken in found:
        yield _template_finding(broken)
    if period:
        yield Finding(
            "warn",
            "template",
            f"it writes the time, so every prompt is a new one each {period}",
            "take strftime_now out of the chat template, or tell the time in the last message",
        )
    if not found and not period:
        yield Finding("ok", "template", "a chat's next turn begins with the one before, so its blocks are found")


def _template_finding(broken: Break) -> Finding:
    return Finding(
        "warn",
        "template",
        f"{broken.what}: turn {broken.turn} finds {broken.kept} of {broken.of} tokens of the turn before, since where"
        f" it had {broken.was!r} the template now writes {broken.now!r}",
        "use a chat template that only appends, where the model allows it; such turns are computed again from there",
    )
