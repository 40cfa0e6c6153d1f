"""What is said of a spec that is wrong: where, as its writer wrote it, what was got, and what was meant, perhaps."""

from __future__ import annotations

from typing import Any

import pytest

from gnomon._requests import job_request
from gnomon.errors import InvalidRequest
from tests.support.sdk_server import HARVEST

TRAIN: dict[str, Any] = {"kind": "train", "activations": HARVEST, "d_sae": 64, "token_budget": 10_000}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a name that is nearly one": ({"dsae": 64}, "dsae is not a field; did you mean 'd_sae'?"),
    "in a member of a union": (
        {"activation": {"kind": "jumprelu", "band_width": 1.0}},
        "activation.band_width is not a field; did you mean 'bandwidth'?",
    ),
    "below a union": (
        {"activations": HARVEST | {"model": {"source": "m", "dtyp": "float32"}}},
        "activations.model.dtyp is not a field; did you mean 'dtype'?",
    ),
    "in a list": (
        {"activations": HARVEST | {"text": [{"url": "/a"}, {"url": "/b", "max_bad_document": 1}]}},
        "activations.text.1.max_bad_document is not a field; did you mean 'max_bad_documents'?",
    ),
    "in another member's fields": (
        {"activation": {"kind": "topk", "bandwidth": 1.0}},
        "activation.bandwidth is not a field; check its spelling, or leave it out",
    ),
    "like nothing": ({"colour": "red"}, "colour is not a field; check its spelling, or leave it out"),
    "out of range": (
        {"activation": {"kind": "topk", "k": 0}},
        "activation.k: input should be greater than or equal to 1 (got 0)",
    ),
    "of another type": (
        {"seed": "seven"},
        "seed: input should be a valid integer, unable to parse string as an integer (got 'seven')",
    ),
    "of no kind": ({"activation": {"kind": "softmax"}}, "activation.kind='softmax' is unknown; use one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_the_words_of_the_file(case: str) -> None:
    change, says = WRONG[case]
    with pytest.raises(InvalidRequest) as alone:
        job_request(TRAIN | change, {})
    assert alone.value.message.startswith(says)
    with pytest.raises(InvalidRequest) as whole:
        job_request({"spec": TRAIN | change}, {})
    assert whole.value.message.startswith(f"spec.{says}")


def test_fields_beside_the_spec_and_options_are_named_as_such() -> None:
    with pytest.raises(InvalidRequest, match=r"^nmae is not a field; did you mean 'name'\?$"):
        job_request({"spec": TRAIN, "nmae": "x"}, {})
    with pytest.raises(InvalidRequest, match=r"^priority: input should be .* 100 \(got 101\)$"):
        job_request(TRAIN, {"priority": 101})
    with pytest.raises(InvalidRequest, match=r"; and 3 more$"):
        job_request(TRAIN | {f"x{number}": number for number in range(8)}, {})
