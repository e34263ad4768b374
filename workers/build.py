"""Make the engine that a worker's settings ask for: model, tiers, store, engine."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from kvstore.admission import Admission, make_admission
from kvstore.blocks import BlockHash, HashScheme
from kvstore.codec import BlockCodec
from kvstore.crypto import Keyring, Protection
from kvstore.device import DeviceTier
from kvstore.disk.tier import DiskTier
from kvstore.errors import FolderTakenError, LayoutError
from kvstore.eviction.tail import Spare
from kvstore.host.slab import CudaPinner
from kvstore.host.tier import HostTier
from kvstore.layout import DTYPE_BYTES, KV_DTYPES, UNQUANTISED, KVLayout
from kvstore.redis.cluster import RedisClusterTier
from kvstore.redis.open import open_redis
from kvstore.redis.recall import Recalling
from kvstore.redis.tier import RedisTier
from kvstore.redis.watch import Watching
from kvstore.store import TieredStore
from kvstore.tier import Clock
from workers.agreement import ALONE, Agreement
from workers.attention.choice import backend_for
from workers.attention.step import AttentionBackend
from workers.canonical.runner import CanonicalRunner
from workers.config import WorkerConfig
from workers.engine import TorchEngine
from workers.models import ModelNotSupported, ModelRunner
from workers.peers import open_peers
from workers.protocol import EngineInfo
from workers.step_times import StepTimes
from workers.stepping.make import Capturing, Limits, StepOptions, make_launcher
from workers.tensor_parallel.shard import ModelGroup

LOCK_WAIT_S = 10.0
# A pass over n numbers is cut into as many equal parts as there are threads. In halves of our sizes of a step each part
# is whole vector registers; thirds end in the middle of one, and what is left over goes through other code.
MOST_EXACT_THREADS = 2

log = logging.getLogger(__name__)


def build_engine(
    config: WorkerConfig, *, clock: Clock = time.monotonic, group: ModelGroup | None = None, ranks: Agreement = ALONE
) -> TorchEngine:
    """An engine for these settings, ready for jobs. Sets torch's number of threads.

    Args:
        config: of the worker. clock: seconds.
        group, ranks: of a worker of several ranks, of which this builds one: who has the other shares of the model, and
        how the engines agree.

    Raises:
        ValueError: a setting is out of range.
        ModelFolderError, ModelNotSupported: see `ModelRunner.load`.
        NotDeterministic: see `CanonicalRunner`.
        TierError, LayoutError: a tier cannot be made; the message says what to change.
    """
    _check(config)
    rank, size = (0, 1) if group is None else (group.rank, group.size)
    config = config_of_rank(config, rank, size)
    torch.set_num_threads(config.threads)
    steps = StepOptions(Capturing(config.cuda_graphs), compile=config.compile)
    kind = CanonicalRunner if config.deterministic else ModelRunner
    runner = kind.load(
        config.model_dir,
        device=_device(config.device, rank),
        dtype=config.dtype,
        backend=_backend(config, rank),
        ranks=group,
        context_length=config.context_length,
    )
    layout = _layout(runner.layout, config)
    # Blocks have rank 0's names, which routers know; `scheme` keeps apart what the ranks store under them.
    named = HashScheme(
        runner.fingerprint, layout.describe(), layout.block_size, canonical=config.deterministic, tp_size=size
    )
    scheme = replace(named, tp_rank=rank)
    info = _info(config, runner, layout, named, size)
    device = DeviceTier(layout, config.device_bytes, clock=clock, device=runner.device)
    pinner = CudaPinner(runner.device) if runner.device.type == "cuda" else None
    spare, times = _measured(config, layout.block_size, clock)
    host = _host(config, layout, named, clock, spare, pinner)
    codec = _codec(config, layout, scheme)
    disk = _disk(config, codec, named, clock, spare)
    shared = _shared(config, codec)
    recalling = Recalling(shared) if shared is not None and config.redis_recall_s > 0 else None
    rule = make_admission(config.admission)
    peers = open_peers(config, host, codec, clock, rank=rank, size=size)
    store = TieredStore(
        layout,
        device,
        host,
        shared,
        disk=disk,
        peers=None if peers is None else peers.tier,
        clock=clock,
        default_ttl_s=config.default_ttl_s,
        admission=rule,
        shared_admission=_redis_rule(config, rule),
        load_slack_s=config.load_slack_s,
    )
    if recalling is not None and not recalling.wait(config.redis_recall_s):
        log.warning("the shared tier holds so much that the start does not wait until it is learnt")
    kv = [device.kv(layer) for layer in range(layout.layers)]
    limits = Limits(config.max_batch_tokens, config.max_running, info.context_length, device.num_blocks)
    # Ranks talk within a step, which no graph of ours captures: they compute at once.
    launcher = make_launcher(runner, kv, steps, limits, clock=clock) if size == 1 else None
    engine = TorchEngine(
        runner,
        store,
        kv,
        info if peers is None else replace(info, peer_address=peers.address),
        num_blocks=device.num_blocks,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        default_ttl_s=config.default_ttl_s,
        clock=clock,
        shared_tier_id=str if shared is None else shared.run_id,
        peers=peers,
        times=times,
        launcher=launcher,
        ranks=ranks,
    )
    engine.grammars.prepare()
    return engine


def config_of_rank(config: WorkerConfig, rank: int, size: int) -> WorkerConfig:
    """What one rank of a worker gets: an equal share of each tier, a folder and a port for its peers of its own."""
    if size == 1:
        return config
    return replace(
        config,
        name=config.name if rank == 0 else f"{config.name}.rank{rank}",
        device_bytes=config.device_bytes // size,
        host_bytes=config.host_bytes // size,
        disk_bytes=config.disk_bytes // size,
        peer_port=config.peer_port + rank if config.peer_port else 0,
    )


def _measured(config: WorkerConfig, block_size: int, clock: Clock) -> tuple[Spare, StepTimes]:
    """What `tail_optimized` goes by, and what it learns that from."""
    spare = Spare(config.tail_threshold_s, block_size, clock)
    return spare, StepTimes(block_size, on_prefill=lambda cost: spare.learn(partial(cost.predict_ms, cached=0)))


def _check(config: WorkerConfig) -> None:
    if config.threads < 1:
        raise ValueError(f"threads is {config.threads}; give at least 1")
    if config.dtype != "auto" and config.dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {config.dtype!r}; choose auto or one of {', '.join(DTYPE_BYTES)}")
    if config.kv_dtype not in KV_DTYPES:
        raise ValueError(f"unknown kv_dtype {config.kv_dtype!r}; choose one of {', '.join(KV_DTYPES)}")
    if config.tensor_parallel > 1 and (config.cuda_graphs == Capturing.ON or config.compile):
        raise ValueError("ranks run without graphs; set engine.cuda_graphs to auto and compile to false, or one rank")
    if config.cuda_graphs not in list(Capturing):
        raise ValueError(f"unknown cuda_graphs {config.cuda_graphs!r}; choose one of {', '.join(Capturing)}")
    if config.deterministic and (config.kv_dtype != UNQUANTISED or config.tensor_parallel > 1 or config.compile):
        raise ValueError(
            "deterministic mode is proven for one rank over K/V as the model computes it, without compiling; set"
            " engine.kv_dtype to auto, workers.tensor_parallel to 1 and engine.compile to false"
        )
    if config.deterministic and config.cuda_graphs == Capturing.ON:
        raise ValueError(
            "deterministic mode cuts and pads steps in its own way, which no graph holds; set engine.cuda_graphs to"
            " auto or off, or engine.deterministic to false"
        )
    if config.deterministic and config.threads > MOST_EXACT_THREADS and _device(config.device, 0) == "cpu":
        raise ValueError(
            f"deterministic mode and {config.threads} threads: PyTorch may then cut a row in two, and round "
            f"differently at the cut; set threads to at most {MOST_EXACT_THREADS} and start more workers"
        )


def _device(name: str, rank: int) -> str:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, and PyTorch finds no usable GPU; set device to cpu, or check the driver")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; choose cpu, cuda or auto")
    return name if name == "cpu" or rank == 0 else f"cuda:{rank % torch.cuda.device_count()}"


def _backend(config: WorkerConfig, rank: int) -> AttentionBackend | None:
    """What attends over quantised K/V; None: what the runner takes by itself."""
    if config.kv_dtype == UNQUANTISED:
        return None
    return backend_for(torch.device(_device(config.device, rank)), config.kv_dtype)


def _layout(probed: KVLayout, config: WorkerConfig) -> KVLayout:
    stored = replace(probed, kv_dtype=config.kv_dtype)
    if config.block_size is None:
        return stored.with_chosen_block_size()
    if config.block_size < 1:
        raise LayoutError(f"block_size is {config.block_size}; give at least 1, or leave it out")
    return replace(stored, block_size=config.block_size)


def _redis_rule(config: WorkerConfig, rule: Admission) -> Admission:
    """The very same one where nothing else is said: a block that it is asked about has then been seen once."""
    return rule if config.redis_admission in (None, config.admission) else make_admission(config.redis_admission)


def _shares(config: WorkerConfig, scheme: HashScheme, capacity: int) -> dict[BlockHash, int] | None:
    """Bytes of a tier of that capacity by the root of who may count on them; None: nobody has a quota.

    Raises:
        ValueError: the quotas are none of one tier.
    """
    if not config.quotas:
        return None
    if min(config.quotas.values()) < 0 or sum(config.quotas.values()) > 1 + 1e-9:
        raise ValueError(f"quotas are {sum(config.quotas.values()):g} together; make none negative and all at most 1")
    return {scheme.root(bytes.fromhex(salt)): int(share * capacity) for salt, share in config.quotas.items()}


def _host(
    config: WorkerConfig,
    layout: KVLayout,
    scheme: HashScheme,
    clock: Clock,
    spare: Spare,
    pinner: CudaPinner | None,
) -> HostTier | None:
    if not config.host_bytes:
        return None
    return HostTier(
        layout,
        config.host_bytes,
        clock=clock,
        pinner=pinner,
        eviction=config.eviction,
        shares=_shares(config, scheme, config.host_bytes),
        spare_blocks=spare,
    )


def _codec(config: WorkerConfig, layout: KVLayout, scheme: HashScheme) -> BlockCodec:
    keyring = Keyring.parse(config.store_keys) if config.store_keys else None
    return BlockCodec(layout, scheme.digest(), keyring, Protection(config.protection))


def _disk(config: WorkerConfig, codec: BlockCodec, scheme: HashScheme, clock: Clock, spare: Spare) -> DiskTier | None:
    """The worker's own folder; while an earlier process of that name is still ending, wait for it a little."""
    if not config.disk_bytes:
        return None
    path = Path(config.disk_dir).expanduser() / config.name
    shares = _shares(config, scheme, config.disk_bytes)
    give_up = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return DiskTier(
                path,
                config.disk_bytes,
                codec=codec,
                clock=clock,
                eviction=config.eviction,
                shares=shares,
                spare_blocks=spare,
            )
        except FolderTakenError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)


def _shared(config: WorkerConfig, codec: BlockCodec) -> RedisTier | RedisClusterTier | None:
    if config.redis_url is None:
        return None
    watching = Watching(config.redis_watch)
    return open_redis(config.redis_url, codec=codec, timeout_s=config.redis_timeout_s, watching=watching)


def _info(config: WorkerConfig, runner: ModelRunner, layout: KVLayout, scheme: HashScheme, size: int) -> EngineInfo:
    return EngineInfo(
        scheme=scheme,
        model=config.model_name,
        tokenizer_sha256=runner.folder.tokenizer_sha256,
        context_length=_context_length(config, runner),
        vocab_size=runner.vocab_size,
        block_nbytes=layout.block_nbytes * size,
        device=runner.device.type,
        eos_token_ids=runner.folder.eos_token_ids,
    )


def _context_length(config: WorkerConfig, runner: ModelRunner) -> int:
    """The smaller of what the settings and the model say.

    Raises:
        ValueError: the settings ask for more than the model was made for, or neither says anything.
    """
    wanted, made_for = config.context_length, runner.context_length
    if wanted is not None and (wanted < 2 or (made_for is not None and wanted > made_for)):
        raise ValueError(f"context_length is {wanted}, and the model's {made_for}; give at least 2 and at most that")
    length = wanted or made_for
    if length is None:
        raise ModelNotSupported("the model does not say how long a context it was made for; set context_length")
    return length
