"""Request ids and W3C trace contexts: which are taken, what is made otherwise."""

import pytest

from router.tracing import take_ids

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def counted(length: int) -> str:
    return "ab" * length


@pytest.mark.parametrize("request_id", ["a", "A-Z_0.9:/+=@", "x" * 128])
def test_well_formed_request_ids_are_taken(request_id: str) -> None:
    assert take_ids(request_id, None, new_hex=counted).request_id == request_id


@pytest.mark.parametrize("request_id", [None, "", "a b", "a\n", "é", "x" * 129, '"', "\x1b[31m"])
def test_other_request_ids_are_replaced(request_id: str | None) -> None:
    assert take_ids(request_id, None, new_hex=counted).request_id == "ab" * 16


@pytest.mark.parametrize("traceparent", [GOOD, GOOD[:-2] + "00", "cc" + GOOD[2:], "01" + GOOD[2:] + "-what.ever"])
def test_well_formed_trace_contexts_are_taken(traceparent: str) -> None:
    assert take_ids(None, traceparent).traceparent == traceparent


@pytest.mark.parametrize(
    "traceparent",
    [
        None,
        "",
        GOOD.upper(),
        "ff" + GOOD[2:],
        GOOD + "-more",
        GOOD + "0",
        "00-" + "0" * 32 + GOOD[35:],
        GOOD[:36] + "0" * 16 + "-01",
        "01" + GOOD[2:] + "-" + "x" * 300,
        GOOD + "\n",
    ],
)
def test_other_trace_contexts_are_replaced_by_valid_ones(traceparent: str | None) -> None:
    made = take_ids(None, traceparent).traceparent
    assert made != traceparent
    assert take_ids(None, made).traceparent == made
