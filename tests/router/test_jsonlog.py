"""Log lines: one JSON object each, with extras and the ids of the running request."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from router.jsonlog import log_as_json
from router.tracing import CURRENT_IDS, RequestIds

log = logging.getLogger("tests.jsonlog")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    text = io.StringIO()
    log_as_json("INFO", text)
    yield text
    root.handlers[:] = before
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_time_level_logger_message_and_extras(stream: io.StringIO) -> None:
    log.info("a worker %s", "joined", extra={"worker": "w0", "blocks": 7, "odd": {1}})
    log.debug("quiet")
    (line,) = lines(stream)
    assert str(line.pop("time")).endswith("+00:00")
    said = {"level": "INFO", "logger": "tests.jsonlog", "message": "a worker joined"}
    assert line == said | {"worker": "w0", "blocks": 7, "odd": "{1}"}


def test_text_of_strangers_cannot_forge_a_line(stream: io.StringIO) -> None:
    log.info('x"}\n{"level": "ERROR"', extra={"problem": "a\nb\u2028\ud800"})
    assert [line["level"] for line in lines(stream)] == ["INFO"]


def test_lines_within_a_request_carry_its_ids_and_others_do_not(stream: io.StringIO) -> None:
    token = CURRENT_IDS.set(RequestIds("r-1", "00-a"))
    log.info("within")
    log.info("of another", extra={"request_id": "r-2"})
    CURRENT_IDS.reset(token)
    log.info("without")
    within, other, without = lines(stream)
    assert (within["request_id"], within["traceparent"]) == ("r-1", "00-a")
    assert other["request_id"] == "r-2"
    assert "request_id" not in without


def test_exceptions_are_part_of_the_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("failed")
    (line,) = lines(stream)
    assert "ValueError: boom" in str(line["exception"])
