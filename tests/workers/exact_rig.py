"""What the tests of exactness share: six small models, engines over one lower tier, and the reference to compare with.

The reference of a sequence is one forward of all its tokens over an empty pool of its own: no engine, no scheduler, no
store. What an engine computed is looked at from outside: logits as they reach the sampler, K/V as the store holds it.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvstore.blocks import BlockHash, HashScheme, block_hashes
from kvstore.codec import BlockCodec
from kvstore.device import DeviceTier
from kvstore.disk.tier import DiskTier
from kvstore.host.tier import HostTier
from kvstore.redis.tier import RedisTier
from kvstore.store import TieredStore
from kvstore.tier import Tier
from tests.workers.engine_rig import BLOCK_SIZE, SHAPE, Answer, Clock, Rig, _root
from workers.attention.step import KVViews, Span
from workers.canonical.runner import CanonicalRunner
from workers.engine import TorchEngine
from workers.models import ModelRunner
from workers.protocol import EngineInfo
from workers.tiny import make_model_folder

ARCHITECTURES = ("llama", "qwen3", "gemma2")
DTYPES = ("float32", "bfloat16")
TIERS = ("device", "host", "disk", "redis")
WINDOW = 100  # of every other layer of the Gemma


@functools.cache
def exact_folder(architecture: str, dtype: str) -> Path:
    """A model folder: weights that spread, so that logits differ and attention looks at more than one token."""
    path = _root() / f"exact-{architecture}-{dtype}"
    shape = replace(SHAPE, dtype=dtype, spread=0.1)
    if architecture in ("llama", "qwen3"):
        return make_model_folder(path, replace(shape, architecture=architecture))
    make_model_folder(path, shape)
    _put_gemma(path, dtype)
    return path


def _put_gemma(path: Path, dtype: str) -> None:
    """Gemma 2: scores capped, a sliding window in every other layer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2",
        num_hidden_layers=SHAPE.layers,
        hidden_size=SHAPE.hidden,
        intermediate_size=3 * SHAPE.hidden,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.hidden // SHAPE.heads,
        query_pre_attn_scalar=SHAPE.hidden // SHAPE.heads,
        vocab_size=SHAPE.vocab,
        max_position_embeddings=SHAPE.context_length,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(path)


@functools.cache
def default_runner(architecture: str, dtype: str) -> ModelRunner:
    return ModelRunner.load(exact_folder(architecture, dtype))


@functools.cache
def canonical_runner(architecture: str, dtype: str) -> CanonicalRunner:
    return CanonicalRunner.load(exact_folder(architecture, dtype))


@dataclass
class ExactRig(Rig):
    """An engine over the device tier, full of NaN where nothing is written, and at most one lower tier.

    Attributes:
        lower: that tier. logits: by job and position, what the token at that position was chosen by.
    """

    lower: Tier | None
    logits: dict[tuple[Hashable, int], Tensor]

    def keep_only_below(self) -> None:
        """Empty the device tier, so that what is found comes from the lower one."""
        if self.lower is not None:
            assert self.store.flush(60)
            self.device.clear()

    def stored(self, names: Sequence[BlockHash]) -> dict[BlockHash, list[bytes]]:
        """The bytes of each block in every tier that holds it."""
        assert self.store.flush(60)
        found: dict[BlockHash, list[bytes]] = {}
        for name in names:
            held = self.device.acquire([name])
            if held:
                found[name] = [bytes(payload) for payload in self.device.payloads(held)]
                self.device.release(held)
            if self.lower is not None:
                into = bytearray(self.device.block_nbytes)
                if self.lower.read([name], [memoryview(into)]).count:
                    found.setdefault(name, []).append(bytes(into))
        return found


@contextmanager
def exact_rig(
    runner: ModelRunner,
    lower: str = "device",
    *,
    folder: Path | None = None,
    redis_url: str | None = None,
    device_blocks: int = 200,
    max_batch_tokens: int = 2048,
    max_running: int = 32,
) -> Iterator[ExactRig]:
    """An engine on this runner; `lower` names its other tier, of a disk in `folder` or a Redis at `redis_url`."""
    clock = Clock()
    layout = replace(runner.layout, block_size=BLOCK_SIZE)
    canonical = isinstance(runner, CanonicalRunner)
    scheme = HashScheme(runner.fingerprint, layout.describe(), BLOCK_SIZE, canonical=canonical)
    device = DeviceTier(layout, device_blocks * layout.block_nbytes, clock=clock, poison=True)
    codec = BlockCodec(layout, scheme.digest())
    host = HostTier(layout, 600 * layout.block_nbytes, clock=clock) if lower == "host" else None
    disk = None
    if lower == "disk":
        assert folder is not None
        disk = DiskTier(folder, 600 * (layout.block_nbytes + 8192), codec=codec, clock=clock)
    shared = None
    if lower == "redis":
        assert redis_url is not None
        shared = RedisTier(redis_url, codec=codec, timeout_s=20.0)
    store = TieredStore(layout, device, host, shared, disk=disk, clock=clock, default_ttl_s=None, load_slack_s=60.0)
    engine = TorchEngine(
        runner,
        store,
        [device.kv(layer) for layer in range(layout.layers)],
        EngineInfo(
            scheme=scheme,
            model="tiny",
            tokenizer_sha256=runner.folder.tokenizer_sha256,
            context_length=SHAPE.context_length,
            vocab_size=runner.vocab_size,
            block_nbytes=layout.block_nbytes,
            device="cpu",
            eos_token_ids=runner.folder.eos_token_ids,
        ),
        num_blocks=device.num_blocks,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        default_ttl_s=None,
        clock=clock,
    )
    engine._scheduler._compute_ms = lambda first, count: float("inf")  # always worth loading
    rig = ExactRig(engine, store, device, clock, host or disk or shared, {})
    _record(rig)
    try:
        yield rig
    finally:
        rig.close()


def _record(rig: ExactRig) -> None:
    choose = rig.engine._sample

    def recorded(ready, logits, *others):
        for sequence, row in zip(ready, logits, strict=True):
            rig.logits[sequence.job.job_id, len(sequence.token_ids)] = row.clone()
        return choose(ready, logits, *others)

    rig.engine._sample = recorded


@dataclass(frozen=True)
class Reference:
    """One sequence computed from nothing: logits [tokens, vocab], and the bytes of its full blocks."""

    logits: Tensor
    blocks: list[bytes]


def reference(runner: ModelRunner, token_ids: Sequence[int], cuts: Sequence[int] = (), last_only: bool = False):
    """Compute a sequence over an empty pool, in one forward, or in several with these cuts between them.

    With `last_only` each forward gives the logits of its last token alone, as the engine's do.
    """
    layout = replace(runner.layout, block_size=BLOCK_SIZE)
    blocks = -(-len(token_ids) // BLOCK_SIZE)
    device = DeviceTier(layout, blocks * layout.block_nbytes, clock=Clock(), poison=True)
    kv: KVViews = [device.kv(layer) for layer in range(layout.layers)]
    table, logits = list(reversed(range(blocks))), []
    for start, stop in zip((0, *cuts), (*cuts, len(token_ids)), strict=True):
        span = Span(0, stop - start, stop, table[: -(-stop // BLOCK_SIZE)])
        rows = [stop - start - 1] if last_only else range(stop - start)
        logits.append(runner.forward(kv, [span], token_ids[start:stop], range(start, stop), rows))
    full = table[: len(token_ids) // BLOCK_SIZE]
    found = Reference(torch.cat(logits), [bytes(payload) for payload in device.payloads(full)])
    device.close()
    return found


def assert_exact(rig: ExactRig, runner: ModelRunner, job, answer: Answer) -> int:
    """Logits of every token of an answer, and every stored block, are the reference's; how many blocks there were."""
    sequence = [*job.token_ids, *answer.token_ids[:-1]]
    expected = reference(runner, sequence)
    for number, token in enumerate(answer.token_ids):
        position = len(job.token_ids) + number
        chosen_by = rig.logits[job.job_id, position]
        assert torch.equal(chosen_by, expected.logits[position - 1]), f"logits of {job.job_id} at {position}"
        assert token == int(expected.logits[position - 1].argmax())
    names = block_hashes(sequence, job.root, BLOCK_SIZE)
    stored = rig.stored(names)
    for name, wanted in zip(names, expected.blocks, strict=True):
        assert all(held == wanted for held in stored.get(name, [])), f"a block of {job.job_id}"
    return sum(len(held) for held in stored.values())
