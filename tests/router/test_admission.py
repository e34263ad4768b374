from __future__ import annotations

import pytest

from router.admission import Admission
from router.errors import Draining, Overloaded


def test_limits_refuse_with_a_time_to_come_back_and_places_are_given_back() -> None:
    admission = Admission(max_in_flight=2, max_per_tenant=1)
    with admission.admitted("a"):
        with pytest.raises(Overloaded, match="max_in_flight_per_tenant") as refused, admission.admitted("a"):
            pass
        assert refused.value.retry_after_s
        with admission.admitted("b"):
            assert admission.in_flight == 2
            with pytest.raises(Overloaded, match="router's limit"), admission.admitted("c"):
                pass
    assert admission.in_flight == 0
    with admission.admitted("a"):
        pass


def test_a_failing_request_gives_its_place_back() -> None:
    admission = Admission(1, 1)
    with pytest.raises(ZeroDivisionError), admission.admitted("a"):
        raise ZeroDivisionError
    assert admission.in_flight == 0


def test_a_draining_router_admits_nothing_and_what_runs_goes_on() -> None:
    admission = Admission(2, 2)
    with admission.admitted("a"):
        admission.drain()
        assert admission.in_flight == 1
        with pytest.raises(Draining), admission.admitted("a"):
            pass
