"""As much HTTP/1.1 as a router's UPnP server needs: one request, one answer, then the connection is closed.

Tolerant, because routers are (lone newlines, no reason phrase, a length that is missing), and bounded, because they are
not ours. The same head parser serves SSDP, whose answers are HTTP heads in a datagram.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import UPNP_MAX_DOCUMENT_BYTES, UPNP_MAX_HEAD_BYTES, UPNP_MAX_HEADERS

AGENT = "lattica UPnP/1.1"
_MARKS = (b"\r\n\r\n", b"\n\n")
"""The end of a head."""
_LAST_CHUNKS = (b"\n0\r\n\r\n", b"\n0\n\n")


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """`headers` by lower-case name, the first of each."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class ResponseReader:
    """Collects one answer as it comes in, and knows when all of it is there: not every router closes the connection.

    Each piece is looked at once, however small the pieces are.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        """What came so far."""
        self.is_complete = False
        self._body_at: int | None = None
        self._length: int | None = None
        self._chunked = False

    def receive_untrusted(self, piece: bytes) -> bool:
        """Whether all of the answer has come."""
        searched = max(0, len(self.data) - len(_MARKS[0]))
        self.data += piece
        if len(self.data) > UPNP_MAX_HEAD_BYTES + UPNP_MAX_DOCUMENT_BYTES:
            raise RemoteProtocolError(f"an HTTP answer over {UPNP_MAX_DOCUMENT_BYTES} bytes")
        if self._body_at is None:
            self._find_head_untrusted(searched)
        if self._body_at is not None:
            if self._length is not None:
                self.is_complete = len(self.data) >= self._body_at + self._length
            else:
                self.is_complete = self._chunked and self.data.endswith(_LAST_CHUNKS)
        return self.is_complete

    def _find_head_untrusted(self, searched: int) -> None:
        ends = [(at, len(mark)) for mark in _MARKS if (at := self.data.find(mark, searched)) >= 0]
        if not ends:
            if len(self.data) > UPNP_MAX_HEAD_BYTES:
                raise RemoteProtocolError(f"an HTTP head over {UPNP_MAX_HEAD_BYTES} bytes")
            return
        at, mark_length = min(ends)
        _, headers = decode_head_untrusted(bytes(self.data[:at]))
        self._body_at = at + mark_length
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked and "content-length" in headers:
            self._length = _number_untrusted(headers["content-length"], 10)


def encode_get(host: str, port: int, path: str) -> bytes:
    """`path` must have been checked for control characters."""
    return f"GET {path} HTTP/1.1\r\n{_common(host, port)}\r\n".encode("ascii")


def encode_post(host: str, port: int, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """The same with a body."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\n{_common(host, port)}{lines}Content-Length: {len(body)}\r\n\r\n"
    return head.encode("ascii") + body


def _common(host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"Host: {shown}:{port}\r\nUser-Agent: {AGENT}\r\nConnection: close\r\n"


def decode_head_untrusted(data: bytes) -> tuple[str, dict[str, str]]:
    """The first line and the headers of `data`, which is a head without the empty line."""
    if len(data) > UPNP_MAX_HEAD_BYTES:
        raise RemoteProtocolError(f"an HTTP head over {UPNP_MAX_HEAD_BYTES} bytes")
    lines = data.decode("latin-1").replace("\r\n", "\n").split("\n")
    if len(lines) > UPNP_MAX_HEADERS:
        raise RemoteProtocolError(f"more than {UPNP_MAX_HEADERS} HTTP headers")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    return lines[0].strip(), headers


def status_untrusted(line: str) -> int:
    """Of `HTTP/1.1 200 OK`."""
    words = line.split(None, 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not (words[1].isascii() and words[1].isdigit()):
        raise RemoteProtocolError("not an HTTP answer")
    status = int(words[1][:4])
    if not 100 <= status <= 599:
        raise RemoteProtocolError(f"HTTP status {status}")
    return status


def decode_response_untrusted(data: bytes, *, closed: bool) -> HttpResponse | None:
    """The answer in `data`, all that has come so far; `None`: more is to come. `closed`: nothing more will."""
    if len(data) > UPNP_MAX_HEAD_BYTES + UPNP_MAX_DOCUMENT_BYTES:
        raise RemoteProtocolError(f"an HTTP answer over {UPNP_MAX_DOCUMENT_BYTES} bytes")
    head, rest = _split_head(data)
    if head is None:
        if closed or len(data) > UPNP_MAX_HEAD_BYTES:
            raise RemoteProtocolError("an HTTP answer without an end of its head")
        return None
    line, headers = decode_head_untrusted(head)
    status = status_untrusted(line)
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _unchunk_untrusted(rest)
    elif "content-length" in headers:
        length = _number_untrusted(headers["content-length"], 10)
        body = rest[:length] if len(rest) >= length else None
    else:
        body = rest if closed else None
    if body is None:
        if not closed:
            return None
        raise RemoteProtocolError("an HTTP answer that is cut off")
    if len(body) > UPNP_MAX_DOCUMENT_BYTES:
        raise RemoteProtocolError(f"an HTTP answer over {UPNP_MAX_DOCUMENT_BYTES} bytes")
    return HttpResponse(status, headers, body)


def _split_head(data: bytes) -> tuple[bytes | None, bytes]:
    ends = [(at, len(mark)) for mark in _MARKS if (at := data.find(mark)) >= 0]
    if not ends:
        return None, b""
    at, length = min(ends)
    return data[:at], data[at + length :]


def _unchunk_untrusted(data: bytes) -> bytes | None:
    """The body of a chunked answer; `None` when its end has not come."""
    out = bytearray()
    at = 0
    while True:
        end = data.find(b"\n", at)
        if end < 0:
            return None
        size = _number_untrusted(data[at:end].partition(b";")[0].strip().decode("latin-1"), 16)
        at = end + 1
        if not size:
            return bytes(out)
        if len(data) < at + size:
            return None
        out += data[at : at + size]
        at += size
        at += data[at : at + 1] == b"\r"
        at += data[at : at + 1] == b"\n"


def _number_untrusted(text: str, base: int) -> int:
    if not text.isascii() or not text.isalnum() or len(text) > 10:
        raise RemoteProtocolError("an HTTP answer with a length that is no number")
    try:
        value = int(text, base)
    except ValueError:
        raise RemoteProtocolError("an HTTP answer with a length that is no number") from None
    if value > UPNP_MAX_DOCUMENT_BYTES:
        raise RemoteProtocolError(f"an HTTP answer of {value} bytes is over {UPNP_MAX_DOCUMENT_BYTES}")
    return value
