"""All settings of a deployment, and how they become the parts' own configurations.

Covers: the whole. What a setting means is in `deploy.sections`; where values come from (file, environment, flags) is
`deploy.layers`. Field names are those that a user writes: in TOML `[store] host_bytes = "4GiB"`, in the environment
`WARMKV_STORE__HOST_BYTES=4GiB`, on the command line `--set store.host_bytes=4GiB`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from deploy.sections import (
    LOOPBACK,
    AuthSettings,
    EngineSettings,
    ModelSettings,
    RaySettings,
    RedisSettings,
    RouterSettings,
    StoreSettings,
    TlsSettings,
    WorkersSettings,
)
from router.config import OverloadConfig, RouterConfig, TlsFiles
from workers.config import WorkerConfig


class Settings(BaseSettings):
    """All of them. Frozen; made by `deploy.layers.load_settings`, which knows each value's origin."""

    model_config = SettingsConfigDict(
        env_prefix="WARMKV_", env_nested_delimiter="__", frozen=True, extra="forbid", validate_default=True
    )

    model: ModelSettings = Field(default_factory=ModelSettings)
    workers: WorkersSettings = Field(default_factory=WorkersSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    store: StoreSettings = Field(default_factory=StoreSettings)
    redis: RedisSettings = Field(default_factory=RedisSettings)
    router: RouterSettings = Field(default_factory=RouterSettings)
    auth: AuthSettings = Field(default_factory=AuthSettings)
    ray: RaySettings = Field(default_factory=RaySettings)
    tls: TlsSettings = Field(default_factory=TlsSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what it is called with: `deploy.layers` merges the sources, because it must know who set what."""
        return (init_settings,)

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        folder = self.model.dir
        return self.model.name or (folder.resolve().name if folder is not None else "simulated")

    def worker_config(self, name: str, *, fleet_secret: str, threads: int = 1) -> WorkerConfig:
        """The configuration of the worker `name`; `threads` where none are set.

        Raises:
            SettingsProblem, KeysFileError: see `deploy.quotas`.
        """
        url = self.redis.url
        return WorkerConfig(
            name=name,
            model_dir=_text(self.model.dir) or "",
            model_name=self.model_name,
            engine=self.workers.engine,
            device=self.workers.device,
            dtype=self.model.dtype,
            kv_dtype=self.engine.kv_dtype,
            cuda_graphs=self.engine.cuda_graphs,
            compile=self.engine.compile,
            threads=self.workers.threads or threads,
            tensor_parallel=self.workers.tensor_parallel,
            deterministic=self.engine.deterministic,
            device_bytes=self.store.device_bytes,
            host_bytes=self.store.host_bytes,
            disk_bytes=self.store.disk_bytes,
            disk_dir=str(self.store.disk_dir),
            admission=self.store.admission,
            redis_admission=self.redis.admission,
            eviction=self.store.eviction,
            tail_threshold_s=self.store.tail_threshold,
            quotas=self._quotas(fleet_secret),
            store_keys=_keys(self.store.keys_file),
            protection=self.store.protection,
            redis_url=None if url is None else url.get_secret_value(),
            redis_timeout_s=self.redis.timeout,
            redis_watch=self.redis.watch,
            redis_recall_s=self.redis.recall,
            kv_events=self.workers.kv_events,
            peers=self.store.peers,
            peer_port=self.workers.peer_port,
            roles=self.workers.roles,
            block_size=self.store.block_size,
            default_ttl_s=self.store.default_ttl,
            load_slack_s=self.store.load_slack,
            context_length=self.model.context_length,
            max_batch_tokens=self.workers.max_batch_tokens,
            max_running=self.workers.max_running,
            watchdog_s=self.workers.watchdog,
            fleet_secret=fleet_secret,
            bind_host=self._bind_host(),
            advertise_host=self._advertise_host(),
            port=self.workers.port,
            tls_cert=_text(self.tls.worker_cert),
            tls_key=_text(self.tls.worker_key),
        )

    def router_config(self, name: str, *, model_dir: str, fleet_secret: str) -> RouterConfig:
        """The configuration of a router; `name` where none is set."""
        router, tls = self.router, self.tls
        files = None
        if tls.cert is not None and tls.key is not None:
            files = TlsFiles(str(tls.cert.absolute()), str(tls.key.absolute()), _text(tls.client_ca))
        return RouterConfig(
            name=router.name or name,
            model_dir=model_dir,
            model_name=self.model_name,
            grpc_host=router.grpc_host,
            grpc_port=router.grpc_port,
            http_host=router.http_host,
            http_port=router.http_port,
            http_allowed_hosts=router.http_allowed_hosts,
            tls=files,
            worker_ca=_text(tls.worker_ca),
            api_keys_file=_text(self.auth.api_keys_file),
            default_tenant=self.auth.default_tenant,
            fleet_secret=fleet_secret,
            policy=router.policy,
            weights=dict(router.weights),
            shared_tier_reads=router.shared_tier_reads,
            max_prompt_bytes=router.max_prompt_bytes,
            max_constraint_bytes=router.max_constraint_bytes,
            index_bytes=router.index_bytes,
            max_in_flight=router.max_in_flight,
            max_in_flight_per_tenant=router.max_in_flight_per_tenant,
            overload=self._overload_config(),
            default_deadline_s=router.default_deadline,
            catch_up_s=router.catch_up,
            belief_ttl_s=router.belief_ttl,
            audit_interval_s=router.audit_interval,
            handover=router.handover == "on",
            drain_grace_s=router.drain_grace,
            show_prompts=router.show_prompts,
            reflection=router.reflection,
        )

    def _overload_config(self) -> OverloadConfig:
        router = self.router
        return OverloadConfig(
            max_worker_queue_s=router.max_worker_queue,
            max_queued=router.max_queued,
            max_queued_per_tenant=router.max_queued_per_tenant,
            max_queued_tokens=router.max_queued_tokens,
            max_queued_tokens_per_tenant=router.max_queued_tokens_per_tenant,
            max_queue_wait_s=router.max_queue_wait,
            tenant_weights=dict(router.tenant_weights),
            tokens_per_minute=dict(router.tokens_per_minute),
            default_tokens_per_minute=router.default_tokens_per_minute,
            cached_token_weight=router.cached_token_weight,
            output_token_weight=router.output_token_weight,
        )

    def _quotas(self, fleet_secret: str) -> dict[str, float]:
        from deploy.quotas import salted_shares  # which knows what settings are

        return salted_shares(self, fleet_secret)

    def _bind_host(self) -> str:
        """On a joined cluster routers come from other nodes, so the fleet secret must guard an open port."""
        if self.workers.bind_host is not None:
            return self.workers.bind_host
        return LOOPBACK if self.ray.address is None else "0.0.0.0"

    def _advertise_host(self) -> str | None:
        if self.workers.advertise_host is not None:
            return self.workers.advertise_host
        bind = self._bind_host()
        return None if bind in ("0.0.0.0", "::") else bind


def _keys(path: Path | None) -> str:
    """The lines of a keys file, which `deploy.up` has looked at before."""
    return "" if path is None else path.read_text(encoding="utf-8")


def _text(path: Path | None) -> str | None:
    """Absolute: workers run in another folder."""
    return None if path is None else str(path.absolute())
