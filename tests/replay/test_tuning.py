"""The search: text form, drawing, halving, the verdict; deterministic, and it finds what was planted."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.comparison import Fleet, Result, Run, Source, clock_tick_s, prepared, read, run_once, running, spread
from replay.front import OBJECTIVES, Finalist, dominated
from replay.outcome import Figures
from replay.policy_space import Configuration, draw, parse_configuration
from replay.significance import difference
from replay.traces import Request, Trace, load, shipped
from replay.tuning import Search, Tuned, candidates, cost_in_replays, rungs, trials_within, tune
from router.policy import POLICIES, checked_weights, find_policy

SIZE = 16
RULE = "sglang_cache_aware"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of 40 blocks that all share, and 20 of their own, more than one worker can compute.

    SGLang's rule sends all to the worker that holds the 40 until it is `balance_abs` requests ahead: never, at present.
    """
    lines = []
    for n in range(450):
        fields = {"timestamp_ms": n * 50, "input_length": 60 * SIZE, "output_length": 3, "block_size": SIZE}
        lines.append(json.dumps({**fields, "hash_runs": [[0, 40], [40 + 20 * n, 20]]}))
    path = tmp_path_factory.mktemp("planted") / "planted.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def search(path: Path, **changes: object) -> Search:
    fleet = Fleet(workers=4, capacity_tokens=6000, prefill_tokens_per_s=4000.0)
    known = {"present": Configuration(RULE, {"balance_abs": 1000.0}), "policies": (RULE,), "trials": 8, "seeds": 2}
    requests = len(prepared(Source((path,))).requests)
    return Search(Source((path,)), fleet, requests, **{**known, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found(planted: Path) -> Tuned:
    with running(1) as runner:
        return tune(search(planted), runner)


def test_it_finds_the_weight_that_was_planted_and_says_that_it_is_better(found: Tuned) -> None:
    assert found.winner.policy == RULE
    weights = found.winner.weights
    # Two thirds of each prompt match: a higher threshold undoes the rule as a lower limit of imbalance does.
    assert weights.get("balance_abs", 64) < 1000 or weights.get("cache_threshold", 0.3) > 2 / 3
    assert found.difference is not None
    assert found.difference.certain
    assert found.difference.relative < -0.5
    assert found.difference.mean + found.difference.half < 0
    assert found.winner.command.startswith(f"warmkv policy set {RULE} --weight ")
    best, present = found.finalist(found.winner), found.finalist(found.search.present)
    assert best.spread("ttft_mean").mean < present.spread("ttft_mean").mean / 2
    assert best.on_front


def test_the_same_seed_finds_the_same_in_one_process_and_in_two(planted: Path, found: Tuned) -> None:
    with running(2) as runner:
        again = tune(search(planted), runner)
    assert again == found
    with running(1) as runner:
        assert tune(search(planted, seed=2), runner).trials != found.trials


def test_nothing_is_better_than_the_best(planted: Path, found: Tuned) -> None:
    with running(1) as runner:
        tuned = tune(search(planted, present=found.winner, trials=2, policies=("round_robin",)), runner)
    assert tuned.winner.text == found.winner.text
    assert tuned.difference is None


def test_the_held_out_part_chooses_nothing(planted: Path, found: Tuned, tmp_path: Path) -> None:
    """A trace whose end is another one gives the same trials and the same winner."""
    lines = planted.read_text().splitlines()
    trained = found.search.trained
    changed = [
        json.dumps({**json.loads(line), "input_length": 700, "hash_runs": [[0, 40]]}) for line in lines[trained:]
    ]
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([*lines[:trained], *changed]) + "\n")
    with running(1) as runner:
        tuned = tune(search(other), runner)
    assert [(t.configuration.text, t.relative, t.kept) for t in tuned.trials] == [
        (t.configuration.text, t.relative, t.kept) for t in found.trials
    ]
    assert tuned.winner.text == found.winner.text
    assert tuned.finalist(tuned.winner).times != found.finalist(found.winner).times


def test_the_present_one_is_never_left_out_and_rungs_shrink(found: Tuned) -> None:
    present = found.search.present.text
    for rung in {trial.rung for trial in found.trials}:
        trials = [trial for trial in found.trials if trial.rung == rung]
        assert [trial.kept for trial in trials if trial.configuration.text == present] == [True]
        assert [trial.relative for trial in trials if trial.configuration.text == present] == [1.0]
        assert trials == sorted(trials, key=lambda trial: trial.relative)


def test_a_short_trace_is_refused(planted: Path) -> None:
    with running(1) as runner, pytest.raises(ValueError, match="record more"):
        tune(Search(Source((planted,), first=100), Fleet(2, 5000), 100, Configuration("sticky"), ("sticky",)), runner)


def plain(requests: int, **changes: object) -> Search:
    known = {"present": Configuration("cache_aware"), "policies": tuple(POLICIES)}
    source = Source((Path("none"),))
    return Search(source, Fleet(1, 1), requests, **{**known, **changes})  # type: ignore[arg-type]


def test_rungs_are_three_times_as_long_as_those_before_and_never_too_short() -> None:
    assert rungs(plain(10_000)) == [(777, 1), (2333, 1), (7000, 2)]
    assert rungs(plain(2000)) == [(466, 1), (1400, 2)]
    assert rungs(plain(500)) == [(350, 2)]


def test_a_budget_buys_as_many_trials_as_it_pays_for() -> None:
    for replays in (30.0, 80.0, 300.0):
        trials = trials_within(plain(10_000), replays)
        assert cost_in_replays(plain(10_000, trials=trials)) <= replays + 1
        assert cost_in_replays(plain(10_000, trials=trials + 10)) > replays
    assert trials_within(plain(10_000), 0.0) == len(POLICIES)


def test_candidates_begin_with_what_is_in_force_and_every_default() -> None:
    given = plain(10_000, trials=30, present=Configuration("cache_aware", {"load": 3.0}))
    texts = [each.text for each in candidates(given)]
    assert texts[0] == "cache_aware:load=3"
    assert texts[1 : 1 + len(POLICIES)] == list(POLICIES)
    assert len(set(texts)) == len(texts) == 30
    assert len(candidates(plain(10_000, trials=30, policies=("round_robin",)))) == 2


@given(st.sampled_from(sorted(POLICIES)), st.integers(0, 10**6))
def test_drawn_weights_are_allowed_near_their_default_and_survive_their_text_form(policy: str, seed: int) -> None:
    drawn = draw(policy, random.Random(seed))
    checked_weights(find_policy(policy), drawn.weights)
    assert parse_configuration(drawn.text) == drawn
    for weight in find_policy(policy).weights:
        value = drawn.weights.get(weight.name, weight.default)
        assert drawn.weights.get(weight.name) != weight.default
        if weight.default:
            assert weight.default / 21 <= value <= weight.default * 21


def test_drawn_weights_lie_around_their_default_on_a_logarithmic_scale() -> None:
    draws = [draw("cache_aware", random.Random(n)).weights.get("price_cap") for n in range(3000)]
    logs = [math.log(value / 10.0) for value in draws if value is not None]
    assert statistics.fmean(logs) == pytest.approx(0.0, abs=0.1)
    assert statistics.stdev(logs) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("best", "no policy 'best'"),
        ("cache_aware:speed=1", "no weight 'speed'"),
        ("cache_aware:load", "is no weight"),
        ("cache_aware:load=fast", "is no weight"),
        ("cache_aware:load=-1", "set it from 0 to 100"),
        ("cache_aware:load=nan", "set it from 0 to 100"),
        ("round_robin:x=1", "it has none"),
    ],
)
def test_a_wrong_policy_says_what_there_is(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_configuration(text)
    assert said in str(caught.value)


def test_a_policy_at_its_defaults_has_the_name_alone() -> None:
    assert parse_configuration("cache_aware: load=1, tie_ms=7").text == "cache_aware:tie_ms=7"
    assert parse_configuration("cache_aware:tie_ms=7").command == "warmkv policy set cache_aware --weight tie_ms=7"
    assert parse_configuration("sticky").command == "warmkv policy set sticky"


def figures(**changes: float) -> Figures:
    known: dict[str, object] = dict.fromkeys(Figures.__slots__, 0.0)
    return Figures(**{**known, "split": {}, "requests": 1, **changes})  # type: ignore[arg-type]


def finalist(times: list[float], *seeds: Figures) -> Finalist:
    group = list(seeds) or [figures(ttft_mean_s=statistics.fmean(times))] * 2
    return Finalist(Configuration("sticky"), group, True, times, [0.0] * len(times), [100] * len(times))


@given(st.integers(0, 10**6))
def test_a_difference_is_certain_about_as_seldom_as_it_says_when_there_is_none(seed: int) -> None:
    rng = random.Random(seed)
    before = [rng.expovariate(1.0) for _ in range(400)]
    apart = difference(OBJECTIVES["ttft_mean"], finalist(before), finalist(list(before)))
    assert (apart.mean, apart.certain) == (0.0, False)


def test_noise_is_seldom_called_a_gain_and_a_gain_is_seen() -> None:
    false = seen = 0
    for seed in range(300):
        rng = random.Random(seed)
        before = [rng.expovariate(1.0) for _ in range(400)]
        same = [value + rng.gauss(0, 0.5) for value in before]
        false += difference(OBJECTIVES["ttft_mean"], finalist(before), finalist(same)).certain
        better = [value - 0.2 for value in same]
        seen += difference(OBJECTIVES["ttft_mean"], finalist(before), finalist(better)).certain
    assert false <= 0.025 * 300 + 8  # one side of a 95 % interval
    assert seen > 295


def test_a_tail_a_hit_rate_and_a_balance_are_compared_too() -> None:
    rng = random.Random(1)
    before = [rng.expovariate(1.0) for _ in range(2000)]
    tail = difference(OBJECTIVES["ttft_p99"], finalist(before), finalist([min(2.0, value) for value in before]))
    assert tail.mean < -1
    one, other = finalist(before), finalist(before)
    hit = difference(
        OBJECTIVES["hit"],
        Finalist(one.configuration, [figures(hit=0.5)] * 2, True, before, [50.0] * 2000, [100] * 2000),
        Finalist(one.configuration, [figures(hit=0.6)] * 2, True, before, [60.0, 61.0] * 1000, [100] * 2000),
    )  # fmt: skip
    assert hit.mean == pytest.approx(-0.105)
    assert hit.certain
    uneven = [figures(busiest=value) for value in (1.5, 1.6, 1.55)]
    even = [figures(busiest=value) for value in (1.1, 1.21, 1.14)]
    assert difference(OBJECTIVES["busiest"], finalist(before, *uneven), finalist(before, *even)).certain
    assert not difference(OBJECTIVES["busiest"], finalist(before, uneven[0]), finalist(before, even[0])).certain
    assert other.spread("hit").mean == 0.0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_front_is_what_nobody_beats(points: list[tuple[int, int]]) -> None:
    front = [one for one in points if not dominated(one, points)]
    assert front
    for one in points:
        beaten = [o for o in points if o != one and o[0] <= one[0] and o[1] <= one[1]]
        assert (one in front) == (not beaten)


def test_spread_is_mean_and_half_of_the_range_of_real_numbers() -> None:
    assert spread([1.0, 2.0, 6.0]) == (3.0, 2.5)
    assert spread([float("nan"), 2.0]) == (2.0, 0.0)
    assert math.isnan(spread([float("nan")]).mean)


def test_a_coarse_clock_is_noticed() -> None:
    assert clock_tick_s(load(shipped()["mooncake_conversation"])) == 3.0
    assert clock_tick_s(load(shipped()["mooncake_synthetic"])) == 0.0
    requests = tuple(Request(n * 2.0, 1, 1, (), None, None, None, None, None) for n in range(5))
    assert clock_tick_s(Trace("apart", 16, requests)) == 0.0


def test_a_source_is_cut_and_spread_as_it_says(planted: Path) -> None:
    assert len(read(Source((planted,), first=50)).requests) == 50
    assert len(read(Source((planted,), longest=960)).requests) == 450
    with pytest.raises(ValueError, match="allow longer"):
        read(Source((planted,), longest=3))


def test_requests_are_kept_when_asked(planted: Path) -> None:
    run = Run(Source((planted,)), Fleet(2, 4000), Configuration("cache_aware"), requests=100, keep_requests=True)
    result: Result = run_once(run)
    assert len(result.times) == len(result.cached) == 100
    counted = result.times[10:]
    assert statistics.fmean(counted) == pytest.approx(result.figures.ttft_mean_s)
