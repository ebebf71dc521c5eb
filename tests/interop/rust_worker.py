"""Runs inside the environment of the Rust wheel: one peer, driven by JSON lines on stdin, answering on stdout.

It imports nothing of ours: `lattica` is the Rust package here. Its `store` and `get` pickle values, which is safe in
this one place because both ends are this test.
"""

import json
import sys
import time

from lattica import ConnectionHandler, Lattica, rpc_method, rpc_stream


class Echo(ConnectionHandler):
    """The service that the benchmarks call."""

    @rpc_method
    def echo(self, data):
        return data

    @rpc_stream
    def size(self, data):
        return len(data)


def build(settings):
    builder = Lattica.builder().with_listen_addrs(settings["listen"]).with_mdns(False)
    if settings.get("bootstraps"):
        builder = builder.with_bootstraps(settings["bootstraps"])
    if settings.get("relays"):
        builder = builder.with_relay_servers(settings["relays"])
    if settings.get("protocol") is not None:
        builder = builder.with_protocol(settings["protocol"])
    if settings.get("autonat"):
        builder = builder.with_autonat(True)
    return builder.build()


def calls(stub, size, count, in_flight):
    """Calls per second of `size` bytes, `in_flight` at a time, and the latencies of sequential ones."""
    data = b"x" * size
    pending, latencies = [], []
    for _ in range(min(50, count)):
        stub.echo(data).result()
    started = time.perf_counter()
    for _ in range(count):
        if in_flight == 1:
            before = time.perf_counter()
            stub.echo(data).result()
            latencies.append(time.perf_counter() - before)
            continue
        pending.append(stub.echo(data))
        if len(pending) >= in_flight:
            pending.pop(0).result()
    for call in pending:
        call.result()
    seconds = time.perf_counter() - started
    latencies.sort()
    return {
        "calls_per_second": count / seconds,
        "median_seconds": latencies[len(latencies) // 2] if latencies else None,
        "p99_seconds": latencies[len(latencies) * 99 // 100] if latencies else None,
    }


def stream(stub, size):
    data = b"x" * size
    started = time.perf_counter()
    stub.size(data).result()
    return {"bytes_per_second": size / (time.perf_counter() - started)}


def main():
    peer = build(json.loads(sys.argv[1]))
    handler = Echo(peer)
    peer.register_service(handler)
    print(json.dumps({"peer_id": peer.peer_id()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        name, args = command["do"], command.get("args", [])
        try:
            if name == "calls":
                answer = calls(handler.get_stub(args[0]), *args[1:])
            elif name == "stream":
                answer = stream(handler.get_stub(args[0]), args[1])
            elif name == "get":
                found = peer.get(args[0])
                answer = None if found is None else found.value
            else:
                answer = getattr(peer, name)(*args)
            print(json.dumps({"ok": answer}), flush=True)
        except Exception as error:  # whatever it was, the driver has to hear of it
            print(json.dumps({"error": str(error)}), flush=True)


main()
