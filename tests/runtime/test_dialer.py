"""In which order, and when, the addresses of a peer are tried. Nothing is dialled here but the clock."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio

from lattica.dialer import ATTEMPT_DELAY, dial_first, order_addresses
from lattica.errors import ConnectError, DialError
from lattica.interfaces import Connection
from lattica_protocols.multiaddr import Multiaddr

RELAY = "/ip4/8.8.8.8/tcp/1/p2p/12D3KooWGRUVh7qTjmPpe9ugBnUnGT8LDKVdDyvRZSuUVvDFxbmg/p2p-circuit"
CIRCUIT = Multiaddr.parse(RELAY)
DIRECT = [Multiaddr.parse(f"/ip4/192.168.1.{n}/tcp/1") for n in range(1, 7)]


class Made:
    def __init__(self, addr: Multiaddr) -> None:
        self.addr = addr

    def abort(self) -> None:
        pass


class Dials:
    """Answers after some seconds, or never."""

    def __init__(self, **answers: float) -> None:
        self.started: list[tuple[Multiaddr, float]] = []
        self.answers = {Multiaddr.parse(addr): after for addr, after in answers.items()}

    async def __call__(self, addr: Multiaddr) -> Connection:
        self.started.append((addr, trio.current_time()))
        after = self.answers.get(addr)
        await trio.sleep(float("inf") if after is None else abs(after))
        if after is not None and after < 0:
            raise DialError("refused")
        return cast(Connection, Made(addr))


def test_a_relayed_address_does_not_wait_for_six_deaf_ones(run_mocked) -> None:
    async def main() -> None:
        dials = Dials(**{str(CIRCUIT): 0.1})
        started = trio.current_time()
        made: Any = await dial_first(order_addresses([CIRCUIT, *DIRECT]), dials)
        assert made.addr == CIRCUIT
        assert trio.current_time() - started == pytest.approx(ATTEMPT_DELAY + 0.1)
        assert [addr for addr, _ in dials.started if not addr.is_circuit] == DIRECT[: len(dials.started) - 1]

    run_mocked(main)


def test_a_direct_path_that_answers_at_once_wins_and_the_relay_is_left_alone(run_mocked) -> None:
    async def main() -> None:
        dials = Dials(**{str(CIRCUIT): 0.0, str(DIRECT[0]): 0.2})
        made: Any = await dial_first(order_addresses([CIRCUIT, *DIRECT]), dials)
        assert made.addr == DIRECT[0]
        assert len(dials.started) == 1

    run_mocked(main)


def test_the_relay_follows_at_once_when_all_direct_ones_are_refused(run_mocked) -> None:
    async def main() -> None:
        dials = Dials(**{str(CIRCUIT): 0.1} | {str(addr): -0.01 for addr in DIRECT[:2]})
        started = trio.current_time()
        made: Any = await dial_first(order_addresses([CIRCUIT, *DIRECT[:2]]), dials)
        assert made.addr == CIRCUIT
        assert trio.current_time() - started == pytest.approx(0.12)

    run_mocked(main)


def test_all_failures_are_named(run_mocked) -> None:
    async def main() -> None:
        dials = Dials(**{str(CIRCUIT): -0.1} | {str(addr): -0.01 for addr in DIRECT[:2]})
        with pytest.raises(ConnectError, match=r"192\.168\.1\.2.*p2p-circuit: refused"):
            await dial_first(order_addresses([CIRCUIT, *DIRECT[:2]]), dials)

    run_mocked(main)
