"""How long blocks are to live, as people write it."""

from __future__ import annotations

import pytest

from deploy.failures import Failure
from deploy.lifetime_options import epoch_seconds, lifetime_options, whole_seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300), ("30m", 1800), ("1h", 3600), ("24h", 86400), ("1h30m", 5400), ("250ms", 1)]
)
def test_the_usual_durations_and_any_other_are_whole_seconds(text: str, seconds: int) -> None:
    assert whole_seconds("--ttl", text) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1800000000", 1_800_000_000), ("2027-01-15T08:00:00Z", 1_800_000_000), ("2027-01-15T09:00+01:00", 1_800_000_000)],
)
def test_a_time_is_read_in_its_zone(text: str, seconds: int) -> None:
    assert epoch_seconds("--expires-at", text) == seconds


@pytest.mark.parametrize("text", ["tomorrow", "", "-5", "2027-13-01", "1.5"])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(Failure, match="2027-01-31T18:00Z"):
        epoch_seconds("--expires-at", text)


@pytest.mark.parametrize("text", ["1950-01-01T00:00Z", "99999999999999999999999", "253402300800", "9" * 5000])
def test_a_time_that_no_message_can_hold_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(Failure, match="2027-01-31T18:00Z"):
        epoch_seconds("--expires-at", text)
    assert epoch_seconds("--expires-at", "9999-12-31T23:59:59Z") == 253_402_300_799


def test_only_what_was_given_is_sent() -> None:
    assert lifetime_options(None, None, None, fixed_ttl=False) == {}
    assert lifetime_options("5m", None, 0, fixed_ttl=True) == {"ttl": 300, "fixed_ttl": True, "keep_priority": 0}
    assert lifetime_options(None, "1800000000", None, fixed_ttl=False) == {"expires_at": 1_800_000_000}


@pytest.mark.parametrize(("ttl", "ends", "fixed"), [("5m", "1800000000", False), (None, None, True), (None, "9", True)])
def test_what_contradicts_itself_is_refused(ttl: str | None, ends: str | None, fixed: bool) -> None:
    with pytest.raises(Failure, match="--ttl"):
        lifetime_options(ttl, ends, None, fixed_ttl=fixed)
