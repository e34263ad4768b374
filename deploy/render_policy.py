"""The policy's past and its shadow, as text and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from google.protobuf.json_format import MessageToDict

from deploy.render import number_text, table, weights_text
from warmkv.v1 import admin_pb2, common_pb2

_MOVED = 8


def history_text(answer: admin_pb2.GetPolicyResponse) -> str:
    """A line a change, the newest first."""
    if not answer.changes:
        return "the policy was not changed yet; it is as the settings have it"
    header = ("version", "when (UTC)", "by", "router", "order", "from", "to")
    return table(header, (_change_row(change) for change in answer.changes))


def history_json(answer: admin_pb2.GetPolicyResponse) -> str:
    """A list under `changes`."""
    changes: list[dict[str, Any]] = [
        MessageToDict(change, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for change in answer.changes
    ]
    return json.dumps({"changes": changes})


def shadow_text(answer: admin_pb2.GetPolicyResponse) -> str:
    """What the shadow would have done beside what was done."""
    report = answer.shadow
    if not report.policy.name:
        return "no policy scores beside the one in force; set one by `warmkv policy set NAME --shadow`"
    lines = [
        f"in force: {answer.policy.name} {weights_text(answer.policy.weights)}".rstrip(),
        f"shadow:   {report.policy.name} {weights_text(report.policy.weights)}".rstrip(),
    ]
    if not report.decisions:
        return "\n".join([*lines, "it has scored no request of this router yet"])
    share = report.same / report.decisions
    lines += [
        f"{report.decisions} requests since {_time(report.since_ms)}; {share:.1%} would have gone to the same worker",
        "",
        table(("", "predicted TTFT", "p99", "predicted hit", "requests by worker"), _side_rows(report)),
        "",
        "Each request is judged on its own, on the caches that the policy in force has made; `warmkv replay` of",
        "recorded traffic tells what another policy would make of them.",
    ]
    if report.moved:
        header = ("moved", "tokens", "went to", "TTFT", "would go to", "TTFT", "because")
        lines += ["", table(header, (_moved_row(moved) for moved in report.moved[:_MOVED]))]
    return "\n".join(lines)


def _side_rows(report: admin_pb2.ShadowReport) -> Iterator[tuple[str, ...]]:
    for name, side in (("in force", report.in_force), ("shadow", report.shadow)):
        workers = " ".join(f"{worker} {count}" for worker, count in sorted(side.workers.items()))
        yield (
            name,
            f"{side.predicted_ttft_ms:.1f} ms",
            f"{side.predicted_ttft_p99_ms:.1f} ms",
            f"{side.predicted_hit:.1%}",
            workers,
        )


def _moved_row(moved: admin_pb2.ShadowReport.Moved) -> tuple[str, ...]:
    return (
        moved.request_id[:12],
        str(moved.prompt_tokens),
        moved.worker,
        f"{moved.predicted_ttft_ms:.1f} ms",
        moved.shadow_worker,
        f"{moved.shadow_predicted_ttft_ms:.1f} ms",
        moved.shadow_reason,
    )


def _change_row(change: common_pb2.PolicyChange) -> tuple[str, ...]:
    before, after = getattr(change, "from"), change.to  # `from` is a word of Python's
    return (
        str(change.version),
        _time(change.time_ms),
        change.by or "-",
        change.router,
        change.order,
        _setting_text(before),
        _setting_text(after),
    )


def _setting_text(setting: common_pb2.PolicySetting) -> str:
    if not setting.name:
        return "none"
    weights = " ".join(f"{name}={number_text(value)}" for name, value in sorted(setting.weights.items()))
    reads = "" if setting.shared_tier_reads else " no-shared-tier-reads"
    return f"{setting.name} {weights}".rstrip() + reads


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
