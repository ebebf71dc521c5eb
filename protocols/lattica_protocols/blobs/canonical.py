"""Canonical msgpack: a subset in which every value has exactly one encoding.

Values are unsigned integers, UTF-8 strings, byte strings, arrays, and maps with string keys. Integers and lengths
take the shortest form that holds them; map keys stand in ascending order of their bytes. `msgpack.packb` writes
this form when it is given sorted maps, so only reading needs code of its own: the reader is told what to expect
and never builds anything else, because a generic decoder turns 16 MiB from a stranger into a gigabyte of objects.
"""

from __future__ import annotations

from lattica_protocols.errors import RemoteProtocolError

_UINT_FORMS = {0xCC: (1, 0x80), 0xCD: (2, 0x100), 0xCE: (4, 0x10000), 0xCF: (8, 0x1_0000_0000)}
"""Marker: width in bytes, and the smallest value that needs this form."""
_STR_FORMS = {0xD9: (1, 32), 0xDA: (2, 0x100), 0xDB: (4, 0x10000)}
_BIN_FORMS = {0xC4: (1, 0), 0xC5: (2, 0x100), 0xC6: (4, 0x10000)}
_ARRAY_FORMS = {0xDC: (2, 16), 0xDD: (4, 0x10000)}
_MAP_FORMS = {0xDE: (2, 16), 0xDF: (4, 0x10000)}


class CanonicalReader:
    """Reads one value after another. Every method raises `RemoteProtocolError` when something else is there."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def read_uint_untrusted(self, maximum: int) -> int:
        marker = self._byte()
        value = marker if marker < 0x80 else self._sized(marker, _UINT_FORMS, "an unsigned integer")
        if value > maximum:
            raise RemoteProtocolError(f"the number {value} is over the limit of {maximum}")
        return value

    def read_str_untrusted(self, max_bytes: int) -> str:
        marker = self._byte()
        size = marker & 0x1F if 0xA0 <= marker <= 0xBF else self._sized(marker, _STR_FORMS, "a string")
        try:
            return self._take(size, max_bytes).decode("utf-8")
        except UnicodeDecodeError:
            raise RemoteProtocolError("a string is not UTF-8") from None

    def read_bin_untrusted(self, max_bytes: int) -> bytes:
        return self._take(self._sized(self._byte(), _BIN_FORMS, "a byte string"), max_bytes)

    def read_array_untrusted(self, max_items: int) -> int:
        """The number of items that follow."""
        marker = self._byte()
        count = marker & 0x0F if 0x90 <= marker <= 0x9F else self._sized(marker, _ARRAY_FORMS, "an array")
        return self._bounded(count, max_items)

    def read_keys_untrusted(self, max_items: int) -> int:
        """The number of key/value pairs that follow."""
        marker = self._byte()
        count = marker & 0x0F if 0x80 <= marker <= 0x8F else self._sized(marker, _MAP_FORMS, "a map")
        return self._bounded(count, max_items)

    def expect_end_untrusted(self) -> None:
        if self._at != len(self._data):
            raise RemoteProtocolError(f"{len(self._data) - self._at} bytes behind the end")

    def _byte(self) -> int:
        if self._at >= len(self._data):
            raise RemoteProtocolError("cut off")
        self._at += 1
        return self._data[self._at - 1]

    def _sized(self, marker: int, forms: dict[int, tuple[int, int]], what: str) -> int:
        form = forms.get(marker)
        if form is None:
            raise RemoteProtocolError(f"byte 0x{marker:02x} where {what} should be")
        width, smallest = form
        value = int.from_bytes(self._take(width, width), "big")
        if value < smallest:
            raise RemoteProtocolError("a value is not in its shortest form")
        return value

    def _take(self, size: int, maximum: int) -> bytes:
        if size > maximum:
            raise RemoteProtocolError(f"{size} bytes are over the limit of {maximum}")
        end = self._at + size
        if end > len(self._data):
            raise RemoteProtocolError("cut off")
        out = self._data[self._at : end]
        self._at = end
        return out

    def _bounded(self, count: int, maximum: int) -> int:
        # An item takes at least one byte: a count beyond the rest of the data is a lie.
        if count > maximum or count > len(self._data) - self._at:
            raise RemoteProtocolError(f"{count} items are more than allowed or present")
        return count
