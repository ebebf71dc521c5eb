"""A go-libp2p peer, by the library that `libp2p-go` makes of it, which obeys JSON lines as in `driven`.

Runs in an environment of its own: it imports nothing of ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from libp2p import (
    DefaultMuxers,
    DefaultSecurity,
    DefaultTransports,
    Host,
    Identity,
    ListenAddrStrings,
    Ping,
    SecurityNoise,
    SecurityTls,
    Stream,
)
from libp2p.crypto import KeyType, crypto_generate_keypair
from libp2p.peer import Peer, addr_info_from_p2p_addr

SECURITY = {"tls": SecurityTls, "noise": SecurityNoise, None: DefaultSecurity}
BLOCK = bytes(range(256)) * 256


async def echo(stream: Stream) -> None:
    try:
        while True:
            size, data = await stream.read_bytes(65536)
            if not size:
                break
            await stream.write(data)
    except ValueError as error:  # the end of a stream is an error of the library
        sys.stderr.write(f"{error}\n")
    await stream.close()


async def send_and_count(stream: Stream, blocks: int) -> int:
    async def send() -> None:
        for _ in range(blocks):
            await stream.write(BLOCK)

    sending = asyncio.create_task(send())
    received = 0
    while received < blocks * len(BLOCK):
        size, data = await stream.read_bytes(65536)
        if not size or data[0] != received & 255:
            raise RuntimeError(f"wrong after {received} bytes")
        received += size
    await sending
    await stream.close()
    return received


async def obey(host: Host, name: str, args: list[Any]) -> Any:
    if name == "connect":
        await host.connect(addr_info_from_p2p_addr(args[0]))
        return True
    if name == "echo":
        return await send_and_count(await host.new_stream(Peer.decode(args[0]), "/echo/1"), args[1])
    raise ValueError(f"no command {name}")


def say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def main() -> None:
    settings = json.loads(sys.argv[1]) or {}
    options = [
        ListenAddrStrings(*settings["listen"]),
        DefaultTransports(),
        DefaultMuxers(),
        SECURITY[settings.get("security")](),
        Ping(True),
    ]
    if "key" in settings:
        options.append(Identity(crypto_generate_keypair(KeyType[settings["key"]], 2048)[0]))
    loop = asyncio.get_running_loop()
    host = Host(*options, loop=loop)
    host.set_stream_handler("/echo/1", echo)
    say({"peer_id": host.id.string, "addrs": host.addrs})
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        command = json.loads(line)
        try:
            say({"ok": await obey(host, command["do"], command["args"])})
        except Exception as error:  # whatever it was, the driver has to hear of it
            say({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # its threads would wait for streams


asyncio.run(main())
