"""What discovery finds out about every kind of box, on a simulated internet. Each test prints its seed; run one again
with `LATTICA_SIM_SEED=<seed>`."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from lattica.testing.internet import Gateway, SimulatedInternet
from lattica.testing.nat_boxes import BOXES, BoxKind
from lattica.testing.observers import SimObserver
from lattica_protocols.nat.behaviour import Filtering, Mapping, NatBehaviour, Ports
from lattica_protocols.nat.discovery import BehaviourKnown, Discovery
from lattica_protocols.stun import SocketAddr

NONE, EIM, ADM, APDM = (
    Mapping.NONE,
    Mapping.ENDPOINT_INDEPENDENT,
    Mapping.ADDRESS_DEPENDENT,
    Mapping.ADDRESS_AND_PORT_DEPENDENT,
)
EIF, ADF, APDF = (
    Filtering.ENDPOINT_INDEPENDENT,
    Filtering.ADDRESS_DEPENDENT,
    Filtering.ADDRESS_AND_PORT_DEPENDENT,
)
EXPECTED: dict[tuple[str, ...], tuple[Mapping, Filtering, Ports, bool | None]] = {
    # boxes from the host to the core: mapping, filtering, ports, hairpin
    (): (NONE, EIF, Ports.PRESERVED, None),
    ("fw",): (NONE, APDF, Ports.PRESERVED, None),
    ("full",): (EIM, EIF, Ports.PRESERVED, True),
    ("adf",): (EIM, ADF, Ports.PRESERVED, False),
    ("apdf",): (EIM, APDF, Ports.PRESERVED, False),
    ("apdfr",): (EIM, APDF, Ports.RANDOM, False),
    ("rej",): (EIM, APDF, Ports.PRESERVED, False),
    ("open",): (EIM, APDF, Ports.PRESERVED, False),
    ("adm",): (ADM, APDF, Ports.RANDOM, None),
    ("symf",): (APDM, EIF, Ports.RANDOM, None),
    ("syma",): (APDM, ADF, Ports.RANDOM, None),
    ("symseq",): (APDM, APDF, Ports.SEQUENTIAL, None),
    ("sym",): (APDM, APDF, Ports.RANDOM, None),
    ("symblk",): (APDM, APDF, Ports.BLOCK, None),
    ("apdf", "apdfr"): (EIM, APDF, Ports.RANDOM, False),
    ("apdf", "sym"): (APDM, APDF, Ports.RANDOM, None),
    ("full", "adf"): (EIM, ADF, Ports.PRESERVED, False),
    ("adf", "symblk"): (APDM, APDF, Ports.BLOCK, None),
}


@pytest.fixture
def seed() -> int:
    seed = int(os.environ.get("LATTICA_SIM_SEED") or random.SystemRandom().getrandbits(32))
    print(f"LATTICA_SIM_SEED={seed}")  # noqa: T201
    return seed


def behind(net: SimulatedInternet, boxes: tuple[str | BoxKind, ...]) -> Gateway | None:
    """The innermost of a chain, given from the host to the core."""
    gateway = None
    for kind in reversed(boxes):
        gateway = net.box(kind, behind=gateway)
    return gateway


def discover(
    net: SimulatedInternet,
    boxes: tuple[str | BoxKind, ...],
    observers: list[SimObserver],
    lifetimes: tuple[float, ...] = (),
) -> list[BehaviourKnown]:
    """All verdicts, the final one last."""
    host = net.host("home", behind(net, boxes), delay=0.01)
    sockets: dict[int, tuple[str, int]] = {}
    machine = Discovery(
        [o.observer for o in observers],
        random.Random(net.rng.getrandbits(64)),
        net.now,
        local_of=lambda number: sockets.get(number),
        lifetimes=lifetimes,
    )
    attached = host.attach(machine)
    sockets.update(attached.sockets)
    attached.sockets = sockets
    net.run(300.0, until=lambda: any(getattr(event, "final", False) for event in attached.events))
    events = [event for event in attached.events if isinstance(event, BehaviourKnown)]
    assert events, "no verdict"
    assert events[-1].final, events
    attached.detach()
    return events


def described(behaviour: NatBehaviour) -> tuple[Mapping, Filtering, Ports, bool | None]:
    return behaviour.mapping, behaviour.filtering, behaviour.allocation.ports, behaviour.hairpin


@pytest.mark.parametrize("boxes", EXPECTED, ids="+".join)
def test_every_box_is_classified_right(boxes: tuple[str, ...], seed: int) -> None:
    net = SimulatedInternet(seed, jitter=0.005)
    events = discover(net, boxes, [SimObserver(net, f"observer {i}") for i in range(3)])
    known = events[-1].behaviour
    assert described(known) == EXPECTED[boxes], known.evidence
    assert events[-1].certain
    assert (known.mapped is None) == (known.mapping not in (NONE, EIM))
    assert known.public_ip is not None
    assert net.now < 5
    assert events[0].behaviour.mapping is known.mapping


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("boxes", EXPECTED, ids="+".join)
def test_with_loss(boxes: tuple[str, ...], seed: int) -> None:
    net = SimulatedInternet(seed, jitter=0.02, loss=0.2)
    known = discover(net, boxes, [SimObserver(net, f"observer {i}") for i in range(5)])[-1].behaviour
    assert known.mapping is EXPECTED[boxes][0], known.evidence
    assert known.filtering is EXPECTED[boxes][1], known.evidence


@pytest.mark.parametrize("box", ["noudp", "tcp443"])
def test_blocked_udp(box: str, seed: int) -> None:
    net = SimulatedInternet(seed)
    events = discover(net, (box,), [SimObserver(net, f"observer {i}") for i in range(3)])
    known = events[-1].behaviour
    assert known.udp_blocked
    assert known.mapping is Mapping.UNKNOWN
    assert known.filtering is Filtering.UNKNOWN
    assert net.now < 6


# -- observers that lie -----------------------------------------------------------------------------------------------
LIES = ("a stranger's address", "the next port", "what another one sees")


@pytest.mark.parametrize("count", [4, 5, 6])
@pytest.mark.parametrize("boxes", [(), ("full",), ("apdf",), ("apdfr",), ("adm",), ("sym",), ("symseq",)], ids="+".join)
@pytest.mark.parametrize("lie", LIES)
def test_one_lying_observer_cannot_move_us(boxes: tuple[str, ...], count: int, lie: str, seed: int) -> None:
    for position in range(count):
        net = SimulatedInternet(seed)
        observers: list[SimObserver] = []

        def told(source: tuple[str, int], observers: list[SimObserver] = observers, liar: int = position) -> SocketAddr:
            if lie == "a stranger's address":
                return "192.0.2.66", 6666
            if lie == "the next port":
                return source[0], source[1] % 60000 + 7
            seen = observers[liar - 1].seen  # as good as a lie can be: what an honest one sees
            return seen[0] if seen else source

        for i in range(count):
            liar = i == position
            observers.append(SimObserver(net, f"observer {i}", lie=told if liar else None, silent=liar))
        last = discover(net, boxes, observers)[-1]
        known, expected = last.behaviour, EXPECTED[boxes]
        assert last.certain
        assert (known.mapping, known.filtering) == expected[:2], (position, known.evidence)
        assert known.mapped is None or known.mapped[0] != "192.0.2.66"
        assert known.public_ip != "192.0.2.66"
        assert known.allocation.ports is expected[2], (position, known.allocation)


@pytest.mark.parametrize(("box", "mapping"), [("apdf", EIM), ("sym", APDM)])
def test_one_liar_of_three_may_make_us_unsure_but_never_wrong(box: str, mapping: Mapping, seed: int) -> None:
    for position in range(3):
        net = SimulatedInternet(seed)
        observers = [
            SimObserver(net, f"observer {i}", lie=(lambda source: ("192.0.2.66", 6)) if i == position else None)
            for i in range(3)
        ]
        known = discover(net, (box,), observers)[-1]
        assert known.behaviour.mapping in (mapping, Mapping.UNKNOWN)
        assert known.behaviour.mapped is None
        assert known.certain or known.behaviour.mapping is Mapping.UNKNOWN


def test_a_liar_cannot_make_us_send_elsewhere(seed: int) -> None:
    """His OTHER-ADDRESS and the addresses he claims name a victim."""
    net = SimulatedInternet(seed)
    victim = net.host("victim")
    hits: list[bytes] = []
    for port in (3478, 3479, 7777):
        victim.bind(lambda data, source: hits.append(data), port=port)
    observers = [SimObserver(net, f"observer {i}", lie=lambda source: (victim.address, 7777)) for i in range(2)]
    observers += [SimObserver(net, f"honest {i}") for i in range(3)]
    discover(net, ("full",), observers, lifetimes=(1.0,))
    assert hits == []


# -- lifetime ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lifetime", "lives", "dies"), [(5.0, None, None), (20.0, 10.0, 30.0), (35.0, 30.0, 60.0), (300.0, 120.0, None)]
)
@pytest.mark.parametrize("box", ["fw", "full", "apdf", "apdfr", "sym", "symseq"])
def test_lifetime(box: str, lifetime: float, lives: float | None, dies: float | None, seed: int) -> None:
    net = SimulatedInternet(seed)
    kind = replace(BOXES[box], lifetime=lifetime)
    observers = [SimObserver(net, f"observer {i}") for i in range(3)]
    events = discover(net, (kind,), observers, lifetimes=(10, 30, 60, 120))
    known = events[-1].behaviour
    assert (known.lives_for, known.dies_within) == (lives, dies)
    assert any(not event.final and event.behaviour.mapping is EXPECTED[box,][0] for event in events), "told early"


def test_a_run_replays_from_its_seed(seed: int) -> None:
    def run() -> object:
        net = SimulatedInternet(seed, loss=0.3, jitter=0.02)
        events = discover(net, ("sym",), [SimObserver(net, f"observer {i}") for i in range(4)])
        return [(event.behaviour, event.certain) for event in events], net.now

    assert run() == run()


def test_few_observers(seed: int) -> None:
    """None: at once; one: not enough, two: a guess; trusted ones: enough."""
    for count, mapping in ((0, Mapping.UNKNOWN), (1, Mapping.UNKNOWN), (2, EIM)):
        net = SimulatedInternet(seed)
        observers = [SimObserver(net, f"observer {i}", second_address=False) for i in range(count)]
        last = discover(net, ("apdf",), observers)[-1]
        assert last.behaviour.mapping is mapping
        assert not last.certain
        assert last.behaviour.mapped is None
    net = SimulatedInternet(seed)
    trusted = replace(SimObserver(net, "mine").observer, trusted=True)
    host = net.host("home", net.box("symseq"))
    attached = host.attach(Discovery([trusted], random.Random(1), 0.0))
    net.run(10.0)
    last = attached.events[-1]
    assert isinstance(last, BehaviourKnown)
    assert last.certain
    assert (last.behaviour.mapping, last.behaviour.filtering) == (APDM, APDF)
