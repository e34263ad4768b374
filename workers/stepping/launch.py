"""Launching a step and taking in what came of it: the two halves that a step has once it may run behind the host.

`DirectLauncher` computes by plain calls, one step at a time; it is what a CPU does. `BufferedLauncher` puts a step's
numbers into static buffers, replays a graph where one fits, samples on the device and leaves the tokens there, so that
the next step can be launched before the host has seen them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from workers.attention.captured import PagedBackend
from workers.attention.step import KVViews, Step, make_step
from workers.device.choice import device_of
from workers.device.cpu import Done
from workers.device.interface import Device, Event
from workers.models import ModelRunner
from workers.sampler import Sampled
from workers.sequence import Sequence
from workers.stepping.buckets import Bucket
from workers.stepping.buffers import Capacity, HostBuffers, StepBuffers, nbytes
from workers.stepping.graphs import StepGraphs
from workers.stepping.sampling import DrawPlan, plan_draws, read_rows, sample_rows, samples_on_device
from workers.stepping.work import StepWork

SampleOnHost = Callable[[list[Sequence], Tensor], dict[Sequence, Sampled]]


@dataclass(slots=True, eq=False)
class Flight:
    """A step that was launched.

    Attributes:
        work: what it computes. event: its end. started: when it was launched, on the engine's clock.
        logits: [R, vocab], of rows that the host samples; set by then. packed: what the device sampled, on the host.
        given_back: blocks that were given back while it was the last step in flight.
    """

    work: StepWork
    event: Event
    started: float = 0.0
    logits: list[Tensor] = field(default_factory=list)
    packed: Tensor | None = None
    given_back: list[int] = field(default_factory=list)

    def sampled(self, on_host: SampleOnHost) -> dict[Sequence, Sampled]:
        """Wait for the step; the token of each sequence that it made up to date.

        Raises:
            RuntimeError: it failed.
        """
        self.event.wait()
        if self.packed is not None:
            return dict(zip(self.work.ready, read_rows(self.packed, self.work.draws), strict=True))
        return on_host(self.work.ready, self.logits[0]) if self.work.ready else {}


class Launcher(Protocol):
    """How steps are computed.

    Attributes:
        runs_ahead: whether the next step may be launched while one runs.
    """

    runs_ahead: bool

    def launch(self, work: StepWork) -> Flight:
        """Start to compute a step, behind those launched before.

        Raises:
            RuntimeError: it failed at once.
        """
        ...

    def settle(self) -> None:
        """Wait until the device has nothing to do, after a launch that failed."""
        ...

    def close(self) -> None:
        """Let go of the pool and the graphs."""
        ...


class DirectLauncher:
    """Computes a step by the model's own `forward`, whatever kind of runner it is.

    On a GPU the calls return before the device has computed anything: the step has ended when its event says so, and
    only then are its blocks anyone else's business.
    """

    runs_ahead = False

    def __init__(self, runner: ModelRunner, kv: KVViews, device: Device | None = None) -> None:
        """Of this model over these views of the pool; `device`: None: the one that the model lies on."""
        self._runner, self._kv = runner, kv
        self._device = device or device_of(runner.device)

    def launch(self, work: StepWork) -> Flight:
        """As `Launcher.launch`."""
        flight = Flight(work, Done())
        flight.event = self._device.queue(lambda: self._compute(flight))
        return flight

    def settle(self) -> None:
        """As `Launcher.settle`."""
        self._device.synchronise()

    def close(self) -> None:
        """As `Launcher.close`."""
        self._kv = ()

    def _compute(self, flight: Flight) -> None:
        work = flight.work
        logits = self._runner.forward(self._kv, work.spans, work.token_ids, work.positions, work.rows)
        flight.logits.append(logits)


class BufferedLauncher:
    """Computes steps behind the host; see the module.

    Attributes:
        runs_ahead: as `Launcher` says. buffers: the static ones, on the device.
    """

    def __init__(
        self, runner: ModelRunner, kv: KVViews, device: Device, capacity: Capacity, *, runs_ahead: bool
    ) -> None:
        """Make the buffers; without graphs until `use` gives some."""
        self._runner, self._kv, self._device, self.runs_ahead = runner, kv, device, runs_ahead
        memory = torch.zeros(nbytes(capacity), dtype=torch.uint8, device=device.torch_device)
        self.buffers = StepBuffers(memory, capacity)
        self.buffers.slots.fill_(-1)
        self._hosts = [HostBuffers(device, capacity), HostBuffers(device, capacity)]
        self._tokens = torch.zeros(capacity.sequences, dtype=torch.int64, device=device.torch_device)
        self._graphs = StepGraphs({})

    def use(self, graphs: StepGraphs) -> None:
        """Replay these where a step fits one."""
        self._graphs = graphs

    def launch(self, work: StepWork) -> Flight:
        """As `Launcher.launch`."""
        host = self._hosts[0]
        self._hosts.reverse()  # the other one may still be read by the step in flight
        sequences, rows, longest = len(work.spans), len(work.token_ids), work.longest
        graph = self._graphs.choose(rows, sequences, longest)
        bucket = graph or Bucket(rows, sequences, longest)
        plan = self._plan(work)
        host.fill(work, bucket, None if plan is None else plan.numbers)
        flight = Flight(work, Done())
        if plan is not None:
            flight.packed = self._device.pinned((len(work.ready), plan.columns), torch.float64)
        flight.event = self._device.queue(lambda: self._compute(flight, host, bucket, graph, plan))
        return flight

    def settle(self) -> None:
        """As `Launcher.settle`."""
        self._device.synchronise()

    def close(self) -> None:
        """As `Launcher.close`."""
        self._device.synchronise()
        self._graphs, self._kv = StepGraphs({}), ()

    def _plan(self, work: StepWork) -> DrawPlan | None:
        """How the device samples; None: the host does, or nobody is ready."""
        on_device = all(samples_on_device(row.params) for row in work.draws)
        return plan_draws(work.draws, self._runner.vocab_size) if work.draws and on_device else None

    @torch.inference_mode()
    def _compute(
        self, flight: Flight, host: HostBuffers, bucket: Bucket, graph: Bucket | None, plan: DrawPlan | None
    ) -> None:
        """Give the device its work: numbers, forward, sampling, result. Nothing here waits for it."""
        work, buffers, ready = flight.work, self.buffers, len(flight.work.ready)
        buffers.copy_from(host, bucket.sequences)
        if work.is_fed:
            self._feed(buffers.ids[: bucket.rows])
        if graph is not None:
            logits = self._graphs.replay(graph)[:ready]
        else:
            step = self._eager_step(work)
            ids, positions = buffers.ids[: bucket.rows], buffers.positions[: bucket.rows]
            logits = self._runner.forward_tensors(step, ids, positions, buffers.wanted[:ready])
        if plan is None or flight.packed is None:
            flight.logits.append(logits)
            return
        tokens, packed = sample_rows(logits, buffers.draws[:ready], plan)
        self._tokens[:ready] = tokens
        flight.packed.copy_(packed, non_blocking=True)

    def _feed(self, ids: Tensor) -> None:
        """Put the tokens that the step before has sampled where its numbers stand."""
        ids.copy_(torch.where(ids < 0, self._tokens[(-1 - ids).clamp_min(0)], ids))

    def _eager_step(self, work: StepWork) -> Step:
        """Nothing but its spans: whoever attends knows best what of them it needs on the device."""
        backend = self._runner.backend
        if isinstance(backend, PagedBackend):
            nothing, size = self.buffers.slots[:0], self.buffers.capacity.block_size
            return Step(self._kv, size, work.spans, nothing, nothing, backend)
        return make_step(self._kv, work.spans, backend)


def needs_token_before_next_step(sequence: Sequence) -> bool:
    """Whether the host must see the token that is being sampled before anything can be launched behind it.

    So it is for rows that the host samples: it masks by a grammar or penalises by tokens that it must know first. Stop
    strings and end tokens need no such wait: a token too many is computed and thrown away.
    """
    return not samples_on_device(sequence.job.sampling)


def must_wait(ready: Items[Sequence]) -> bool:
    """Whether the next step may be launched only when this one's tokens are known."""
    return any(needs_token_before_next_step(sequence) for sequence in ready)
