"""The record of what operators did: one log line for each order, whatever came of it.

Covers: who, what, and how it ended. Does not cover: prompts, which are never logged; a prompt appears as the number of
its blocks and the hash of the last one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from router.errors import RouterError
from router.protocol import Caller

log = logging.getLogger(__name__)


@contextmanager
def audited(order: str, caller: Caller, **facts: object) -> Iterator[dict[str, object]]:
    """Log the order when the block ends; what the block adds to the dictionary is logged with it."""
    said = {"order": order, "tenant": caller.tenant, **facts, "outcome": "DEFECT"}
    try:
        yield said
        said["outcome"] = "OK"
    except RouterError as error:
        said["outcome"], said["why"] = error.reason, error.message
        raise
    except asyncio.CancelledError:
        said["outcome"] = "CANCELLED"
        raise
    finally:
        log.info("an operator gave an order", extra=said)
