"""Everybody sees the same requests, and they are the kind of traffic that they claim to be."""

from __future__ import annotations

from dataclasses import replace

from deploy.workload import WorkloadShape, make_workload


def test_the_same_seed_gives_the_same_requests_and_another_gives_others() -> None:
    assert make_workload(seed=3) == make_workload(seed=3)
    assert make_workload(seed=3) != make_workload(seed=4)


def test_chats_of_a_tenant_share_their_system_prompt_and_nobody_elses() -> None:
    workload = make_workload()
    systems: dict[str, set[str]] = {}
    for session in workload.sessions:
        if session.kind == "chat":
            systems.setdefault(session.tenant, set()).add(session.system)
    assert {len(of_tenant) for of_tenant in systems.values()} == {1}
    assert len(set.union(*systems.values())) == len(WorkloadShape().tenants)


def test_there_are_at_least_eight_turns_and_every_question_differs() -> None:
    workload = make_workload()
    assert min(len(session.turns) for session in workload.sessions if session.kind == "chat") >= 8
    turns = [(session.tenant, session.name, turn) for session in workload.sessions for turn in session.turns]
    assert len(set(turns)) == workload.requests


def test_the_shape_says_how_much_there_is() -> None:
    shape = replace(
        WorkloadShape(), tenants=("a", "b"), chats_per_tenant=3, turns=9, readers_per_document=1, questions=2
    )
    workload = make_workload(shape)
    assert workload.requests == 2 * (3 * 9 + 1 * 1 * 2)
    assert all(len(session.system) >= 3000 for session in workload.sessions)
