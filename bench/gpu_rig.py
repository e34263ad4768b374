"""An engine as a GPU worker has it, over random weights of a given shape, and the moves that `bench.gpu` makes.

On a CPU the same engine is put together with a tiny shape, padded and captured steps and copies beside them, so that
every line runs there too; its figures mean nothing.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvstore.blocks import BlockHash, HashScheme, block_hashes
from kvstore.buffers import aligned
from kvstore.copier import Bytes
from kvstore.device import DeviceTier
from kvstore.host.slab import CudaPinner
from kvstore.host.tier import HostTier
from kvstore.layout import UNQUANTISED
from kvstore.store import TieredStore
from kvstore.tier import BlockMeta
from workers.attention.choice import backend_for
from workers.attention.gather_backend import GatherBackend
from workers.attention.step import AttentionBackend
from workers.device.cpu import CpuDevice, Done
from workers.device.cuda import CudaDevice
from workers.device.interface import Device
from workers.engine import TorchEngine
from workers.model_folder import open_model_folder
from workers.models import ModelRunner
from workers.protocol import EngineInfo, Job, Output, SamplingParams
from workers.random_model import random_model, random_runner
from workers.stepping.buckets import Bucket, decode_buckets, tail_buckets
from workers.stepping.make import Limits, StepOptions, buffered
from workers.tiny import ModelShape, make_model_folder

HOST_READY_S = 300.0
_ROOT_SALT = b"bench"


@dataclass(frozen=True, slots=True)
class Scale:
    """What is measured, and how large.

    Attributes:
        config: of the model. dtype: of its weights. device: torch's name.
        pool_blocks, host_blocks: of the tiers. max_batch_tokens, max_running, context_length: of the engine.
        context: tokens of a decoding sequence. batches: how many decode at once. prompt: of the cold and warm runs.
        tail: of the prompt's tokens, those that a warm run computes. moved: blocks of a spill or promotion.
    """

    config: dict[str, Any]
    dtype: str
    device: str
    pool_blocks: int
    host_blocks: int
    max_batch_tokens: int
    max_running: int
    context_length: int
    context: int
    batches: tuple[int, ...]
    prompt: int
    tail: int
    moved: int


LLAMA_8B = Scale(
    config={
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    dtype="bfloat16",
    device="cuda",
    pool_blocks=12_000,
    host_blocks=4_096,
    max_batch_tokens=2048,
    max_running=128,
    context_length=16_384,
    context=1024,
    batches=(1, 32, 128),
    prompt=8192,
    tail=64,
    moved=2048,
)
DRY = replace(
    LLAMA_8B,
    config={
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    dtype="float32",
    device="cpu",
    pool_blocks=160,
    host_blocks=96,
    max_batch_tokens=64,
    max_running=4,
    context_length=512,
    context=32,
    batches=(1, 2, 4),
    prompt=256,
    tail=16,
    moved=8,
)


class AtOnce(Done):
    """A copy that was made when it was begun, at that time."""

    def __init__(self, started: float) -> None:
        self._took_ms = (time.perf_counter() - started) * 1e3

    def took_ms(self) -> float | None:
        """As `Copy.took_ms`."""
        return self._took_ms


class AtOnceCopier:
    """Makes copies where they would be begun: for a dry run. `device` is set when the pool is there."""

    device: DeviceTier | None = None

    def copy_out(self, block_ids: Sequence[int], into: Sequence[Bytes]) -> AtOnce:
        """As `Copier.copy_out`."""
        started = time.perf_counter()
        for block_id, row in zip(block_ids, into, strict=True):
            np.copyto(row, self._block(block_id))
        return AtOnce(started)

    def copy_in(self, rows: Sequence[Bytes], block_ids: Sequence[int]) -> AtOnce:
        """As `Copier.copy_in`."""
        started = time.perf_counter()
        for row, block_id in zip(rows, block_ids, strict=True):
            np.copyto(self._block(block_id), row)
        return AtOnce(started)

    def buffers(self, count: int) -> list[Bytes]:
        """As `Copier.buffers`."""
        return [np.empty(self._pool.block_nbytes, np.uint8) for _ in range(count)]

    def buffer(self) -> memoryview:
        """As `Copier.buffer`."""
        return aligned(self._pool.block_nbytes)

    def follow_compute(self) -> None:
        """As `Copier.follow_compute`: the pool is written at once."""

    def close(self) -> None:
        """As `Copier.close`."""
        self.device = None

    @property
    def _pool(self) -> DeviceTier:
        if self.device is None:
            raise ValueError("the copier has no pool yet; set its device")
        return self.device

    def _block(self, block_id: int) -> Bytes:
        return np.frombuffer(self._pool.landing([block_id]).buffers[0], np.uint8)


@dataclass(slots=True)
class GpuRig:
    """The engine and its parts.

    Attributes:
        step_device: where its steps are computed.
    """

    scale: Scale
    runner: ModelRunner
    device: DeviceTier
    store: TieredStore
    engine: TorchEngine
    step_device: Device
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    _names: int = 0
    _closed: bool = False

    @property
    def root(self) -> BlockHash:
        """Of the chains of all its prompts."""
        return self.engine.info.scheme.root(_ROOT_SALT)

    def prompt(self, tokens: int) -> list[int]:
        """One that nobody had before."""
        return [self.rng.randrange(5, self.runner.vocab_size) for _ in range(tokens)]

    def submit(self, prompt: list[int], output: int) -> int:
        """Give the engine a job of greedy tokens, as many as asked for; its name."""
        self._names += 1
        sampling = SamplingParams(output, temperature=0.0, ignore_eos=True)
        names = block_hashes(prompt, self.root, self.engine.info.scheme.block_size)
        self.engine.submit(Job(self._names, prompt, self.root, names, sampling))
        return self._names

    def step(self) -> list[Output]:
        """One step; waits a moment where every sequence waits for blocks."""
        outputs = self.engine.step().outputs
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(f"a job failed: {output.error.reason}: {output.error.message}")
        if not outputs:
            self.engine.wait(0.005)
        return outputs

    def finish(self) -> list[Output]:
        """Until all jobs have ended and all copies are made; what came out."""
        outputs = []
        while self.engine.has_work():
            outputs += self.step()
        self.store.flush(30.0)
        return outputs

    def first_token_ms(self, prompt: list[int]) -> tuple[float, dict[str, int]]:
        """Time to the first token of a prompt that comes to an idle engine, and where its tokens came from."""
        started = time.perf_counter()
        self.submit(prompt, 1)
        while not (outputs := self.step()):
            pass
        took_ms = (time.perf_counter() - started) * 1e3
        self.finish()
        return took_ms, outputs[0].fates or {}

    def decoding(self, sequences: int, output: int) -> None:
        """Let so many sequences be prefilled, and all decode, for so many tokens each, counted from when all do."""
        started: set[object] = set()
        # The first ones decode while the last ones are prefilled, with what they leave of each step.
        room = self.scale.max_batch_tokens - sequences
        output += sequences * self.scale.context // room + 2
        for _ in range(sequences):
            self.submit(self.prompt(self.scale.context), output)
        while len(started) < sequences:
            started |= {each.job_id for each in self.step()}
        self.store.flush(30.0)

    def fresh_metas(self, count: int) -> list[BlockMeta]:
        """Names of blocks that nobody has, each the first of a chain."""
        root = self.root
        return [BlockMeta(BlockHash(self.rng.randbytes(32)), root, root, None) for _ in range(count)]

    def abandon(self) -> None:
        """End all jobs, so that what is measured next has the engine for itself."""
        if self._closed:
            return
        for name in range(1, self._names + 1):
            self.engine.cancel(name)
        while self.engine.has_work():
            self.engine.step()
        self.store.flush(30.0)

    def close(self) -> None:
        """Give everything back, once."""
        if not self._closed:
            self._closed = True
            self.engine.close(flush_s=1.0)


def _buckets(scale: Scale, options: StepOptions) -> list[Bucket]:
    """All that an engine captures; where each is compiled first, which takes most of a minute, those measured here."""
    limits = scale.max_running, scale.max_batch_tokens
    buckets = [*decode_buckets(scale.max_running), *tail_buckets(*limits)]
    if not options.compile:
        return buckets
    return [each for each in buckets if (each.rows in scale.batches if each.longest == 1 else each.rows == scale.tail)]


def make_rig(
    scale: Scale,
    folder: Path,
    options: StepOptions,
    *,
    captures: bool = True,
    model: Any = None,
    kind: type[ModelRunner] = ModelRunner,
    kv_dtype: str = UNQUANTISED,
) -> GpuRig:
    """An engine of this scale; `folder` is an empty one for a tokenizer. `model`: None: a new one of random weights.
    `kv_dtype`: what K/V is stored as.

    A runner of another kind than the plain one computes its steps as it likes: without graphs, and one by one.
    """
    model = random_model(scale.config, device=scale.device, dtype=scale.dtype) if model is None else model
    make_model_folder(folder, ModelShape(layers=1, hidden=8, heads=1, kv_heads=1, vocab=512))
    plain, dry = kind is ModelRunner, scale.device == "cpu"
    backend: dict[str, AttentionBackend] = {}
    if plain:
        backend["backend"] = GatherBackend() if dry else backend_for(torch.device(model.device), kv_dtype)
    runner = random_runner(model, open_model_folder(folder), kind=kind, **backend)
    layout = replace(runner.layout, kv_dtype=kv_dtype).with_chosen_block_size()
    layout = replace(layout, block_size=16) if dry else layout
    scheme = HashScheme(runner.fingerprint, layout.describe(), layout.block_size)
    copier = AtOnceCopier() if dry else None
    device = DeviceTier(
        layout,
        scale.pool_blocks * layout.block_nbytes,
        clock=time.monotonic,
        device=runner.device,
        copier=copier,
    )
    if copier is not None:
        copier.device = device
    pinner = None if dry else CudaPinner(runner.device)
    host = HostTier(layout, scale.host_blocks * layout.block_nbytes, clock=time.monotonic, pinner=pinner)
    if not host.wait_ready(HOST_READY_S):
        raise RuntimeError("host memory was not ready in time; give the benchmark a machine with more of it")
    if problem := host.stats().problem:
        print(f"the figures of copies mean little: {problem}", file=sys.stderr, flush=True)
    store = TieredStore(layout, device, host, None, clock=time.monotonic, default_ttl_s=None)
    kv = [device.kv(layer) for layer in range(layout.layers)]
    step_device: Device = CpuDevice() if dry else CudaDevice(runner.device)
    limits = Limits(scale.max_batch_tokens, scale.max_running, scale.context_length, device.num_blocks)
    launcher = None
    if plain:
        buckets = _buckets(scale, options) if captures else ()
        launcher = buffered(runner, kv, step_device, options, limits, buckets, time.monotonic)
    info = EngineInfo(
        scheme=scheme,
        model="random",
        tokenizer_sha256=runner.folder.tokenizer_sha256,
        context_length=scale.context_length,
        vocab_size=runner.vocab_size,
        block_nbytes=layout.block_nbytes,
        device=runner.device.type,
        eos_token_ids=runner.folder.eos_token_ids,
    )
    engine = TorchEngine(
        runner,
        store,
        kv,
        info,
        num_blocks=device.num_blocks,
        max_batch_tokens=scale.max_batch_tokens,
        max_running=scale.max_running,
        default_ttl_s=None,
        launcher=launcher,
    )
    return GpuRig(scale, runner, device, store, engine, step_device)
