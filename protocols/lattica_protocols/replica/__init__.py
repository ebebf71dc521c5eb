"""`/lattica/replica/1`: replicated state that converges without a server and that anybody can verify.

    genesis       what a space is: its owner, its first writers; the hash of it is the id
    operation     one signed, hash-linked edit or change of the writer set
    update        what an edit may contain: checks (and renames ids in) yrs updates
    membership    who may write, as a function of the operations before
    equivocation  what proves that an author cheated
    scope         what names of items mean, by the past of who names them
    graph         the DAG: admission, forks, removals, which operations count
    tree          the Merkle tree behind the root
    replica       graph and document together; the local side writes here
    checkpoint    signed states that replace history
    download      how one is fetched from a neighbour
    proposal      those that a quorum signs
    proof         what a third party is shown
    messages      the wire
    sync          the machine: frontiers, missing operations, push, presence

`protocols/specs/replica.md` has the rules and test vectors.
"""

from __future__ import annotations

PROTOCOL = "/lattica/replica/1"
SPACE_CODEC = 0x0202
"""Multicodec of a space id (private use)."""
