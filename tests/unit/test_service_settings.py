"""Settings, ids, logs and keys: what needs no database."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest

from gnomon.errors import InvalidRequest
from gnomon.specs.problems import plain_path
from gnomon_service.jobs.ids import make_id
from gnomon_service.logs import JsonFormatter
from gnomon_service.settings import load_settings
from gnomon_service.tenancy.keys import Principal


def test_defaults_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path))
    settings = load_settings()
    assert settings.home == tmp_path
    assert settings.database_url == f"sqlite:///{tmp_path}/gnomon.db"
    assert settings.project_root == f"file://{tmp_path}/store/projects"
    assert settings.input_roots == (str(tmp_path / "inputs"), str(Path.cwd()))


@pytest.mark.parametrize("text", ["/a,s3://b/c", ' ["/a", "s3://b/c"]'])
def test_input_roots_come_as_a_list_of_either_kind(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_INPUT_ROOTS", text)
    assert load_settings().input_roots == ("/a", "s3://b/c")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DATABASE_URL", "postgresql://gnomon:changeme@db/gnomon", "placeholder"),
        ("DATABASE_URL", "postgresql://gnomon:<password>@db/gnomon", "placeholder"),
        ("DATABASE_URL", "mysql://x", "not supported"),
        ("PORT", "70000", "65535"),
        ("LEASE_S", "6", "second chance"),
        ("EVENTS_DAYS", "-1", "greater than or equal to 0"),
        ("HOME", "/", "root of the file system"),
        ("LOG_LEVEL", "LOUD", "GNOMON_LOG_LEVEL"),
        ("INPUT_ROOTS", "[", "GNOMON_INPUT_ROOTS"),
    ],
)
def test_nonsense_is_refused_by_name(name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"GNOMON_{name}", value)
    with pytest.raises(InvalidRequest, match=re.escape(says)) as caught:
        load_settings()
    assert caught.value.code == "invalid_settings"
    assert value not in caught.value.message or len(value) < 8, "a setting may hold a secret"


def test_ids_are_of_the_form_that_specs_demand_and_sort_by_time() -> None:
    made = [make_id("job") for _ in range(50)]
    assert all(re.fullmatch(r"job_[0-9a-z]{26}", job_id) for job_id in made)
    assert [job_id[:14] for job_id in made] == sorted(job_id[:14] for job_id in made)
    assert len(set(made)) == 50


def test_a_log_line_cannot_be_forged() -> None:
    text = 'a\n{"level": "ERROR"}\x1b[31m\u202e' + "x" * 10_000
    record = logging.makeLogRecord({"name": "n", "levelname": "INFO", "msg": "message", "job": text})
    try:
        raise ValueError(text)
    except ValueError:
        record.exc_info = sys.exc_info()
    line = JsonFormatter("test").format(record)
    assert "\n" not in line
    assert line.isascii()
    assert "\x1b" not in line
    content = json.loads(line)
    assert f"... ({len(text)} characters) ..." in content["job"] and len(content["job"]) < len(text)
    assert content["job"].endswith("xxx"), "the end of a trace says why"
    assert content["process"] == "test"


@pytest.mark.parametrize(
    ("location", "path"),
    [
        (("spec", "train", "activation", "topk", "k"), "spec.activation.k"),
        (("spec", "train", "missing"), "spec.missing"),
        (("spec", "train"), "spec"),
        (("spec", "train", "list", 1, "x"), "spec.list.1.x"),
        (("other",), "other"),
    ],
)
def test_paths_are_those_of_the_users_json(location: tuple[str | int, ...], path: str) -> None:
    body = {"spec": {"kind": "train", "activation": {"kind": "topk", "k": 0}, "list": [{}, {"x": 1}]}}
    assert plain_path(location, body) == path


@pytest.mark.parametrize(
    ("has", "needs", "passes"),
    [("read", "read", True), ("read", "write", False), ("write", "read", True), ("admin", "write", True)],
)
def test_scopes_imply_lesser_ones(has: str, needs: str, passes: bool) -> None:
    principal = Principal(key_id="k", project="p", scopes=frozenset({has}))
    try:
        principal.require(needs)  # type: ignore[arg-type]
    except Exception as error:
        assert not passes
        assert type(error).__name__ == "Forbidden"
    else:
        assert passes
