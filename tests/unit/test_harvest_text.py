"""Text sources: what is read, in which order, and what is said when something is wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnomon.errors import InvalidRequest
from gnomon.specs import HarvestSpec, TextSource
from gnomon_workers.harvest.identity import store_id
from gnomon_workers.harvest.readers import READERS
from gnomon_workers.harvest.text import Tally, check_text, matches, read_documents, resolve_text


def documents(root: Path, *sources: TextSource) -> list[str]:
    """Every document of the sources."""
    return list(read_documents(resolve_text(sources, [str(root)])))


def test_every_format_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("\ufeffone\ndocument é", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "two"}\n\n{"text": "", "x": 1}\n{"text": null}\n"three"\n')
    (tmp_path / "d.json").write_text(json.dumps(["four", {"text": "five"}]))
    (tmp_path / "e.json").write_text(json.dumps({"a": {"extract": "six"}, "b": {"extract": "seven"}}))
    pq.write_table(pa.table({"text": ["eight", None, "nine"], "n": [1, 2, 3]}), tmp_path / "f.parquet")
    found = documents(
        tmp_path,
        *[TextSource(url=str(tmp_path / name)) for name in ("b.txt", "c.jsonl", "d.json")],
        TextSource(url=f"file://{tmp_path}/e.json", field="extract"),
        TextSource(url=str(tmp_path / "f.parquet")),
    )
    assert found == ["one\ndocument é", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_the_format_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "x.data").write_text('{"body": "b"}\n')
    assert documents(tmp_path, TextSource(url=str(tmp_path / "x.data"), format="jsonl", field="body")) == ["b"]
    with pytest.raises(InvalidRequest) as caught:
        documents(tmp_path, TextSource(url=str(tmp_path / "x.data")))
    assert caught.value.code == "unknown_format"


def test_patterns_name_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("a/10.txt", "a/2.txt", "b/1.txt", "b/1.md", "b/.hidden.txt", "b/deep/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path, TextSource(url=f"{tmp_path}/a/*.txt")) == ["a/10.txt", "a/2.txt"]
    assert documents(tmp_path, TextSource(url=f"{tmp_path}/*/*.txt")) == ["a/10.txt", "a/2.txt", "b/1.txt"]
    assert documents(tmp_path, TextSource(url=f"{tmp_path}/*/deep/*")) == ["b/deep/3.txt"]
    with pytest.raises(InvalidRequest) as caught:
        documents(tmp_path, TextSource(url=f"{tmp_path}/a/*.json"))
    assert caught.value.code == "missing_file"


def test_patterns_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.txt").write_text("s")
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "secret.txt")
    for url in (f"{tmp_path}/*.txt", f"{tmp_path}/in/*.txt", "/*/passwd", "/etc/*"):
        with pytest.raises(InvalidRequest) as caught:
            documents(tmp_path / "in", TextSource(url=url))
        assert caught.value.code == "location_not_allowed"


def test_an_object_is_one_document_or_holds_documents(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps({"id": "17", "title": "A title", "text": "the text"}))
    assert documents(tmp_path, TextSource(url=str(tmp_path / "record.json"))) == ["the text"]
    (tmp_path / "other.json").write_text(json.dumps({"id": "17", "body": "the text"}))
    with pytest.raises(InvalidRequest, match="has no field 'text'; it has 'body', 'id'") as caught:
        documents(tmp_path, TextSource(url=str(tmp_path / "other.json")))
    assert caught.value.code == "unknown_field"


def test_halves_of_characters_become_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert documents(tmp_path, TextSource(url=str(tmp_path / "x.jsonl"))) == ["a \ufffd b", "\U0001f600"]


@given(st.text("ab*", max_size=12), st.text("ab", max_size=12))
def test_a_pattern_means_what_an_expression_would(pattern: str, name: str) -> None:
    expression = ".*".join(re.escape(part) for part in pattern.split("*"))
    assert matches(name, pattern) == (re.fullmatch(expression, name) is not None)


def test_stars_cost_nothing(tmp_path: Path) -> None:
    (tmp_path / ("a" * 200 + ".txt")).write_text("text")
    with pytest.raises(InvalidRequest, match="no text file matches"):
        documents(tmp_path, TextSource(url=f"{tmp_path}/{'*a' * 24}*b"))


@pytest.mark.parametrize(
    ("name", "content", "code", "says"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "bad_text", "'x.jsonl' line 2"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "unknown_field", "line 2 has no field 'text'; it has 'body'"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "bad_text", "line 2 is not UTF-8: byte 0xff"),
        ("x.jsonl", b'{"text": 5}\n', "bad_text", "line 1 holds a number, wanted text"),
        ("x.json", b'{"text": ', "bad_text", "'x.json' line 1 is not JSON: Expecting value at column 10"),
        ("x.json", b'["a",\n "\t"]', "bad_text", "'x.json' line 2 is not JSON: Invalid control character at column 3"),
        (
            "x.jsonl",
            b'"a"\n{"text": "a\tb"}\n',
            "bad_text",
            "line 2 is not JSON: Invalid control character at column 12",
        ),
        ("x.jsonl", b'"a"\n"b"\n{"text": \n', "bad_text", "line 3 is not JSON: Expecting value at column 11"),
        ("x.jsonl", b'{"text": [1]}\n', "bad_text", "line 1 holds a list, wanted text"),
        ("x.json", b"5", "bad_text", "'x.json' holds a number, wanted a list"),
        ("x.json", b'["a", {"b": 1}]', "unknown_field", "item 1 has no field 'text'"),
        ("x.json", b"[" * 100_000, "bad_text", "is not JSON"),
        ("x.txt", b"\xff\xfe", "bad_text", "is not UTF-8"),
        ("x.parquet", b"PAR1 not really", "bad_text", "is not readable Parquet"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, content: bytes, code: str, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        documents(tmp_path, TextSource(url=str(tmp_path / name)))
    assert caught.value.code == code
    assert says in caught.value.message


def test_files_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text('{"text": "good"}\n' + ("{}\n" if name == "b" else ""))
    with pytest.raises(InvalidRequest) as caught:
        documents(tmp_path, TextSource(url=f"{tmp_path}/*/x.jsonl"))
    assert f"{tmp_path}/b/x.jsonl' line 2 has no field" in caught.value.message


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(InvalidRequest, match="no field 'text'; it has 'body'"):
        check_text([TextSource(url=str(tmp_path / "x.parquet"))], [str(tmp_path)])


def test_two_columns_of_one_name_are_refused_by_name(tmp_path: Path) -> None:
    columns = [pa.array(["x"]), pa.array(["y"]), pa.array([1])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text", "n"]), tmp_path / "x.parquet")
    with pytest.raises(InvalidRequest, match="has 2 columns of name 'text'") as caught:
        check_text([TextSource(url=str(tmp_path / "x.parquet"))], [str(tmp_path)])
    assert caught.value.code == "bad_text"


TEXTS: dict[str, tuple[pa.DataType, Callable[[str], Any]]] = {
    "string": (pa.string(), str), "large string": (pa.large_string(), str), "view": (pa.string_view(), str),
    "binary": (pa.binary(), str.encode), "large binary": (pa.large_binary(), str.encode),
    "list": (pa.list_(pa.string()), lambda text: [text]),
    "large list": (pa.large_list(pa.large_string()), lambda t: [t]),
    "struct": (pa.struct([("text", pa.string())]), lambda text: {"text": text}),
    "large struct": (pa.struct([("text", pa.large_string())]), lambda text: {"text": text}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_no_kind_of_text_unpacks_beyond_what_is_held(kind: str, tmp_path: Path) -> None:
    """A row group whose value is repeated; what is no text is bad by row, and costs no more."""
    type_, make = TEXTS[kind]
    with pq.ParquetWriter(
        tmp_path / "x.parquet", pa.schema([("text", type_)]), dictionary_pagesize_limit=1 << 30
    ) as out:
        out.write_table(pa.table({"text": pa.array([make("x" * (1 << 20))] * 300, type_)}))
    before, most = pa.total_allocated_bytes(), 0
    (file,) = resolve_text([TextSource(url=str(tmp_path / "x.parquet"))], [str(tmp_path)])
    n_rows = 0
    for _document in READERS["parquet"](file):
        n_rows, most = n_rows + 1, max(most, pa.total_allocated_bytes() - before)
    assert n_rows == 300
    assert most < 64 << 20


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json"])
def test_wide_characters_without_a_mark_are_no_text(name: str, encoding: str, tmp_path: Path) -> None:
    """Latin letters in UTF-16 are valid UTF-8, with a NUL beside each."""
    (tmp_path / name).write_bytes('["hello there, plain"]'.encode(encoding))
    with pytest.raises(InvalidRequest, match="as in UTF-16; convert it to UTF-8") as caught:
        check_text([TextSource(url=str(tmp_path / name))], [str(tmp_path)])
    assert caught.value.code == "bad_text"


def test_a_few_nuls_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a text with one \0 in it")
    assert documents(tmp_path, TextSource(url=str(tmp_path / "x.txt"))) == ["a text with one \0 in it"]


def test_a_repeated_value_of_parquet_is_held_once(tmp_path: Path) -> None:
    """A kilobyte of Parquet can repeat a megabyte thousands of times: what is read at once is a thousand rows."""
    table = pa.table({"text": pa.array(["x" * (1 << 19)] * 4096), "n": pa.array(range(4096))})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=["text"])
    del table
    before = pa.total_allocated_bytes()
    found = read_documents(resolve_text([TextSource(url=str(tmp_path / "x.parquet"))], [str(tmp_path)]))
    assert len(next(found)) == 1 << 19
    assert pa.total_allocated_bytes() - before < 64 << 20
    assert sum(1 for _ in found) == 4095
    with pytest.raises(InvalidRequest, match="row 0 holds a number, wanted text"):
        documents(tmp_path, TextSource(url=str(tmp_path / "x.parquet"), field="n"))


@pytest.mark.parametrize("name", ["x.txt", "x.json", "x.jsonl"])
def test_documents_beyond_a_limit_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    os.truncate(path, (256 << 20) + 1)
    with pytest.raises(InvalidRequest, match=r"bytes, and .* is read whole|has more than 268435456 bytes") as caught:
        documents(tmp_path, TextSource(url=str(path)))
    assert caught.value.code == "bad_text"


def test_empty_and_missing_are_refused_early(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n ")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n\n')
    with pytest.raises(InvalidRequest) as caught:
        check_text([TextSource(url=f"{tmp_path}/{name}") for name in ("empty.txt", "blank.jsonl")], [str(tmp_path)])
    assert caught.value.code == "empty_corpus"
    with pytest.raises(InvalidRequest) as caught:
        check_text([TextSource(url=f"{tmp_path}/absent.txt")], [str(tmp_path)])
    assert caught.value.code == "missing_file"
    with pytest.raises(InvalidRequest) as caught:
        check_text([TextSource(url="/etc/passwd")], [str(tmp_path)])
    assert caught.value.code == "location_not_allowed"


def test_the_fingerprint_is_of_content_and_reading(tmp_path: Path) -> None:
    def fingerprint(name: str, **how: str) -> str:
        source = TextSource.model_validate({"url": str(tmp_path / name), **how})
        return check_text([source], [str(tmp_path)])

    (tmp_path / "a.jsonl").write_text('{"text": "a", "other": "b"}\n')
    first = fingerprint("a.jsonl")
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert fingerprint("b.jsonl") == first
    assert fingerprint("b.jsonl", field="other") != first
    (tmp_path / "b.jsonl").write_text('{"text": "a", "other": "c"}\n')
    assert fingerprint("b.jsonl") != first


BAD_LINES = [b"{", b'{"text": "\xff"}', b'{"text": 5}', b'{"body": "b"}', b"[" * 100_000, b"7"]
"""Lines that are not JSON, not UTF-8, of the wrong type, without the field, too deep, and no record."""


def tallied(root: Path, *sources: TextSource) -> tuple[list[str], Tally]:
    """Every document of the sources, and what was passed over."""
    tally = Tally()
    return list(read_documents(resolve_text(sources, [str(root)]), tally)), tally


@pytest.mark.parametrize("at_end", [b"\n", b""], ids=["ended", "cut off"])
def test_bad_lines_are_passed_over_up_to_a_limit(tmp_path: Path, at_end: bytes) -> None:
    lines = [b'{"text": "a"}', *BAD_LINES, b'{"text": "z"}', b"", b'{"text": null}', b"{"]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines) + at_end)
    url, n_bad = str(tmp_path / "x.jsonl"), len(BAD_LINES) + 1
    found, tally = tallied(tmp_path, TextSource(url=url, max_bad_documents=n_bad))
    assert (found, tally.n_bad, tally.n_bytes) == (["a", "z"], n_bad, 2)
    assert [message.split(" is ")[0] for message in tally.first_bad[:2]] == ["'x.jsonl' line 2", "'x.jsonl' line 3"]
    assert len(tally.first_bad) == 5
    says = (
        rf"'x.jsonl' line 11 is not JSON.*bad document number {n_bad} of its source, and max_bad_documents={n_bad - 1}"
    )
    with pytest.raises(InvalidRequest, match=says) as caught:
        tallied(tmp_path, TextSource(url=url, max_bad_documents=n_bad - 1))
    assert (caught.value.code, caught.value.detail) == ("too_many_bad_documents", {"n_bad_documents": n_bad})
    with pytest.raises(InvalidRequest, match=r"'x\.jsonl' line 2 is not JSON") as caught:
        tallied(tmp_path, TextSource(url=url))
    assert caught.value.code == "bad_text"


def test_bad_items_rows_and_files_are_documents_like_any(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["one", 1, {"body": "x"}, {"text": ["y"]}, {"text": "two"}]))
    broken = pa.Array.from_buffers(pa.string(), 3, [None, *pa.array(["ok", "\u00e9", "end"]).buffers()[1:]])
    buffers = [each and pa.py_buffer(each.to_pybytes().replace(b"\xc3", b"\xff")) for each in broken.buffers()]
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, buffers)}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "d.txt").write_text("three")
    limits = {"a.json": 3, "b.parquet": 1, "*.txt": 1}
    sources = [TextSource(url=f"{tmp_path}/{name}", max_bad_documents=limit) for name, limit in limits.items()]
    found, tally = tallied(tmp_path, *sources)
    assert (found, tally.n_bad) == (["one", "two", "ok", "end", "three"], 5)
    assert tally.first_bad[3].startswith("'b.parquet' row 1 is not UTF-8")
    for source in sources:  # what one source may have is nothing to another
        changed = source.model_copy(update={"max_bad_documents": source.max_bad_documents - 1})
        with pytest.raises(InvalidRequest):
            tallied(tmp_path, *[changed if each == source else each for each in sources])


@pytest.mark.parametrize(("name", "content"), [("x.json", b'["a", '), ("x.json", b"5"), ("x.parquet", b"PAR1 not")])
def test_a_file_that_cannot_be_read_is_no_bad_document(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        tallied(tmp_path, TextSource(url=str(tmp_path / name), max_bad_documents=100))
    assert caught.value.code == "bad_text"


def test_a_line_that_is_too_long_is_one_bad_document(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n')
    os.truncate(path, (256 << 20) + (5 << 19))
    with path.open("ab") as file:
        file.write(b'\n{"text": "b"}\n')
    found, tally = tallied(tmp_path, TextSource(url=str(path), max_bad_documents=1))
    assert (found, tally.n_bad) == (["a", "b"], 1)
    assert "line 2 has more than 268435456 bytes" in tally.first_bad[0]


def test_a_text_that_begins_badly_is_accepted_within_its_limit(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{\n{"text": "a"}\n')
    assert check_text([TextSource(url=f"{tmp_path}/x.jsonl", max_bad_documents=1)], [str(tmp_path)])
    with pytest.raises(InvalidRequest, match="line 1 is not JSON"):
        check_text([TextSource(url=f"{tmp_path}/x.jsonl")], [str(tmp_path)])


def test_a_limit_makes_another_store_and_none_the_same_as_ever() -> None:
    def id_with(**fields: int) -> str:
        spec = {"model": {"source": "m"}, "text": [{"url": "/a"}, {"url": "/b", **fields}], "hooks": ["h"]}
        return store_id(HarvestSpec.model_validate({**spec, "token_budget": 1000}), "model", "text")

    # as release 0.1 called it: what is stored must be found again
    assert id_with() == id_with(max_bad_documents=0) == "act_badeeb854da4474d91903c4481ccd01d"
    assert len({id_with(), id_with(max_bad_documents=1), id_with(max_bad_documents=2)}) == 3
