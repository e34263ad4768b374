"""Every sampling option from the client over gRPC through the router to a real engine and back."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import jsonschema
import pytest

from router.core import Router
from tests.router.edge import serving
from tests.router.rig import SECRET, Rig, all_ready
from tests.workers.engine_rig import make_rig, oracle, prompts
from warmkv import errors
from warmkv.client import AsyncClient
from workers.config import WorkerConfig
from workers.server import WorkerServer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@asynccontextmanager
async def served() -> AsyncIterator[tuple[AsyncClient, Router]]:
    fleet, engine = Rig(), make_rig().engine
    config = WorkerConfig(name="w0", model_dir="", model_name="tiny", fleet_secret=SECRET)
    server = fleet.workers["w0"] = WorkerServer(config, engine)
    fleet.addresses["w0"] = server.start()
    try:
        router = await fleet.start_router(model_name="tiny")
        await all_ready(router, 1)
        async with serving(router) as edge, AsyncClient(f"127.0.0.1:{edge.grpc_port}") as client:
            yield client, router
    finally:
        await fleet.close()


@pytest.mark.asyncio
async def test_constraints_penalties_bias_and_logprobs_reach_the_engine_and_their_effect_the_client() -> None:
    (prompt,) = prompts(1, lengths=[50])
    async with served() as (client, _):
        answer = await client.generate(token_ids=prompt, json_schema=SCHEMA, max_tokens=99, seed=3).result()
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)
        answer = await client.generate(token_ids=prompt, regex="[a-f]{3,9}", seed=3).result()
        assert re.fullmatch("[a-f]{3,9}", answer.text)

        plain = await client.generate(token_ids=prompt, max_tokens=30, temperature=0.0, logprobs=3).result()
        assert [len(each.top) for each in plain.logprobs] == [3] * 30
        assert [each.token_id for each in plain.logprobs] == plain.token_ids
        raw = oracle().logits(prompt)[-1].log_softmax(-1)
        assert plain.logprobs[0].logprob == pytest.approx(raw[plain.token_ids[0]].item(), abs=1e-3)
        assert [top.token_id for top in plain.logprobs[0].top] == raw.topk(3).indices.tolist()

        (wanted,) = oracle().generate([prompt], 30, repetition_penalty=1.6)
        punished = await client.generate(
            token_ids=prompt, max_tokens=30, temperature=0.0, repetition_penalty=1.6
        ).result()
        assert punished.token_ids[:10] == wanted.token_ids[:10]
        banned = await client.generate(
            token_ids=prompt, max_tokens=1, temperature=0.0, logit_bias={plain.token_ids[0]: -100.0}
        ).result()
        assert banned.token_ids == [raw.topk(2).indices[1].item()]


@pytest.mark.asyncio
async def test_answers_to_one_prompt_share_its_blocks_and_one_bill() -> None:
    (prompt,) = prompts(1, lengths=[100])
    async with served() as (client, router):
        stream = client.generate(token_ids=prompt, n=4, seed=9, max_tokens=12, ignore_eos=True, logprobs=1)
        answers = (await stream.result()).samples
        assert [len(each.logprobs) for each in answers] == [12] * 4
        assert len({tuple(each.token_ids) for each in answers}) == 4
        assert (stream.usage.prompt_tokens_by_fate.computed, stream.usage.completion_tokens) == (100, 48)
        tiers = (await client.cache_stats()).workers[0].tiers
        assert tiers[0].stores <= 100 // 16 + 4  # the prompt's blocks once, and what the answers filled
        for place, each in enumerate(answers):
            alone = await client.generate(token_ids=prompt, seed=9 + place, max_tokens=12, ignore_eos=True).result()
            assert alone.token_ids == each.token_ids
        assert router.stats(show_prompts=False).prompt_tokens.device > 0


@pytest.mark.asyncio
async def test_what_cannot_be_done_is_told_with_the_right_error() -> None:
    (prompt,) = prompts(1)
    async with served() as (client, _):
        with pytest.raises(errors.InvalidRequest, match="unclosed group") as caught:
            await client.generate(token_ids=prompt, regex="(").result()
        assert caught.value.reason == "INVALID_REQUEST"
        with pytest.raises(errors.NotFound) as missing:
            await client.generate(token_ids=prompt, adapter="lora").result()
        assert missing.value.reason == "ADAPTER_NOT_FOUND"
        with pytest.raises(errors.InvalidRequest, match=r"presence_penalty is 3; set it from -2 to 2"):
            await client.generate(token_ids=prompt, presence_penalty=3.0).result()
        # The grammar names a special token that this model's tokenizer does not have: only the worker can know.
        with pytest.raises(errors.InvalidRequest, match=r"constraint|vocabulary"):
            await client.generate(token_ids=prompt, grammar='start: "a" <|nowhere|>').result()
