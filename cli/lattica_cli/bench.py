"""`lattica bench PEER`: what the path to a peer carries."""

from __future__ import annotations

import typer

from lattica_cli.context import State, daemon, say
from lattica_cli.parameters import PEER, parse_peer, seconds


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    ctx: typer.Context,
    peer: str = PEER,
    duration: float = seconds(2.0, "--seconds", least=0.1, most=60.0, help="For each of the measurements."),
) -> None:
    """What the path to PEER carries: calls/s, MB/s, round trips.

    Calls of 128 B and 256 KiB, MB/s each way and round-trip times, over the path in use.
    """
    state = State.of(ctx)
    target = str(parse_peer(peer))
    with daemon(state) as lat:
        data = lat.daemon("bench", target, duration, timeout=duration * 5 + 30)

    def human() -> None:
        say(f"over {data['path']} at {data['addr']}")
        say(f"{data['calls_per_second_128']:>10.0f} calls/s with 128 B, 64 in flight")
        say(f"{data['calls_per_second_256k']:>10.0f} calls/s with 256 KiB, 16 in flight")
        say(f"{data['upload_mb_s']:>10.0f} MB/s up")
        say(f"{data['download_mb_s']:>10.0f} MB/s down")
        say(f"{data['rtt_ms_p50']:>10.2f} ms round trip (median), {data['rtt_ms_p99']:.2f} ms (99th percentile)")

    state.emit(data, human)
