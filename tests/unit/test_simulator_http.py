"""The simulator's HTTP parser and its reading of bodies, whatever pieces the bytes come in."""

import pytest

from forkpointd.vmm.simulator.body import Field, Struct, optional, string, unsigned
from forkpointd.vmm.simulator.errors import Fault
from forkpointd.vmm.simulator.http import BUFFER_BYTES, ParseError, RequestParser, Response

REQUESTS = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    b'PATCH /vm HTTP/1.1\r\nContent-Length: 18\r\n\r\n{"state":"Paused"}'
    b"PUT /a/b HTTP/1.0\r\ncontent-length:  2 \r\n\r\n{}"
    b"GET http://host/version HTTP/1.1\r\n\r\n"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1024])
def test_requests_are_the_same_in_whatever_pieces_they_come(size: int) -> None:
    parser = RequestParser(100)
    found = []
    for at in range(0, len(REQUESTS), size):
        assert parser.room > 0
        found += parser.feed(REQUESTS[at : at + size])
    assert [(r.method, r.path, r.body) for r in found] == [
        ("GET", "/", None),
        ("PATCH", "/vm", b'{"state":"Paused"}'),
        ("PUT", "/a/b", b"{}"),
        ("GET", "/version", None),
    ]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"a" * BUFFER_BYTES,
        b"GET / HTTP/1.1\r\nX: " + b"a" * BUFFER_BYTES,
        b"\r\n",
        b"GET  HTTP/1.1\r\n",
        b"GET /\xff HTTP/1.1\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: 4294967296\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: 101\r\n\r\n",
        b"DELETE / HTTP/1.1\r\n",
    ],
)
def test_what_is_no_request_is_an_error_and_nothing_of_it_is_kept(sent: bytes) -> None:
    parser = RequestParser(100)
    with pytest.raises(ParseError):
        while sent:
            room = parser.room
            assert parser.feed(sent[:room]) == []
            sent = sent[room:]
    assert parser.room == BUFFER_BYTES


def test_answers() -> None:
    assert b"Content-Length" not in Response(204).encode()
    assert Response(200, {"a": "ü"}).encode().endswith('Length: 10\r\n\r\n{"a":"ü"}'.encode())


INNER = Struct("Inner", {"n": Field(unsigned("u8", 8))})
OUTER = Struct("Outer", {"a": Field(string), "i": optional(INNER)})


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"a":"x"}', {"a": "x"}),
        (b' {"i" : null , "a":"x"} ', {"a": "x"}),
        (b'{"a":"x","i":{"n":5}}', {"a": "x", "i": {"n": 5}}),
    ],
)
def test_bodies(body: bytes, wanted: dict[str, object]) -> None:
    assert OUTER.parse(body) == wanted


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"a":null}', "invalid type: null, expected a string at line 1 column 9"),
        (b'{"a":"x","i":{"n":256}}', "invalid value: integer `256`, expected u8 at line 1"),
        (b'{"a":"x","i":3}', "invalid type: integer `3`, expected struct Inner at line 1"),
        (b'{"a":"x","i":{}}', "missing field `n` at line 1 column 15"),
        (b'{"a":"x"}x', "trailing characters at line 1 column 10"),
        (b'{"a":"x"\n"b":1}', "expected `,` or `}` at line 2 column 1"),
        (b'{"a" "x"}', "expected `:` at line 1 column 6"),
        (b'{"a":"x', "EOF while parsing"),
        (b'{"a', "EOF while parsing a string"),
        (b"{a:1}", "key must be a string at line 1 column 2"),
        (b"", "EOF while parsing a value"),
    ],
)
def test_bodies_that_are_refused(body: bytes, told: str) -> None:
    with pytest.raises(Fault) as fault:
        OUTER.parse(body)
    assert told in str(fault.value)
