"""Checkpoints that a quorum signs: each signer makes the same one itself, and signs when it is equal byte for byte.

    a signer proposes:   header with its signature ──PROPOSAL──▶ neighbours, who pass it on
    another signer:      has the heads that the header names? makes the checkpoint at these heads
                         equal ──▶ its signature, too, in a PROPOSAL
    anybody:             enough signatures and the same checkpoint made here ──▶ takes it; others download it

Only the header travels: whoever holds the operations can make the state. A checkpoint at given heads is a function of
those operations and of the proofs of equivocation, because it is built in an order that depends on them alone.

Of one number a signer signs another checkpoint only when it contains all that the last one did. A quorum is more than
half, so of two complete checkpoints with one number one contains the other, and ranks above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.limits import REPLICA_MAX_PROPOSAL_BYTES, REPLICA_MAX_PROPOSALS
from lattica_protocols.replica.checkpoint import Checkpoint, read_header_untrusted, valid_signers
from lattica_protocols.replica.replica import Replica

PAUSE = 2.0
"""Seconds between two attempts to make the proposed checkpoints here: each makes a document anew."""
BLAME = (10.0, 600.0)
"""Seconds in which no checkpoint of a signer is made here after one was another than it said: doubling from the first
to the second. It may lack a proof that we have, or want to keep us busy."""

Signatures = Sequence[tuple[bytes, bytes]]


@dataclass(eq=False, slots=True)
class Proposal:
    """A checkpoint that waits for signatures."""

    header: bytes
    number: int
    previous: bytes
    time: int
    heads: frozenset[bytes]
    signatures: dict[bytes, bytes] = field(default_factory=dict)
    made: Checkpoint | None = None
    """The same, made here."""
    unlike: bytes = b""
    """The digest of the exclusions with which another was made here: with the same ones it always is."""


class Proposals:
    """The proposals that one replica knows."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.signed: bytes = b""
        """The header we signed last; restored from disk by the owner of the replica."""
        self._held: dict[bytes, Proposal] = {}
        self._try_at = 0.0
        self._blamed: dict[bytes, tuple[float, float]] = {}
        """Signers, with the end of the pause and its length."""
        self._untried = False

    def propose(self, unix_now: float) -> Proposal:
        """Propose what counts now. `LocalProtocolError` when we are no signer, or signed something else before."""
        replica = self.replica
        if replica.key is None or replica.key.public_key.data not in replica.genesis.signers:
            raise LocalProtocolError("this key is none of the signers of the space")
        made = _checkpoint_at(replica, frozenset(replica.graph.heads), int(unix_now))
        if made is None:
            raise LocalProtocolError("the state changed meanwhile")
        if len(made.header) > REPLICA_MAX_PROPOSAL_BYTES:
            raise LocalProtocolError(f"the checkpoint's header of {len(made.header)} bytes is too long to be proposed")
        proposal = _read_proposal_untrusted(made.header, replica.space)
        proposal.made = made
        proposal = self._held.setdefault(made.header, proposal)
        if not self._sign(proposal):
            raise LocalProtocolError("we signed another checkpoint that this one does not contain")
        return proposal

    def receive_untrusted(self, header: bytes, signatures: Signatures) -> Proposal | None:
        """Take a proposal; None when there is no news in it. Raises `RemoteProtocolError`."""
        replica = self.replica
        proposal = self._held.get(header)
        known = () if proposal is None else proposal.signatures
        news = [pair for pair in signatures if pair[0] not in known]
        if not replica.genesis.quorum or not news:
            return None
        valid = valid_signers(replica.genesis, frozenset(), header, news)
        if not valid:
            raise RemoteProtocolError("a proposed checkpoint that none of the signers signed")
        if proposal is None:
            proposal = _read_proposal_untrusted(header, replica.space)
            if (proposal.number, proposal.previous) != _next_of(replica):
                return None
            if len(self._held) >= REPLICA_MAX_PROPOSALS:
                # The one with the fewest signatures goes: it comes again when it is still wanted.
                del self._held[min(self._held, key=lambda each: len(self._held[each].signatures))]
            self._held[header] = proposal
        proposal.signatures.update(pair for pair in news if pair[0] in valid)
        self._untried = True
        return proposal

    def settle(self, now: float, *, again: bool = False) -> tuple[list[Proposal], Checkpoint | None]:
        """Sign what can be signed, and give a checkpoint that is complete: (proposals that we signed, checkpoint).

        `again`: operations may have come that were missing. Does nothing within 2 s of the last attempt.
        """
        if not self._held or now < self._try_at or not (self._untried or again):
            return [], None
        self._try_at = now + PAUSE
        self._untried = False
        self._drop_old()
        signed = []
        for proposal in self._held.values():
            if proposal.made is None and not self._make(proposal, now):
                continue
            if self._own() not in proposal.signatures and self._sign(proposal):
                signed.append(proposal)
        return signed, self.complete()

    def _make(self, proposal: Proposal, now: float) -> bool:
        """Make the proposed checkpoint; whether it is the same."""
        exclusions = self.replica.exclusions_digest()
        if proposal.unlike == exclusions:
            return False
        if all(now < self._blamed.get(signer, (0.0, 0.0))[0] for signer in proposal.signatures):
            return False
        made = _checkpoint_at(self.replica, proposal.heads, proposal.time)
        if made is None:
            return False  # operations are missing yet
        if made.header != proposal.header:
            proposal.unlike = exclusions
            for signer in proposal.signatures:
                pause = min(2 * self._blamed.get(signer, (0.0, BLAME[0] / 2))[1], BLAME[1])
                self._blamed[signer] = now + pause, pause
            return False
        proposal.made = made
        for signer in proposal.signatures:
            self._blamed.pop(signer, None)
        return True

    def complete(self) -> Checkpoint | None:
        """A checkpoint with enough signatures, the highest-ranking one."""
        quorum = self.replica.genesis.quorum
        found = [
            each.made.with_signatures(each.signatures)
            for each in self._held.values()
            if each.made is not None and len(each.signatures) >= quorum and each.made.ranks_above(self.replica.rank())
        ]
        return max(found, key=lambda each: (each.number, each.operations), default=None)

    def held(self) -> list[Proposal]:
        """Those that wait."""
        self._drop_old()
        return list(self._held.values())

    def _own(self) -> bytes:
        return b"" if self.replica.key is None else self.replica.key.public_key.data

    def _sign(self, proposal: Proposal) -> bool:
        """Sign a proposal that was made here, too; whether we did."""
        replica = self.replica
        if replica.key is None or self._own() not in replica.genesis.signers or proposal.made is None:
            return False
        if self.signed and self.signed != proposal.header:
            before = _read_proposal_untrusted(self.signed, replica.space)
            known = proposal.made.floor
            if before.number >= proposal.number and not (
                before.number == proposal.number and all(known.covers(head) for head in before.heads)
            ):
                return False
        self.signed = replica.unsaved.signed = proposal.header
        proposal.signatures |= dict(proposal.made.signed(replica.key).signatures)
        return True

    def _drop_old(self) -> None:
        current = _next_of(self.replica)
        self._held = {key: each for key, each in self._held.items() if (each.number, each.previous) == current}


def _next_of(replica: Replica) -> tuple[int, bytes]:
    """Number and predecessor of the next checkpoint."""
    number, _, previous = replica.rank()
    return number + 1, previous


def _checkpoint_at(replica: Replica, heads: frozenset[bytes], time: int) -> Checkpoint | None:
    other = replica.at_heads(heads)
    return None if other is None else other.unsigned_checkpoint(time)


def _read_proposal_untrusted(header: bytes, space: bytes) -> Proposal:
    fields = read_header_untrusted(header, space)
    heads = fields[11]
    if type(heads) is not tuple or not all(type(head) is bytes and len(head) == 32 for head in heads):
        raise RemoteProtocolError("a proposed checkpoint with a head that is no hash")
    return Proposal(header, fields[2], fields[3], fields[4], frozenset(heads))
