"""The ranks of one worker, and what they tell one another: `torch.distributed` without its process-wide default group.

Two groups: the model's tensors go over NCCL where every rank has a GPU and over gloo elsewhere, everything else over
gloo. Groups are made of their own objects, so that several workers, or all ranks of one in tests, fit in a process.

The ranks find one another through a file in a folder that only this user may open, and talk over the loopback: they
are of one node, since a worker is placed as one bundle. So there is no port to be guessed, and nobody else joins.

Every collective has a deadline. A rank that ended is noticed at once, since its sockets close.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from workers.tensor_parallel.lost import RankLost

LOOPBACK = "127.0.0.1"
RENDEZVOUS = "ranks"
_HEAD = 8  # bytes that say how long a message is
_INLINE = 4096 - _HEAD  # of a message, sent with its length


class RankGroup:
    """This rank's end. Owned by one thread at a time; all ranks call the same methods in the same order.

    Attributes:
        rank: of this process, from 0. size: how many there are. collectives: carried out so far.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        *,
        join_timeout_s: float,
        timeout_s: float,
        device: torch.device | None = None,
    ) -> None:
        """Meet the other ranks.

        Args:
            folder: where they meet; private to this user, new for each start of the worker.
            join_timeout_s: how long the others may take to come. timeout_s: how long any collective may take.
            device: of this rank's model; None: the CPU.

        Raises:
            RankLost: they did not come in time.
        """
        self.rank, self.size, self.collectives = rank, size, 0
        store = dist.FileStore(str(folder / RENDEZVOUS), size)  # type: ignore[attr-defined]  # the stubs lack it
        store.set_timeout(timedelta(seconds=join_timeout_s))
        with self._told("meeting the other ranks"):
            self._control = _gloo(PrefixStore("control", store), rank, size, timeout_s)
            if device is not None and device.type == "cuda" and _may_use_nccl(size):
                self._model = _nccl(PrefixStore("model", store), rank, size, timeout_s, device)
            else:
                self._model = _gloo(PrefixStore("model", store), rank, size, timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        """How long any collective may take from now on."""
        for backend in (self._control, self._model):
            backend._set_default_timeout(timedelta(seconds=timeout_s))

    def close(self) -> None:
        """Leave: ranks that wait for this one give up at once. Not while another thread is in a collective."""
        self._control = self._model = None

    # --- numbers ---

    def least(self, values: Sequence[int]) -> list[int]:
        """Place by place the least that any rank says; all give as many."""
        numbers = torch.tensor(values, dtype=torch.int64)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]  # the stubs know the enum by its inner name
        with self._told("agreeing on numbers"):
            self._control.allreduce([numbers], options).wait()
        return [int(number) for number in numbers]

    def numbers_of_first(self, values: Sequence[int]) -> list[int]:
        """What rank 0 says; all give as many."""
        numbers = torch.tensor(values, dtype=torch.int64)
        self._from_first(numbers)
        return [int(number) for number in numbers]

    # --- messages ---

    def message_of_first(self, message: bytes = b"") -> bytes:
        """What rank 0 gives; the others give nothing. They wait for it no longer than any collective may take."""
        head = torch.zeros(_HEAD + _INLINE, dtype=torch.uint8)
        if self.rank == 0:
            _write(head, 0, len(message).to_bytes(_HEAD, "little") + message[:_INLINE])
        self._from_first(head)
        raw = head.numpy().tobytes()
        length = int.from_bytes(raw[:_HEAD], "little")
        if length <= _INLINE:
            return raw[_HEAD : _HEAD + length]
        rest = torch.zeros(length - _INLINE, dtype=torch.uint8)
        if self.rank == 0:
            _write(rest, 0, message[_INLINE:])
        self._from_first(rest)
        return raw[_HEAD:] + rest.numpy().tobytes()

    def messages_of_all(self, message: bytes) -> list[bytes]:
        """What each rank gives, in the order of the ranks."""
        longest = -self.least([-len(message)])[0]
        mine = torch.zeros(_HEAD + longest, dtype=torch.uint8)
        _write(mine, 0, len(message).to_bytes(_HEAD, "little") + message)
        found = [torch.zeros_like(mine) for _ in range(self.size)]
        with self._told("hearing all ranks"):
            self._control.allgather([found], [mine]).wait()
        raws = [each.numpy().tobytes() for each in found]
        return [raw[_HEAD : _HEAD + int.from_bytes(raw[:_HEAD], "little")] for raw in raws]

    # --- the model's tensors ---

    def add_up(self, part: Tensor) -> Tensor:
        """The sum over the ranks, in the place of `part`. Every rank gets the same bits."""
        with self._told("adding up a layer's outputs"):
            self._model.allreduce([part]).wait()
        return part

    def side_by_side(self, part: Tensor) -> Tensor:
        """The ranks' parts, equally large, joined at their last dimension in the order of the ranks."""
        part = part.contiguous()
        found = [torch.empty_like(part) for _ in range(self.size)]
        with self._told("joining a layer's outputs"):
            self._model.allgather([found], [part]).wait()
        return torch.cat(found, dim=-1)

    def _from_first(self, tensor: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        with self._told("hearing rank 0"):
            self._control.broadcast([tensor], options).wait()

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        self.collectives += 1
        try:
            yield
        except RuntimeError as error:
            first = str(error).strip().partition("\n")[0]
            raise RankLost(
                f"rank {self.rank} of {self.size} lost another one while {doing} ({first}); the worker ends and is "
                "started again, and the log of the rank that ended says why"
            ) from error


def _write(tensor: Tensor, start: int, data: bytes) -> None:
    tensor.numpy()[start : start + len(data)] = list(data) if len(data) < 64 else memoryview(data)


def _gloo(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupGloo(store, rank, size, options)


def _may_use_nccl(size: int) -> bool:
    """NCCL wants a GPU of its own for each rank; ranks that share one add up over gloo."""
    return dist.is_nccl_available() and torch.cuda.device_count() >= size


def _nccl(store: Any, rank: int, size: int, timeout_s: float, device: torch.device) -> Any:
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(store, rank, size, options)
