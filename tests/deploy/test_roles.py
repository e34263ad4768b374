"""Which worker has which role."""

from __future__ import annotations

import pytest

from deploy.sections import WorkersSettings
from workers.config import WorkerConfig
from workers.roles import Role, parse_roles, role_of


def test_workers_have_roles_in_the_order_of_their_numbers() -> None:
    told = "prefill=1, decode=2"
    assert [role_of(f"w{n}", told) for n in range(5)] == ["prefill", "decode", "decode", "both", "both"]
    assert role_of("w10", "both=10,decode=1") is Role.DECODE
    assert role_of("alone", told) is Role.BOTH
    assert role_of("w0", "") is Role.BOTH
    assert WorkerConfig("w1", "", "", roles=told).role is Role.DECODE


@pytest.mark.parametrize("text", ["prefill", "prefill=", "decode=-1", "prefil=2", "prefill=1,,decode=1"])
def test_what_is_no_list_of_roles_is_refused_with_how_to_write_it(text: str) -> None:
    with pytest.raises(ValueError, match="write them as prefill=2,decode=6"):
        parse_roles(text)
    with pytest.raises(ValueError, match="prefill=2,decode=6"):
        WorkersSettings(roles=text)
