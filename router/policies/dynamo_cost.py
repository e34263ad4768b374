"""`dynamo_cost`: fewest blocks to compute and to keep, each tier's blocks counted off by a credit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.policies.protocol import Candidate, Decision, RouteRequest, Term, Weight
from router.policies.ties import hit_reason, only, quietest


class DynamoCost:
    """The linear cost of NVIDIA Dynamo's KV router 1.6 in our words, with its defaults, in blocks; the least wins.

        cost   = prefill * max(0, pending + prompt - credit) + active + requests * active requests
        credit = device_credit * device + host_credit * host + disk_credit * disk + shared_credit * shared

    `pending`: blocks of prompts still to be computed on the worker. `active`: different blocks in use by requests in
    flight there, this one among them. In `credit` each leading block counts once, where it lies fastest. Ties go to the
    quietest worker, where the original draws one. `active` counts the requests of this router alone, as there without
    replica sync; `pending` those of all routers. Left out, as they are off there by default: the softmax over costs
    (its temperature is 0: the least cost wins), the credit's decay under load, the credit for blocks that are on their
    way, and the filters by busyness.
    """

    name = "dynamo_cost"
    help = "Dynamo's rule: fewest blocks to compute, less a credit for those that are held, plus blocks in use."
    weights: tuple[Weight, ...] = (
        Weight("prefill", 1.0, 0.0, 100, "", "Weight of blocks to compute against blocks in use."),
        Weight("device_credit", 1.0, 0.0, 10, "blocks", "Taken off for each leading block on the device."),
        Weight("host_credit", 0.75, 0.0, 10, "blocks", "Taken off for each further one in host RAM."),
        Weight("disk_credit", 0.25, 0.0, 10, "blocks", "Taken off for each further one on disk."),
        Weight("shared_credit", 0.5, 0.0, 10, "blocks", "Taken off for each further one in the shared tier."),
        Weight("requests", 0.0, 0.0, 10_000, "blocks", "Charged for each active request."),
    )
    predicts = False
    counts_blocks = True
    cost_unit = "blocks"

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The least cost."""
        costs = tuple(_cost(request, c, w) for c in candidates)
        least = min(costs)
        chosen = quietest(request, (c for c, cost in zip(candidates, costs, strict=True) if cost == least))
        most = max(_credit(c, w) for c in candidates)
        return Decision(chosen, only(candidates) or hit_reason(_credit(chosen, w), most), costs)

    def terms(
        self, request: RouteRequest, candidates: Sequence[Candidate], candidate: Candidate, w: Mapping[str, float]
    ) -> tuple[Term, ...]:
        """None: its costs are no milliseconds."""
        return ()


def _cost(request: RouteRequest, c: Candidate, w: Mapping[str, float]) -> float:
    to_compute = c.blocks.pending + request.prompt_tokens / request.block_size - _credit(c, w)
    return w["prefill"] * max(0.0, to_compute) + c.blocks.active + w["requests"] * c.active


def _credit(c: Candidate, w: Mapping[str, float]) -> float:
    """Blocks: `Overlap` counts from the fastest tier on, so a tier's own are what it adds."""
    device, host, disk, shared = c.overlap
    return (
        w["device_credit"] * device
        + w["host_credit"] * (host - device)
        + w["disk_credit"] * (disk - host)
        + w["shared_credit"] * (shared - disk)
    )
