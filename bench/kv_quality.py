"""What quantised K/V costs in the answers, and what it gains in room and time: int8 and fp8 against the model's own.

Covers: next-token distributions over contexts of 512 to 1,023 tokens of text that a model was not trained on (KL
divergence in nats, agreement of the likeliest token, perplexity), for weights trained for 45 CPU seconds, the same with
outlying channels in K, and random ones; `bfloat16_...` rows are the model computed in bfloat16 without quantisation, as
a measure of what people accept. Bytes of a token, blocks of a GiB, the time to promote the same tokens from host, disk
and Redis, and the time of a decode step on this CPU. Does not cover: GPUs; a model that anybody would use, unless
`--model DIR` (and `--text FILE`) names one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.kv_model import SEQUENCE, local_text, random_model, token_ids, train, with_outliers
from bench.report import Report, ratios
from deploy.redis_server import PrivateRedis
from kvstore.blocks import HashScheme, block_hashes
from kvstore.codec import BlockCodec
from kvstore.device import DeviceTier
from kvstore.disk.files import PAGE_NBYTES
from kvstore.disk.slab import slot_nbytes
from kvstore.disk.tier import DiskTier
from kvstore.host.tier import HostTier
from kvstore.layout import KV_DTYPES, UNQUANTISED, KVLayout
from kvstore.redis.tier import RedisTier
from kvstore.tier import BlockMeta, Tier, chain_metas
from workers.attention.step import Span
from workers.models import ModelRunner
from workers.tiny import ModelShape, make_model_folder

QUANTISED = tuple(name for name in KV_DTYPES if name != UNQUANTISED)
FIRST = 512  # tokens of context from which on positions are compared
LLAMA_8B = KVLayout(layers=32, kv_heads=8, k_dim=128, v_dim=128, dtype="bfloat16")
PROMOTED_BLOCKS = 16
STEP_SHAPE = ModelShape(layers=4, hidden=512, heads=4, kv_heads=2, vocab=1024, dtype="bfloat16", context_length=8192)


@dataclass(slots=True)
class Compared:
    """What two models say at the same positions, [positions] each: KL in nats, same likeliest token, both losses."""

    kl: Tensor
    agrees: Tensor
    loss: Tensor
    own_loss: Tensor


def quality(report: Report, label: str, folder: Path, ids: Sequence[int], sequences: int) -> None:
    """The rows of one model."""
    exact, rounded = (ModelRunner.load(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    texts = [ids[at * SEQUENCE : (at + 1) * SEQUENCE] for at in range(sequences)]
    texts = [text for text in texts if len(text) == SEQUENCE]
    if not texts:
        raise SystemExit(f"the text has {len(ids)} tokens, and {SEQUENCE} are the least; give a longer one")
    wanted = [logits_of(exact, UNQUANTISED, text) for text in texts]
    for name, runner, kv_dtype in [("bfloat16", rounded, UNQUANTISED), *((kind, exact, kind) for kind in QUANTISED)]:
        pairs = zip(texts, wanted, strict=True)
        parts = [compare(logits_of(runner, kv_dtype, text), own, text) for text, own in pairs]
        _add_quality(report, f"{name}_{label}", parts)


def logits_of(runner: ModelRunner, kv_dtype: str, text: Sequence[int]) -> Tensor:
    """[positions, vocab] logits after the tokens from FIRST on but the last, in two chunks over a pool of this type."""
    layout = replace(runner.layout, kv_dtype=kv_dtype)
    blocks = -(-len(text) // layout.block_size)
    tier = DeviceTier(layout, blocks * layout.block_nbytes, clock=time.monotonic)
    kv, logits = [tier.kv(layer) for layer in range(layout.layers)], torch.empty(0)
    for start, stop in ((0, FIRST), (FIRST, len(text))):
        table, count = list(range(-(-stop // layout.block_size))), stop - start
        span = Span(0, count, stop, table)
        logits = runner.forward(kv, [span], text[start:stop], range(start, stop), range(count))
    return logits[:-1]


def compare(logits: Tensor, own: Tensor, text: Sequence[int]) -> Compared:
    """Logits against the unquantised model's own."""
    found, wanted = torch.log_softmax(logits.double(), -1), torch.log_softmax(own.double(), -1)
    following = torch.tensor(text[FIRST + 1 :])[:, None]
    return Compared(
        kl=(wanted.exp() * (wanted - found)).sum(-1),
        agrees=(found.argmax(-1) == wanted.argmax(-1)).double(),
        loss=-found.gather(1, following)[:, 0],
        own_loss=-wanted.gather(1, following)[:, 0],
    )


def _add_quality(report: Report, name: str, parts: Sequence[Compared]) -> None:
    kl = [float(part.kl.mean()) for part in parts]
    report.add(f"{name}_kl_mean", [sum(kl) / len(kl)], "nats")
    report.add(f"{name}_kl_p99", [float(torch.cat([part.kl for part in parts]).quantile(0.99))], "nats")
    report.add(f"{name}_top1_agreement", [float(torch.cat([part.agrees for part in parts]).mean())], "ratio")
    change = torch.cat([part.loss for part in parts]).mean() - torch.cat([part.own_loss for part in parts]).mean()
    report.add(f"{name}_perplexity", [float(change.exp())], "ratio")


def sizes(report: Report) -> None:
    """Room, for the shape of Llama 3 8B."""
    for kv_dtype in KV_DTYPES:
        layout = replace(LLAMA_8B, kv_dtype=kv_dtype)
        name = LLAMA_8B.dtype if kv_dtype == UNQUANTISED else kv_dtype
        report.add(f"{name}_token_bytes", [layout.token_nbytes], "bytes")
        report.add(f"{name}_blocks_a_gib", [(1 << 30) // layout.block_nbytes], "blocks")


def promotion(report: Report, rounds: int) -> None:
    """The time to bring the same tokens into the pool from each tier, int8 against bfloat16, in turns."""
    with tempfile.TemporaryDirectory(prefix="bench-kv-", dir=Path.cwd()) as folder, PrivateRedis() as server:
        for name in ("host", "disk", "redis"):
            with (
                _filled(name, Path(folder), server.url, UNQUANTISED) as plain,
                _filled(name, Path(folder), server.url, "int8") as quantised,
            ):
                for work in (plain, quantised):
                    work()
                times = [(_seconds(plain), _seconds(quantised)) for _ in range(rounds)]
            own, other = ([pair[place] * 1e3 for pair in times] for place in (0, 1))
            report.add(f"promote_{name}_bfloat16_ms", own, "ms")
            report.add(f"promote_{name}_int8_ms", other, "ms")
            report.add(f"promote_{name}_int8_vs_bfloat16", ratios(other, own), "ratio")


@contextmanager
def _filled(name: str, folder: Path, url: str, kv_dtype: str) -> Iterator[Callable[[], None]]:
    """A tier that holds the blocks; what brings all of them into a pool's blocks."""
    layout = replace(LLAMA_8B, kv_dtype=kv_dtype)
    device = DeviceTier(layout, PROMOTED_BLOCKS * layout.block_nbytes, clock=time.monotonic)
    tier, metas = _tier(name, folder / f"{name}-{kv_dtype}", url, layout), _metas(layout)
    if tier.write(metas, device.payloads(range(PROMOTED_BLOCKS))) != PROMOTED_BLOCKS:
        raise RuntimeError(f"tier {name} did not take the blocks; it said {tier.stats().problem!r}")
    block_ids = device.allocate(PROMOTED_BLOCKS) or []
    names = [meta.hash for meta in metas]

    def promote() -> None:
        landing = device.landing(block_ids)
        count = tier.read(names, landing.buffers).count
        if count != PROMOTED_BLOCKS:
            raise RuntimeError(f"tier {name} gave {count} of {PROMOTED_BLOCKS} blocks back")
        device.land(landing, count)

    try:
        yield promote
    finally:
        tier.close()


def _tier(name: str, path: Path, url: str, layout: KVLayout) -> Tier:
    codec = BlockCodec(layout, _scheme(layout).digest())
    if name == "host":
        return HostTier(layout, PROMOTED_BLOCKS * layout.block_nbytes, clock=time.monotonic)
    if name == "disk":
        capacity = PAGE_NBYTES + PROMOTED_BLOCKS * slot_nbytes(layout.block_nbytes)
        return DiskTier(path, capacity, codec=codec, clock=time.monotonic)
    return RedisTier(url, codec=codec, timeout_s=20.0, write_timeout_s=20.0)


def _metas(layout: KVLayout) -> list[BlockMeta]:
    root = _scheme(layout).root(b"")
    names = block_hashes(range(PROMOTED_BLOCKS * layout.block_size), root, layout.block_size)
    return chain_metas(names, before=root, root=root, ttl_s=3600.0)


def _scheme(layout: KVLayout) -> HashScheme:
    return HashScheme(b"f" * 32, layout.describe(), layout.block_size)


def steps(report: Report, folder: Path, rounds: int) -> None:
    """One decode row of a small bfloat16 model over contexts of 1k and 8k, pools in turns."""
    runner = ModelRunner.load(make_model_folder(folder, STEP_SHAPE))
    for context in (1024, 8192):
        pools = {}
        for kv_dtype in KV_DTYPES:
            layout = replace(runner.layout, kv_dtype=kv_dtype)
            tier = DeviceTier(layout, context // layout.block_size * layout.block_nbytes, clock=time.monotonic)
            pools[kv_dtype] = [tier.kv(layer) for layer in range(layout.layers)]
        span = Span(0, 1, context, list(range(context // runner.layout.block_size)))
        row: tuple[list[Span], list[int], list[int], list[int]] = [span], [7], [context - 1], [0]
        seconds: dict[str, list[float]] = {kv_dtype: [] for kv_dtype in KV_DTYPES}
        for turn in range(rounds + 1):
            for kv_dtype, kv in pools.items():
                took = _seconds(partial(runner.forward, kv, *row))
                seconds[kv_dtype] += [took] if turn else []
        report.add(f"decode_{context}_bfloat16_ms", [1e3 * took for took in seconds[UNQUANTISED]], "ms")
        for kind in QUANTISED:
            report.add(f"decode_{context}_{kind}_vs_bfloat16", ratios(seconds[kind], seconds[UNQUANTISED]), "ratio")


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Train, compare, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="end within 50 s; coarser figures")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.add_argument("--model", type=Path, help="compare this model folder instead of those that are made here")
    parser.add_argument("--text", type=Path, help="on this UTF-8 text; else the Python library's")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    report, sequences, seconds = Report("kv_quality"), 3 if chosen.quick else 8, 10.0 if chosen.quick else 45.0
    text = local_text() if chosen.text is None else chosen.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="bench-kv-") as made:
        root = Path(made)
        if chosen.model is not None:
            quality(report, "model", chosen.model, token_ids(chosen.model, text), sequences)
        else:
            _own_models(report, root, text, sequences, seconds)
        sizes(report)
        promotion(report, 5 if chosen.quick else 11)
        steps(report, root / "steps", 3 if chosen.quick else 7)
    report.print(as_json=chosen.json)


def _own_models(report: Report, root: Path, text: str, sequences: int, seconds: float) -> None:
    drawn = random_model(root / "random")
    ids = token_ids(drawn, text)
    unseen = ids[len(ids) * 9 // 10 :]
    trained, loss = train(root / "trained", ids, seconds)
    report.add("training_loss", [loss], "nats")
    folders = {"trained": trained, "outliers": with_outliers(trained, root / "outliers"), "random": drawn}
    for label, folder in folders.items():
        quality(report, label, folder, unseen, sequences)


if __name__ == "__main__":
    main()
