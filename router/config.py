"""What a router is told when it starts. Built by `deploy` from the user's settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.index import DEFAULT_BYTES

# Up to 10 ms for each KiB is what compiling one takes a worker; larger schemas of real tools are rare.
DEFAULT_CONSTRAINT_BYTES = 16 << 10
# The library that parses them recurses over rules that name rules, and its threads' stacks hold this much.
MOST_CONSTRAINT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With `client_ca`, callers must present a certificate that it signed (mTLS)."""

    cert: str
    key: str
    client_ca: str | None = None


@dataclass(frozen=True, slots=True)
class OverloadConfig:
    """What happens when more is asked than the workers can take.

    Attributes:
        max_worker_queue_s: a request is sent when the chosen worker's predicted queue is at most this, else it waits
        here; None: everything is sent at once, and nothing waits here.
        max_queued, max_queued_per_tenant: requests that wait here; more are refused.
        max_queued_tokens, max_queued_tokens_per_tenant: likewise of their prompts.
        max_queue_wait_s: who waits longer is refused.
        tenant_weights: shares of the workers' time while tenants compete; 1 for those that are not named.
        tokens_per_minute: quotas of the fleet, by tenant. default_tokens_per_minute: of every other; None: unlimited.
        cached_token_weight: what a cached prompt token counts for quotas and turns, where a computed one counts 1.
        output_token_weight: what a generated token counts for a turn.
    """

    max_worker_queue_s: float | None = 0.5
    max_queued: int = 512
    max_queued_per_tenant: int = 256
    max_queued_tokens: int = 4_000_000
    max_queued_tokens_per_tenant: int = 2_000_000
    max_queue_wait_s: float = 60.0
    tenant_weights: dict[str, float] = field(default_factory=dict)
    tokens_per_minute: dict[str, int] = field(default_factory=dict)
    default_tokens_per_minute: int | None = None
    cached_token_weight: float = 0.1
    output_token_weight: float = 2.0


def named_tenants(config: OverloadConfig) -> frozenset[str]:
    """Those that an operator gave a weight or a quota: few enough for labels of metrics."""
    return frozenset(config.tenant_weights) | frozenset(config.tokens_per_minute)


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """One router's settings.

    Attributes:
        name: unique in the fleet. model_dir: folder with tokenizer.json, tokenizer_config.json (or
        chat_template.jinja), config.json and generation_config.json; weights are not needed.
        model_name: what clients call the model.
        grpc_host, grpc_port, http_host, http_port: where to listen; port zero: any. http_port None: no HTTP.
        http_allowed_hosts: names besides loopback and `http_host` by which browsers and scrapers may address the HTTP
        side (the `Host` header), without port; all others are refused, which stops DNS rebinding.
        tls: for gRPC; None: plaintext.
        worker_ca: PEM file that workers' certificates are checked against; None: plaintext.
        api_keys_file: TOML of keys (see `router.auth`); None: every caller is `default_tenant` with role admin.
        default_tenant: tenant of callers without keys.
        fleet_secret: presented to workers; tenant salts are derived from it, so all routers of a fleet share it.
        policy, weights: in force until the fleet record says otherwise. shared_tier_reads: likewise.
        max_prompt_bytes: larger prompts are refused before they are encoded.
        max_constraint_bytes: larger constraints on answers are refused, as compiling them slows their worker;
        at most `MOST_CONSTRAINT_BYTES`.
        index_bytes: memory of the index; when it ends, the least recently placed run of blocks is forgotten.
        max_in_flight: requests at once; more are refused. max_in_flight_per_tenant: likewise for one tenant.
        overload: who waits, who is refused, and whose turn it is when workers cannot keep up.
        default_deadline_s: for callers that set none; None: unlimited.
        belief_ttl_s: how long a block that was sent to a worker without K/V events is believed there, at least.
        audit_interval_s: between two probes of one worker; None: none. catch_up_s: how long requests wait at most for
        the snapshots of all workers that a new router meets first.
        handover: whether an answer whose worker is lost or ends goes on at another one; else it ends in an error.
        drain_grace_s: how long running requests may take after SIGTERM.
        show_prompts: hand out first words of prompts in statistics to admins that ask.
        reflection: serve gRPC reflection.
        record_file: where the policy in force, its history and owed clears are kept; None: nowhere.
    """

    name: str
    model_dir: str
    model_name: str
    grpc_host: str = "127.0.0.1"
    grpc_port: int = 50051
    http_host: str = "127.0.0.1"
    http_port: int | None = 8080
    http_allowed_hosts: tuple[str, ...] = ()
    tls: TlsFiles | None = None
    worker_ca: str | None = None
    api_keys_file: str | None = None
    default_tenant: str = "default"
    fleet_secret: str = ""
    policy: str = "cache_aware"
    weights: dict[str, float] = field(default_factory=dict)
    shared_tier_reads: bool = True
    max_prompt_bytes: int = 16 << 20
    max_constraint_bytes: int = DEFAULT_CONSTRAINT_BYTES
    index_bytes: int = DEFAULT_BYTES
    max_in_flight: int = 1024
    max_in_flight_per_tenant: int = 512
    overload: OverloadConfig = field(default_factory=OverloadConfig)
    default_deadline_s: float | None = 600.0
    belief_ttl_s: float = 600.0
    audit_interval_s: float | None = 10.0
    catch_up_s: float = 5.0
    handover: bool = True
    drain_grace_s: float = 30.0
    show_prompts: bool = False
    reflection: bool = True
    record_file: str | None = None
