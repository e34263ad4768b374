"""Real small models, real engines over real tiers, and plain transformers as the oracle."""

from __future__ import annotations

import atexit
import functools
import math
import random
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from kvstore.blocks import HashScheme, block_hashes
from kvstore.codec import BlockCodec
from kvstore.device import DeviceTier
from kvstore.disk.tier import DiskTier
from kvstore.host.tier import HostTier
from kvstore.lifetime import Lifetime
from kvstore.redis.tier import RedisTier
from kvstore.store import TieredStore
from workers.engine import TorchEngine
from workers.models import ModelRunner
from workers.protocol import EngineInfo, FinishReason, Job, JobError, Output, SamplingParams, TokenLogprob
from workers.stepping.launch import Launcher
from workers.tiny import ModelShape, make_model_folder

torch.set_num_threads(1)

BLOCK_SIZE = 16
SHAPE = ModelShape(layers=2, hidden=64, heads=4, kv_heads=2, vocab=1024, context_length=1024)
NEAR_TIE = 1e-4


@functools.cache
def _root() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="warmkv-models-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def model_folder(architecture: str = "llama") -> Path:
    return make_model_folder(_root() / architecture, replace(SHAPE, architecture=architecture))


@functools.cache
def runner(architecture: str = "llama") -> ModelRunner:
    return ModelRunner.load(model_folder(architecture))


class Clock:
    """Real time, that a test can move forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


@dataclass
class Rig:
    """An engine, its parts, and what came out of it."""

    engine: TorchEngine
    store: TieredStore
    device: DeviceTier
    clock: Clock

    def job(self, name: Hashable, prompt: Sequence[int], *, salt: bytes = b"", **options: object) -> Job:
        if "ttl_s" in options:
            options["lifetime"] = Lifetime(options.pop("ttl_s"))
        sampling = {"max_tokens": 64, "temperature": 0.0}
        fields = {"priority", "lifetime", "no_store", "no_read", "keep_priority", "turn", "deadline"}
        sampling |= {key: value for key, value in options.items() if key not in fields}
        root = self.engine.info.scheme.root(salt)
        return Job(
            job_id=name,
            token_ids=prompt,
            root=root,
            block_hashes=block_hashes(prompt, root, BLOCK_SIZE),
            sampling=SamplingParams(**sampling),
            **{key: value for key, value in options.items() if key in fields},
        )

    def run(self, *jobs: Job) -> list[Answer]:
        """Submit all, step until all have ended."""
        for job in jobs:
            self.engine.submit(job)
        answers = self.collect()
        return [answers[job.job_id] for job in jobs]

    def collect(self) -> dict[Hashable, Answer]:
        answers: dict[Hashable, Answer] = {}
        for _ in range(100_000):
            if not self.engine.has_work():
                break
            outputs = self.engine.step().outputs
            for output in outputs:
                answers.setdefault(output.job_id, Answer()).add(output)
            if not outputs:
                self.engine.wait(0.05)
        assert not self.engine.has_work()
        self.assert_nothing_leaked()
        return answers

    def assert_nothing_leaked(self) -> None:
        assert not self.engine.has_work()
        self.assert_nothing_held()

    def assert_nothing_held(self) -> None:
        self.store.check()
        assert [block for block in range(self.device.num_blocks) if self.device.refs(block)] == []

    def close(self) -> None:
        self.engine.close(flush_s=5)


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    fates: dict[str, int] | None = None
    error: JobError | None = None
    outputs: list[Output] = field(default_factory=list)
    resumed: int = 0

    def add(self, output: Output) -> None:
        assert self.finish is None, "an output came after the last one"
        self.outputs.append(output)
        self.token_ids += output.token_ids
        self.text += output.text
        self.logprobs += output.logprobs
        self.finish, self.fates, self.error = output.finish, output.fates, output.error
        assert output.completion_tokens == self.resumed + len(self.token_ids)


def make_rig(
    architecture: str = "llama",
    *,
    device_blocks: int = 400,
    host_blocks: int = 0,
    redis_url: str | None = None,
    max_batch_tokens: int = 256,
    max_running: int = 32,
    context_length: int | None = None,
    kv_dtype: str = "auto",
    disk: Path | None = None,
    model: ModelRunner | None = None,
    make_launcher: Callable[[DeviceTier], Launcher] | None = None,
) -> Rig:
    """An engine over a pool whose free blocks are full of NaN, so that a read of one shows."""
    model, clock = model or runner(architecture), Clock()
    layout = replace(model.layout, block_size=BLOCK_SIZE, kv_dtype=kv_dtype)
    scheme = HashScheme(model.fingerprint, layout.describe(), BLOCK_SIZE)
    device = DeviceTier(layout, device_blocks * layout.block_nbytes, clock=clock, poison=True)
    host = HostTier(layout, host_blocks * layout.block_nbytes, clock=clock) if host_blocks else None
    codec = BlockCodec(layout, scheme.digest())
    shared = None if redis_url is None else RedisTier(redis_url, codec=codec, timeout_s=5.0)
    slow = None if disk is None else DiskTier(disk, 16 << 20, codec=codec, clock=clock)
    store = TieredStore(layout, device, host, shared, disk=slow, clock=clock, default_ttl_s=None, load_slack_s=5.0)
    info = EngineInfo(
        scheme=scheme,
        model="tiny",
        tokenizer_sha256=model.folder.tokenizer_sha256,
        context_length=context_length or SHAPE.context_length,
        vocab_size=model.vocab_size,
        block_nbytes=layout.block_nbytes,
        device="cpu",
        eos_token_ids=model.folder.eos_token_ids,
    )
    engine = TorchEngine(
        model,
        store,
        [device.kv(layer) for layer in range(layout.layers)],
        info,
        num_blocks=device.num_blocks,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        default_ttl_s=None,
        clock=clock,
        launcher=None if make_launcher is None else make_launcher(device),
    )
    # So small a model computes faster than a server answers; these tests are about what is loaded.
    engine._scheduler._compute_ms = lambda first, count: math.inf
    return Rig(engine, store, device, clock)


def prompts(count: int, *, lengths: Sequence[int] = (20, 37, 64, 100, 131), seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths in turn; those of one length share their first half with every other one."""
    draw = random.Random(seed)
    found: list[list[int]] = []
    for number in range(count):
        length = lengths[number % len(lengths)]
        prompt = [draw.randrange(5, SHAPE.vocab) for _ in range(length)]
        twin = number - 2 * len(lengths)
        if twin >= 0:
            prompt[: length // 2] = found[twin][: length // 2]
        found.append(prompt)
    return found


@dataclass(frozen=True)
class Expected:
    """What `generate()` gave: tokens up to the first end token, and raw logits [tokens, vocab]."""

    token_ids: list[int]
    logits: torch.Tensor

    def near_tie(self, position: int) -> bool:
        best, second = self.logits[position].topk(2).values.tolist()
        return best - second < NEAR_TIE


class Oracle:
    """Plain transformers, with its own attention and its own cache."""

    def __init__(self, architecture: str) -> None:
        self._ends = set(runner(architecture).folder.eos_token_ids)
        self._model = AutoModelForCausalLM.from_pretrained(model_folder(architecture), dtype=torch.float32).eval()

    def generate(self, batch: Sequence[Sequence[int]], max_tokens: int = 64, **options: object) -> list[Expected]:
        """Greedy continuations; prompts of one length run together."""
        found: dict[int, Expected] = {}
        for length in sorted({len(prompt) for prompt in batch}):
            places = [place for place, prompt in enumerate(batch) if len(prompt) == length]
            ids = torch.tensor([batch[place] for place in places])
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )
            logits = torch.stack(out.logits, 1)
            for row, place in enumerate(places):
                tokens = out.sequences[row, length:].tolist()
                ends = [at for at, token in enumerate(tokens) if token in self._ends]
                found[place] = Expected(tokens[: ends[0] + 1] if ends else tokens, logits[row])
        return [found[place] for place in range(len(batch))]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[tokens, vocab]: what follows each token."""
        return self._model(torch.tensor([token_ids])).logits[0]


@functools.cache
def oracle(architecture: str = "llama") -> Oracle:
    return Oracle(architecture)


def near_ties(answers: Sequence[Answer], expected: Sequence[Expected]) -> int:
    """Compare token for token; how many answers differ, each of them first at a near-tie of the oracle's logits."""
    count = 0
    for number, (answer, wanted) in enumerate(zip(answers, expected, strict=True)):
        if answer.token_ids == wanted.token_ids:
            continue
        pairs = zip(answer.token_ids, wanted.token_ids, strict=False)
        at = next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
        assert at is not None, f"answer {number} ends early or late: {answer.token_ids} and not {wanted.token_ids}"
        assert wanted.near_tie(at), f"answer {number} differs at token {at}, which is no near-tie"
        count += 1
    return count
