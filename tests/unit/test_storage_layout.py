"""Where a project's things lie, and that one module alone joins their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gnomon_storage.layout import ProjectLayout

ROOT = Path(__file__).parents[2]
JOINED = re.compile(
    r"""child\([^)]*["'](activations|checkpoints|dictionaries|profiles)["']|[}/](activations|checkpoints|dictionaries|profiles)/"""
)


@pytest.mark.parametrize("url", ["file:///data/projects", "/data/projects", "s3://bucket/projects"])
def test_places_are_where_earlier_releases_put_them(url: str) -> None:
    places = ProjectLayout.of(url, "team")
    root = f"{url if '://' in url else f'file://{url}'}/team"
    assert ProjectLayout.open(root).store("act_1").url == places.store("act_1").url == f"{root}/activations/act_1"
    assert places.checkpoints("job_1").url == f"{root}/checkpoints/job_1"
    assert places.checkpoints("job_1", "k8").url == f"{root}/checkpoints/job_1/k8"
    assert places.dictionary("dict_1").url == f"{root}/dictionaries/dict_1"
    assert places.profile("job_1", 2).url == f"{root}/profiles/job_1/attempt-0002.json.gz"


def test_nobody_else_joins_these_names() -> None:
    sources = [path for room in ("api", "service", "workers", "storage") for path in (ROOT / room).rglob("*.py")]
    assert len(sources) > 150
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in sources
        if path.name != "layout.py" and (match := JOINED.search(_code(path)))
    }
    assert not found


def _code(path: Path) -> str:
    """The text without docstrings, which may speak of places."""
    return re.sub(r'"""[\s\S]*?"""', "", path.read_text())
