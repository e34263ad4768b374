"""Tenants' shares of the local tiers, as workers take them: by the salt of their blocks.

A tenant is known by its keys, its blocks only by the salt of its trust group, which the router derives: workers know
neither names nor keys. Tenants of one trust group share their blocks, so they have their shares together.
"""

from __future__ import annotations

from collections import defaultdict

from deploy.layers import SettingsProblem
from deploy.settings import Settings


def group_shares(settings: Settings) -> dict[str, float]:
    """The share of each trust group that has one.

    Raises:
        SettingsProblem: a tenant has a share and no key. KeysFileError: the keys file cannot be used.
    """
    shares: defaultdict[str, float] = defaultdict(float)
    for tenant, share in settings.store.quotas.items():
        shares[_group(settings, tenant)] += share
    return dict(shares)


def salted_shares(settings: Settings, fleet_secret: str) -> dict[str, float]:
    """The same by the salt of its blocks, in hex.

    Raises:
        as `group_shares`.
    """
    from router.salts import group_salt

    return {group_salt(fleet_secret, group).hex(): share for group, share in group_shares(settings).items()}


def check_tenants(settings: Settings) -> None:
    """Look whether the tenants that have a weight or a token quota exist.

    Raises:
        as `group_shares`.
    """
    for name in ("tenant_weights", "tokens_per_minute"):
        for tenant in getattr(settings.router, name):
            _group(settings, tenant, f"router.{name} names {tenant!r}")


def _group(settings: Settings, tenant: str, said: str = "") -> str:
    from router.auth import ApiKeys

    auth, said = settings.auth, said or f"store.quotas gives {tenant!r} a share"
    if auth.api_keys_file is None:
        if tenant != auth.default_tenant:
            raise SettingsProblem(
                f"{said}, and without auth.api_keys_file every caller is the tenant "
                f"{auth.default_tenant!r}; name a keys file, or leave it out"
            )
        return tenant
    keys = ApiKeys(auth.api_keys_file)
    if tenant not in keys.tenants():
        raise SettingsProblem(
            f"{said}, and {auth.api_keys_file} has no key of that tenant; correct the name, or add its key first"
        )
    return keys.trust_group_of(tenant)
