"""Replicas on a simulated network: latency, loss, repetition, partitions, crashes, and members that cheat.

Everything comes from one seed; a failing run is replayed with `python tests/sim/replica_runs.py --seed N`.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from pycrdt import Map

from lattica_protocols.errors import ProtocolError
from lattica_protocols.keys import PrivateKey
from lattica_protocols.replica.genesis import Genesis
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.plain import container, to_shared
from lattica_protocols.replica.replica import Replica
from lattica_protocols.replica.short_form import RowWriter
from lattica_protocols.replica.sync import ReplicaSync

UNIX = 1_800_000_000.0
EDIT_SECONDS = 20.0
"""Simulated seconds in which edits are made."""
SETTLE_SECONDS = 240.0


@dataclass(eq=False)
class Member:
    """One peer of the space."""

    number: int
    key: PrivateKey
    replica: Replica
    machine: ReplicaSync[int]
    neighbours: list[int]
    writes: bool = True
    byzantine: bool = False
    disk: list[tuple[bytes, int]] = field(default_factory=list)
    row: RowWriter = field(default_factory=RowWriter)
    forks: list[list[bytes]] = field(default_factory=list)
    lost: list[Operation] = field(default_factory=list)
    checkpoint: bytes = b""

    def save(self) -> None:
        unsaved = self.replica.take_unsaved()
        self.lost += unsaved.lost
        if unsaved.checkpoint is not None:
            self.checkpoint = unsaved.checkpoint.encode()
            self.row = RowWriter()
            self.disk = [(self.row.write(e.op), e.end - e.start) for e in self.replica.graph.counted()]
            return
        self.disk += [(self.row.write(op), items) for op, items in unsaved.operations]
        self.forks += [[op.encoded for op in fork.operations] for fork in unsaved.forks]


class Network:
    """Members, and what is on its way between them."""

    def __init__(self, seed: int, size: int, byzantine: int, loss: float = 0.1) -> None:
        self.rng = random.Random(seed)
        self.loss = loss
        self.now = 0.0
        self.partition: dict[int, int] = {}
        self._order = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        keys = [PrivateKey.generate(self.rng.randbytes(32)) for _ in range(size)]
        writers = [key.public_key.data for key in keys[1 : 1 + max(size * 3 // 4, byzantine + 2)]]
        self.genesis = Genesis.create(keys[0].public_key.data, "simulated", self.rng.randbytes(16), writers)
        self.members: list[Member] = []
        for number, key in enumerate(keys):
            replica = self._replica(key)
            machine: ReplicaSync[int] = ReplicaSync(replica, self.rng, 0.0)
            member = Member(number, key, replica, machine, [], key.public_key.data in writers or number == 0)
            member.byzantine = 0 < number <= byzantine
            self.members.append(member)
        self._connect()

    def _replica(self, key: PrivateKey) -> Replica:
        return Replica(self.genesis, key=key, instance=self.rng.getrandbits(32), rng=self.rng)

    def _connect(self) -> None:
        """A ring, so that it is connected without the cheaters, and a few links at random."""
        honest = [member.number for member in self.members if not member.byzantine]
        pairs = {
            tuple(sorted(pair)) for pair in zip(honest, honest[1:] + honest[:1], strict=True) if pair[0] != pair[1]
        }
        for member in self.members:
            for _ in range(2):
                other = self.rng.choice(self.members)
                if other is not member:
                    pairs.add(tuple(sorted((member.number, other.number))))
        for a, b in sorted(pairs):
            self.members[a].neighbours.append(b)
            self.members[b].neighbours.append(a)
        for member in self.members:
            self._start(member)

    def _start(self, member: Member) -> None:
        for other in member.neighbours:
            member.machine.add_neighbour(other, self.now)
        self.pump(member)
        self._arm(member, member.machine)

    def _arm(self, member: Member, machine: ReplicaSync[int]) -> None:
        def fire() -> None:
            if member.machine is machine:
                machine.handle_timer(self.now, UNIX + self.now)
                self.pump(member)
                self._arm(member, machine)

        self.at(max(machine.next_timeout(), self.now + 0.01), fire)

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time, next(self._order), call))

    def run(self, until: float, stop: Callable[[], bool] = lambda: False, every: float = 1.0) -> bool:
        check = self.now + every
        while self._heap and self._heap[0][0] <= until:
            self.now, _, call = heapq.heappop(self._heap)
            call()
            if self.now >= check:
                check = self.now + every
                if stop():
                    return True
        self.now = until
        return stop()

    # -- messages -------------------------------------------------------------------------------------------
    def pump(self, member: Member) -> None:
        """Store what is new, then send: nothing leaves that a crash could take back."""
        member.save()
        for peer, data in member.machine.poll_transmit():
            self.send(member.number, peer, data)

    def send(self, source: int, target: int, data: bytes) -> None:
        if self.partition.get(source, 0) != self.partition.get(target, 0) or self.rng.random() < self.loss:
            return
        copies = 2 if self.rng.random() < 0.05 else 1
        for _ in range(copies):
            delay = self.rng.uniform(0.01, 0.12) if self.rng.random() < 0.9 else self.rng.uniform(0.1, 1.5)
            self.at(self.now + delay, lambda: self._deliver(source, target, data))

    def _deliver(self, source: int, target: int, data: bytes) -> None:
        member = self.members[target]
        if member.byzantine and self.rng.random() < 0.3:
            return  # it drops what it should pass on
        try:
            member.machine.receive_message_untrusted(source, data, self.now, UNIX + self.now)
        except ProtocolError:
            if not self.members[source].byzantine:
                raise
        self.pump(member)

    # -- what members do ------------------------------------------------------------------------------------
    def edit(self, member: Member) -> None:
        """A random edit of a random container, by an honest member."""
        if member.replica.why_not_writable() is not None:
            return
        with member.replica.transaction(UNIX + self.now) as made:
            for _ in range(self.rng.choice((1, 1, 1, 4))):
                edit_at_random(member.replica, self.rng)
        member.machine.push(made)
        self.pump(member)

    def crash(self, member: Member, *, forget: bool) -> None:
        """The process ends and starts again, with what was on its disk or without."""
        member.row = RowWriter()
        if forget:
            member.disk, member.forks, member.lost, member.checkpoint = [], [], [], b""
            member.replica = self._replica(member.key)
        else:
            instance = member.replica.instance
            member.replica = Replica(self.genesis, key=member.key, instance=instance, rng=self.rng)
            if member.checkpoint:
                member.replica.receive_checkpoint(member.checkpoint)
                member.replica.take_unsaved()
            member.replica.load(member.disk, member.forks)
            member.replica.lost = list(member.lost)
        member.machine = ReplicaSync(member.replica, self.rng, self.now)
        self._start(member)

    def honest(self) -> list[Member]:
        return [member for member in self.members if not member.byzantine]

    def agreed(self) -> bool:
        roots = {member.replica.root() for member in self.honest()}
        return len(roots) == 1


def edit_at_random(replica: Replica, rng: random.Random) -> None:
    """One change to one of the containers, by rules that fit its type."""
    doc = replica.doc
    what = rng.choice("mmmnltcs")
    if what == "m":
        config = container(doc, "m:config")
        key = f"key{rng.randrange(6)}"
        if rng.random() < 0.25 and key in config:
            del config[key]
        else:
            config[key] = to_shared(rng.choice([1, 2.5, "text", b"bytes", None, True, [1, "a"], {"a": {"b": 1}}]))
    elif what == "n":
        nested = container(doc, "m:nested")
        if not isinstance(nested.get("inner"), Map):  # a cheat may have put a text there
            nested["inner"] = to_shared({"list": [1, 2]})
        else:
            nested["inner"][f"key{rng.randrange(4)}"] = rng.randrange(100)
    elif what == "l":
        items = container(doc, "l:items")
        if len(items) and rng.random() < 0.3:
            del items[rng.randrange(len(items))]
        else:
            items.insert(rng.randrange(len(items) + 1), rng.randrange(1000))
    elif what == "t":
        text = container(doc, "t:notes")
        size = len(str(text))
        if size > 4 and rng.random() < 0.3:
            at = rng.randrange(size - 2)
            del text[at : at + 2]
        else:
            text.insert(rng.randrange(size + 1), rng.choice(["ab", "xyz", "q"]))
    elif what == "c":
        counter = container(doc, "c:hits")
        own = str(doc.client_id)
        counter[own] = counter.get(own, 0) + rng.randrange(1, 5)
    else:
        members = container(doc, "s:workers")
        element = f'"w{rng.randrange(6)}"'
        if element in members and rng.random() < 0.5:
            del members[element]
        else:
            members[element] = element[1:-1]


def grant(network: Network, kind: Kind, key: bytes) -> Operation | None:
    """The owner changes who writes."""
    owner = network.members[0]
    try:
        op = owner.replica.change_members(kind, key, UNIX + network.now)
    except ProtocolError:
        return None
    owner.machine.push([op])
    network.pump(owner)
    return op
