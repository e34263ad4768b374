"""The parts of the canonical mode: sizes of forwards, the audit of operations, products that tell, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from tests.workers.exact_rig import canonical_runner, default_runner, exact_folder, exact_rig
from workers.attention.exact_backend import ExactBackend
from workers.attention.step import Span
from workers.build import build_engine
from workers.canonical import products
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
