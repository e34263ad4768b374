"""The fleet secret of fleets that were given none: made once, kept in the state folder, outlives `warmkv down`.

Covers: making, keeping and reading it. Tenants' chains of block hashes are salted by it, so a fleet finds the blocks on
disk and in Redis again only with the secret under which they were written. Does not cover: a secret that the settings
name (`auth.fleet_secret`), which is used instead and is never written here.
"""

from __future__ import annotations

import logging
import re
import secrets
import stat
from pathlib import Path

from deploy.state import StateProblem, locked, write_private

log = logging.getLogger(__name__)

FILE = "fleet-secret"
_FORM = re.compile(r"[0-9a-f]{64}\n?")
_REMEDY = (
    "put back a copy of it, or remove it: the next start makes another one, under which the blocks on disk and in "
    "Redis are not found and are dropped over time"
)


def kept_secret(state_dir: Path) -> str | None:
    """The secret that is kept there; None: none is.

    Raises:
        StateProblem: it cannot be read, or it is not what was written.
    """
    path = state_dir / FILE
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            log.warning("the fleet secret can be read by other users; run chmod 600", extra={"path": str(path)})
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StateProblem(f"the fleet secret {path} cannot be read ({error}); {_REMEDY}") from error
    if not _FORM.fullmatch(text):  # what it holds is not shown: it may be most of a secret
        raise StateProblem(f"the fleet secret {path} is damaged: it is not 64 hexadecimal digits; {_REMEDY}")
    return text.strip()


def keep_secret(state_dir: Path) -> str:
    """The secret that is kept there, made now where none is.

    Raises:
        StateProblem: as `kept_secret`, or the folder cannot be written.
    """
    with locked(state_dir):
        kept = kept_secret(state_dir)
        if kept is None:
            kept = secrets.token_hex(32)
            write_private(state_dir / FILE, kept + "\n")
        return kept
