"""Streams that wait: who is woken by what, and how little is asked for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, event

from gnomon_service.db.engine import Database
from gnomon_service.rest.news import News
from gnomon_service.tenancy.keys import Keys
from tests.support.service_jobs import PROJECT, Bench
from tests.support.waiting import LIMIT_S

OFTEN_S = 0.01


@pytest.fixture
def statements(database: Database) -> Iterator[list[str]]:
    """Every statement that any database of this process is asked."""
    told: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        told.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield told
    event.remove(Engine, "before_cursor_execute", note)


def woken(database: Database, key_id: str, job_ids: list[str], change: Callable[[], object], n: int = 1) -> set[str]:
    """Which of the streams of jobs are woken by a change, once n were."""
    news = News(database, Keys(database), poll_s=OFTEN_S)

    async def wait() -> set[str]:
        waits = {
            asyncio.create_task(news.wait(job_id, key_id, after=1, most_s=LIMIT_S), name=job_id) for job_id in job_ids
        }
        await asyncio.sleep(10 * OFTEN_S)
        assert not any(task.done() for task in waits), "woken by nothing"
        await asyncio.to_thread(change)
        while sum(task.done() for task in waits) < n:
            await asyncio.sleep(OFTEN_S)
        await asyncio.sleep(10 * OFTEN_S)
        for task in waits:
            task.cancel()
        return {task.get_name() for task in waits if task.done() and not task.cancelled()}

    return asyncio.run(wait())


def test_a_stream_is_woken_by_its_own_job_s_events_alone(database: Database) -> None:
    bench = Bench(database)
    made = [bench.submit(store=number).id for number in range(3)]
    key_id = Keys(database).create(project=PROJECT, name="k", scopes=("read",)).id
    assert woken(database, key_id, made, bench.claim) == {made[0]}
    assert woken(database, key_id, made[1:], lambda: bench.queue.cancel(PROJECT, made[2])) == {made[2]}


def test_all_streams_of_a_key_are_woken_when_it_is_revoked(database: Database) -> None:
    bench, keys = Bench(database), Keys(database)
    made = [bench.submit(store=number).id for number in range(3)]
    key_id = keys.create(project=PROJECT, name="k", scopes=("read",)).id
    assert woken(database, key_id, made, lambda: keys.revoke(PROJECT, key_id), 3) == set(made)


def test_the_database_is_asked_as_much_for_a_hundred_streams_as_for_one(
    database: Database, statements: list[str]
) -> None:
    bench = Bench(database)
    made = [bench.submit(store=number).id for number in range(100)]
    news = News(database, Keys(database), poll_s=OFTEN_S)
    key_id = Keys(database).create(project=PROJECT, name="k", scopes=("read",)).id
    asked = []

    async def look(job_ids: list[str]) -> None:
        waits = [asyncio.create_task(news.wait(job_id, key_id, after=1, most_s=0.2)) for job_id in job_ids]
        await asyncio.sleep(0)
        with news._lock:
            waiting = list(news._waiting)
        assert len(waiting) == len(job_ids)
        news._due(waiting)
        statements.clear()
        assert news._due(waiting) == []
        asked.append(len(statements))
        await asyncio.gather(*waits)

    news._poll_s = LIMIT_S  # it is asked by hand
    asyncio.run(look(made[:1]))
    asyncio.run(look(made))
    news.close()
    assert asked[0] == asked[1]
