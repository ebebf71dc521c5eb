"""The hash DAG of one space: which operations are admitted, and which of them count.

Two layers, so that every replica decides alike whatever the order of arrival:

1. *Admission* looks at an operation and its past only: form, signature, links, sequence, clocks, rights and references
   (what its items name has to be in its past). It is decided once.
2. *Counting* looks at the set of admitted operations. An operation is **void** when its author equivocated (from the
   first fork of the chain on, and all of the author's other chains), or when a removal of its author and it do not know
   of each other. Removals are never void. An operation **counts** when it is not void, or when one that is not void has
   it in its past: what a valid member built on stays. The document consists of the operations that count.

A fork puts two items under one name, and so do two chains that have one client id. So the items of void operations of
an equivocator that count, and those of chains that count and collide (`client_ids`), have a name of their own in the
document: the client id `forked_client(operation id)`. References in other operations are resolved by their past: it
contains one branch of the fork or one of the chains, or they name the renamed client itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.limits import (
    REPLICA_MAX_ADMIN_OPERATIONS,
    REPLICA_MAX_CLOCK_SKEW,
    REPLICA_MAX_CUTS,
    REPLICA_MAX_FIRST_BYTES,
    REPLICA_MAX_INSTANCES,
    REPLICA_MAX_LIMBO,
    REPLICA_MAX_LIMBO_LINKS,
    REPLICA_MAX_UPDATE_BYTES,
    REPLICA_MAX_WRITERS,
)
from lattica_protocols.replica.client_ids import ClientIds, client_id, forked_client
from lattica_protocols.replica.equivocation import Crowd, Equivocation, Fork
from lattica_protocols.replica.errors import MissingParents, NotYet, Refused
from lattica_protocols.replica.floor import Floor
from lattica_protocols.replica.membership import Membership, MembershipTable
from lattica_protocols.replica.operation import Kind, Operation
from lattica_protocols.replica.placement import Find, Placement, Places
from lattica_protocols.replica.scope import Scope
from lattica_protocols.replica.update import ParsedUpdate, Piece, Reference, TooMuch, parse_update_untrusted

Chain = tuple[bytes, int]
"""Author and instance."""
Past = dict["Branch", int]
"""The highest `seq` of each branch in somebody's past: with the branch, all of it up to there."""


_MARK_EVERY = 256


class Branch:
    """A line of operations of one chain. A chain has one, and one more for each fork."""

    __slots__ = ("base", "chain", "client", "ends", "entries", "first_seq", "marks", "past", "start")

    def __init__(self, chain: Chain, client: int, base: Entry | None, first_seq: int, start: int) -> None:
        self.chain = chain
        self.client = client
        self.base = base
        """The operation it forked off."""
        self.first_seq = first_seq
        self.start = start
        """The clock of its first item."""
        self.entries: list[Entry] = []
        self.ends: list[int] = []
        """Clock behind each entry."""
        self.past: Past = {}
        """The past of the last entry, itself included."""
        self.marks: list[Past] = []
        """That of every 256th: the past of one in the middle of a long branch is a walk from the mark before it."""

    def add(self, entry: Entry, past: Past) -> None:
        self.entries.append(entry)
        self.ends.append(entry.end)
        self.past = past
        if len(self.entries) % _MARK_EVERY == 0:
            self.marks.append(past)

    def mark_before(self, seq: int) -> tuple[int, Past]:
        """The last mark that the operation `seq` has in its past or is itself: its `seq`, and its past."""
        marks = (seq - self.first_seq + 1) // _MARK_EVERY
        return (self.first_seq + marks * _MARK_EVERY - 1, self.marks[marks - 1]) if marks else (-1, {})

    def keep(self, count: int, past: Past) -> None:
        """Forget all entries but the first ones; `past`: that of the last one left."""
        del self.entries[count:], self.ends[count:], self.marks[count // _MARK_EVERY :]
        self.past = past

    def at_clock(self, clock: int) -> Entry | None:
        """The operation with the item `clock`."""
        index = bisect_right(self.ends, clock)
        return self.entries[index] if clock >= self.start and index < len(self.entries) else None


def _merge(past: Past, other: Past) -> None:
    for branch, reached in other.items():
        if past.get(branch, -1) < reached:
            past[branch] = reached


class Entry:
    """An admitted operation. Hashed and compared by identity."""

    __slots__ = (
        "before",
        "branch",
        "counted",
        "end",
        "membership",
        "op",
        "order",
        "parents",
        "places",
        "removed",
        "start",
    )

    def __init__(self, op: Operation, branch: Branch, parents: tuple[Entry, ...], before: Membership) -> None:
        self.op = op
        self.branch = branch
        self.parents = parents
        self.before = before
        """The writer set in its past."""
        self.membership = before
        """The same with its own change."""
        self.start = self.end = 0
        """Clocks of its items."""
        self.order = 0
        """Position in the order of admission, which is a topological one."""
        self.removed = False
        """Some removal of its author and it do not know of each other."""
        self.counted = False
        self.places: Places | None = None
        """Where its items stand; None: not looked at yet."""


class Admission:
    """What an admitted operation (or a proof) changed."""

    __slots__ = ("counted", "entry", "fork", "rebuild")

    def __init__(self, entry: Entry | None = None) -> None:
        self.entry = entry
        self.counted: list[Entry] = []
        """Operations that count now and did not, in an order in which they can be applied."""
        self.rebuild = False
        """Something that counted does not any more, or got another name: the document is to be made anew."""
        self.fork: Equivocation | None = None
        """A proof that is new."""


class Graph:
    """All admitted operations of a space."""

    def __init__(self, space: bytes, owner: bytes, writers: Iterable[bytes], floor: Floor | None = None) -> None:
        self.space = space
        self.floor = floor if floor is not None else Floor.empty(owner, writers)
        self.entries: dict[bytes, Entry] = {}
        self.heads: set[bytes] = set(self.floor.heads)
        """Operations that count and that no other that counts is linked to."""
        self.forks: dict[bytes, Equivocation] = {}
        """Equivocators, with the proof that decides."""
        self.chains: dict[Chain, list[Branch]] = {}
        self.table = MembershipTable(self.floor.owners, self.floor.writers, self.floor.former)
        self.renamed: dict[int, Entry] = {}
        """Operations by the client ids that their items have, or would have if they counted, instead of the chain's."""
        self.client_ids = ClientIds(self.floor.chains)
        self._firsts: dict[bytes, dict[int, Operation]] = {}
        """The first operations of each author's instances."""
        self._removals: dict[bytes, list[tuple[Entry, Past]]] = {}
        self._changes = 0
        self._order = 0
        self.limbo = 0
        """Admitted operations that do not count."""
        self._limbo_links = 0
        """Branches in their pasts and beside them, all together."""
        self._counted_membership: Membership | None = None
        self.placement = Placement(self.floor.state, self._find_from)

    # -- what is known --------------------------------------------------------------------------------------
    def membership(self) -> Membership:
        """The writer set after all operations that count."""
        if self._counted_membership is None:
            parts = [self.entries[head].membership for head in self.heads if head in self.entries]
            self._counted_membership = self.table.merged([self.table.base, *parts])
        return self._counted_membership

    def excluded(self, author: bytes) -> bool:
        """Whether there is a proof that `author` equivocated."""
        return author in self.forks or author in self.floor.excluded

    def exclusions(self) -> list[tuple[bytes, int, int]]:
        """(author, seq, instance) of every exclusion, sorted."""
        own = {author: (author, *fork.place) for author, fork in self.forks.items()}
        return sorted({**{author: (author, *place) for author, place in self.floor.excluded.items()}, **own}.values())

    def counted(self) -> list[Entry]:
        """The operations that count, parents first."""
        return [entry for entry in self.entries.values() if entry.counted]

    def operation_at(self, client: int, seq: int) -> Operation | None:
        """The operation at `seq` of the chain with this client id; None when it is not here, or a fork has two."""
        branches = self.client_ids.branches(client)
        found = [b.entries[seq - b.first_seq].op for b in branches if 0 <= seq - b.first_seq < len(b.entries)]
        return found[0] if len(found) == 1 else None

    def clock_before(self, op: Operation) -> int:
        """The clock at which the items of `op` start, which is about to be admitted."""
        previous = self.entries.get(op.parents[0]) if op.seq else None
        if previous is not None:
            return previous.end
        ended = self.floor.chains.get(op.chain)
        return 0 if ended is None else ended.end

    def tip(self, chain: Chain) -> Entry | None:
        """The last counted operation of a chain's longest line."""
        tips = [e for b in self.chains.get(chain, ()) for e in b.entries[-1:] if e.counted]
        return max(tips, key=lambda e: e.op.seq, default=None)

    # -- admission ------------------------------------------------------------------------------------------
    def admit(self, op: Operation, unix_now: float | None, *, span: tuple[int, int] | None = None) -> Admission:
        """Check `op` against the rules and take it in.

        `unix_now` None and `span` (its clocks) are for operations that we stored ourselves: they are not checked for
        signature, time and content again. Raises `Refused`, `NotYet` or `MissingParents`. One that is here already, or
        that the checkpoint covers, changes nothing.
        """
        if op.id in self.entries or self.floor.covers(op.id):
            return Admission(self.entries.get(op.id))
        missing = [p for p in op.parents if p not in self.entries and not self.floor.covers(p)]
        if missing:
            raise MissingParents(missing)
        trusted = span is not None
        if unix_now is not None and op.time > unix_now + REPLICA_MAX_CLOCK_SKEW:
            raise NotYet(f"its time is {op.time - unix_now:.0f} s ahead of ours")
        if not trusted and not op.check_signature(self.space):
            raise Refused("wrong signature")
        previous, start = self._previous(op, trusted)
        parents = tuple(self.entries[p] for p in op.parents if p in self.entries)
        before = self._membership_before(parents)
        self._check_right(op, before)
        branch = self._branch_for(op, previous, start)
        past = dict(branch.past)
        for parent in parents:
            if past.get(parent.branch, -1) < parent.op.seq:
                self.absorb(past, parent)
        entry = Entry(op, branch, parents, before)
        entry.start = entry.end = start
        if span is not None:
            entry.end = span[1]
        elif op.kind == Kind.EDIT and op.body:
            scope = Scope(past, self.client_ids, self.floor)
            parsed = self._check_update(op, branch, start, scope)
            if parsed.end > parsed.start:
                entry.end = parsed.end
                entry.places = self._check_places(op, scope, parsed.deletions)
            elif len(parsed.deletions) > REPLICA_MAX_CUTS:
                self._check_places(op, scope, parsed.deletions)
        return self._insert(entry, past)

    def _previous(self, op: Operation, trusted: bool) -> tuple[Entry | None, int]:
        """The operation before `op` in its chain (None: `op` is the first, or it is covered), and its clock."""
        ended = self.floor.chains.get(op.chain)
        if op.seq == 0:
            if ended is not None:
                raise Refused("this place of the chain is covered by the checkpoint: another operation is there")
            self._check_first(op, trusted)
            return None, 0
        previous = self.entries.get(op.parents[0])
        if previous is None:
            if ended is None or ended.seq + 1 != op.seq or ended.last != op.parents[0]:
                raise Refused("its first parent is not the author's operation before it")
            if op.time < ended.time:
                raise Refused("its time is before that of the operation before it")
            return None, ended.end
        if previous.op.chain != op.chain or previous.op.seq + 1 != op.seq:
            raise Refused("its first parent is not the author's operation before it")
        if op.time < previous.op.time:
            raise Refused("its time is before that of the operation before it")
        return previous, previous.end

    def _check_first(self, op: Operation, trusted: bool) -> None:
        if len(op.encoded) > REPLICA_MAX_FIRST_BYTES and not trusted:
            raise Refused(f"the first operation of a chain has {len(op.encoded)} bytes, over {REPLICA_MAX_FIRST_BYTES}")
        if op.chain in self.chains:
            return
        if client_id(*op.chain) in self.client_ids.floor:
            raise Refused("its client id is that of a chain which the checkpoint has")

    def _membership_before(self, parents: Sequence[Entry]) -> Membership:
        if not parents:
            return self.table.base
        first = parents[0].membership
        for parent in parents:
            if parent.membership is not first:
                return self.table.merged([p.membership for p in parents])
        return first

    def _check_right(self, op: Operation, before: Membership) -> None:
        if op.author not in before.writers and op.author not in self.floor.former:
            raise Refused("its author had no right to write")
        if op.kind == Kind.EDIT:
            return
        if op.author not in before.owners:
            raise Refused("only the owner may change who writes")
        if self._changes >= REPLICA_MAX_ADMIN_OPERATIONS:
            raise NotYet(f"{REPLICA_MAX_ADMIN_OPERATIONS} changes of the writer set: a checkpoint has to come first")
        if op.kind != Kind.REMOVE and op.body not in before.writers and len(before.writers) >= REPLICA_MAX_WRITERS:
            raise Refused(f"there are {REPLICA_MAX_WRITERS} writers already")
        if op.kind == Kind.REMOVE and op.body in before.owners:
            raise Refused("an owner cannot be removed; it hands over")

    def _branch_for(self, op: Operation, previous: Entry | None, start: int) -> Branch:
        """The branch that `op` extends; a new one for the first of a chain or a fork. Not yet registered."""
        branches = self.chains.get(op.chain, [])
        for branch in branches:
            if branch.base is previous and not branch.entries:
                return branch
            if branch.entries and branch.entries[-1] is previous:
                return branch
        client = branches[0].client if branches else client_id(*op.chain)
        return Branch(op.chain, client, previous, op.seq, start)

    def absorb(self, past: Past, entry: Entry) -> None:
        """Put `entry` and its past into `past`."""
        stack = [entry]
        while stack:
            entry = stack.pop()
            branch, seq = entry.branch, entry.op.seq
            known = past.get(branch, -1)
            if known >= seq:
                continue
            if branch.entries[-1] is entry and len(branch.past) > 1:
                _merge(past, branch.past)
                continue
            marked, before = branch.mark_before(seq)
            if marked > known:
                _merge(past, before)
                known = marked
            past[branch] = seq
            first = max(known + 1, branch.first_seq)
            for earlier in branch.entries[first - branch.first_seq : seq - branch.first_seq + 1]:
                stack += [parent for parent in earlier.parents if parent.branch is not branch]

    # -- references -----------------------------------------------------------------------------------------
    def _check_update(self, op: Operation, branch: Branch, start: int, scope: Scope) -> ParsedUpdate:
        """Its items are those of its chain's client, contiguous, and everything they name is in its past."""
        parsed = parse_update_untrusted(op.body)
        if parsed.end > parsed.start:
            if parsed.client != branch.client:
                raise Refused(f"its items have the client id {parsed.client}, its author's is {branch.client}")
            if parsed.start != start:
                raise Refused(f"its items start at clock {parsed.start}, the author's next is {start}")
        own_end = parsed.end if parsed.end > parsed.start else start
        for client, clock in parsed.references:
            if client != branch.client or not start <= clock < own_end:
                self._check_known(client, clock, 1, scope)
        for client, clock, length in parsed.deletions:
            if client == branch.client and clock + length > start:
                if clock + length > own_end:
                    raise Refused("it deletes items that are not there yet")
                length = start - clock
            if length > 0:
                self._check_known(client, clock, length, scope)
        return parsed

    def _check_places(self, op: Operation, scope: Scope, deletions: Sequence[Piece]) -> Places:
        try:
            return self.placement.check_untrusted(
                op.body, lambda client, clock: self._find(client, clock, scope), deletions, op.id
            )
        except RemoteProtocolError as error:
            raise Refused(str(error)) from None

    def check_own(self, body: bytes) -> list[tuple[bytes, ParsedUpdate]]:
        """Whether an update that was made on our document stands where it may: it, or several that together do the
        same when it is too much work for one operation. Raises `RemoteProtocolError`."""
        try:
            parsed = parse_update_untrusted(body)
            self.placement.check_untrusted(body, self._find_own, parsed.deletions)
            return [(body, parsed)]
        except TooMuch:
            deletions = parse_update_untrusted(body, max_structs=REPLICA_MAX_UPDATE_BYTES).deletions
            parts = self.placement.cut(body, self._find_own, deletions)
            return [(part, parse_update_untrusted(part)) for part in parts]

    def _find_own(self, client: int, clock: int) -> Entry | Reference:
        return self._find(client, clock, None)

    def _find_from(self, entry: Entry) -> Find:
        scope: Scope | None = None

        def find(client: int, clock: int) -> Entry | Reference:
            nonlocal scope
            if scope is None and self.is_forked(client):
                scope = self.scope_of(entry)
            return self._find(client, clock, scope)

        return find

    def _find(self, client: int, clock: int, scope: Scope | None) -> Entry | Reference:
        """The operation with an item that is known to be there. `scope` None: as the document names it."""
        branches = self.client_ids.branches(client)
        if len(branches) == 1 and not self.any_renamed and clock >= branches[0].start:
            return branches[0].entries[bisect_right(branches[0].ends, clock)]
        renamed = self.renamed.get(client)
        if renamed is not None:
            return renamed
        if scope is not None:
            stretch = scope.find(client, clock)
            found = None if stretch is None else stretch.entry(clock)
            name = client if stretch is None else stretch.name
            return (name, clock) if found is None else found
        if clock >= self.floor.vector.get(client, 0):
            for branch in branches:
                entry = branch.at_clock(clock)
                if entry is not None and not self.is_renamed(entry):
                    return entry
        return client, clock

    def _check_known(self, client: int, clock: int, length: int, scope: Scope) -> None:
        """Raises when these items are not all in the past, or a fork has two of them there."""
        end = clock + length
        past = scope.past
        entry = self.renamed.get(client)
        if entry is not None:
            if past.get(entry.branch, -1) < entry.op.seq or clock < entry.start or end > entry.end:
                raise Refused("it names items that are not in its past")
            if not self._after_fork(entry.op) and not self.client_ids.shows(entry.branch, past):
                raise NotYet("it names items under a client id that they do not have")
            return
        branches = self.client_ids.branches(client)
        if len(branches) == 1 and clock >= self.floor.vector.get(client, 0) and not self.floor.renamed_of(client):
            # The usual case: no fork, the range is in one branch.
            branch = branches[0]
            seq = past.get(branch, -1)
            if seq >= 0 and branch.start <= clock and end <= branch.ends[seq - branch.first_seq]:
                return
        while clock < end:
            stretch = scope.find(client, clock)
            if stretch is None:
                if not branches and client not in self.floor.vector:
                    raise NotYet("it names items of a client that is not known here")
                raise Refused("it names items that are not in its past")
            if stretch.several:
                raise Refused("it names items of which a fork has two")
            clock = stretch.end

    def is_forked(self, client: int) -> bool:
        """Whether items of this client may have another name in the document."""
        return (
            self.client_ids.may_rename(client)
            or any(self.excluded(branch.chain[0]) for branch in self.client_ids.branches(client))
            or bool(self.floor.renamed_of(client))
        )

    def pieces(self, own: Entry, scope: Scope, client: int, clock: int, length: int) -> list[Piece]:
        """How a range of items that the admitted operation `own`, with this scope, names is called in the document.
        Raises `RemoteProtocolError` when they are not in its past."""
        if not self.is_forked(client):
            return [(client, clock, length)]
        out: list[Piece] = []
        end = clock + length
        if client == own.branch.client and own.start < end <= own.end:
            inside = max(clock, own.start)
            out.append((forked_client(own.op.id) if self.is_renamed(own) else client, inside, end - inside))
            end = inside
        while clock < end:
            stretch = scope.find(client, clock)
            if stretch is None:
                raise RemoteProtocolError("an operation names items that are not in its past")  # it changed on the disk
            entry = stretch.entry(clock)
            name = stretch.name
            stop = min(end, stretch.end)
            if entry is not None:
                name = forked_client(entry.op.id) if self.is_renamed(entry) else client
                stop = min(stop, entry.end)
            out.append((name, clock, stop - clock))
            clock = stop
        return out

    def scope_of(self, entry: Entry) -> Scope:
        """What names mean in an admitted operation."""
        return Scope(self.past_of(entry), self.client_ids, self.floor)

    def past_of(self, entry: Entry) -> Past:
        """Everything before `entry`, and itself. A walk over the graph: for forks only."""
        past: Past = {}
        for parent in entry.parents:
            self.absorb(past, parent)
        past[entry.branch] = max(past.get(entry.branch, -1), entry.op.seq)
        return past

    # -- counting -------------------------------------------------------------------------------------------
    def is_void(self, entry: Entry) -> bool:
        """Whether the operation counts only if a valid one builds on it."""
        if entry.op.kind == Kind.REMOVE:
            return False
        return entry.removed or self._after_fork(entry.op)

    def is_renamed(self, entry: Entry) -> bool:
        """Whether its items have a name of their own in the document."""
        return (
            self.any_renamed
            and entry.op.kind == Kind.EDIT
            and (entry.branch.client in self.client_ids.collided or self._after_fork(entry.op))
        )

    @property
    def any_renamed(self) -> bool:
        """Whether any items may have another name in the document."""
        ids = self.client_ids
        return bool(self.forks or self.floor.excluded or self.floor.renamed or ids.shared or ids.collided)

    def _after_fork(self, op: Operation) -> bool:
        place = self._place_of(op.author)
        return place is not None and (op.instance != place[1] or op.seq >= place[0])

    def _insert(self, entry: Entry, past: Past) -> Admission:
        op, branch = entry.op, entry.branch
        admission = Admission(entry)
        branches = self.chains.setdefault(op.chain, [])
        if branch not in branches:
            branches.append(branch)
            for other in self.client_ids.add(branch):
                self.renamed[forked_client(other.op.id)] = other
        entry.order = self._order
        self._order += 1
        past[branch] = op.seq
        self._limbo_links += len(past) - len(branch.past) + len(branches)
        branch.add(entry, past)
        self.entries[op.id] = entry
        self.limbo += 1
        entry.removed = op.author in self.floor.former and op.author not in entry.before.writers
        for removal, _ in self._removals.get(op.author, ()):
            if past.get(removal.branch, -1) < removal.op.seq:
                entry.removed = True
        recount = False
        if op.kind != Kind.EDIT:
            self._changes += 1
            entry.membership = self.table.merged([entry.before], entry)
            if op.kind == Kind.REMOVE:
                recount = self._note_removal(entry, past)
        if self._after_fork(op) or self.client_ids.may_rename(branch.client):
            self.renamed[forked_client(op.id)] = entry
        proof = self._proof(branch, op)
        if proof is not None:
            admission.fork = self._take_fork(proof)
            recount = recount or admission.fork is not None
        if recount:
            self._recount(admission)
        elif not self.is_void(entry):
            self._count(entry, admission.counted)
            admission.rebuild = self.client_ids.note_counted(admission.counted)
        if not self.limbo:
            self._limbo_links = 0
        elif self.limbo > REPLICA_MAX_LIMBO or self._limbo_links > REPLICA_MAX_LIMBO_LINKS:
            self.forget_limbo()
        return admission

    def _proof(self, branch: Branch, op: Operation) -> Equivocation | None:
        """What `op` and those that are here prove against its author."""
        twin = self._twin(branch, op.seq)
        if twin is not None:
            return Fork(twin.op, op)
        if op.seq:
            return None
        firsts = self._firsts.setdefault(op.author, {})
        if len(firsts) <= REPLICA_MAX_INSTANCES:
            firsts[op.instance] = op
        return Crowd(firsts.values()) if len(firsts) > REPLICA_MAX_INSTANCES else None

    def _twin(self, branch: Branch, seq: int) -> Entry | None:
        """Another operation at `seq` of the same chain."""
        for other in self.chains[branch.chain]:
            if other is not branch and 0 <= seq - other.first_seq < len(other.entries):
                return other.entries[seq - other.first_seq]
        return None

    def would_move_fork(self, op: Operation) -> bool:
        """Whether `op` would show that its author, who is excluded, equivocated earlier than was known."""
        place = self._place_of(op.author)
        if place is None or place <= (op.seq, op.instance) or op.id in self.entries:
            return False
        return any(0 <= op.seq - branch.first_seq < len(branch.entries) for branch in self.chains.get(op.chain, ()))

    def _note_removal(self, removal: Entry, past: Past) -> bool:
        """Mark what the removed author wrote without knowing of `removal`; whether something that counted is marked."""
        author = removal.op.body
        self._removals.setdefault(author, []).append((removal, dict(past)))
        changed = False
        for chain, branches in self.chains.items():
            if chain[0] != author:
                continue
            for branch in branches:
                for entry in branch.entries[max(0, past.get(branch, -1) + 1 - branch.first_seq) :]:
                    # None of these can have the removal in its past: it came later.
                    entry.removed = True
                    changed = changed or entry.counted
        return changed

    def add_fork_untrusted(self, fork: Equivocation) -> Admission:
        """Take a proof. Changes nothing when it says nothing new. Raises `Refused` or `NotYet`."""
        author = fork.author
        place = self._place_of(author)
        if place is not None and place <= fork.place:
            return Admission()
        if not any(chain[0] == author for chain in self.chains) and author not in self.membership().writers:
            raise NotYet("a proof against somebody who is no writer here")
        fork.check_untrusted(self.space)
        admission = Admission()
        admission.fork = self._take_fork(fork)
        if admission.fork is not None:
            self._recount(admission)
        return admission

    def restore_forks(self, forks: Iterable[Equivocation]) -> None:
        """Put back proofs that were checked, into a graph that has no operations yet."""
        for fork in forks:
            self._take_fork(fork)

    def _place_of(self, author: bytes) -> tuple[int, int] | None:
        """From where on `author` is excluded: (seq, instance)."""
        known = self.forks.get(author)
        return known.place if known is not None else self.floor.excluded.get(author)

    def _take_fork(self, fork: Equivocation) -> Equivocation | None:
        place = self._place_of(fork.author)
        if place is not None and place <= fork.place:
            return None
        self.forks[fork.author] = fork
        for entry in self.entries.values():
            if entry.op.author == fork.author and self._after_fork(entry.op):
                self.renamed[forked_client(entry.op.id)] = entry
        return fork

    def _count(self, entry: Entry, out: list[Entry]) -> None:
        """`entry` counts now, and all in its past."""
        found = []
        stack = [entry]
        while stack:
            entry = stack.pop()
            if entry.counted:
                continue
            entry.counted = True
            self.limbo -= 1
            found.append(entry)
            stack += [parent for parent in entry.parents if not parent.counted]
        if len(found) > 1:
            found.sort(key=lambda e: e.order)
        for entry in found:
            self.heads.difference_update(entry.op.parents)
            self.heads.add(entry.op.id)
        out += found
        self._counted_membership = None

    def _recount(self, admission: Admission) -> None:
        """Decide anew for all operations."""
        before = {entry for entry in self.entries.values() if entry.counted}
        for entry in before:
            entry.counted = False
        self.limbo = len(self.entries)
        self.heads = set(self.floor.heads)
        self._counted_membership = None
        counted: list[Entry] = []
        for entry in self.entries.values():
            if not self.is_void(entry):
                self._count(entry, counted)
        self.client_ids.forget_counted()
        self.client_ids.note_counted(counted)
        now = set(counted)
        admission.rebuild = bool(before - now) or any(self.is_renamed(entry) for entry in before)
        admission.counted = sorted(now - before, key=lambda e: e.order)

    def forget_limbo(self) -> None:
        """Drop the operations that do not count. No operation that counts has one of them in its past."""
        dropped = {entry for entry in self.entries.values() if not entry.counted}
        self.entries = {key: entry for key, entry in self.entries.items() if entry.counted}
        for entry in dropped:
            self.renamed.pop(forked_client(entry.op.id), None)
        for chain in {entry.op.chain for entry in dropped}:
            self._cut_chain(chain)
        for branches in self.chains.values():
            for branch in branches:
                branch.past = {b: s for b, s in branch.past.items() if b.entries}
        self.limbo = self._limbo_links = 0

    def _cut_chain(self, chain: Chain) -> None:
        for branch in self.chains[chain]:
            kept = sum(entry.counted for entry in branch.entries)  # the first ones
            if kept != len(branch.entries):
                branch.keep(kept, self.past_of(branch.entries[kept - 1]) if kept else {})
        self.chains[chain] = [branch for branch in self.chains[chain] if branch.entries]
        self.client_ids.cut(client_id(*chain))
        if not self.chains[chain]:
            del self.chains[chain]
