"""Forms: what they become, and those that are refused because parsers read them differently."""

import re
import time
import tracemalloc
from urllib.parse import quote_plus, unquote_to_bytes, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.ingest.errors import ApiError
from serving.ingest.forms import MAX_FIELDS, raw_request
from serving.ingest.requests import URLENCODED

PART = b"Content-Disposition: form-data"
FORM = "multipart/form-data; boundary=b"
CURE = ": name further images image1, image2"


def form(*parts, boundary="b", end="--"):
    lines = [
        f"--{boundary}\r\nContent-Disposition: form-data; {about}\r\n\r\n".encode() + data + b"\r\n"
        for about, data in parts
    ]
    return b"".join(lines) + f"--{boundary}{end}\r\n".encode()


def test_forms_are_taken_apart():
    data = bytes(range(256)) * 300 + b"\r\n-b\r\n--"
    body = form(('name="image"; filename="a=b;.png"', data), ('name="alpha"', b"0.5"))
    made = raw_request("Multipart/Form-Data; boundary=b", body, True, "id")
    assert made.body is None and made.fields == {"image": data, "alpha": b"0.5"}
    assert made.probe and made.id == "id"
    made = raw_request(URLENCODED, b"n=4&kind=a%26+b&c=&d\r\n")
    assert made.fields == {"n": b"4", "kind": b"a& b", "c": b"", "d": b""}
    for body in (b"", b'"n": 4\r\n'):
        assert raw_request(f"{URLENCODED}; charset=utf-8", body).fields == {}
    made = raw_request("image/png", b"--b")
    assert made.body == b"--b" and made.fields == {}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=3).map(quote_plus) | st.sampled_from("=+ \t._"), max_size=9))
def test_values_are_unquoted(pieces):
    value = "".join(pieces).encode()
    made = raw_request(URLENCODED, b"n=" + value)
    assert made.fields == {"n": unquote_to_bytes(value.replace(b"+", b" "))}


def test_a_value_of_escapes_takes_little_memory():
    body = b"n=" + b"%89" * 2**20
    tracemalloc.start()
    try:
        made = raw_request(URLENCODED, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert made.fields == {"n": b"\x89" * 2**20} and peak < 5 * len(body)


@pytest.mark.parametrize(
    "content_type, body",
    [
        ("multipart/form-data", form(('name="n"', b"1"))),
        ("multipart/form-data; boundary=", form(('name="n"', b"1"))),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"--b\r\nnothing"),
        ("multipart/form-data; boundary=b", form(('name="n"', b"1"), end="")),
        ("multipart/form-data; boundary=b", form(('name="n"', b"1"))[:-9]),
        ("multipart/form-data; boundary=b", form(("x", b"1"))),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\n1\r\n--b--\r\n"),
        (URLENCODED, b"n=%zz"),
        (URLENCODED, b"%ff=1"),
        (URLENCODED, b"n=1&" * 20 + b"\x89PNG"),
    ],
)
def test_forms_that_are_refused(content_type, body):
    with pytest.raises(ApiError) as caught:
        raw_request(content_type, body)
    assert (caught.value.status, caught.value.code) == (400, "malformed_request")


def test_forms_whose_fields_would_be_lost_are_refused():
    """Some parsers drop a part that is cut off, what follows the end, and all files but the last.

    A line of data that begins with the boundary is a new part for them, or ends the form.
    """

    def part(name, kind="image/png"):
        return b'--B\r\nContent-Type: %s\r\n%s; name="%s"\r\n\r\nx\r\n' % (
            kind.encode(),
            PART,
            name.encode(),
        )

    def encoded(how):
        return part("image").replace(
            b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: %s\r\n\r\n" % how
        )

    def check(body):
        return bool(raw_request("multipart/form-data; boundary=B", body).fields)

    end = b"--B--\r\n"
    whole = part("image") + part("alpha")
    assert check(whole + end) and check(whole + end[:-2]) and check(whole + end + b"\r\n")
    assert check(b"\r\n" + whole + end)
    assert check(encoded(b"binary") + end) and check(encoded(b" 8BIT") + end)
    for body, message in (
        (part("image") + b"--Bx\r\n" + part("alpha") + end, "cannot be parsed"),
        (part("image")[:-2] + b"\n" + part("alpha") + end, "cannot be parsed"),
        (part("image")[:-2] + b"\r" + part("alpha") + end, "cannot be parsed"),
        (part("image") + b"--B " + part("alpha")[3:] + end, "cannot be parsed"),
        (whole, "cannot be parsed"),
        (whole[:-9], "cannot be parsed"),
        (part("image") + end + part("alpha") + end, "cannot be parsed"),
        (part("image", "Multipart/Mixed; boundary=C") + end, "holds several files"),
        (part("image", "\tmultipart/mixed;boundary=C") + end, "holds several files"),
        (encoded(b"binary\nContent-Transfer-Encoding: base64") + end, "cannot be parsed"),
        # Django decodes it, and may find another file.
        (encoded(b"base64") + end, "must not be encoded"),
        # A header with many parameters takes long to parse.
        (part("image", "a" + ";x" * 2040) + end, "at most 32 semicolons"),
        (end + part("alpha") + end, "cannot be parsed"),
        # Without a name, engines differ in what they make of a part.
        (part("image") + b"--B\r\n%s\r\n\r\nx\r\n" % PART + end, "cannot be parsed"),
        (part("image") + b"--B\r\nContent-Type: text/plain\r\n\r\nx\r\n" + end, "cannot be parsed"),
        # With two of them, parsers differ in which one they follow.
        (b"--B\r\n%s\r\n" % PART + part("alpha")[5:] + end, "cannot be parsed"),
        (b'--B\r\n%s; name="image"\r\n' % PART + part("alpha")[5:] + end, "cannot be parsed"),
    ):
        with pytest.raises(ApiError, match=message):
            check(body)
    for kind in (
        "multipart/form-data-x; boundary=B",
        "multipart/form-data, x; boundary=B",
        "multipart/form-data; boundary=B--; boundary=B",
        'multipart/form-data; x="; boundary=C"; boundary=B',
        "multipart/form-data; boundary*=C; boundary=B",
        "multipart/form-data",
    ):
        with pytest.raises(ApiError, match="cannot be parsed"):
            raw_request(kind, whole + end)
    browsers = whole.replace(b"--B", b"------WebKitFormBoundaryB") + b"------WebKitFormBoundaryB--"
    kind = "multipart/form-data; boundary=----WebKitFormBoundaryB"
    assert raw_request(kind, bytearray(browsers)).fields == {"image": b"x", "alpha": b"x"}


@pytest.mark.parametrize(
    "body, status",
    [
        (b"\r\n".join(b"--B\r\n%s; name=a%d\r\n\r\n" % (PART, i) for i in range(300_000)), 413),
        (b"--B\r\n\r\n\r\n" * 2**21, 413),
        (b"--B\r\n%s; name=a\r\n\r\n" % PART + b"\r\n--" * 2**22 + b"\r\n--B--", 200),
        (b"--B\r\n%s; name=a\r\n\r\n" % PART + b"\r\n--Bx" * 2**22 + b"\r\n--B--", 413),
        (b"--B" + b" " * 2**24 + b"\r\n%s; name=a\r\n\r\n\r\n--B--" % PART, 400),
        (b"--B\r\n%s; name=a\r\n\r\n\r\n--B" % PART + b"\t" * 2**24 + b"\r\n--B--", 400),
        (b"--B\r\n%s; name=a\r\n\r\n\r\n--B--" % PART + b" " * 2**24, 200),
        (b" " * 2**24 + b"\r\n--B\r\n%s; name=a\r\n\r\n\r\n--B--" % PART, 400),
        (b"--B\r\n" + b"x" * 2**24, 400),
        (b"--B\r\n%s\r\n\r\n" % (b'%s; name=a; b="%s\r\n' % (PART, b";" * 4000) * 8) * 99, 400),
        (b'--B\r\n%s; name="a%s"\r\n\r\n\r\n--B--' % (PART, b"&#23383;" * 30), 200),
    ],
    ids=[
        "many parts",
        "empty parts",
        "what resembles a boundary",
        "boundaries in the data",
        "spaces behind the first boundary",
        "tabs behind a boundary",
        "spaces behind the end",
        "spaces before the beginning",
        "a long header",
        "quotations of many parameters",
        "a name that a browser escaped",
    ],
)
def test_forms_are_read_in_bounded_time(body, status):
    """Their worker does nothing else meanwhile."""
    started = time.process_time()
    try:
        found = 200 if raw_request("multipart/form-data; boundary=B", body).fields else None
    except ApiError as error:
        found = error.status
    assert found == status and time.process_time() - started < 3


def test_url_encoded_forms():
    for body, fields in (
        (b"calibration=caf%C3%A9&alpha=0.05", {"calibration": "café".encode(), "alpha": b"0.05"}),
        (b"image=%89PNG", {"image": b"\x89PNG"}),
        (b"a=1&&b", {"a": b"1", "b": b""}),
        (b"a=1\r\n", {"a": b"1"}),
    ):
        assert raw_request(URLENCODED, body).fields == fields
    for body, code in (
        (b"a=1&%61=2", "malformed_request"),
        (b"=1&=2", "malformed_request"),
        (b"a=1\r\n&b=2", "malformed_request"),
        (b"a=1\n&b=2\n", "malformed_request"),
        (b"&".join(b"a%d=1" % i for i in range(MAX_FIELDS + 1)), "too_many_images"),
        (b"%41" * 2000 + b"=1", "malformed_request"),
    ):
        with pytest.raises(ApiError) as caught:
            raw_request(URLENCODED, body)
        assert caught.value.code == code


@pytest.mark.parametrize(
    "start", [b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM6\0\0\0", b"RIFF\x1a\0\0\0WEBP"]
)
def test_a_file_under_the_default_type_is_a_raw_body(start):
    """As ``curl --data-binary @FILE``, ``wget --post-file`` and urllib send it."""
    made = raw_request(URLENCODED, start + b"&=%" * 99)
    assert (made.body, made.content_type) == (start + b"&=%" * 99, "")


@pytest.mark.parametrize("body", [b'{"n": 4}', b' ["x"]\r\n', '{"a": "é"}'.encode()])
def test_json_under_the_type_of_a_form_is_refused(body):
    """As ``curl -d`` declares it."""
    with pytest.raises(ApiError, match="needs the header Content-Type: application/json"):
        raw_request(URLENCODED, body)


@pytest.mark.parametrize(
    "kind, body, rest",
    [
        (FORM, form(*((f'name="{n}"', b"x") for n in ("image", "image1", "image"))), CURE),
        (URLENCODED, b"seed=1&n=2&seed=3", "$"),
    ],
)
def test_repeated_fields_are_refused(kind, body, rest):
    """Most parsers drop all but the last."""
    with pytest.raises(ApiError, match=f"more than once{rest}"):
        raw_request(kind, body)


NAMES = st.text("abc é1%&;=", min_size=1, max_size=6).filter(lambda name: name == name.strip())
VALUES = st.lists(
    st.sampled_from([b"\r\n", b"\r", b"\n", b"--", b"-", b"b", b"\r\n--", b"--a", b" "])
    | st.binary(max_size=5)
).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=5), st.integers(0, 9), st.booleans())
def test_no_field_is_lost_or_changed(fields, cut, is_urlencoded):
    """Unless the data hold the boundary, or the form is cut off: then it is refused."""
    if is_urlencoded:
        kind, body = URLENCODED, urlencode({k.encode(): v for k, v in fields.items()}).encode()
        assert raw_request(kind, body).fields == fields
        return
    body = form(*((f'name="{name}"', value) for name, value in fields.items()))
    try:
        made = raw_request(FORM, body[: len(body) - cut])
    except ApiError as error:
        holds_boundary = [v for v in fields.values() if re.search(rb"(^|[\r\n])--b", v)]
        assert error.status == 400 and (cut > 2 or holds_boundary)
    else:
        assert made.fields == fields and cut <= 2
