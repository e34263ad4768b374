"""A few threads that do not keep the process from ending.

Those of `concurrent.futures.ThreadPoolExecutor` are joined when the interpreter exits: one that hangs in a read of a
dead network disk would hold the process for ever.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Task(Generic[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        self._call = call

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._call()
        except Exception as error:  # noqa: BLE001
            self.future.set_exception(error)  # whoever asks for the result gets it
        else:
            self.future.set_result(result)


class DaemonPool:
    """Runs calls in the order in which they were submitted. Thread-safe. Threads start when they are needed."""

    def __init__(self, threads: int, name: str) -> None:
        """At most so many threads, named `name-0` and so on."""
        self._max, self._name = threads, name
        self._changed = threading.Condition()
        self._tasks: deque[_Task[object]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run it in one of the threads.

        Raises:
            RuntimeError: the pool is closed.
        """
        task: _Task[T] = _Task(lambda: call(*args, **kwargs))
        with self._changed:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed; nothing is run any more")
            self._tasks.append(task)  # type: ignore[arg-type]  # what a task returns matters to its future alone
            if len(self._tasks) > self._idle and len(self._threads) < self._max:
                self._start_thread()
            self._changed.notify()
        return task.future

    def close(self, timeout_s: float | None = 0.0) -> bool:
        """Cancel what has not begun, and wait so long for what has; None: until it has ended. False: some has not."""
        with self._changed:
            self._closed = True
            while self._tasks:
                future = self._tasks.popleft().future
                if future.cancel():
                    future.set_running_or_notify_cancel()  # wakes those who wait for it
            self._changed.notify_all()
        with self._changed:
            return self._changed.wait_for(lambda: self._idle == len(self._threads), timeout_s)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._tasks or self._closed)
                if not self._tasks:
                    return  # counts as idle for ever
                self._idle -= 1
                task = self._tasks.popleft()
            task.run()
            del task  # and what it returned
