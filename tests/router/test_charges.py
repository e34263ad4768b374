"""What requests are expected to take, and the account after they have ended."""

from __future__ import annotations

import pytest

from router.charges import Charges
from router.config import OverloadConfig
from router.fair_queue import FairQueue
from router.ledger import Entry
from router.quotas import TokenQuotas

CONFIG = OverloadConfig(tokens_per_minute={"a": 60_000}, cached_token_weight=0.1, output_token_weight=2.0)


def parts() -> tuple[Charges, FairQueue[str], TokenQuotas]:
    queue: FairQueue[str] = FairQueue({})
    quotas = TokenQuotas(CONFIG.tokens_per_minute, None, lambda: 0.0)
    return Charges(CONFIG, queue, quotas), queue, quotas


def ended(tenant: str = "a", code: str = "OK", *, computed: int, device: int, generated: int) -> Entry:
    fates = {"computed": computed, "device": device}
    return Entry(tenant, "w0", code, computed + device, fates, generated)


def left(quotas: TokenQuotas) -> float:
    """Tokens in the bucket: by how long a full one is away."""
    return 60_000 - quotas.wait_s("a", 60_000) * 1000


def test_cached_tokens_count_a_tenth_and_answers_twice_for_turns_and_once_for_quotas() -> None:
    charges, _, _ = parts()
    charge = charges.expected("a", prompt_tokens=1100, cached_tokens=1000, max_tokens=50)
    assert (charge.cost, charge.quota) == (100 + 100 + 2 * 50, 100 + 100 + 50)


def test_the_expected_answer_is_the_tenants_mean_and_at_most_what_it_asks_for() -> None:
    charges, _, _ = parts()
    for _ in range(100):
        charge = charges.expected("a", prompt_tokens=10, cached_tokens=0, max_tokens=1000)
        charge.sent = True
        charges.settle(charge, ended(computed=10, device=0, generated=400))
    assert charges.expected("a", prompt_tokens=0, cached_tokens=0, max_tokens=1000).quota == pytest.approx(400)
    assert charges.expected("a", prompt_tokens=0, cached_tokens=0, max_tokens=600).quota == pytest.approx(400)
    assert charges.expected("a", prompt_tokens=0, cached_tokens=0, max_tokens=7).quota == 7
    assert charges.expected("b", prompt_tokens=0, cached_tokens=0, max_tokens=1000).quota == 128


def test_answers_to_requests_that_allow_ten_times_more_are_another_matter() -> None:
    charges, _, _ = parts()
    for max_tokens, generated in ((100, 90), (1000, 700)):
        charge = charges.expected("a", prompt_tokens=10, cached_tokens=0, max_tokens=max_tokens)
        charges.settle(charge, ended(computed=10, device=0, generated=generated))
    assert charges.answer_tokens("a", 110, unknown=0.0) == 90
    assert charges.answer_tokens("a", 900, unknown=0.0) == 700
    assert charges.answer_tokens("a", 10_000, unknown=0.0) == 0


def test_answers_of_ever_more_tenants_take_bounded_memory_and_the_latest_are_kept() -> None:
    charges, _, _ = parts()
    for n in range(10_000):
        charge = charges.expected(f"tenant-{n}", prompt_tokens=10, cached_tokens=0, max_tokens=100)
        charges.settle(charge, ended(f"tenant-{n}", computed=10, device=0, generated=50))
    assert len(charges._answers) <= 4096
    assert charges.answer_tokens("tenant-9999", 100, unknown=0.0) == 50


def test_a_quota_is_charged_what_the_request_took_in_the_end() -> None:
    charges, _, quotas = parts()
    charge = charges.expected("a", prompt_tokens=5000, cached_tokens=0, max_tokens=100)
    quotas.take("a", charge.quota)
    charge.sent = True
    charges.settle(charge, ended(computed=1000, device=4000, generated=700))
    assert left(quotas) == pytest.approx(60_000 - 1000 - 400 - 700)


def test_what_was_never_sent_costs_nothing() -> None:
    charges, queue, quotas = parts()
    charge = charges.expected("a", prompt_tokens=5000, cached_tokens=0, max_tokens=100)
    quotas.take("a", charge.quota)
    charges.settle(charge, Entry("a", "", "CANCELLED", 5000))
    assert left(quotas) == 60_000
    assert not queue._flows


def test_what_its_worker_had_not_begun_costs_nothing() -> None:
    charges, queue, quotas = parts()
    queue.charge("a", 1.0)
    before = queue._flows["a"].start
    charge = charges.expected("a", prompt_tokens=5000, cached_tokens=0, max_tokens=100)
    quotas.take("a", charge.quota)
    queue.charge("a", charge.cost)
    charge.sent = True
    charges.settle(charge, Entry("a", "w0", "CANCELLED", 5000, begun=False))
    assert left(quotas) == 60_000
    assert queue._flows["a"].start == pytest.approx(before)


def test_a_lost_request_keeps_what_it_was_charged() -> None:
    charges, _, quotas = parts()
    charge = charges.expected("a", prompt_tokens=5000, cached_tokens=0, max_tokens=100)
    quotas.take("a", charge.quota)
    charge.sent = True
    charges.settle(charge, Entry("a", "w0", "UNAVAILABLE", 5000))
    assert left(quotas) == pytest.approx(60_000 - charge.quota)
