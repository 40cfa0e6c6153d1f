"""A connection goes back to its pool clean, whatever is raised while it is used, on each database."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from sqlalchemy import Connection, insert, select, update

from gnomon.errors import InvalidRequest, NotFound
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import api_keys
from gnomon_service.tenancy.keys import LONGEST_LIFE_S, Keys

RAISED: dict[str, BaseException] = {
    "a fault": OverflowError("of a value"),
    "a refusal": NotFound("it is not there", code="key_not_found"),
    "an interrupt": KeyboardInterrupt(),
    "a generator that is given up": GeneratorExit(),
}
Opens = Callable[[Database], AbstractContextManager[Connection]]
OPENS: dict[str, Opens] = {"read": Database.read, "write": Database.write}


@pytest.fixture
def keys(database: Database) -> Keys:
    """The keys of a database that holds many."""
    made = Keys(database)
    made.create(project="default", name="first", scopes=("read",))
    with database.write() as connection:
        row = dict(connection.execute(select(api_keys)).mappings().one())
        connection.execute(insert(api_keys), [{**row, "id": f"k{number:011d}"} for number in range(500)])
    return made


@pytest.mark.parametrize("opens", OPENS)
@pytest.mark.parametrize("case", RAISED)
def test_an_error_in_a_loop_over_rows_harms_no_later_write(
    case: str, opens: str, keys: Keys, database: Database
) -> None:
    kept: list[BaseException] = []  # as a log or a cycle keeps an error, and its traceback the cursor
    try:
        with OPENS[opens](database) as connection:
            for _row in connection.execute(select(api_keys)).mappings():
                raise RAISED[case]
    except BaseException as error:
        kept.append(error)
    assert kept == [RAISED[case]]
    other = Database(database.url, busy_timeout_s=5.0)
    Keys(other).create(project="default", name="by another process", scopes=("read",))
    other.close()
    for _ in range(12):  # more than the pool holds for one thread
        keys.create(project="default", name="later", scopes=("read",))
    assert len(keys.list("default")) == 514


def test_what_was_written_before_an_error_is_not_kept(keys: Keys, database: Database) -> None:
    with pytest.raises(OverflowError), database.write() as connection:
        connection.execute(update(api_keys).values(name="changed"))
        for _row in connection.execute(select(api_keys)):
            raise OverflowError
    assert "changed" not in {key.name for key in keys.list("default")}


@pytest.mark.parametrize("life_s", [LONGEST_LIFE_S + 1, 999999999999999999, -1e18, float("inf"), float("nan")])
def test_a_key_that_could_not_be_read_is_not_made(life_s: float, keys: Keys) -> None:
    with pytest.raises(InvalidRequest, match=r"expires_in_s=.*, wanted 1000000000 at most"):
        keys.create(project="default", name="x", scopes=("read",), expires_in_s=life_s)
    assert "x" not in {key.name for key in keys.list("default")}


@pytest.mark.parametrize("when_s", [999999999999999999.0, 1e308])
def test_one_row_of_an_earlier_release_hides_no_other(when_s: float, keys: Keys, database: Database) -> None:
    with database.write() as connection:
        connection.execute(update(api_keys).where(api_keys.c.id == "k00000000007").values(expires_at=when_s))
    listed = {key.id: key.expires_at for key in keys.list("default")}
    assert len(listed) == 501
    assert (expires_at := listed["k00000000007"]) is not None
    assert expires_at.year == 9999
