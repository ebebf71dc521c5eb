"""grpc.aio without encryption, as a peer to compare with: generic byte methods, so that no message is compiled."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import grpc

LIMIT = 300 * 1024 * 1024
OPTIONS = [("grpc.max_send_message_length", LIMIT), ("grpc.max_receive_message_length", LIMIT)]
CHUNK = 1024 * 1024


class Echo(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method == "/echo/unary":

            async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
                return request

            return grpc.unary_unary_rpc_method_handler(unary)
        if details.method == "/echo/sink":

            async def sink(requests: object, context: grpc.aio.ServicerContext) -> bytes:
                total = 0
                async for chunk in requests:  # type: ignore[attr-defined]
                    total += len(chunk)
                return str(total).encode()

            return grpc.stream_unary_rpc_method_handler(sink)
        return None


async def serve() -> None:
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(json.dumps({"port": port}) + "\n")
    sys.stdout.flush()
    await server.wait_for_termination()


async def calls(method: grpc.aio.UnaryUnaryMultiCallable, size: int, count: int, in_flight: int) -> dict[str, object]:
    data = b"x" * size
    latencies: list[float] = []
    left = count

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            before = time.perf_counter()
            await method(data)
            latencies.append(time.perf_counter() - before)

    for _ in range(min(50, count)):
        await method(data)
    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    seconds = time.perf_counter() - started
    latencies.sort()
    return {
        "calls_per_second": count / seconds,
        "median_seconds": latencies[len(latencies) // 2],
        "p99_seconds": latencies[len(latencies) * 99 // 100],
    }


async def stream(method: grpc.aio.StreamUnaryMultiCallable, size: int) -> dict[str, float]:
    chunk = bytes(CHUNK)

    async def chunks() -> object:
        for _ in range(size // CHUNK):
            yield chunk

    started = time.perf_counter()
    await method(chunks())
    return {"bytes_per_second": size / (time.perf_counter() - started)}


async def client(port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        await channel.channel_ready()
        unary, sink = channel.unary_unary("/echo/unary"), channel.stream_unary("/echo/sink")
        sys.stdout.write('{"ready": true}\n')
        sys.stdout.flush()
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command = json.loads(line)
            answer = await (
                calls(unary, *command["args"]) if command["do"] == "calls" else stream(sink, *command["args"])
            )
            sys.stdout.write(json.dumps({"ok": answer}) + "\n")
            sys.stdout.flush()


settings = json.loads(sys.argv[1])
asyncio.run(serve() if settings["role"] == "server" else client(settings["port"]))
