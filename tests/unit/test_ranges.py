"""Which bytes a Range header asks for; what is not understood is the whole file, as RFC 9110 has it."""

from __future__ import annotations

import pytest

from gnomon_service.rest.ranges import Span, digest_headers, is_known, range_of, span_of

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (None, (0, 100)),
        ("bytes=0-", (0, 100)),
        ("bytes=40-", (40, 100)),
        ("bytes=99-", (99, 100)),
        ("bytes=40-59", (40, 60)),
        ("bytes=40-40", (40, 41)),
        ("bytes=40-1000", (40, 100)),
        ("bytes=-30", (70, 100)),
        ("bytes=-1000", (0, 100)),
        ("bytes=100-", None),
        ("bytes=1000-2000", None),
        ("bytes=-0", None),
        # not one range of bytes
        ("bytes=0-1,5-6", (0, 100)),
        ("bytes=50-40", (0, 100)),
        ("bytes=-", (0, 100)),
        ("bytes=a-b", (0, 100)),
        ("rows=1-2", (0, 100)),
        ("bytes=" + "9" * 5000 + "-", (0, 100)),
        ("bytes=-٣", (0, 100)),
    ],
)
def test_which_bytes_are_asked_for(header: str | None, wanted: tuple[int, int] | None) -> None:
    span = span_of(header, 100)
    assert (None if span is None else (span.start, span.stop)) == wanted


def test_an_empty_file_has_no_byte_to_ask_for() -> None:
    assert span_of(None, 0) == Span(start=0, stop=0, n_bytes=0)
    assert span_of("bytes=0-", 0) is None and span_of("bytes=-1", 0) is None


def test_the_head_says_which_part_it_is() -> None:
    part = Span(start=40, stop=60, n_bytes=100)
    assert part.headers() == {
        "Accept-Ranges": "bytes",
        "Content-Length": "20",
        "Content-Range": "bytes 40-59/100",
    }
    assert "Content-Range" not in Span(start=0, stop=100, n_bytes=100).headers()


def test_a_condition_holds_for_the_very_content_alone() -> None:
    asked = {"range": "bytes=5-", "if-range": f'"{DIGEST}"'}
    assert range_of(asked, DIGEST) == "bytes=5-"
    assert range_of(asked, "cd" * 32) is None and range_of(asked, None) is None
    assert range_of({**asked, "if-range": f'W/"{DIGEST}"'}, DIGEST) is None, "a weak tag says nothing of bytes"
    assert range_of({"range": "bytes=5-"}, None) == "bytes=5-"
    assert is_known({"if-none-match": f'"x", W/"{DIGEST}"'}, DIGEST)
    assert not is_known({"if-none-match": f'"{DIGEST}"'}, None) and not is_known({}, DIGEST)
    assert digest_headers(None) == {}
