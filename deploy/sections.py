"""The sections of the settings: each setting's name, type, default and meaning, and what makes a value wrong.

Covers: one section by itself. Does not cover: what holds between sections, and what the parts are given (`settings`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import NoDecode

from deploy.quantities import Duration, OptionalDuration, Size, format_size
from kvstore.eviction.tail import DEFAULT_THRESHOLD_S
from kvstore.patience import DEFAULT_SLACK_S
from router.config import DEFAULT_CONSTRAINT_BYTES, MOST_CONSTRAINT_BYTES
from router.index import DEFAULT_BYTES
from workers.roles import parse_roles

LOOPBACK = "127.0.0.1"
_LEAST_INDEX_BYTES = 16 << 20
T = TypeVar("T", int, float)
_REDIS_KINDS = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster", "unix")
_REDIS_SCHEMES = tuple(f"{kind}://" for kind in _REDIS_KINDS)

Port = Annotated[int, Field(ge=0, le=65535)]


def _redis_url(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(_REDIS_SCHEMES):
        raise ValueError(
            "a Redis URL starts with redis://, rediss:// (TLS), redis+sentinel://, redis+cluster:// or unix://"
        )
    return value


def _roles(text: str) -> str:
    parse_roles(text)
    return text


Roles = Annotated[str, AfterValidator(_roles)]


def _host_names(value: object) -> object:
    """A list as it is; the environment and flags write `a.example,b.example`."""
    if value is None:
        return ()
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _joined(names: tuple[str, ...]) -> str:
    return ",".join(names) or "none"


def _shares(value: dict[str, float]) -> dict[str, float]:
    wrong = [tenant for tenant, share in value.items() if not (tenant and 0 < share <= 1)]
    if wrong:
        raise ValueError(f"the share of {wrong[0]!r} is not above 0 and at most 1; write it like 0.25")
    if sum(value.values()) > 1 + 1e-9:
        raise ValueError(f"the shares are {sum(value.values()):g} together; make them at most 1")
    return value


Shares = Annotated[dict[str, float], AfterValidator(_shares)]


def _positive_by_tenant(value: dict[str, T]) -> dict[str, T]:
    wrong = [tenant for tenant, number in value.items() if not (tenant and 0 < number < 1e15)]
    if wrong:
        raise ValueError(f"the number of {wrong[0]!r} is not above 0; correct it, or leave the tenant out")
    return value


TenantWeights = Annotated[dict[str, float], AfterValidator(_positive_by_tenant)]
TenantTokens = Annotated[dict[str, int], AfterValidator(_positive_by_tenant)]

HostNames = Annotated[
    tuple[str, ...], NoDecode, BeforeValidator(_host_names), PlainSerializer(_joined, return_type=str)
]


AdmissionRule = Literal["always", "second_hit", "on_eviction"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelSettings(_Section):
    """The model that the fleet serves."""

    dir: Path | None = Field(default=None, description="Hugging Face model folder; the same path on every node.")
    name: str | None = Field(default=None, min_length=1, description="What clients call it; none: the folder's name.")
    dtype: str = Field(
        default="auto", description="Of the weights in memory: auto (the checkpoint's), float32, bfloat16, float16."
    )
    context_length: int | None = Field(
        default=None,
        ge=1,
        description="Longest sequence in tokens; none: the model's own. Models whose positions are of the kind longrope"
        " (Phi-3 and Phi-4-mini of 128k) need one within their original length, such as 4096.",
    )


class WorkersSettings(_Section):
    """The workers, and what each may use."""

    count: int = Field(default=1, ge=0, le=1024, description="How many `up` starts.")
    engine: Literal["torch", "simulated"] = Field(
        default="torch", description="simulated: a timing model without tensors."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where the model runs.")
    cpus: float = Field(default=1.0, ge=0, description="Ray CPUs that each reserves.")
    gpus: float | None = Field(
        default=None,
        ge=0,
        description="Ray GPUs that each reserves; none: one a rank where device is not cpu and there are GPUs.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="Torch threads of each rank; none: the cores shared out among workers."
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes of each worker that share out the model's heads, with a GPU each where there are any.",
    )
    max_batch_tokens: int = Field(default=2048, ge=1, description="Tokens a step.")
    max_running: int = Field(default=64, ge=1, description="Sequences a step.")
    kv_events: Literal["on", "off"] = Field(
        default="on",
        description="off: workers tell routers of no block, and each router goes by what it sent to them itself.",
    )
    bind_host: str | None = Field(
        default=None, description="Where workers listen; none: loopback on an own Ray, else the node's address."
    )
    advertise_host: str | None = Field(
        default=None, description="What routers dial; none: the bind host or the node's address."
    )
    roles: Roles = Field(
        default="",
        description="Who prefills and who answers, as prefill=1,decode=3 in the order of the workers' numbers; empty: "
        "all do both.",
    )
    port: Port = Field(default=0, description="Where workers listen; 0: any free port.")
    peer_port: Port = Field(default=0, description="Where workers serve blocks to one another; 0: any free port.")
    start_timeout: Duration = Field(default=600.0, description="How long `up` waits for workers to be ready.")
    watchdog: Duration = Field(
        default=300.0,
        description="How long one turn of a worker's engine may take; one that is stuck for longer is ended and started"
        " anew. 0: never.",
    )
    flush: Duration = Field(
        default=5.0, description="How long a worker that is told to end may write blocks to disk and the shared tier."
    )


class EngineSettings(_Section):
    """How each worker computes."""

    kv_dtype: Literal["auto", "fp8_e4m3", "int8"] = Field(
        default="auto",
        description="What K/V is stored as in every tier: auto (as the model computes it), or quantised to a byte a "
        "number, about half of bfloat16; all workers of a fleet alike.",
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Whether small steps are captured at start and replayed; auto: on a GPU. on: or no start.",
    )
    compile: bool = Field(
        default=False, description="Compile what is captured (torch.compile); a start then takes minutes longer."
    )
    deterministic: bool = Field(
        default=False,
        description="Canonical mode: slower, and the same floats whatever is cached and whatever else runs.",
    )


class StoreSettings(_Section):
    """Each worker's block store."""

    device_bytes: Size = Field(default=1 << 30, ge=1 << 16, description="Capacity of the paged pool.")
    host_bytes: Size = Field(default=4 << 30, description="Capacity of the host tier; 0: none.")
    disk_bytes: Size = Field(default=4 << 30, description="Capacity of the disk tier, which outlives workers; 0: none.")
    disk_dir: Path = Field(
        default=Path("~/.cache/warmkv/blocks"),
        description="Where the disk tier lies on each node; every worker has a folder of its own in it.",
    )
    admission: AdmissionRule = Field(
        default="always",
        description="Which blocks are written to disk and Redis: all, those used again, or those that host evicts.",
    )
    eviction: Literal["lru", "s3fifo", "lfu_da", "arc", "tail_optimized", "priority", "reuse"] = Field(
        default="lru", description="Which blocks host and disk drop first when they are full."
    )
    tail_threshold: Duration = Field(
        default=DEFAULT_THRESHOLD_S,
        gt=0,
        description="Of tail_optimized: the time to first token that it keeps for the next turn of conversations.",
    )
    quotas: Shares = Field(
        default_factory=dict,
        description="Share of host and disk that each tenant may count on, at most 1 together; the rest is for all.",
    )
    keys_file: Path | None = Field(
        default=None,
        description="Lines `id:base64-of-32-bytes`; with it stored blocks are protected, also between workers.",
    )
    protection: Literal["authenticate", "encrypt"] = Field(
        default="authenticate", description="What is done with the keys: nobody else can write a block, or read one."
    )
    peers: bool = Field(
        default=True, description="Whether workers read blocks from one another's host RAM; needs the fleet secret."
    )
    block_size: int | None = Field(
        default=None, ge=1, le=1024, description="Tokens a block; none: chosen for the model."
    )
    default_ttl: OptionalDuration = Field(
        default=3600.0, description="How long blocks live after their last use, or never."
    )
    load_slack: Duration = Field(
        default=DEFAULT_SLACK_S, gt=0, description="By how much reading blocks may be late before they are computed."
    )


class RedisSettings(_Section):
    """The tier that the fleet shares."""

    url: Annotated[SecretStr, AfterValidator(_redis_url)] | None = Field(
        default=None,
        description="redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://; none: no shared tier.",
    )
    admission: AdmissionRule | None = Field(
        default=None, description="Which blocks are written to Redis; none: as store.admission says."
    )
    timeout: Duration = Field(
        default=0.05, gt=0, description="Longest silence of the server during a look-up or a read; then it is a miss."
    )
    watch: Literal["off", "listen", "configure"] = Field(
        default="listen",
        description="Whether to hear of removals from the server; configure: turn its notifications on for that.",
    )
    recall: Duration = Field(
        default=5.0,
        description="How long a starting worker waits to learn what lies there already; 0: it does not ask.",
    )


class RouterSettings(_Section):
    """Each router."""

    name: str | None = Field(
        default=None, min_length=1, description="Unique in the fleet; none: made of host and port."
    )
    grpc_host: str = Field(default=LOOPBACK, description="Where gRPC listens; 0.0.0.0 for every interface.")
    grpc_port: Port = Field(default=50051, description="0: any free port.")
    http_host: str = Field(default=LOOPBACK, description="Where metrics, health and the dashboard listen.")
    http_port: Port | None = Field(default=8080, description="0: any free port; none: no HTTP.")
    http_allowed_hosts: HostNames = Field(
        default=(), description="Names besides loopback and http_host by which browsers and scrapers may address HTTP."
    )
    policy: str = Field(default="cache_aware", description="The routing policy until somebody sets another.")
    weights: dict[str, float] = Field(
        default_factory=dict, description="Weights of the policy that differ from its defaults."
    )
    shared_tier_reads: bool = Field(default=True, description="Whether workers read blocks from the shared tier.")
    max_prompt_bytes: Size = Field(default=16 << 20, ge=1, description="Larger prompts are refused.")
    max_constraint_bytes: Size = Field(
        default=DEFAULT_CONSTRAINT_BYTES,
        ge=1,
        le=MOST_CONSTRAINT_BYTES,
        description="Larger JSON schemas, regular expressions and grammars are refused: compiling one takes a core of "
        "its worker up to 10 ms for each KiB.",
    )
    index_bytes: Size = Field(
        default=DEFAULT_BYTES,
        description="Memory of the prefix index; when it ends, the blocks of the least recently placed run are "
        "forgotten.",
    )
    max_in_flight: int = Field(default=1024, ge=1, description="Requests at once.")
    max_in_flight_per_tenant: int = Field(default=512, ge=1, description="Requests at once of one tenant.")
    max_worker_queue: OptionalDuration = Field(
        default=0.5,
        gt=0,
        description="Requests whose worker has a longer queue than this wait in the router; never: none waits there.",
    )
    max_queued: int = Field(default=512, ge=1, description="Requests that may wait in the router.")
    max_queued_per_tenant: int = Field(default=256, ge=1, description="Of one tenant.")
    max_queued_tokens: int = Field(default=4_000_000, ge=1, description="Tokens of the prompts that may wait there.")
    max_queued_tokens_per_tenant: int = Field(default=2_000_000, ge=1, description="Of one tenant's.")
    max_queue_wait: Duration = Field(default=60.0, gt=0, description="How long a request may wait there.")
    tenant_weights: TenantWeights = Field(
        default_factory=dict, description="Shares of the workers' time while tenants compete; 1 for all others."
    )
    tokens_per_minute: TenantTokens = Field(
        default_factory=dict, description="Tokens a minute that tenants may use, prompts and answers, of all routers."
    )
    default_tokens_per_minute: int | None = Field(
        default=None, ge=1, description="The same for each tenant that is not named there; none: unlimited."
    )
    cached_token_weight: float = Field(
        default=0.1, ge=0, le=1, description="What a cached prompt token counts, where a computed one counts 1."
    )
    output_token_weight: float = Field(
        default=2.0, ge=0, le=1000, description="What a generated token counts for a tenant's turn; for its quota 1."
    )
    default_deadline: OptionalDuration = Field(default=600.0, description="For callers that set none, or never.")
    catch_up: Duration = Field(
        default=5.0, description="How long requests to a new router wait at most for what all workers hold."
    )
    belief_ttl: Duration = Field(
        default=600.0,
        gt=0,
        description="How long a block is believed at first that was sent to a worker without K/V events.",
    )
    audit_interval: OptionalDuration = Field(
        default=10.0, gt=0, description="Between two probes of what one worker really holds, or never."
    )
    handover: Literal["on", "off"] = Field(
        default="on", description="on: an answer whose worker is lost or ends goes on at another one."
    )
    drain_grace: Duration = Field(default=30.0, description="How long running requests may take after SIGTERM.")
    show_prompts: bool = Field(
        default=False, description="Show first words of prompts to admins that ask, and let them record prompts."
    )
    reflection: bool = Field(default=True, description="Serve gRPC reflection.")
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="auto: text on a terminal, else one JSON object a line."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least level that is logged."
    )

    @field_validator("index_bytes")
    @classmethod
    def _index_can_work(cls, value: int) -> int:
        if value < _LEAST_INDEX_BYTES:
            raise ValueError(
                f"{format_size(value)} is too small for an index; give it at least {format_size(_LEAST_INDEX_BYTES)}, "
                "and about 140 MiB for every million blocks that the fleet's tiers hold"
            )
        return value


class AuthSettings(_Section):
    """Who may call."""

    api_keys_file: Path | None = Field(
        default=None, description="TOML of API keys; none: everybody is an admin of the default tenant."
    )
    default_tenant: str = Field(
        default="default", min_length=1, description="Tenant of callers where there is no keys file."
    )
    fleet_secret: SecretStr | None = Field(
        default=None,
        description="What routers present to workers, and what block names are salted with; "
        "none: made at the first `up`, and kept in the state folder.",
    )


class RaySettings(_Section):
    """The Ray cluster."""

    address: str | None = Field(default=None, description="host:port of a Ray cluster to join; none: start an own one.")
    object_store_memory: Size = Field(
        default=100 << 20, ge=80 << 20, description="Of an own Ray; warmkv puts nothing there."
    )
    num_cpus: int | None = Field(
        default=None, ge=1, description="Of an own Ray; none: as many as scaling could ask for."
    )
    start_timeout: Duration = Field(default=60.0, description="How long Ray may take to start or to answer.")


class TlsSettings(_Section):
    """PEM files. `cert`, `key` and `client_ca` are the router's; `worker_*` secure the streams to workers."""

    cert: Path | None = Field(default=None, description="The router's certificate; none: plaintext.")
    key: Path | None = Field(default=None, description="Its key.")
    client_ca: Path | None = Field(
        default=None, description="Callers must present a certificate signed by this (mTLS)."
    )
    worker_cert: Path | None = Field(default=None, description="The workers' certificate; none: plaintext.")
    worker_key: Path | None = Field(default=None, description="Its key.")
    worker_ca: Path | None = Field(default=None, description="What routers check workers' certificates against.")

    @model_validator(mode="after")
    def _in_pairs(self) -> Self:
        for cert, key, names in (
            (self.cert, self.key, "tls.cert and tls.key"),
            (self.worker_cert, self.worker_key, "tls.worker_cert and tls.worker_key"),
        ):
            if (cert is None) != (key is None):
                raise ValueError(f"{names} are needed together; give both, or neither")
        return self
