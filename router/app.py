"""One router as a process: its parts put together, served until a signal, drained, closed.

`run` returns 0 after SIGTERM or SIGINT: what ran has finished, or the grace was over. A second signal cuts the wait
short.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from router.auth import ApiKeys, KeysFileError, open_access
from router.config import RouterConfig
from router.core import Router
from router.errors import InvalidRequest
from router.http import create_app
from router.listen import ListenError
from router.model_folder import ModelFolderError
from router.protocol import Discovery
from router.server import RouterServer
from router.settling import settle_process
from router.tls import TlsFilesError
from router.tokenizer import PromptEncoder

__all__ = ["STARTUP_ERRORS", "OnReady", "RouterServer", "Stop", "run", "serving"]

log = logging.getLogger(__name__)

# What keeps a router from starting and is the operator's to correct. Every message says how.
STARTUP_ERRORS = (ModelFolderError, KeysFileError, TlsFilesError, ListenError, InvalidRequest)

OnReady = Callable[[RouterServer], None]


@dataclass(frozen=True, slots=True)
class Stop:
    """What ends a router: `stop` begins the drain, `hurry` cuts it short."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)

    def signalled(self) -> None:
        """A signal came: the first, or another one."""
        (self.hurry if self.stop.is_set() else self.stop).set()


def run(config: RouterConfig, discovery: Discovery, *, on_ready: OnReady | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0.

    Args:
        on_ready: called once when the ports listen, for example to print them.

    Raises:
        one of STARTUP_ERRORS.
    """
    asyncio.run(_run_until_signalled(config, discovery, on_ready))
    return 0


@asynccontextmanager
async def serving(config: RouterConfig, discovery: Discovery) -> AsyncIterator[RouterServer]:
    """A router that listens for as long as the block runs. Closes `discovery` on every way out.

    Raises:
        one of STARTUP_ERRORS.
    """
    encoder = PromptEncoder.load(config.model_dir, max_prompt_bytes=config.max_prompt_bytes)
    keys = ApiKeys(config.api_keys_file) if config.api_keys_file is not None else None
    authenticate = keys.authenticate if keys is not None else open_access(config.default_tenant)
    router = Router(
        config,
        encoder,
        discovery,
        credentials=_worker_credentials(config),
        trust_group_of=keys.trust_group_of if keys is not None else None,
        settle=settle_process,
    )
    http_app = create_app(router, config, registry=router.metrics.registry, authenticate=authenticate)
    server = RouterServer(router, config, authenticate=authenticate, http_app=http_app, on_drain=router.drain)
    try:
        await router.start()
        await server.start()
        yield server
    finally:
        await server.stop()
        await router.close()
        encoder.close()


async def _run_until_signalled(config: RouterConfig, discovery: Discovery, on_ready: OnReady | None) -> None:
    until = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, until.signalled)
    async with serving(config, discovery) as server:
        if on_ready is not None:
            on_ready(server)
        await until.stop.wait()
        log.info("the router drains", extra={"router": config.name, "grace_s": config.drain_grace_s})
        await server.drain(until.hurry)
    log.info("the router ended", extra={"router": config.name})


def _worker_credentials(config: RouterConfig) -> grpc.ChannelCredentials | None:
    if config.worker_ca is None:
        return None
    try:
        return grpc.ssl_channel_credentials(Path(config.worker_ca).read_bytes())
    except OSError as error:
        raise TlsFilesError(f"{config.worker_ca} cannot be read ({error.strerror}). Correct worker_ca.") from error
