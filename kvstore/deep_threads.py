"""A few threads with room for recursion that follows what callers sent.

A parser in another language that recurses over its input ends the whole process when its thread's stack ends, and no
`except` sees it. The usual 8 MiB are soon gone. Where there is a bound on the input, a large stack holds what fits it;
it is address space, and takes memory only as far as it was ever used.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

_SETTING = threading.Lock()  # the size of stacks is a setting of the whole process


def deep_threads(threads: int, *, stack_bytes: int, name: str) -> ThreadPoolExecutor:
    """A pool of so many threads, all started, each with a stack of `stack_bytes`.

    A thread that others start in the meantime has such a stack too, which does no harm.

    Raises:
        RuntimeError: the system gives no more threads or address space. ValueError: stacks cannot have this size.
    """
    with _SETTING:
        before = threading.stack_size(stack_bytes)
        try:
            return _started(ThreadPoolExecutor(threads, thread_name_prefix=name), threads)
        finally:
            threading.stack_size(before)


def _started(pool: ThreadPoolExecutor, threads: int) -> ThreadPoolExecutor:
    """A pool starts a thread only while none is idle: hold all of them up until the last one is there."""
    gate = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(gate.wait)
        gate.wait()
    except BaseException:
        gate.abort()
        pool.shutdown(wait=False)
        raise
    return pool
