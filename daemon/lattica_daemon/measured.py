"""The `bench` service: what another peer's `lattica bench` measures against. Nothing in it keeps data or computes.

A caller can make us send at most `MAX_DOWNLOAD` for one call, over a connection that it made and pays for in the same
coin, and flow control holds the sender to the pace at which it reads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from lattica.errors import InvalidArgument
from lattica.rpc import client_streaming, nonblocking

ITEM_BYTES = 1 << 20
MAX_DOWNLOAD = 1 << 30


class BenchService:
    """Echo, sink and source."""

    @nonblocking
    def echo(self, data: object) -> object:
        """`data`, back."""
        return data

    @client_streaming
    async def upload(self, items: AsyncIterator[Any]) -> int:
        """Read items and drop them; how many bytes they had."""
        total = 0
        async for item in items:
            total += len(item)
        return total

    async def download(self, size: int) -> AsyncIterator[bytes]:
        """`size` bytes in items of 1 MiB."""
        if not isinstance(size, int) or not 0 <= size <= MAX_DOWNLOAD:
            raise InvalidArgument(f"a download has 0 to {MAX_DOWNLOAD} bytes")
        item = bytes(ITEM_BYTES)
        for _ in range(size // ITEM_BYTES):
            yield item
        if size % ITEM_BYTES:
            yield item[: size % ITEM_BYTES]
