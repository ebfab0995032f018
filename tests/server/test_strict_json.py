"""JSON bodies mean one thing or are refused."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwise.server.errors import ApiError
from kvwise.server.strict import read_json


def read(body: bytes, *, max_bytes: int = 2**20, max_depth: int = 16, max_items: int = 1000) -> Any:
    return read_json(body, max_bytes=max_bytes, max_depth=max_depth, max_items=max_items)


def refusal(body: bytes, **limits: int) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(body, **limits)
    return caught.value


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b" \r\n\t", "empty"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "valid JSON"),
        ('{"a": 1}'.encode("utf-16-le"), "valid JSON"),
        (b'{"a": "\xff"}', "no UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "no UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": "\\uDFFF x"}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'["\\udc00\\ud800"]', "surrogate"),
        (b"NaN", "NaN"),
        (b'{"a": Infinity}', "Infinity"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "range of a double"),
        (b"[-1e999]", "range of a double"),
        (b"[9223372036854775808]", "64 bits"),
        (b"[-9223372036854775809]", "64 bits"),
        (b"[" + b"9" * 5000 + b"]", "64 bits"),
        (b'{"a": 1, "a": 1}', "twice"),
        (b'{"x": [{"b": 1, "b": 2}]}', "'b'"),
        (b"{} {}", "extra data"),
        (b'{"a": 1}x', "extra data"),
        (b"{'a': 1}", "line 1 column 2"),
        (b'{"a": 1,}', "valid JSON"),
        (b"[1,]", "valid JSON"),
        (b'{"a": "\n"}', "control character"),
        (b'{"a', "valid JSON"),
        (b"\x00", "valid JSON"),
        (b"01", "valid JSON"),
        (b"+1", "valid JSON"),
        (b".5", "valid JSON"),
        (b"// x\n{}", "valid JSON"),
    ],
)
def test_what_is_no_plain_json_is_a_400(body: bytes, says: str) -> None:
    error = refusal(body)
    assert (error.status, error.code) == (400, "invalid_json")
    assert says in error.message


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b'"x"',
        b" [1, -2.5e3] ",
        b"[9223372036854775807]",
        b"[-9223372036854775808]",
        b"[1e-999]",
        b"[123456789012345678901.5]",
        b'["\\ud83d\\ude00"]',
        b'["\xf0\x9f\x98\x80"]',
        b'["99999999999999999999999 1e999"]',
        b'["\\\\ud800"]',
    ],
)
def test_plain_json_is_read_as_the_library_reads_it(body: bytes) -> None:
    assert read(body) == json.loads(body)


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
_NUMBERS = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
_VALUES = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_TEXTS, inner),
    max_leaves=30,
)


@given(_VALUES, st.booleans())
def test_every_value_comes_through(value: Any, ascii_only: bool) -> None:
    assert read(json.dumps(value, ensure_ascii=ascii_only).encode(), max_depth=64, max_items=10_000) == value


def test_depth_counts_what_is_open_at_once() -> None:
    assert read(b"[" * 16 + b"]" * 16)
    error = refusal(b"[" * 17 + b"]" * 17)
    assert error.status == 400
    assert "deeper than 16" in error.message
    assert refusal(b'{"a":' * 17 + b"1" + b"}" * 17).status == 400
    assert len(read(b"[" + b"[]," * 40 + b"[]]")) == 41


@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b'{"a":' * 100_000, b'["' + b'\\"' * 300_000, b"[" + b'"\\' * 200_000]
)
def test_floods_are_refused_at_once(body: bytes) -> None:
    assert refusal(body, max_items=10**6).status in (400, 413)


def test_brackets_in_strings_are_text() -> None:
    text = "[{" * 500 + '\\"' * 100 + ",:" * 2000
    assert read(json.dumps([text]).encode()) == [text]


@pytest.mark.parametrize("body", [b"[" + b"1," * 1000 + b"1]", json.dumps({str(n): n for n in range(600)}).encode()])
def test_values_are_counted(body: bytes) -> None:
    error = refusal(body)
    assert (error.status, error.code) == (413, "request_too_large")
    assert "1000 values" in error.message


def test_keys_of_an_object_are_counted() -> None:
    body = json.dumps({str(number): 1 for number in range(4097)}).encode()
    assert refusal(body, max_items=10**6).status == 413


def test_size_is_bounded() -> None:
    assert read(b'"%s"' % (b"x" * 1022), max_bytes=1024)
    error = refusal(b'"%s"' % (b"x" * 1023), max_bytes=1024)
    assert (error.status, error.code) == (413, "request_too_large")


def test_errors_never_repeat_much_of_a_body() -> None:
    for body in (
        b"[" + b"9" * 5000 + b"]",
        b'{"%s": 1, "%s": 2}' % (b"k" * 5000, b"k" * 5000),
        b"[1e" + b"9" * 5000 + b"]",
    ):
        assert len(refusal(body).message) < 200
