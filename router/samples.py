"""Several answers to one prompt: one decision, one place in admission, one bill; a job and a life for each.

Every sample is a `Request` of its own with its own flight, so what holds for the loss of a worker holds for each of
them. They are sent to the same worker at the same moment, where all but the first wait for the prompt's blocks that the
first one computes. Sample i draws with the seed plus i: its answer is that of a request alone with that seed.

The bill is the call's: the prompt once, with the fates of the first sample that has any; the tokens of all answers. An
error of one sample is the call's error and ends the others.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace

import grpc

from router.attempts import Attempts
from router.ledger import Entry
from router.request import PreparedPrompt, Request
from warmkv.v1 import inference_pb2, worker_pb2

_SEEDS = 1 << 64


class Samples:
    """Of one call. Owned by the event loop.

    Args:
        work: the call itself: what is settled, once. job: of the first sample.
    """

    def __init__(self, work: Request, job: worker_pb2.Job, count: int, attempts: Attempts) -> None:
        self._work = work
        self._attempts = attempts
        self._samples = [work.sample(settle=self._settled, on_first=self._first_token) for _ in range(count)]
        self._places = {id(sample): place for place, sample in enumerate(self._samples)}  # equal ones are not the same
        self._jobs = [job, *(_with_seed(job, place) for place in range(1, count))]
        self._entries: dict[int, Entry] = {}
        self._running = count

    async def outputs(
        self, prepared: PreparedPrompt
    ) -> AsyncGenerator[tuple[Request, worker_pb2.SequenceOutput], None]:
        """What the samples say, each in its order; as it comes, so that none waits for another.

        Raises:
            RouterError: one of them cannot be had, or ended in an error.
        """
        first, *others = self._samples
        first.beside = list(zip(others, self._jobs[1:], strict=True))
        await self._attempts.place(first, prepared, self._jobs[0])
        tasks = {self._next(place, prepared): place for place in range(len(self._samples))}
        try:
            while tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda each: tasks[each]):
                    place, output = tasks.pop(task), task.result()
                    if output.finish_reason:
                        self._running -= 1
                    else:
                        tasks[self._next(place, prepared)] = place
                    yield self._samples[place], output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def completed(self, sample: Request, response: inference_pb2.GenerateResponse) -> inference_pb2.GenerateResponse:
        """With its index, and with usage and route of the call in the last one of all."""
        response.index = self._places[id(sample)]
        if not response.finish_reason:
            return response
        if self._running:
            response.ClearField("usage")
            response.ClearField("route")
            return response
        self._gather()
        router, first = response.route.router, self._samples[0]
        response.usage.CopyFrom(self._work.usage())
        response.route.CopyFrom(first.route(router))
        response.route.ttft_ms = self._work.ttft_ms
        response.route.retries = sum(sample.retries for sample in self._samples)
        response.route.handovers = sum(sample.handovers for sample in self._samples)
        return response

    def finish(self, code: grpc.StatusCode) -> None:
        """The caller got all answers or an error: stop what still runs. The bill waits for the last word of each."""
        self._work.code = code.name
        for sample in self._samples:
            sample.finish(code)
            self._attempts.leave(sample)

    def _next(self, place: int, prepared: PreparedPrompt) -> asyncio.Task[worker_pb2.SequenceOutput]:
        return asyncio.create_task(
            self._attempts.next_output(self._samples[place], prepared, self._jobs[place]), name="sample"
        )

    def _first_token(self, sample: Request, now: float) -> None:
        """The call's first token is the first one of any sample."""
        if self._work.ttft_ms:
            return
        self._gather()
        self._work.ttft_ms, self._work.sent_at = sample.ttft_ms, sample.sent_at
        self._work.on_first(self._work, now)

    def _gather(self) -> None:
        """What the call's bill and statistics need of its samples."""
        work, first = self._work, self._samples[0]
        work.choice, work.guest, work.record = first.choice, first.guest, first.record
        work.first_choice = first.first_choice
        work.finish_reason = first.finish_reason
        work.begun = any(sample.begun for sample in self._samples)
        work.generated = sum(sample.generated for sample in self._samples)
        work.generated_by = sum((sample.generated_by for sample in self._samples), Counter())
        work.fates = next((sample.fates for sample in self._samples if sample.fates), {})

    def _settled(self, sample: Request, entry: Entry) -> None:
        self._entries[self._places[id(sample)]] = entry
        if len(self._entries) < len(self._samples):
            return
        self._gather()
        work = self._work
        total = replace(
            self._entries[0],
            fates=work.fates,
            generated_tokens=work.generated,
            generated_by=work.generated_by,
            begun=work.begun,
        )
        work.settle(work, total)


def _with_seed(job: worker_pb2.Job, place: int) -> worker_pb2.Job:
    copy = worker_pb2.Job()
    copy.CopyFrom(job)
    copy.sampling.seed = (job.sampling.seed + place) % _SEEDS
    return copy
