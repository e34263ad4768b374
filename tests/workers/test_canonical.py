"""The parts of the canonical mode: sizes of forwards, the audit of operations, products that tell, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from kvstore.layout import KVLayout
from tests.workers.exact_rig import canonical_runner, default_runner, exact_folder, exact_rig, reference
from workers.attention import exact_backend
from workers.attention.exact_backend import ROWS, ExactBackend
from workers.attention.step import Span, make_step
from workers.build import build_engine
from workers.canonical import attention, products
from workers.canonical.attention import rows_agree
from workers.canonical.audit import Audit
from workers.canonical.check import NotDeterministic, find_sizes, refuse_mixed_rows
from workers.canonical.rows import CPU_ANCHOR, CPU_SIZES, CUDA_SIZES, padded, parts, spans_of
from workers.canonical.runner import CanonicalRunner
from workers.config import WorkerConfig

CPU = torch.device("cpu")


@given(st.integers(1, 5000), st.sampled_from([CPU_SIZES, CUDA_SIZES, (16,), (4, 64, 512)]))
def test_a_step_is_cut_into_forwards_of_the_sizes_and_nothing_is_lost(total, sizes):
    found = parts(total, sizes)
    assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])]
    assert found[-1].stop == total
    assert all(part.size in sizes and 0 < part.stop - part.start <= part.size for part in found)
    assert all(part.stop - part.start == part.size for part in found[:-1]), "only the last one is filled up"


def test_on_a_gpu_a_step_of_few_rows_is_filled_up_to_256():
    assert [part.size for part in parts(1, CUDA_SIZES)] == [256]
    assert [part.size for part in parts(200, CUDA_SIZES)] == [256]
    assert [part.size for part in parts(2048 + 17, CUDA_SIZES)] == [2048, 256]


def test_wanted_rows_are_filled_up_too():
    assert [padded(count, (4, 16, 64)) for count in (0, 1, 4, 5, 17, 64)] == [0, 4, 4, 16, 64, 64]


def test_spans_are_cut_with_the_step():
    spans = [Span(0, 1, 33, [5, 6, 7]), Span(1, 20, 40, [1, 2, 3])]
    first, second = parts(21, (16,))
    assert spans_of(spans, first, 16) == [Span(0, 1, 33, [5, 6, 7]), Span(1, 15, 35, [1, 2, 3])]
    assert spans_of(spans, second, 16) == [Span(0, 5, 40, [1, 2, 3])]


def test_the_runner_runs_nothing_but_its_sizes_and_pads_what_is_short(monkeypatch):
    runner, seen = canonical_runner("llama", "float32"), []
    run = runner._run

    def watched(step, ids, positions, rows):
        seen.append((len(ids), len(rows)))
        return run(step, ids, positions, rows)

    monkeypatch.setattr(runner, "_run", watched)
    with exact_rig(runner) as rig:
        rig.run(rig.job("a", list(range(5, 75)), max_tokens=3, ignore_eos=True))
    assert seen == [(64, 0), (16, 16), (16, 16), (16, 16)]
    assert runner.sizes == tuple(size for size in CPU_SIZES if size >= CPU_ANCHOR)


@torch.inference_mode()
def test_an_operation_that_mixes_rows_is_seen():
    x, w, frequencies = torch.randn(4, 8), torch.randn(8, 8), torch.randn(1, 3)
    with Audit() as audit:
        torch.nn.functional.silu(linear(x, w)).mean(-1)
        x[:, :1] @ frequencies
    assert audit.doubtful == set()
    with Audit() as audit:
        x.sort(0)
        x @ w
    assert audit.doubtful == {"sort", "matmul"}


def test_a_mixture_of_experts_is_refused_and_says_why():
    with pytest.raises(NotDeterministic, match=r"sort.*mixture of experts.*engine.deterministic"):
        refuse_mixed_rows(lambda: torch.zeros(4).sort())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vanishing_product_shows_another_order_of_adding_which_ordinary_numbers_hide(dtype):
    x, w = products.vanishing_product((512, 64), 16, dtype, CPU)
    one = linear(x, w)
    other = linear(x.flip(1), w.flip(1))  # the same sums, from behind
    assert float((one != other).float().mean()) > 0.3
    assert float(one.float().abs().max()) < 1.0, "each sum is zero but for rounding"


def test_sizes_whose_products_differ_are_left_out(monkeypatch):
    runner = canonical_runner("llama", "float32")
    kept, small = runner.sizes, runner._backend.small_block
    monkeypatch.setattr("workers.canonical.check.agree", lambda shapes, size, *rest: size <= 64)
    sizes, _ = find_sizes(runner, ExactBackend(), CPU_ANCHOR, CPU_SIZES, set())
    runner.sizes = kept
    assert max(sizes) == 64
    assert small == runner._backend.small_block


def test_a_machine_whose_rows_differ_by_place_is_refused(monkeypatch):
    runner = canonical_runner("llama", "float32")
    kept = runner.sizes
    forward = runner.forward
    noise = iter(range(10_000))
    monkeypatch.setattr(runner, "forward", lambda *step: forward(*step) + 1e-6 * next(noise))
    with pytest.raises(NotDeterministic, match=r"workers\.threads"):
        find_sizes(runner, ExactBackend(), CPU_ANCHOR, CPU_SIZES, set())
    runner.sizes = kept


def test_workers_share_blocks_only_with_those_of_the_same_mode_and_the_same_bits():
    folder = exact_folder("llama", "float32")
    again = CanonicalRunner.load(folder)
    exact, default = canonical_runner("llama", "float32"), default_runner("llama", "float32")
    assert again.fingerprint == exact.fingerprint != default.fingerprint
    config = WorkerConfig("w0", str(folder), "tiny", device="cpu", device_bytes=4 << 20, host_bytes=0)
    engines = [build_engine(config), build_engine(replace(config, deterministic=True))]
    assert engines[0].info.scheme.differences(engines[1].info.scheme) == ["model_fingerprint", "canonical"]
    for engine in engines:
        engine.close(flush_s=0)


LAYOUTS = [
    KVLayout(1, 2, k_dim, v_dim, dtype, 16)
    for k_dim, v_dim in ((32, 32), (128, 128), (48, 32))
    for dtype in ("float32", "bfloat16", "float16")
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.k_dim}-{layout.v_dim}-{layout.dtype}")
def test_attention_has_the_same_bits_for_any_number_of_rows_even_where_sums_vanish(layout):
    backend = ExactBackend()
    assert rows_agree(backend, layout, CPU)
    query, key, value = (each.to(getattr(torch, layout.dtype)) for each in attention._vanishing(layout))
    out = attention._attend(backend, layout, [query, key, value], 32, None)
    assert float(out.abs().max()) < 0.01, "each sum is zero but for rounding"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [32, 64, 96])
def test_where_few_rows_of_attention_round_differently_they_are_filled_up(monkeypatch, rows, dtype):
    runner = canonical_runner("llama", dtype)
    kept = runner.sizes, runner._backend
    attend = exact_backend.scaled_dot_product_attention

    def from_behind(q, k, v, attn_mask, scale):
        if q.shape[2] == rows:
            k, v, attn_mask = k.flip(2), v.flip(2), attn_mask.flip(1)
        return attend(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(exact_backend, "scaled_dot_product_attention", from_behind)
    backend = ExactBackend()
    assert not rows_agree(backend, runner.layout, CPU)
    monkeypatch.setattr(runner, "_backend", backend)
    find_sizes(runner, backend, CPU_ANCHOR, CPU_SIZES, set())
    assert backend.block == ROWS
    assert rows_agree(backend, runner.layout, CPU)
    runner.sizes = kept[0]


def test_two_threads_give_the_bits_of_any_cut():
    torch.set_num_threads(2)
    try:
        runner = CanonicalRunner.load(exact_folder("llama", "float32"))
        tokens = [(7919 * n + 13) % 1000 + 5 for n in range(600)]
        whole = reference(runner, tokens)
        for cuts in ([1], [511], [513], [599], list(range(37, 600, 37))):
            cut = reference(runner, tokens, cuts)
            assert torch.equal(cut.logits, whole.logits), cuts
            assert cut.blocks == whole.blocks, cuts
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "k_dim", "v_dim", "options"),
    [
        (4, 2, 32, 32, {"sinks": True}),
        (8, 1, 64, 64, {"sinks": True, "window": 100, "softcap": 5.0}),
        (4, 4, 48, 32, {}),
        (6, 2, 64, 64, {"window": 100}),
    ],
)
def test_cuts_change_no_bit_of_attention_with_sinks_or_keys_wider_than_values(
    heads, kv_heads, k_dim, v_dim, options, dtype
):
    torch.manual_seed(1)
    query, key, value = (torch.randn(n, 600, dim).to(dtype) for n, dim in _dims(heads, kv_heads, k_dim, v_dim))
    sinks = torch.randn(heads).to(dtype) if options.get("sinks") else None
    scores = {"window": None, "softcap": None, **options, "scale": k_dim**-0.5, "sinks": sinks}

    def attended(cuts):
        pool = tuple(torch.full((38, 16, kv_heads, dim), float("nan"), dtype=dtype) for dim in (k_dim, v_dim))
        backend, out = ExactBackend(), []
        for start, stop in zip((0, *cuts), (*cuts, 600), strict=True):
            step = make_step([pool], [Span(0, stop - start, stop, list(range(-(-stop // 16))))], backend)
            rows = slice(start, stop)
            out.append(backend.attend(step, 0, query[:, rows], key[:, rows], value[:, rows], **scores))
        return torch.cat(out)

    whole = attended([])
    assert bool(whole.isfinite().all())
    for cuts in ([1], [511], [513], [599], [3, 5, 100, 612 - 50, 590], list(range(37, 600, 37))):
        assert torch.equal(attended(cuts), whole), cuts


def _dims(heads, kv_heads, k_dim, v_dim):
    return (heads, k_dim), (kv_heads, k_dim), (kv_heads, v_dim)
