"""XML from a router: expat with every door closed.

No document type, hence no entities of its own to expand or to fetch; bounded in size, depth, elements and text. Names
come without their namespace: routers are careless with prefixes, and what we look for has unmistakable names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    UPNP_MAX_DOCUMENT_BYTES,
    UPNP_MAX_ELEMENTS,
    UPNP_MAX_TEXT_CHARS,
    UPNP_MAX_XML_DEPTH,
)


@dataclass(slots=True)
class Element:
    """One element; `text` is its own, without that of its children."""

    name: str
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        """This element and all below it, in their order."""
        yield self
        for child in self.children:
            yield from child.walk()

    def find(self, name: str) -> Element | None:
        """The first of that name, here or below."""
        return next((element for element in self.walk() if element.name == name), None)

    def text_of(self, name: str) -> str | None:
        """The text of a direct child."""
        return next((child.text.strip() for child in self.children if child.name == name), None)


def parse_xml_untrusted(data: bytes) -> Element:
    """The root element."""
    if len(data) > UPNP_MAX_DOCUMENT_BYTES:
        raise RemoteProtocolError(f"XML of {len(data)} bytes is over {UPNP_MAX_DOCUMENT_BYTES}")
    data = data.strip(b"\x00\t\r\n ")
    try:
        data.decode()
    except UnicodeDecodeError:
        data = data.decode("latin-1").encode()  # a friendly name with umlauts, whatever the declaration says
    builder = _Builder()
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = builder.doctype
    parser.EntityDeclHandler = builder.doctype
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.characters
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise RemoteProtocolError(f"not XML: {error}") from None
    if builder.root is None:
        raise RemoteProtocolError("XML without an element")
    return builder.root


class _Builder:
    def __init__(self) -> None:
        self.root: Element | None = None
        self._open: list[Element] = []
        self._count = 0

    def doctype(self, *_: object) -> None:
        raise RemoteProtocolError("XML with a document type")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > UPNP_MAX_ELEMENTS or len(self._open) >= UPNP_MAX_XML_DEPTH:
            raise RemoteProtocolError("XML that is too large or too deep")
        element = Element(name.rpartition(":")[2])
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)

    def end(self, name: str) -> None:
        self._open.pop()

    def characters(self, text: str) -> None:
        element = self._open[-1]
        if len(element.text) + len(text) > UPNP_MAX_TEXT_CHARS:
            raise RemoteProtocolError("XML with too long a text")
        element.text += text
