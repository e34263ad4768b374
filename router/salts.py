"""What tells one trust group's blocks from another's: the salt that its chains begin with.

Routers hash with it, and `deploy` tells workers the salts of tenants that have quotas. It comes from the fleet's
secret, so that no client can name another's blocks.
"""

from __future__ import annotations

import hashlib
import hmac


def group_salt(fleet_secret: str, trust_group: str) -> bytes:
    """The salt of a trust group, 32 bytes; the same in every router of a fleet."""
    return hmac.new(fleet_secret.encode(), trust_group.encode(), hashlib.sha256).digest()
