"""Answering requests: the server side of the protocol, without its streams.

Order of trust: the sender's id was proven by the connection; everything else in a request is checked here. A provider
record is taken for the sender itself only, so nobody can announce somebody else; a value only if its namespace's rules
accept it. Answers never exceed `KAD_MAX_MESSAGE_BYTES`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.kad.messages import (
    KadMessage,
    MessageType,
    PeerAddrs,
    PeerEntry,
    Reach,
    Record,
    peer_entry,
    peers_untrusted,
)
from lattica_protocols.kad.records import Validators
from lattica_protocols.kad.routing import K, RoutingTable
from lattica_protocols.kad.shares import origin_of
from lattica_protocols.kad.store import ProviderStore, ValueStore
from lattica_protocols.limits import (
    KAD_MAX_ADDRS_PER_PEER,
    KAD_MAX_KEY_BYTES,
    KAD_MAX_PEERS_IN_MESSAGE,
    KAD_MAX_PROVIDER_KEY_BYTES,
    KAD_MAX_PROVIDERS_PER_ANSWER,
)
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.peer_id import PeerId

AddressBook = Callable[[PeerId], Sequence[Multiaddr]]
"""Where a peer may be, as far as we know; empty when we do not."""


class KadServer:
    """One node's answers. `addresses` is asked for the addresses of the peers named in them."""

    def __init__(
        self,
        own: PeerId,
        table: RoutingTable,
        addresses: AddressBook,
        *,
        validators: Validators,
        k: int = K,
    ) -> None:
        self.own = own
        self.table = table
        self.providers = ProviderStore()
        self.values = ValueStore(validators)
        self.provided: set[bytes] = set()
        """Keys that we provide ourselves: their answers start with us."""
        self._addresses = addresses
        self._k = k

    def answer_untrusted(
        self, request: KadMessage, sender: PeerId, remote: Multiaddr | None, unix_now: float
    ) -> KadMessage | None:
        """The answer to `request`, `None` for one that has none.

        `remote` is where the sender is connected from: it decides which addresses can mean something to it.
        `RemoteProtocolError`: the request breaks the rules; reset its stream.
        """
        kind = request.type
        key = request.key or b""
        if kind == MessageType.PING:
            return KadMessage(type=MessageType.PING)
        if not 0 < len(key) <= KAD_MAX_KEY_BYTES:
            raise RemoteProtocolError(f"Kademlia request with a key of {len(key)} bytes")
        if kind == MessageType.ADD_PROVIDER:
            self._add_provider_untrusted(request, key, sender, remote, unix_now)
            return None
        if kind == MessageType.PUT_VALUE:
            return self._put_value_untrusted(request, key, sender, remote, unix_now)
        closer = self._closer(key, sender, remote, with_target=kind == MessageType.FIND_NODE)
        if kind == MessageType.FIND_NODE:
            return KadMessage(type=kind, key=key, closer_peers=closer)
        if kind == MessageType.GET_VALUE:
            value = self.values.get(key, unix_now)
            record = None if value is None else Record(key=key, value=value)
            return KadMessage(type=kind, key=key, record=record, closer_peers=closer)
        _check_provider_key_untrusted(key)
        providers = self._providers(key, sender, remote, unix_now)
        return KadMessage(type=kind, key=key, closer_peers=closer, provider_peers=providers)

    def _closer(self, key: bytes, sender: PeerId, remote: Multiaddr | None, *, with_target: bool) -> list[PeerEntry]:
        peers = self.table.closest(key, self._k, exclude=sender)
        if with_target:
            target = self._target(key)
            if target is not None and target not in (sender, *peers):
                peers.insert(0, target)
        out = []
        for peer in peers[: self._k]:
            usable = addresses_for(self._addresses(peer), remote)
            if usable or peer == self.own:  # nobody could ask another one otherwise
                out.append(peer_entry(PeerAddrs(peer, usable)))
        return out

    def _target(self, key: bytes) -> PeerId | None:
        """The peer asked for, when we know where it is though it is not in the table: clients are found like that.

        And we ourselves: go-libp2p-kad-dht asks a new peer for that very peer, and takes it into its table only if the
        answer names anybody, which it would not in a network of two.
        """
        try:
            target = PeerId.from_bytes_untrusted(key)
        except RemoteProtocolError:
            return None
        return target if target == self.own or self._addresses(target) else None

    def _providers(self, key: bytes, sender: PeerId, remote: Multiaddr | None, unix_now: float) -> list[PeerEntry]:
        out = []
        if key in self.provided:
            out.append(peer_entry(PeerAddrs(self.own, addresses_for(self._addresses(self.own), remote))))
        for provider in self.providers.get(key, unix_now, KAD_MAX_PROVIDERS_PER_ANSWER - len(out)):
            addrs = provider.addrs or self._addresses(provider.peer)
            out.append(peer_entry(PeerAddrs(provider.peer, addresses_for(addrs, remote)), Reach.CAN_CONNECT))
        return out

    def _add_provider_untrusted(
        self, request: KadMessage, key: bytes, sender: PeerId, remote: Multiaddr | None, unix_now: float
    ) -> None:
        _check_provider_key_untrusted(key)
        for provider in peers_untrusted(request.provider_peers, KAD_MAX_PEERS_IN_MESSAGE):
            if provider.peer == sender:
                addrs = addresses_for(provider.addrs, remote)
                self.providers.add(key, sender, addrs, unix_now, origin_of(remote))
                return
        raise RemoteProtocolError("provider record that does not name its sender")

    def _put_value_untrusted(
        self, request: KadMessage, key: bytes, sender: PeerId, remote: Multiaddr | None, unix_now: float
    ) -> KadMessage:
        record = request.record
        if record is None or record.value is None:
            raise RemoteProtocolError("PUT_VALUE without a value")
        if record.key is not None and record.key != key:
            raise RemoteProtocolError("PUT_VALUE with two different keys")
        stored = self.values.put_untrusted(key, record.value, sender, unix_now, origin_of(remote))
        return KadMessage(type=MessageType.PUT_VALUE, key=key, record=Record(key=key, value=stored))


def _check_provider_key_untrusted(key: bytes) -> None:
    if len(key) > KAD_MAX_PROVIDER_KEY_BYTES:
        raise RemoteProtocolError(f"provider key of {len(key)} bytes is over {KAD_MAX_PROVIDER_KEY_BYTES}")


def addresses_for(addrs: Iterable[Multiaddr], remote: Multiaddr | None) -> tuple[Multiaddr, ...]:
    """The addresses that mean the same to a peer at `remote` as to us, at most `KAD_MAX_ADDRS_PER_PEER`.

    A loopback address is of use on this machine only, a private one in the local network; to anybody else they are
    somebody else's machines. Global addresses come first.
    """
    reach = _Scope.MACHINE if remote is None else _scope(remote)
    usable = [(scope, addr) for addr in addrs if (scope := _scope(addr)) >= reach]
    usable.sort(key=lambda entry: -entry[0])
    return tuple(dict.fromkeys(addr for _, addr in usable))[:KAD_MAX_ADDRS_PER_PEER]


class _Scope(enum.IntEnum):
    """How far away an address means the same."""

    NONE = 0
    MACHINE = 1
    NETWORK = 2
    INTERNET = 3


@lru_cache(maxsize=8192)
def _scope(addr: Multiaddr) -> _Scope:
    """Cached: every answer asks for the scope of some 50 addresses, mostly the same."""
    if addr.is_unspecified:
        return _Scope.NONE
    if addr.is_loopback or addr.has("memory") or addr.has("unix"):
        return _Scope.MACHINE
    return _Scope.NETWORK if addr.is_private else _Scope.INTERNET
