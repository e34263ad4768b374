"""What commands print: texts for people, JSON for programs. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from google.protobuf.json_format import MessageToDict

from deploy.layers import Row
from warmkv import versions
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from deploy.finding import Finding
    from warmkv.stream import Generation, Sample

FATES = ("device", "host", "disk", "redis", "peer", "computed")
_UNHEALTHY = {
    admin_pb2.WORKER_STATE_SUSPECT,
    admin_pb2.WORKER_STATE_LOST,
    admin_pb2.WORKER_STATE_REFUSED,
}
_MIB = 1 << 20


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two blanks between them."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def message_json(message: Message) -> str:
    """A message in protobuf's JSON form, with the field names of the contract; 64-bit numbers are texts there."""
    fields = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps(fields, ensure_ascii=False)


def settings_text(rows: Sequence[Row], *, explain: bool) -> str:
    """One line a setting."""
    header = ("setting", "value", "origin", *(("meaning",) if explain else ()))
    return table(header, ((r.key, r.value, r.origin, *((r.help,) if explain else ())) for r in rows))


def settings_json(rows: Sequence[Row]) -> str:
    """An object by setting."""
    return json.dumps({row.key: {"value": row.value, "origin": row.origin, "help": row.help} for row in rows})


def findings_text(findings: Sequence[Finding]) -> str:
    """One line a finding, and below it what to do."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<5} {finding.check:<12} {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<18} -> {finding.remedy}")
    return "\n".join(lines)


def findings_json(findings: Sequence[Finding]) -> str:
    """A list under `findings`."""
    keys = ("level", "check", "found", "remedy")
    return json.dumps({"findings": [{key: getattr(finding, key) for key in keys} for finding in findings]})


def is_healthy(stats: admin_pb2.WatchStatsResponse) -> bool:
    """Whether a worker is ready, and none is lost, silent or refused."""
    states = [worker.state for worker in stats.workers]
    return admin_pb2.WORKER_STATE_READY in states and not _UNHEALTHY & set(states)


def status_text(stats: admin_pb2.WatchStatsResponse) -> str:
    """The fleet at a glance."""
    header: tuple[str, ...] = ("worker", "state", "address", "run", "wait", "ms/1k prefill", "tiers")
    rows = [_worker_row(worker) for worker in stats.workers]
    if any(worker.role not in ("", "both") for worker in stats.workers):
        header = ("worker", "role", *header[1:])
        rows = [(row[0], worker.role or "-", *row[1:]) for row, worker in zip(rows, stats.workers, strict=True)]
    if any(worker.ranks > 1 for worker in stats.workers):
        header = (*header[:-1], "ranks", header[-1])
        rows = [(*row[:-1], _ranks(worker), row[-1]) for row, worker in zip(rows, stats.workers, strict=True)]
    parts = [table(header, rows)] if stats.workers else ["no workers"]
    parts += [f"{worker.name}: {worker.problem}" for worker in stats.workers if worker.problem]
    parts += [f"{worker.name}: {doubt}" for worker in stats.workers if (doubt := _doubt(worker.index))]
    parts += [note for worker in stats.workers if (note := _older(worker))]
    if stats.catching_up:
        parts.append(f"this router is catching up: it waits for what {', '.join(stats.catching_up)} hold")
    parts.append("")
    if layouts := sorted({worker.layout for worker in stats.workers if worker.layout}):
        parts.append(f"K/V        {'; '.join(layouts)}")
    if exact := [worker.name for worker in stats.workers if worker.deterministic]:
        joined = sum(worker.ranks > 0 for worker in stats.workers)
        parts.append("mode       deterministic" + ("" if len(exact) == joined else f" on {', '.join(exact)} only"))
    parts.append(f"policy     {stats.policy.name} {weights_text(stats.policy.weights)}".rstrip())
    parts.append(f"prompts    {fates_text(stats.prompt_tokens)}")
    reads = "on" if stats.shared_tier_reads else "off"
    shared = stats.shared_tier  # a fleet that has none says nothing of its health
    state = _cut_off(shared) if shared.capacity_bytes or shared.blocks else ""
    if known := _audit_text([worker.index for worker in stats.workers]):
        parts.append(f"index      {known}")
    parts.append(f"shared     {_tier_text(shared)}{state}; reads {reads}")
    ttft = stats.ttft
    if ttft.count:
        window = f"the last {stats.window_seconds:g} s, {ttft.count} requests"
        parts.append(f"TTFT       p50 {ttft.p50_ms:.0f} ms, p95 {ttft.p95_ms:.0f} ms ({window})")
    parts += _together_lines(stats)
    done = ", ".join(f"{count} {code}" for code, count in sorted(stats.requests.items())) or "none yet"
    waiting = f", {stats.queued} of them waiting in the router" if stats.queued else ""
    parts.append(f"requests   {done}; {stats.in_flight} in flight{waiting}")
    if stats.refused:
        parts.append("refused    " + ", ".join(f"{n} by {limit}" for limit, n in sorted(stats.refused.items())))
    return "\n".join(parts)


def _together_lines(stats: admin_pb2.WatchStatsResponse) -> list[str]:
    """What workers did for one another; empty where nothing was."""
    lines = []
    if begun := sum(stats.prefill_jobs.values()):
        rest = ", ".join(f"{n} {outcome}" for outcome, n in sorted(stats.prefill_jobs.items()) if outcome != "done")
        lines.append(f"pairs      {stats.prefill_jobs.get('done', 0)} of {begun} prompts prefilled for another worker")
        lines[-1] += f" ({rest})" if rest else ""
    if moved := sum(stats.handovers.values()):
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(stats.handovers.items()))
        lines.append(f"handovers  {moved} ({why})")
        pause = stats.handover_pause
        lines[-1] += f"; pause p50 {pause.p50_ms:.0f} ms, p99 {pause.p99_ms:.0f} ms" if pause.count else ""
    return lines


def fates_text(fates: common_pb2.TokensByFate | admin_pb2.TokensByFate64) -> str:
    """`75 % of 400 tokens cached (device 200, redis 100)`."""
    counts = {fate: getattr(fates, fate) for fate in FATES}
    total = sum(counts.values())
    if not total:
        return "none yet"
    where = ", ".join(f"{fate} {count}" for fate, count in counts.items() if count and fate != "computed")
    share = 1 - counts["computed"] / total
    return f"{share:.0%} of {total} tokens cached" + (f" ({where})" if where else "")


def weights_text(weights: Mapping[str, float]) -> str:
    """`load=2 tie_ms=5`."""
    return " ".join(f"{name}={number_text(value)}" for name, value in sorted(weights.items()))


def number_text(value: float) -> str:
    """Whole numbers in full, others with six digits."""
    return str(int(value)) if value == int(value) else f"{value:g}"


def policy_text(answer: admin_pb2.GetPolicyResponse) -> str:
    """The policy in force, then every policy with its weights."""
    lines = [f"in force: {answer.policy.name} {weights_text(answer.policy.weights)}".rstrip()]
    lines.append(f"workers read from the shared tier: {'yes' if answer.shared_tier_reads else 'no'}")
    for policy in answer.available:
        lines += ["", policy.name, f"  {policy.help}"]
        for w in policy.weights:
            default, least, most = (number_text(value) for value in (w.default_value, w.min, w.max))
            limits = f"{default}{' ' + w.unit if w.unit else ''}, from {least} to {most}"
            now = number_text(answer.policy.weights.get(w.name, w.default_value))
            lines.append(f"  --weight {w.name}={now}  ({limits}) {w.help}")
    return "\n".join(lines)


def generation_text(stream: Generation) -> str:
    """One line: cache, length, route."""
    usage, route = stream.usage, stream.route
    waited = f", {route.router_wait_ms:.0f} of it in the router's queue" if route.router_wait_ms else ""
    predicted = f", predicted {route.predicted_ttft_ms:.0f}" if route.predicted_ttft_ms else ""
    prefilled = f", prefilled by {route.prefill_worker}" if route.prefill_worker else ""
    moved = f", handed over {route.handovers} times" if route.handovers > 1 else ", handed over" * route.handovers
    return (
        f"[{fates_text(usage.prompt_tokens_by_fate)}; {usage.completion_tokens} generated, {_ends(stream)}; "
        f"{route.worker} because {route.reason}{prefilled}{moved}; "
        f"first token after {route.ttft_ms:.0f} ms{waited}{predicted}]"
    )


def _ends(stream: Generation) -> str:
    """Why the answers ended, each reason once."""
    return "/".join(dict.fromkeys(str(sample.finish_reason) for sample in stream.samples))


def generation_json(stream: Generation) -> str:
    """The whole answer, or all of them."""
    whole: dict[str, object] = _sample_plain(stream.samples[0])
    whole["usage"] = json.loads(message_json(stream.usage))
    whole["route"] = json.loads(message_json(stream.route))
    if len(stream.samples) > 1:
        whole["samples"] = [_sample_plain(sample) for sample in stream.samples]
    return json.dumps(whole, ensure_ascii=False)


def _sample_plain(sample: Sample) -> dict[str, object]:
    plain: dict[str, object] = {
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
    }
    if sample.logprobs:
        plain["logprobs"] = [json.loads(message_json(each)) for each in sample.logprobs]
    return plain


def explain_text(answer: inference_pb2.ExplainResponse) -> str:
    """The decision, the candidates, the first missing block."""
    lines = [f"{answer.prompt_tokens} tokens, {answer.blocks} full blocks of {answer.block_size}"]
    lines.append(f"policy {answer.policy} {weights_text(answer.weights)}".rstrip())
    chosen = f"{answer.worker}, because {answer.reason}" if answer.worker else "nobody: no worker takes requests"
    waits = f", after about {answer.router_wait_ms:.0f} ms in the router's queue" if answer.router_wait_ms else ""
    lines.append(f"would go to {chosen}{waits}")
    if answer.prefill_worker:
        lines.append(
            f"prefilled by {answer.prefill_worker}: {answer.pair_cost_ms:.0f} ms for both and those whom they delay, "
            f"{answer.alone_cost_ms:.0f} alone"
        )
    lines.append("")
    header = ("worker", "cached", f"cost {answer.cost_unit}".rstrip(), "TTFT ms", "terms", "")
    lines.append(table(header, (_candidate_row(candidate) for candidate in answer.candidates)))
    if answer.HasField("miss"):
        lines += ["", f"first missing block: {answer.miss.block} ({answer.miss.reason}) {answer.miss.detail}".rstrip()]
    return "\n".join(lines)


def tier_name(tier: int) -> str:
    """`device`, `host`, ..."""
    return common_pb2.Tier.Name(common_pb2.Tier.ValueType(tier)).removeprefix("TIER_").lower()


def _worker_row(worker: admin_pb2.WorkerInfo) -> tuple[str, ...]:
    state = admin_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
    tiers = "  ".join(f"{tier_name(tier.tier)} {_tier_text(tier)}{_cut_off(tier)}" for tier in worker.tiers)
    prefill = f"{worker.prefill_ms_per_1k:.0f}" if worker.prefill_ms_per_1k else "-"
    return worker.name, state, worker.address, str(worker.running), str(worker.waiting), prefill, tiers


def _ranks(worker: admin_pb2.WorkerInfo) -> str:
    return str(worker.ranks) if worker.ranks else "-"


def _doubt(trust: admin_pb2.IndexTrust) -> str:
    """Why what a worker is believed to hold counts less; empty: it does not."""
    return f"suspect: {trust.suspect}; its blocks count {trust.credit:.0%}" if trust.suspect else ""


def _older(worker: admin_pb2.WorkerInfo) -> str:
    """What a worker of the version before cannot do; empty: it is not one."""
    if not 0 < worker.protocol_version < versions.NEWEST:
        return ""
    return (
        f"{worker.name}: runs warmkv {worker.package_version}, which is older: it speaks protocol"
        f" {worker.protocol_version} and gets no request that needs {versions.NEWEST}"
    )


def _audit_text(trusts: Sequence[admin_pb2.IndexTrust]) -> str:
    """How the workers tell of their blocks, and the worst of what probes found; empty where there is nothing to say."""
    words = []
    if guessed := sum(trust.approximate for trust in trusts):
        words.append(f"{guessed} of {len(trusts)} workers send no events")
    figures = {
        name: [getattr(trust, name) for trust in trusts if trust.HasField(name)] for name in ("precision", "recall")
    }
    words += [f"{name} {min(known):.1%}" for name, known in figures.items() if known]
    probed = sum(trust.probed for trust in trusts)
    return ", ".join([*words, f"{probed} blocks probed"]) if words else ""


def _tier_text(tier: admin_pb2.TierUsage) -> str:
    used = f"{tier.used_bytes / _MIB:.0f}"
    return f"{used}/{tier.capacity_bytes / _MIB:.0f} MiB" if tier.capacity_bytes else f"{tier.blocks} blocks"


def _cut_off(tier: admin_pb2.TierUsage) -> str:
    return "" if tier.healthy else " (cut off)"


def _candidate_row(candidate: inference_pb2.Candidate) -> tuple[str, ...]:
    cached = ", ".join(
        f"{fate} {count}" for fate in FATES if fate != "computed" and (count := getattr(candidate.tokens, fate))
    )
    terms = " + ".join(f"{term.name} {term.ms:.1f}*{term.weight:.3g}" for term in candidate.terms)
    why = "; ".join(filter(None, ["" if candidate.eligible else candidate.excluded_because, _suspicion(candidate)]))
    if not candidate.eligible:  # it was not priced
        return candidate.worker, cached or "-", "-", "-", terms, why
    return candidate.worker, cached or "-", f"{candidate.cost:.1f}", f"{candidate.predicted_ttft_ms:.1f}", terms, why


def _suspicion(candidate: inference_pb2.Candidate) -> str:
    return f"suspect: {candidate.suspect}" if candidate.suspect else ""
