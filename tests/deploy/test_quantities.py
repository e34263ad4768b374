"""Sizes and durations: what people write is what they mean, and writing it out again loses nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.quantities import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2GB", 2_000_000_000), ("4096", 4096), ("0", 0), ("7b", 7), (9, 9)],
)
def test_a_size_is_read_with_its_unit(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1.5", "12 parsecs", "1e9", True, None, 1.5, "2048PiB", "99999999TiB"]
)
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30m", 1800), ("1h30m", 5400), ("250ms", 0.25), ("2.5s", 2.5), ("1d", 86400), (12, 12), (0.5, 0.5)],
)
def test_a_duration_is_read_with_its_units(text: object, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "30", "m", "-1s", "1h 30m", "1y", float("nan"), -1, True, None, "99999999d"])
def test_what_is_no_duration_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="30m"):
        parse_duration(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_every_size_survives_writing_and_reading(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(min_value=0, max_value=10**12))
def test_every_duration_of_whole_milliseconds_survives_writing_and_reading(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


@given(st.floats(min_value=1e-6, max_value=1e6))
def test_finer_durations_survive_to_a_nanosecond(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-9)


def test_sizes_and_durations_are_written_as_people_would() -> None:
    assert [format_size(n) for n in (1 << 30, 3 << 29, 1000, 0)] == ["1GiB", "1536MiB", "1000B", "0B"]
    assert [format_duration(s) for s in (3600, 5400, 0.25, 0, 0.0001)] == ["1h", "1h30m", "250ms", "0s", "0.0001s"]
