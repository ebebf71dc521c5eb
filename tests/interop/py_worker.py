"""A py-libp2p peer that obeys JSON lines: `{"do": name, "args": […]}` in, `{"ok": …}` or `{"error": …}` out.

Runs in an environment of its own: it imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import multiaddr
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr

ECHO = TProtocol("/echo/1")


async def echo(stream: Any) -> None:
    while data := await stream.read(65536):
        await stream.write(data)
    await stream.close()


async def obey(host: Any, name: str, args: list[Any]) -> Any:
    if name == "echo":  # connect, send so many bytes on a stream, count what comes back
        info = info_from_p2p_addr(multiaddr.Multiaddr(args[0]))
        await host.connect(info)
        stream = await host.new_stream(info.peer_id, [ECHO])
        payload = bytes(i % 251 for i in range(args[1]))
        await stream.write(payload)
        received = b""
        while len(received) < len(payload):
            received += await stream.read(65536)
        return received == payload
    raise ValueError(f"no command {name}")


async def main() -> None:
    listen = json.loads(sys.argv[1])
    host = new_host(key_pair=create_new_key_pair(), enable_quic="quic" in listen)
    async with host.run(listen_addrs=[multiaddr.Multiaddr(listen)]):
        host.set_stream_handler(ECHO, echo)
        hello = {"peer_id": str(host.get_id()), "addrs": [str(addr) for addr in host.get_addrs()]}
        sys.stdout.write(json.dumps(hello) + "\n")
        sys.stdout.flush()
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            command = json.loads(line)
            try:
                answer = {"ok": await obey(host, command["do"], command["args"])}
            except Exception as error:  # whatever it was, the driver has to hear of it
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


trio.run(main)
