"""What is started, resized and sent away: single decisions, and whole workloads on clusters that never were."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gnomon_service.dispatch.decisions import Decisions, Gang
from gnomon_service.dispatch.order import AGE_S, LIFT_S, Ask, Share, in_order
from gnomon_service.dispatch.reasons import drained
from gnomon_service.dispatch.room import FreeDevices, Node, Shape
from gnomon_service.dispatch.scheduling import decide
from tests.support.scheduling import Job, Simulation, backlog, lower_bound_s, random_cluster, random_jobs

FOUR = [Node(id="n", n_devices=4)]


def ask(job_id: str, n: int = 1, size: int = 1, **fields: Any) -> Ask:
    """A gang of n groups."""
    values: dict[str, Any] = {"project": "p", "tier": 1, "priority": 0, "waited_s": 0.0, "shapes": (Shape(n, size),)}
    return Ask(job_id=job_id, **(values | fields))


def gang(job_id: str, *places: str, **fields: Any) -> Gang:
    """A running job with these places."""
    values: dict[str, Any] = {"project": "p", "tier": 1, "priority": 0, "places": places}
    return Gang(job_id=job_id, **(values | fields))


def started(decisions: Decisions) -> dict[str, tuple[str, ...]]:
    """Where what is started goes."""
    return {start.job_id: start.places for start in decisions.starts}


def left(decisions: Decisions) -> list[str]:
    """Who is sent away."""
    return [leave.job_id for leave in decisions.leaves]


# ---------------------------------------------------------------------------------------------- places


def test_a_group_is_on_one_node_and_groups_on_as_few_as_can_be() -> None:
    room = FreeDevices.of([Node(id="a", n_devices=3), Node(id="b", n_devices=2), Node(id="c", n_devices=4)])
    assert room.place(Shape(1, 2)) == ("b", "b")
    assert room.place(Shape(2, 2)) == ("c", "c", "c", "c")
    assert room.place(Shape(4, 2)) == ("c", "c", "c", "c", "a", "a", "b", "b")
    assert room.place(Shape(3, 3)) is None
    assert room.place(Shape(9, 1)) == ("c",) * 4 + ("a",) * 3 + ("b",) * 2


def test_gangs_start_whole_or_not_at_all() -> None:
    decisions = decide([ask("first", 3), ask("second", 2)], [], FOUR, {})
    assert started(decisions) == {"first": ("n", "n", "n")}
    assert decisions.order == ["second"]
    assert decisions.reasons["second"].code == "no_room"
    assert "needs 2 devices, 1 free of 4" in decisions.reasons["second"].message


def test_what_can_never_fit_is_told_so_and_promised_nothing() -> None:
    nodes = [Node(id="a", n_devices=2), Node(id="b", n_devices=2)]
    asks = [ask("sum", 1, 4, priority=9), ask("all", 5, 1, priority=8), ask("small", 4)]
    decisions = decide(asks, [], nodes, {})
    assert set(started(decisions)) == {"small"}
    assert decisions.reasons["sum"].message == "needs 4 devices on one node; no node has more than 2"
    assert decisions.reasons["all"].message == "needs 5 devices; the cluster has 4 on which may be started"


# ---------------------------------------------------------------------------------------------- order


def test_a_class_goes_first_then_what_a_project_is_owed_then_priority_then_age() -> None:
    shares = {"p": Share(used_s=100.0), "q": Share(used_s=0.0)}
    asks = [
        ask("old", waited_s=5.0),
        ask("new"),
        ask("preferred", priority=1),
        ask("owed", project="q"),
        ask("urgent", tier=2),
    ]
    assert [a.job_id for a in in_order(asks, shares, {})] == ["urgent", "owed", "preferred", "old", "new"]


def test_age_makes_up_for_priority_and_in_the_end_for_class() -> None:
    aged = [ask("aged", waited_s=10 * AGE_S + 1), ask("young", priority=10)]
    assert [a.job_id for a in in_order(aged, {}, {})] == ["aged", "young"]
    spare = [ask("spare", tier=0, waited_s=LIFT_S), ask("normal", priority=100)]
    assert [a.job_id for a in in_order(spare, {}, {})] == ["spare", "normal"]


def test_weights_are_kept_among_what_waits() -> None:
    shares = {"a": Share(weight=1.0), "b": Share(weight=3.0)}
    asks = [ask(f"{project}{i}", project=project, waited_s=float(-i)) for project in "ab" for i in range(40)]
    first = [a.project for a in in_order(asks, shares, {})][:40]
    assert (first.count("a"), first.count("b")) == (10, 30)


def test_quotas_hold_a_project_back_and_nobody_else() -> None:
    shares = {"p": Share(n_jobs_most=1), "q": Share(n_devices_most=1)}
    running = [gang("p0", "n")]
    asks = [
        ask("p1"),
        ask("q2", 2, project="q"),
        ask("q1", project="q", priority=-1),
        ask("r", project="r"),
    ]
    decisions = decide(asks, running, FOUR, shares)
    assert set(started(decisions)) == {"q1", "r"}
    assert decisions.reasons["p1"].message == "quota of project p: 1 of 1 running"
    assert decisions.reasons["q2"].message == "quota of project q: 0 of 1 devices"


# ---------------------------------------------------------------------------------------------- promises


def test_small_jobs_run_around_a_large_one_that_waits_but_only_where_they_are_done_in_time() -> None:
    running = [gang("holder", "n", "n", ends_in_s=100.0)]
    asks = [
        ask("large", 4, priority=9),
        ask("long", expected_s=500.0, priority=8),
        ask("unknown", priority=7),
        ask("short", expected_s=90.0, priority=6),
    ]
    decisions = decide(asks, running, FOUR, {})
    assert set(started(decisions)) == {"short"}
    (start,) = decisions.starts
    assert start.guest_for_s == 100.0
    assert decisions.reasons["large"].message.endswith("holder holds the rest, expected free in 2 min")
    assert decisions.reasons["long"].code == "behind"
    assert "kept for job large" in decisions.reasons["long"].message


def test_what_the_promise_leaves_over_is_for_everybody() -> None:
    running = [gang("holder", "n", "n", ends_in_s=100.0)]
    decisions = decide([ask("large", 3, priority=9), ask("long", expected_s=5000.0)], running, FOUR, {})
    (start,) = decisions.starts
    assert (start.job_id, start.guest_for_s) == ("long", None)


def test_a_guest_that_stays_too_long_is_sent_away_as_soon_as_that_helps() -> None:
    guest = gang("guest", "n", "n", guest_for_s=-1.0)
    assert left(decide([ask("large", 4)], [guest], FOUR, {})) == ["guest"]
    assert left(decide([ask("large", 4)], [guest, gang("other", "n")], FOUR, {})) == []
    assert left(decide([ask("small", 2)], [guest], FOUR, {})) == []
    in_time = gang("guest", "n", "n", guest_for_s=1.0)
    assert left(decide([ask("large", 4)], [in_time], FOUR, {})) == []


# ---------------------------------------------------------------------------------------------- preemption


def test_a_higher_class_sends_away_as_little_as_it_needs() -> None:
    running = [
        gang("normal", "n", ran_s=10.0),
        gang("spare_old", "n", tier=0, ran_s=900.0),
        gang("spare_new", "n", tier=0, ran_s=5.0),
        gang("urgent", "n", tier=2),
    ]
    decisions = decide([ask("now", tier=2)], running, FOUR, {})
    assert left(decisions) == ["spare_new"]
    assert decisions.reasons["now"].code == "room_is_made"
    assert sorted(left(decide([ask("now", 3, tier=2)], running, FOUR, {}))) == ["normal", "spare_new", "spare_old"]
    assert left(decide([ask("now", 4, tier=2)], running, FOUR, {})) == [], "it would not fit all the same"
    assert left(decide([ask("same", tier=0)], running, FOUR, {})) == []


def test_of_several_that_could_go_only_those_go_that_are_needed() -> None:
    nodes = [Node(id="a", n_devices=1), Node(id="b", n_devices=4)]
    running = [gang("small", "a", tier=0), gang("large", "b", "b", "b", "b", tier=0, ran_s=9.0)]
    assert left(decide([ask("now", 1, 4, tier=1)], running, nodes, {})) == ["large"]


def test_what_is_leaving_is_waited_for_and_nobody_else_is_sent_away() -> None:
    running = [gang("leaving", "n", "n", tier=0, is_leaving=True), gang("spare", "n", "n", tier=0)]
    decisions = decide([ask("now", 2, tier=2), ask("later", 1, tier=0)], running, FOUR, {})
    assert left(decisions) == []
    assert decisions.reasons["now"].message == "starts as soon as leaving made room"
    assert started(decisions) == {}


# ---------------------------------------------------------------------------------------------- elastic jobs


def test_elastic_jobs_take_what_gangs_leave() -> None:
    asks = [ask("harvest", n_most=8, priority=5), ask("gang", 2)]
    assert {job: len(places) for job, places in started(decide(asks, [], FOUR, {})).items()} == {
        "harvest": 2,
        "gang": 2,
    }
    grown = decide([], [gang("harvest", "n", n_most=3)], FOUR, {})
    assert grown.sizes == {"harvest": ("n", "n", "n")}


def test_elastic_jobs_share_what_is_left() -> None:
    running = [gang("one", "n", n_most=8), gang("two", "n", n_most=8)]
    assert {job: len(places) for job, places in decide([], running, FOUR, {}).sizes.items()} == {"one": 2, "two": 2}


def test_elastic_jobs_shrink_for_a_gang_and_do_not_grow_back_meanwhile() -> None:
    running = [gang("harvest", "n", "n", "n", "n", n_most=8)]
    decisions = decide([ask("gang", 3)], running, FOUR, {})
    assert decisions.sizes == {"harvest": ("n",)}
    assert decisions.leaves == []
    assert decisions.reasons["gang"].message == "starts as soon as harvest made room"
    shrinking = [gang("harvest", "n", n_most=8, gives=("n", "n", "n"))]
    waiting = decide([ask("gang", 3)], shrinking, FOUR, {})
    assert (started(waiting), waiting.sizes) == ({}, {})
    done = decide([ask("gang", 3)], [gang("harvest", "n", n_most=8)], FOUR, {})
    assert set(started(done)) == {"gang"}
    assert done.sizes == {}


def test_an_elastic_job_of_a_lower_class_leaves_where_shrinking_is_not_enough() -> None:
    running = [gang("harvest", "n", "n", "n", "n", n_most=8, tier=0)]
    assert left(decide([ask("gang", 4, tier=1)], running, FOUR, {})) == ["harvest"]
    same = decide([ask("gang", 4, tier=0)], running, FOUR, {})
    assert (same.leaves, same.sizes) == ([], {})


# ---------------------------------------------------------------------------------------------- draining


def test_a_drained_node_is_left_and_not_started_on() -> None:
    nodes = [Node(id="a", n_devices=2, is_drained=True), Node(id="b", n_devices=2)]
    decisions = decide([ask("new", 1)], [gang("there", "a"), gang("here", "b")], nodes, {})
    assert left(decisions) == ["there"]
    assert decisions.leaves[0].why == "node 'a' is drained"
    assert started(decisions) == {"new": ("b",)}


def test_a_drained_cluster_starts_nothing_and_says_so() -> None:
    running = [gang("harvest", "n", n_most=4)]
    decisions = decide([ask("new")], running, FOUR, {}, starts_nothing=drained("key k"))
    assert (started(decisions), decisions.sizes) == ({}, {})
    assert decisions.reasons["new"].message == "the cluster is drained by key k: nothing is started"


# ---------------------------------------------------------------------------------------------- workloads


@pytest.mark.parametrize("seed", range(24))
def test_no_rule_is_broken_and_every_job_is_done(seed: int) -> None:
    draw = random.Random(seed)
    nodes = random_cluster(draw)
    jobs = random_jobs(draw, nodes, draw.randint(5, 40))
    run = Simulation(nodes, jobs)
    run.run()
    end = max(life.done_at or 0.0 for life in run.lives.values())
    assert end <= 3 * lower_bound_s(nodes, jobs)


def test_projects_that_always_have_work_get_what_their_weights_say() -> None:
    shares = {"a": Share(weight=1.0), "b": Share(weight=3.0)}
    run = Simulation([Node(id=f"n{i}", n_devices=8) for i in range(2)], backlog("ab", n=100), shares, stop_at=5000.0)
    run.run()
    total = run.used_s["a"] + run.used_s["b"]
    assert run.used_s["b"] / total == pytest.approx(0.75, rel=0.1)


def test_a_stream_of_small_jobs_does_not_starve_a_large_one() -> None:
    """Each would fit at once; without the promise the large one never would."""
    small = [
        Job(job_id=f"s{i:03d}", project="p", comes_at=20.0 * i, work_s=100.0, shapes=(Shape(1),)) for i in range(200)
    ]
    large = Job(job_id="large", project="p", comes_at=50.0, work_s=10.0, shapes=(Shape(1, 4),))
    run = Simulation(FOUR, [*small, large])
    run.run()
    started_at = run.lives["large"].first_start
    assert started_at is not None
    assert started_at <= 50.0 + 2 * 100.0


def test_the_same_is_decided_twice() -> None:
    draw = random.Random(3)
    nodes = random_cluster(draw)
    asks = [ask(f"j{i}", draw.choice([1, 2]), waited_s=float(i)) for i in range(50)]
    first, second = (decide(order, [], nodes, {}) for order in (asks, asks[::-1]))
    assert (first.starts, first.order, first.reasons) == (second.starts, second.order, second.reasons)
