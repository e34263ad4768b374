"""What a worker is told when it starts. Built by `deploy` from the user's settings; plain, so that Ray can carry it."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.eviction.tail import DEFAULT_THRESHOLD_S
from kvstore.layout import UNQUANTISED
from kvstore.patience import DEFAULT_SLACK_S
from workers.roles import Role, role_of


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker's settings.

    Attributes:
        name: unique in the fleet, for example `w0`.
        model_dir: a Hugging Face model folder. model_name: what clients call it.
        engine: `torch` or `simulated`.
        device: `cpu`, `cuda` or `auto`. dtype: `auto` (the checkpoint's) or a key of `kvstore.layout.DTYPE_BYTES`.
        kv_dtype: one of `kvstore.layout.KV_DTYPES`, what K/V is stored as in every tier.
        cuda_graphs: `auto`, `on` or `off`, whether small steps are captured. compile: whether what is captured is
        compiled first.
        threads: torch threads of each rank. deterministic: canonical mode, see
        `workers.canonical`.
        tensor_parallel: processes, each with a GPU of its own where there are any, that share out the model's heads.
        device_bytes, host_bytes: capacity of the two tiers, of all ranks together; zero host bytes: no host tier.
        disk_bytes: capacity of the disk tier; zero: none. disk_dir: the worker's folder is made in it; `~` is the
        node's home.
        admission: one of `kvstore.admission.ADMISSIONS`, which blocks are written to disk and Redis. redis_admission:
        another one for Redis; None: the same. eviction: a policy of `kvstore.eviction.policies`, for host and disk.
        tail_threshold_s: time to first token that `tail_optimized` keeps for a conversation's next turn.
        quotas: by the salt of a tenant's blocks in hex, the share of host and of disk that it may count on.
        store_keys: lines of a keyring (`kvstore.crypto.Keyring.parse`); empty: blocks are not protected. protection:
        `authenticate` or `encrypt`, what is done with it.
        redis_url: the shared tier; None: without.
        redis_timeout_s: longest silence of the server before a read is a miss. redis_watch: a value of
        `kvstore.redis.watch.Watching`. redis_recall_s: how long a worker that starts waits to learn what lies there
        already; it goes on learning while it serves. Zero: it does not ask.
        kv_events: `on`, or `off`: routers are told of no block and go by what they sent.
        peers: whether it reads blocks from other workers' host tiers and serves those of its own; only with a
        fleet_secret. peer_port: where it serves them, on bind_host; zero: any; further
        ranks count up from it.
        roles: how many workers of the fleet have which role, `prefill=2,decode=6`; empty: all do both. See `roles`.
        block_size: None: `KVLayout.with_chosen_block_size`.
        default_ttl_s: time to live of blocks after their last use; None: until evicted.
        load_slack_s: by how much a load of blocks may be late before they are computed.
        context_length: None: the model's own.
        max_batch_tokens: tokens a step. max_running: sequences a step.
        watchdog_s: the longest that one turn of the engine's thread may take before the worker counts as stuck and
        ends, to be started anew; zero: for ever.
        fleet_secret: what routers must present. bind_host: where to listen. advertise_host: what routers dial;
        None: the node's address. port: zero: any.
        tls_cert, tls_key, tls_client_ca: PEM files; None: plaintext.
    """

    name: str
    model_dir: str
    model_name: str
    engine: str = "torch"
    device: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = UNQUANTISED
    cuda_graphs: str = "auto"
    compile: bool = False
    threads: int = 1
    deterministic: bool = False
    tensor_parallel: int = 1
    device_bytes: int = 1 << 30
    host_bytes: int = 4 << 30
    disk_bytes: int = 0
    disk_dir: str = "~/.cache/warmkv/blocks"
    admission: str = "always"
    redis_admission: str | None = None
    eviction: str = "lru"
    tail_threshold_s: float = DEFAULT_THRESHOLD_S
    quotas: dict[str, float] = field(default_factory=dict, repr=False)
    store_keys: str = field(default="", repr=False)
    protection: str = "authenticate"
    redis_url: str | None = None
    redis_timeout_s: float = 0.05
    redis_watch: str = "listen"
    redis_recall_s: float = 5.0
    kv_events: str = "on"
    peers: bool = False
    peer_port: int = 0
    roles: str = ""
    block_size: int | None = None
    default_ttl_s: float | None = 3600.0
    load_slack_s: float = DEFAULT_SLACK_S
    context_length: int | None = None
    max_batch_tokens: int = 2048
    max_running: int = 64
    watchdog_s: float = 300.0
    fleet_secret: str = ""
    bind_host: str = "127.0.0.1"
    advertise_host: str | None = None
    port: int = 0
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None

    @property
    def role(self) -> Role:
        """This worker's. Raises ValueError where `roles` is no list of roles."""
        return role_of(self.name, self.roles)
