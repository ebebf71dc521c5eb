"""Signatures checked beside the trio thread: in threads, in processes, and when a process dies."""

from __future__ import annotations

import io
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from lattica import NodeConfig, open_node
from lattica.replica import signatures, verifier
from lattica.replica.signatures import SignatureChecker
from lattica_protocols.keys import PrivateKey
from lattica_protocols.replica.operation import Operation

SPACE = bytes(range(32))
KEY = PrivateKey.generate(bytes(32))


def operations(count: int) -> list[Operation]:
    """Unchecked ones; every fifth is not what its author signed."""
    out = []
    for seq in range(1, count + 1):
        op = Operation.seal(KEY, SPACE, instance=1, seq=seq, parents=[bytes(32)], time=1, body=b"x" * (seq % 60))
        data = op.encoded if seq % 5 else op.encoded[:-1] + bytes([op.encoded[-1] ^ 1])
        out.append(Operation.decode_untrusted(data, SPACE))
    return out


def right(ops: Sequence[Operation]) -> bool:
    return [op.verified for op in ops] == [bool(op.seq % 5) for op in ops]


def is_running(pid: int) -> bool:
    """Whether a child process is there, also one that ended and was not waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@asynccontextmanager
async def checker() -> AsyncIterator[SignatureChecker]:
    async with trio.open_nursery() as nursery:
        made = SignatureChecker()
        made.max_processes = 2
        nursery.start_soon(made.run)
        await trio.testing.wait_all_tasks_blocked()
        yield made
        nursery.cancel_scope.cancel()


def test_the_program_answers_what_this_process_finds() -> None:
    ops = operations(20)
    body = (52).to_bytes(4, "big") + b"lattica-replica-op-1" + SPACE
    body += b"".join(len(op.encoded).to_bytes(4, "big") + op.encoded for op in ops)
    request = len(body).to_bytes(4, "big") + body
    answers = io.BytesIO()
    verifier.main(io.BytesIO(request + request + request[:100]), answers)
    assert answers.getvalue() == bytes(op.check_signature(SPACE) for op in ops) * 2


def test_few_are_checked_in_threads_and_many_in_processes_that_end(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "PROCESSES_OVER", 100)
    monkeypatch.setattr(signatures, "IDLE", 0.05)

    async def main() -> None:
        async with checker() as made:
            few = operations(50)
            await made.check(few, SPACE)
            assert right(few)
            assert made.processes() == 0
            lots = [operations(80) for _ in range(6)]
            async with trio.open_nursery() as nursery:
                for ops in lots:
                    nursery.start_soon(made.check, ops, SPACE)
            assert all(right(ops) for ops in lots)
            assert made.checked_in_processes >= 4 * 80
            pids = [each._process.pid for each in made._processes]
            assert 1 <= len(pids) <= 2
            with trio.fail_after(10):
                while made.processes():
                    await trio.testing.wait_all_tasks_blocked(0.01)
            assert not any(map(is_running, pids))
            again = [operations(80) for _ in range(3)]
            async with trio.open_nursery() as nursery:
                for ops in again:
                    nursery.start_soon(made.check, ops, SPACE)
            assert all(right(ops) for ops in again)

    run(main)


def test_all_are_checked_when_a_process_dies(
    run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(signatures, "PROCESSES_OVER", 0)

    async def main() -> None:
        async with checker() as made:
            first = operations(20)
            await made.check(first, SPACE)
            (process,) = made._processes
            os.kill(process._process.pid, signal.SIGKILL)
            second = operations(20)
            await made.check(second, SPACE)
            assert right(first)
            assert right(second)
            assert made.processes() == 0
            third = operations(20)
            await made.check(third, SPACE)
            assert right(third)
            assert made.processes() == 0

    with caplog.at_level(logging.WARNING):
        run(main)
    assert "signature_processes_failed" in caplog.text


def test_threads_do_it_where_no_process_starts(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "PROCESSES_OVER", 0)
    monkeypatch.setattr(signatures.sys, "executable", "/nonexistent/python")

    async def main() -> None:
        async with checker() as made:
            ops = operations(20)
            await made.check(ops, SPACE)
            assert right(ops)
            assert made.checked_in_processes == 0

    run(main)


def test_processes_are_gone_when_the_node_is(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "PROCESSES_OVER", 100)
    tcp = ["/ip4/127.0.0.1/tcp/0"]

    async def main() -> None:
        async with open_node(NodeConfig(home=tmp_path / "one", listen=tcp, kad_mode="server")) as one:
            space = await one.spaces.create("much")
            for number in range(3000):
                space[f"k{number % 50}"] = number
            config = NodeConfig(home=tmp_path / "two", listen=tcp)
            async with open_node(config) as two:
                checks = two.spaces._signatures
                checks.max_processes = 2
                addr = one.host.listen_addrs()[0]
                await two.host.connect(one.peer_id, [addr])
                other = await two.spaces.join(space.id, [one.peer_id])
                with trio.fail_after(30):
                    while other.root() != space.root():
                        await trio.testing.wait_all_tasks_blocked(0.005)
                assert checks.checked_in_processes
                pids = [each._process.pid for each in checks._processes]
            assert pids
            assert not any(map(is_running, pids))

    run(main)
