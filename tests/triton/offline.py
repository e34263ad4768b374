"""Compile attention launches for a GPU that is not there: what the interpreter cannot tell.

    PYTHONPATH=.venv-triton:. .venv/bin/python tests/triton/offline.py

prints a line a kernel: shared memory, registers and spilled bytes as ptxas counts them.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget

from workers.attention import triton_kernels as kernels
from workers.attention.step import Span, make_step
from workers.attention.triton_backend import TritonBackend

SHARED_LIMIT = 232_448 - 1024  # bytes a thread block may have on compute capability 9.0, less what the system takes


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as a GPU of compute capability 9.0 would run it; bytes, but for the registers of a thread."""

    name: str
    shared: int
    registers: int
    spilled: int


class _AbsentDriver:
    """What the compiler asks of a driver; it launches nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


class _Compiling:
    """Stands in a kernel's place and compiles what it would launch."""

    def __init__(self, kernel: triton.runtime.JITFunction, found: list[Compiled]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*arguments: object, **options: object) -> None:
            log = io.StringIO()
            self._kernel.device_caches.clear()  # what was compiled before would say nothing
            with contextlib.redirect_stdout(log):
                compiled = self._kernel.warmup(*arguments, grid=grid, **options)
            text = log.getvalue()
            registers = re.search(r"Used (\d+) registers", text)
            spilled = re.search(r"(\d+) bytes spill stores", text)
            self._found.append(
                Compiled(
                    self._kernel.__name__,
                    compiled.metadata.shared,
                    int(registers[1]) if registers else -1,
                    int(spilled[1]) if spilled else -1,
                )
            )

        return launch


@contextlib.contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Within it the backend compiles instead of launching; the list is what it compiled."""
    found: list[Compiled] = []
    names = ("write_rows", "decode_splits", "combine_splits", "prefill_rows")
    real = {name: getattr(kernels, name) for name in names}
    driver = triton.runtime.driver._active  # to ask for it otherwise would look for a GPU
    triton.runtime.driver.set_active(_AbsentDriver())
    try:
        with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
            triton.knobs.nvidia.dump_ptxas_log = True
            triton.knobs.compilation.always_compile = True
            for name in names:
                setattr(kernels, name, _Compiling(real[name], found))
            yield found
    finally:
        triton.runtime.driver._active = driver
        for name in names:
            setattr(kernels, name, real[name])


def compile_step(
    dim: int, dtype: torch.dtype, *, group: int = 4, v_dim: int | None = None, **scoring
) -> list[Compiled]:
    """What a mixed step of one decode row and a chunk compiles to."""
    kv_heads, blocks, v_dim = 8, 80, v_dim or dim
    pool = torch.zeros(blocks, 2, 16 * kv_heads * (dim + v_dim), dtype=dtype)[:, 1]
    keys = pool[:, : 16 * kv_heads * dim].view(blocks, 16, kv_heads, dim)
    values = pool[:, 16 * kv_heads * dim :].view(blocks, 16, kv_heads, v_dim)
    spans = [Span(0, 1, 600, list(range(38))), Span(1, 63, 200, list(range(38, 51)))]
    step = make_step([(keys, values)], spans, TritonBackend())
    query, key, value = (
        torch.zeros(64, heads, size, dtype=dtype).transpose(0, 1)
        for heads, size in ((kv_heads * group, dim), (kv_heads, dim), (kv_heads, v_dim))
    )
    options = {"scale": 0.1, "window": None, "softcap": None, "sinks": None} | scoring
    with compiling() as found:
        step.backend.attend(step, 0, query, key, value, **options)
    return found


def main() -> None:
    """Every head size and dtype, plain and with everything on."""
    everything = {"window": 128, "softcap": 50.0, "sinks": torch.zeros(32, dtype=torch.bfloat16)}
    for dim, dtype in product((64, 80, 96, 128, 256), (torch.bfloat16, torch.float16, torch.float32)):
        for name, scoring in (("plain", {}), ("everything", everything)):
            for each in compile_step(dim, dtype, **scoring):
                fits = "" if each.shared <= SHARED_LIMIT else "  TOO MUCH SHARED MEMORY"
                print(dim, str(dtype).removeprefix("torch."), name, each, fits, flush=True)


if __name__ == "__main__":
    main()
