"""What keeps a DHT node useful over days: refresh, renew, expire, and put everything on disk.

    every 10 min (+-20 %)   look up ourselves and each bucket nobody asked about
    every minute            announce what we provide and store what we publish, as far as 22 h have passed or it never
                            worked (at once when the table gets its first peer); drop what expired
    10 s after a change     write what changed into the datastore
    every 5 min             a snapshot of the routing table
    at the start            read all of it back, and connect with peers of the last snapshot

Announcing again is paced: 10,000 blobs take half an hour of their 22, at a few per cent of a core.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from lattica.datastore import StoredContact
from lattica.errors import InvalidRecord, LatticaError, StorageFull
from lattica_protocols.kad.routing import REFRESH_INTERVAL, K
from lattica_protocols.kad.store import REPUBLISH_INTERVAL, ProviderDropped, ProviderRecord, ValueDropped, ValueRecord

if TYPE_CHECKING:
    from lattica.datastore import PublishedValue
    from lattica.host import Host
    from lattica.kad.service import KadService

log = logging.getLogger("lattica.kad")

TICK = 60.0
"""Seconds between two looks at what is due."""

WRITE_INTERVAL = 10.0
"""Seconds of changes that a crash may lose. Others' records come again, ours are renewed by whoever made them."""

SNAPSHOT_INTERVAL = 300.0
PACE = 0.2
"""Seconds between two announcements of the upkeep."""

RECONNECT = 2 * K
"""Peers of the last snapshot that are tried after a start."""

RECONNECT_AT_ONCE = 5
STORED_ADDRS_TTL = 3600.0
"""Seconds that addresses from the last snapshot are kept: servers rarely move."""


class Upkeep:
    """The background work of a `KadService`, and what it works on."""

    def __init__(self, service: KadService, host: Host) -> None:
        self.provided: dict[bytes, float] = {}
        """Key -> Unix seconds of its last announcement, 0: none yet."""
        self.published: dict[str, PublishedValue] = {}
        self.first_peer = trio.Event()
        """Set when the table got its first peer: what is due need not wait for the next tick."""
        self._service = service
        self._host = host
        self._contacts: list[StoredContact] = []
        self._disk_is_full = False

    # -- start --------------------------------------------------------------------------------------------
    async def load(self) -> None:
        """Read the stored state."""
        store, server, unix_now = self._service.datastore, self._service.server, self._service.clock()
        self.provided = await store.read(store.load_provided)
        server.provided.update(self.provided)
        server.providers.load(await store.read(store.load_providers), unix_now)
        server.values.load(await store.read(store.load_records), unix_now)
        published = await store.read(store.load_published)
        self.published = {value.name: value for value in published if value.renew or value.expires > unix_now}
        self._contacts = await store.read(store.load_contacts)

    async def run(self) -> None:
        """Until cancelled; then a last snapshot is noted down."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._reconnect)
                nursery.start_soon(self._refresh)
                nursery.start_soon(self._snapshot)
                nursery.start_soon(self._write_behind)
                nursery.start_soon(self._renew)
        finally:
            self.note_changes()
            self._note_contacts()

    async def _reconnect(self) -> None:
        """Connect with peers we knew; identify then puts them into the table."""
        limiter = trio.CapacityLimiter(RECONNECT_AT_ONCE)

        async def one(contact: StoredContact) -> None:
            async with limiter:
                if len(self._service.table) >= K:
                    return
                try:
                    await self._host.connect(contact.peer, route=False)
                except LatticaError as error:
                    log.debug("contact_gone peer=%s error=%s", contact.peer.short(), error)

        contacts = sorted(self._contacts, key=lambda contact: -contact.seen)[:RECONNECT]
        self._contacts = []
        for contact in contacts:
            self._host.peerstore.add_addrs(contact.peer, contact.addrs, STORED_ADDRS_TTL)
        async with trio.open_nursery() as nursery:
            for contact in contacts:
                nursery.start_soon(one, contact)

    # -- the table ----------------------------------------------------------------------------------------
    async def _refresh(self) -> None:
        while True:
            await trio.sleep(REFRESH_INTERVAL * self._host.rng.uniform(0.8, 1.2))
            if len(self._service.table):
                await self._service.lookup(self._host.peer_id.to_bytes())
                await self.refresh_buckets(older_than=REFRESH_INTERVAL)

    async def refresh_buckets(self, *, older_than: float) -> None:
        """Look up a key in each bucket that nobody asked about for `older_than` seconds."""
        for key in self._service.table.refresh_keys(trio.current_time(), self._host.rng, older_than=older_than):
            await self._service.lookup(key)

    async def _snapshot(self) -> None:
        while True:
            await trio.sleep(SNAPSHOT_INTERVAL)
            self._note_contacts()

    def _note_contacts(self) -> None:
        table, unix_now, now = self._service.table, self._service.clock(), trio.current_time()
        contacts = []
        for peer in table.peers():
            addrs = tuple(self._host.peerstore.addrs(peer))
            if addrs:
                contacts.append(StoredContact(peer, addrs, unix_now - (now - (table.last_seen(peer) or now))))
        if contacts:
            self._service.datastore.save_contacts(contacts)

    # -- records ------------------------------------------------------------------------------------------
    async def _write_behind(self) -> None:
        while True:
            await self._service.datastore.wait_noted()
            await trio.sleep(WRITE_INTERVAL)
            await self._flush()

    async def _renew(self) -> None:
        while True:
            with trio.move_on_after(TICK):
                await self.first_peer.wait()
            self.first_peer = trio.Event()
            unix_now = self._service.clock()
            self._service.server.providers.expire(unix_now)
            self._service.server.values.expire(unix_now)
            self.note_changes()
            if len(self._service.table):
                await self._announce_due()
                await self._store_due()

    async def _announce_due(self) -> None:
        due = [k for k, last in self.provided.items() if last + REPUBLISH_INTERVAL <= self._service.clock()]
        for key in due:
            if key in self.provided:  # it may have been withdrawn meanwhile
                await self._service.announce(key)
                await trio.sleep(PACE)

    async def _store_due(self) -> None:
        unix_now = self._service.clock()
        for value in list(self.published.values()):
            if not value.renew and value.expires <= unix_now:
                await self._service.unpublish(value.name)
            elif value.put + REPUBLISH_INTERVAL <= unix_now:
                try:
                    await self._service.store_again(value)
                except InvalidRecord as error:
                    # Another machine with our key published a newer one: ours must not fight with it.
                    log.warning("publish_given_up name=%s error=%s", value.name, error)
                    await self._service.unpublish(value.name)
                await trio.sleep(PACE)

    def note_changes(self) -> None:
        """Note down for the datastore what changed in the stores."""
        store = self._service.datastore
        for provider_change in self._service.server.providers.poll_changes():
            match provider_change:
                case ProviderRecord():
                    store.save_provider(provider_change)
                case ProviderDropped(key, provider):
                    store.drop_provider(key, provider)
        for value_change in self._service.server.values.poll_changes():
            match value_change:
                case ValueRecord():
                    store.save_record(value_change)
                case ValueDropped(key):
                    store.drop_record(key)

    async def _flush(self) -> None:
        try:
            await self._service.datastore.flush()
        except StorageFull as error:
            if not self._disk_is_full:
                log.error("database_write_failed error=%s", error)
            self._disk_is_full = True
        else:
            self._disk_is_full = False
