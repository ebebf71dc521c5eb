"""Two peers in one program, without a daemon: one shares a file and serves a method, the other uses both."""

import tempfile
from pathlib import Path

import numpy as np
import trio

import lattica

LOOPBACK = ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"]


class Scale:
    async def double(self, x: np.ndarray) -> np.ndarray:
        return x * 2


async def main(folder: Path) -> None:
    async with lattica.open_node(lattica.NodeConfig(listen=LOOPBACK)) as alice:
        alice.rpc.serve("scale", Scale())
        where = [f"{addr}/p2p/{alice.peer_id}" for addr in alice.host.listen_addrs()]
        async with lattica.open_node(lattica.NodeConfig(listen=LOOPBACK, bootstrap=where)) as bob:
            y = await bob.rpc.call(alice.peer_id, "scale.double", np.arange(4), timeout=5)
            print("alice answered", y)

            (folder / "weights.bin").write_bytes(bytes(range(256)) * 4096)
            shared = await alice.blobs.share(folder / "weights.bin")
            await bob.blobs.fetch(shared.cid, folder / "copy.bin")
            same = (folder / "copy.bin").read_bytes() == (folder / "weights.bin").read_bytes()
            print("bob fetched", shared.cid, "equal" if same else "different")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        trio.run(main, Path(name))
