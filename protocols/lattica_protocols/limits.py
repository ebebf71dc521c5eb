"""Every bound on a size or count that a peer can choose, each with its reason.

Units: bytes unless the name says otherwise. One section per protocol, from the encodings up to replicated state. It is
one file, however long: whoever wants to know what a stranger can make us spend reads one list to its end.
"""

from __future__ import annotations

# -- encodings and identity ---------------------------------------------------------------------------------------
MAX_UVARINT_BYTES = 9
"""Set by the unsigned-varint specification: values stay below 2**63."""

MAX_PROTOBUF_FIELDS = 4096
"""Fields in one (sub)message. Our largest, a Kademlia answer, has under 100; each field costs us an object."""

MAX_PUBLIC_KEY_BYTES = 2048
"""A key's protobuf. RSA of 8192 bits, the largest that is accepted, needs 1,064."""

MIN_RSA_BITS = 2048
"""What Go and Rust demand as well: shorter moduli can be factored."""

MAX_RSA_BITS = 8192
"""As Go: the cost of a verification grows with the square of the size, and a stranger chooses the size."""

MAX_SIGNATURE_BYTES = 1024
"""An RSA signature is as long as the modulus (8192 bits); all others are under 150."""

MAX_MULTIHASH_DIGEST_BYTES = 128
"""As go-multihash; the longest digests in use have 64 bytes."""

MAX_INLINE_KEY_BYTES = 42
"""Set by the peer id specification: keys up to this size stand in the id itself, others by their SHA-256."""

MAX_TEXT_BYTES = 4096
"""Text of a peer id, CID or multiaddr. Base 58 costs quadratic time, so it is bounded before it is decoded."""

MAX_MULTIADDR_BYTES = 1024
"""A relayed address with two WebTransport hashes and two ids is under 400."""

MAX_MULTIADDR_PARTS = 32
"""A relayed WebSocket address over TLS has 10."""

MAX_ENVELOPE_BYTES = 16384
"""A signed peer record with 64 addresses is under 8 KiB."""

MAX_PEER_RECORD_ADDRS = 128
"""go-libp2p keeps at most 64 signed addresses of a peer; double that is somebody who fills our memory."""

# -- identify -----------------------------------------------------------------------------------------------------
MAX_IDENTIFY_MESSAGE_BYTES = 8192
"""As go-libp2p (signedIDSize)."""

MAX_IDENTIFY_SENT_BYTES = 4096
"""rust-libp2p reads no longer message."""

MAX_IDENTIFY_MESSAGES = 10
"""As go-libp2p (maxMessages): a large identify is sent in parts that are merged."""

IDENTIFY_PUSH_BURST = 32
"""Pushes that a peer may send at once on one connection: one for each address that comes or goes while a laptop changes
its network, and for each service that is offered at a start. Reading one takes 2 to 4 ms, signature included."""

IDENTIFY_PUSHES_PER_SECOND = 1.0
"""Pushes in the long run. Whoever has more to say is asked once the burst is over, so nothing of it is lost."""

MAX_IDENTIFY_ADDRS = 256
"""Go keeps 500 of connected peers; a node with 20 interfaces and 5 transports has 100."""

MAX_IDENTIFY_PROTOCOLS = 512
"""A go-ipfs node has about 30; applications add one a service."""

MAX_IDENTIFY_TEXT_BYTES = 256
"""Agent and protocol version are shown to people and written into logs."""

# -- multistream-select -------------------------------------------------------------------------------------------
MAX_MULTISTREAM_MESSAGE_BYTES = 1024
"""As go-multistream: the longest protocol name in use has under 100 bytes."""

MAX_MULTISTREAM_PROPOSALS = 20
"""Proposals (and `ls`) a responder answers on one stream: more is somebody who keeps us busy."""

MAX_TLS_CERTIFICATE_BYTES = 8192
"""DER. An RSA host key of 8192 bits with its signature and an RSA-4096 certificate key is under 5 KiB."""

# -- host: peers, connections, streams ----------------------------------------------------------------------------
MAX_PEERSTORE_PEERS = 20_000
"""Peers remembered. About 1 kB each: 20 MB at the most, enough for a Kademlia table and all recent provider answers."""
MAX_ADDRS_PER_PEER = 32
"""A machine with several interfaces, two transports and a few relays has about 20 addresses."""
MAX_PROTOCOLS_PER_PEER = 256
"""kubo lists about 40."""
MAX_CONNECTIONS = 1024
"""Connections of one node, both directions. Above it idle ones are closed, then new inbound ones are refused."""
MAX_CONNECTIONS_PER_PEER = 8
"""TCP, QUIC and relayed, each in both directions, and two to spare while paths change."""
MAX_INBOUND_STREAMS_PER_CONNECTION = 512
"""Inbound streams served at once; go and rust allow 256 per connection, content transfers open more for a moment."""
MAX_UNREAD_BYTES = 128 << 20
"""Bytes that arrived on all connections together and that nobody has read: 512 stalled streams at yamux's first window.
Bulk is read as it comes, so an honest node holds a few MiB."""
NEGOTIATION_TIMEOUT = 10.0
"""Seconds a peer may take for multistream-select. rust-libp2p uses 10 s."""


# -- RPC (/lattica/rpc/1) ---------------------------------------------------------------------------------------
RPC_MAX_HEAD = 65_535
"""The head length is a u16. Larger values move into the tail (extension 5)."""

RPC_MAX_TAIL = 1 << 30
"""One message's buffers. A layer of a 70B model in bf16 is 1.7 GB: it is sent as several tensors of a stream."""

RPC_MAX_VALUE = 16 << 20
"""msgpack that stands in the tail because it does not fit into a head. Whoever has more sends arrays or a
stream; each element costs the reader about 50 bytes of objects."""

RPC_MAX_DAEMON_VALUE = 64 << 10
"""The same for services that the daemon itself serves to strangers, in its event loop: as much as a head may have.
Their arguments are numbers and bytes; bytes and arrays stand in the tail and do not count."""

RPC_MAX_ARRAY = 1 << 20
"""Elements of one msgpack array: msgpack reserves 8 bytes per claimed element before it sees the first."""

RPC_MAX_RANK = 32
"""Dimensions of a tensor; NumPy's own limit was 32 before 2.0 and is 64 now."""

RPC_MAX_CALLS = 4096
"""Inbound calls at once on one control stream: a task of about 3 KB each."""

RPC_INITIAL_CALLS = 64
"""Calls at once before the other side's HELLO tells its own number."""

RPC_MAX_HELD = 2 << 30
"""Bytes of messages that one peer can make us hold: tails on their way, arguments of calls that run, items not
yet consumed. Twice the longest tail, so one of the longest never blocks the small ones."""

RPC_OBJECT_WEIGHT = 64
"""msgpack of arguments counts so often against `RPC_MAX_HELD`: an empty map is 1 byte there and 64 as a dict."""

RPC_MAX_SESSIONS = 8
"""Control streams that one peer has open with us: one is normal, a second while both sides open at once or a path
changes."""

RPC_STREAM_ITEMS = 64
RPC_STREAM_BYTES = 4 << 20
"""A stream's first credit: 64 items of 64 KiB fill a path of 1 Gbit/s and 32 ms."""

RPC_DETACH_OVER = 64 << 10
"""Longer tails leave the control stream: 64 KiB take 60 us on a path of 1 GB/s, a small call's latency."""

RPC_MAX_BULK_STREAMS = 16
"""Bulk streams of one session. More would only share the same path, and each costs a stream window."""

RPC_MAX_EARLY_TAILS = 256
"""Detached tails that came before the frame they belong to."""

RPC_MAX_METHOD = 255
RPC_MAX_ROUTE = 255
"""Both lengths are a u8."""

RPC_MAX_PING = 64
RPC_MAX_ERROR_KIND = 128
RPC_MAX_ERROR_MESSAGE = 4096
"""Characters of an error's text: enough for a message, not for a traceback."""

RPC_MAX_DISCARDED_TAILS = 65_536
"""Tails still to come for calls that are over. One cancelled stream leaves up to 64; this is 1,024 of them."""

RPC_MAX_CREDIT = 1 << 31
"""Credit a stream can collect, items or bytes: nobody grants two billion."""

RPC_SPILL_OVER = 32 << 10
"""Values with longer msgpack go into the tail, so heads on the control stream stay small."""

RPC_ACK_AFTER = 64 << 10
"""Bytes of a session received before they are acknowledged: one small frame in a thousand of the smallest calls."""

RPC_ACK_ALONE_AFTER = 512 << 10
"""The same when there is nothing else to send: a packet of its own costs as much as a small call."""

RPC_MAX_UNACKED = 16 << 20
"""Bytes of the control stream kept for a peer that does not acknowledge, as many as a stream's window lets travel."""

RPC_MAX_UNACKED_TAIL_BYTES = 64 << 20
"""The same of detached tails, kept by reference. One that is longer goes alone."""

RPC_MAX_UNACKED_TAILS = 1024
"""How far one detached tail may be ahead of another that is still missing; an account names that many, in 4 KiB."""

RPC_MAX_SUSPENDED = 4
"""Sessions with one peer that wait for a path. Half of `RPC_MAX_SESSIONS`: a peer whose path flaps can still open
new ones."""


# -- Kademlia -----------------------------------------------------------------------------------------------------
KAD_MAX_MESSAGE_BYTES = 16 * 1024
"""One message, both directions. rust-libp2p refuses longer ones (its default), so ours never are."""

KAD_MAX_FOREIGN_MESSAGE_BYTES = 64 * 1024
"""What we read as an answer: go puts all addresses of 20 peers and many providers in, rust's answers fit 16 KiB."""

KAD_MAX_KEY_BYTES = 256
"""`/lattica/` + 52 characters of a peer id + a name of 128 bytes, and room for foreign namespaces."""

KAD_MAX_PROVIDER_KEY_BYTES = 80
"""As go-libp2p-kad-dht: a multihash of 64 bytes with its prefix has 67."""

KAD_MAX_VALUE_BYTES = 8 * 1024
"""A value with its signature: an answer has to carry it and 20 closer peers within 16 KiB."""

KAD_MAX_PEERS_IN_MESSAGE = 256
"""Peers decoded from one list of a message: go answers with up to 20 closer peers, and every provider it knows."""

KAD_MAX_CLOSER_PEERS = 20
"""Closer peers used from one answer: k. An honest answer has no more, a long one would steer the lookup."""

KAD_MAX_PROVIDERS_PER_ANSWER = 64
"""Providers we put into one answer and use from one answer; the rest is found at the other k - 1 peers."""

KAD_MAX_ADDRS_PER_PEER = 8
"""Addresses of one peer that we send or use: 20 peers of 8 addresses of 40 bytes fit into 16 KiB with the ids."""

KAD_MAX_DECODED_ADDRS_PER_PEER = 256
"""Addresses of one peer read from a message before the first usable 8 are taken."""

KAD_MAX_ADDR_BYTES = 512
"""One address in a message; longer ones are skipped."""

KAD_MAX_LOOKUP_CANDIDATES = 512
"""Peers that one lookup remembers; the farthest are dropped. 20 answers of 20 peers are 400."""

KAD_MAX_LOOKUP_REQUESTS = 160
"""Requests of one lookup. Peers that invent ever closer neighbours would keep it going without an end; an honest
lookup in a network of a million peers with a third of them gone needs about 60."""

KAD_MAX_TABLE_PEERS_PER_SUBNET = 2
"""Peers of one bucket within one IPv4 /24 or IPv6 /48 (private addresses aside): one operator cannot fill it."""

KAD_PROVIDERS_PER_KEY = 256
"""Providers kept for one key; the longest unrefreshed one of the network that has most makes room. An answer carries
64, of all networks in turn."""

KAD_PROVIDER_KEYS_PER_PEER = 4096
"""Keys that one peer may have itself recorded for here. A peer sharing 100,000 blobs in a network of 1,000 spreads
2,000 over each of us."""

KAD_MAX_PROVIDER_RECORDS = 50_000
"""Provider records in all, about 800 bytes each with 4 addresses: 40 MB. Above that the network that has most makes
room (`kad/shares.py`)."""

KAD_MAX_VALUES = 8192
"""Values in all; likewise."""

KAD_MAX_VALUES_BYTES = 16 << 20
"""Bytes of all values together; with KAD_MAX_VALUE_BYTES that is at least 2,048 values."""

KAD_VALUES_PER_PUBLISHER = 256
"""Values that one publisher may have stored here."""

KAD_REQUESTS_PER_SECOND = 50.0
"""Requests a second that one peer may send us for long. A lookup asks each peer once, so a busy node sends a few."""

KAD_REQUEST_BURST = 400
"""Requests it may send at once: a node that announces a few hundred blobs to a small network."""

KAD_STREAMS_PER_PEER = 32
"""Streams of one peer served at once. Three times alpha: several lookups in parallel reach us with one each."""

KAD_MAX_RECORD_LIFETIME = 30 * 24 * 3600
"""Seconds. A record that expires later than that from now is refused: it would be there long after its publisher."""

KAD_MAX_NAME_BYTES = 128
"""The name part of a `/lattica/<publisher>/<name>` key."""

# -- Noise and TCP ------------------------------------------------------------------------------------------------
MAX_NOISE_HANDSHAKE_BYTES = 8192
"""One handshake message: an RSA-8192 key and its signature are 2.1 KB, the rest is for extensions we skip."""
MAX_NOISE_MUXERS = 32
"""Muxers a peer offers in the handshake; there are two in the world."""
MAX_NOISE_CIPHERS = 8
"""Ciphers it would rather use after the handshake; there is one."""
MAX_UNFINISHED_HANDSHAKES = 256
"""Accepted sockets that have not proven a peer id yet, all together: each costs a task and a file descriptor."""
MAX_UNFINISHED_HANDSHAKES_PER_IP = 32
"""The same from one IPv4 address or IPv6 /64, so that one stranger cannot take all places; 32 daemons starting behind a
NAT fit."""

# -- yamux --------------------------------------------------------------------------------------------------------
YAMUX_INITIAL_WINDOW = 256 * 1024
"""Set by the specification: what each side may send on a new stream."""
YAMUX_MIN_WINDOW = 64 * 1024
"""The least that a stream is limited to: about one message of the channel."""
YAMUX_MAX_WINDOW = 16 * 1024 * 1024
"""As go-yamux. 1 Gbit/s at 130 ms."""
YAMUX_MAX_EXTRA_WINDOWS = 64 * 1024 * 1024
"""Window granted above the initial ones, over all streams of a connection: four streams at their largest."""
YAMUX_MAX_BUFFERED = 64 * 1024 * 1024
"""Bytes of one connection that nobody has read yet. A stream that goes over it is reset."""
YAMUX_MAX_INBOUND_STREAMS = 512
"""Streams opened by the peer and alive; further ones are reset. Go allows 1000, Rust 512."""
YAMUX_ACK_BACKLOG = 256
"""Set by the specification: streams opened and not yet acknowledged."""
YAMUX_MAX_CONTROL_FRAMES = 2048
"""Answers (pongs, resets) waiting for a peer that does not read them: 24 KB. More is a flood: ends the connection."""
YAMUX_PING_BURST = 64
"""Pings a peer may send at once; go and js send one in 15-30 s."""
YAMUX_PINGS_PER_SECOND = 8.0
"""Pings a peer may send in the long run."""

# -- QUIC ---------------------------------------------------------------------------------------------------------
MAX_QUIC_STREAMS = 256
"""Streams a peer has open at once on one connection: as go-libp2p and rust-libp2p. More open as others end."""

QUIC_STREAM_WINDOW_BYTES = 6 * 1024 * 1024
"""Unread bytes of one stream. 60 MB/s, what Python encrypts, over 100 ms of round trip."""

QUIC_CONNECTION_WINDOW_BYTES = 24 * 1024 * 1024
"""Unread bytes of all streams of one connection: four stalled streams do not stop the others."""

MAX_QUIC_HANDSHAKE_BYTES = 65536
"""One TLS message. libp2p certificates have 450 bytes, 8 KiB with an RSA-8192 key."""

MAX_QUIC_HALF_OPEN = 256
"""Inbound handshakes under way at once. A handshake costs about 5 ms of CPU, so more could not finish in time."""

MAX_QUIC_HALF_OPEN_PER_IP = 32
"""Of these from one IPv4 address or IPv6 /64: many nodes behind one NAT restart together, hundreds do not."""

QUIC_RETRY_THRESHOLD = 64
"""From this many half-open handshakes on a stranger proves its address by a Retry round trip first."""

MAX_QUIC_RESETS_PER_SECOND = 50
"""Stateless resets and version negotiations we answer strangers with: they help a peer that lost its state, but
must not make us a reflector."""

# -- content ------------------------------------------------------------------------------------------------------
CHUNK_BYTES = 1 << 20
"""Size of a chunk. Verified as a whole, so it is also what a liar can make us throw away; larger ones gain no speed."""

MAX_BLOB_CHUNKS = 1 << 20
"""1 TiB a file: 32 MiB of digests in the receiver's memory. Larger models come as folders of shards."""

MAX_INLINE_CHUNKS = 1 << 17
"""Chunks (128 GiB) whose digests stand in the manifest itself, 4 MiB of them; above that they are in pages."""

HASHES_PER_PAGE = 1 << 15
"""Digests in one page: 1 MiB, the size of a chunk."""

MAX_OBJECT_BYTES = 16 << 20
"""A manifest: 4 MiB of digests and the tensor table, or 100,000 files of a folder. It is held in memory whole."""

MAX_MANIFEST_TENSORS = 200_000
"""The largest mixture-of-experts checkpoints list about 90,000 tensors over all their files together."""

MAX_TENSOR_NAME_BYTES = 512
"""Tensor names are paths of modules; the longest in published models are near 150 characters."""

MAX_TENSOR_DIMENSIONS = 16
"""NumPy allows 64, models use up to 6."""

MAX_FOLDER_ENTRIES = 100_000
"""Files in a folder. A dataset in more files than that belongs into archives; 10 MiB of manifest."""

MAX_FOLDER_PATH_BYTES = 1024
"""A path inside a folder. Together with the destination it has to stay below PATH_MAX (4,096)."""

MAX_PATH_PART_BYTES = 255
"""NAME_MAX of every common file system."""

MAX_WANTED_BLOBS_PER_STREAM = 64
"""Blobs one stream asks about: a client opens a stream for a fetch, a folder fetch uses it for its files."""

MAX_SERVED_STREAMS_PER_PEER = 32
"""Content streams one peer may have open with us: one a fetch, and eight files of a folder at a time."""

MAX_QUEUED_CHUNKS = 4096
"""Chunk requests that wait on one stream. We keep up to 128 in flight; a queued one costs about 150 bytes."""

MAX_QUEUED_OBJECTS = 64
"""Object requests that wait on one stream: we ask for one manifest and up to 32 pages."""

MAX_CHUNK_RANGES = 1024
"""Ranges in one request or announcement: 8 KiB."""

MAX_CHUNKS_IN_FLIGHT = 128
"""Chunks we ask of one source ahead of time: 128 MiB, 1 Gbyte/s over a round trip of 0.1 s."""

MAX_FETCH_SOURCES = 16
"""Sources of one fetch that send at a time. Each fills a chunk buffer of its own."""

# -- STUN ---------------------------------------------------------------------------------------------------------
STUN_MAX_MESSAGE_BYTES = 1280
"""The smallest MTU of IPv6, which RFC 8489 section 6.1 asks requests to stay below. Ours have 100 bytes."""

STUN_MAX_ATTRIBUTES = 32
"""Attributes of one message. The richest that exist, TURN's and ICE's, have about 12."""

STUN_REQUESTS_PER_SECOND = 20.0
"""Requests that we answer for one IPv4 address or IPv6 /64 in the long run: a discovery sends about 40, once in
minutes, and several peers may be behind one NAT."""

STUN_REQUEST_BURST = 120
"""Of these at once: three discoveries."""

STUN_TOTAL_PER_SECOND = 2000.0
"""Answers to all strangers together: 200 kB/s, and about a tenth of a core."""

STUN_MAX_SOURCES = 4096
"""Addresses whose budget is remembered; the one that asked least recently makes room."""

STUN_MAX_TRANSACTIONS = 512
"""Requests of ours that wait for their answer: a birthday attempt asks once for each of 256 sockets."""

# -- NATs ---------------------------------------------------------------------------------------------------------
NAT_MAX_OBSERVERS = 7
"""Asked in one discovery: two of them may lie. Each costs about six datagrams."""

NAT_MAX_LIFETIMES = 6
"""Idle times tested at once: two sockets each."""

NAT_MAX_TARGETS = 8
"""Addresses of a partner that are probed in turn: at 20 rounds a second 160 packets of 52 bytes, for 2 s."""

NAT_MAX_PROBES = 4096
"""Packets of one attempt, whatever it tries: 200 kB."""

NAT_PROBES_PER_SECOND = 100.0
"""Of a birthday attempt, each side. Tailscale's rate; small home routers drop bursts of new flows."""

NAT_MAX_STEP = 16
"""From one port of a sequential NAT to the next, as hosts behind it take some in between. More predicts nothing."""

NAT_MAX_REPORT_BYTES = 64
"""What a peer tells of its NAT: eight small numbers."""

NAT_MAX_ANSWERS = 512
"""Answers to signed probes in one attempt: a partner that sends more plays tricks."""

NAT_MAX_STRANGERS = 4
"""Probes in one attempt to addresses that signed probes came from and that the partner has not proven to hold: a
carrier's NAT may use another address for a new mapping, a forger would like us to hit somebody."""

# -- observed addresses -------------------------------------------------------------------------------------------
OBSERVED_MAX_OBSERVATIONS = 512
"""Observations held at once, of 300 bytes: one for each connection, the oldest of ended ones make room."""

OBSERVED_MAX_ADDRS_PER_SOCKET = 2
"""Observed addresses that are believed for one socket of ours: behind two providers at once there are two."""

# -- AutoNAT ------------------------------------------------------------------------------------------------------
AUTONAT_MAX_MESSAGE_BYTES = 8192
"""As go-libp2p: a request with 50 addresses, or 4,096 bytes of data."""

AUTONAT_MAX_ADDRS = 50
"""Addresses in one request; go-libp2p sends and takes as many."""

AUTONAT_MAX_DATA_BYTES = 4096
"""In one message of data: the specification's."""

AUTONAT_MIN_DIAL_DATA = 30_000
AUTONAT_MAX_DIAL_DATA = 100_000
"""Bytes that a client pays for a dial to another IP address than its own: the specification's bounds. A dial costs the
other side some 5 kB."""

AUTONAT_PER_MINUTE = 60
"""Requests served in all: go-libp2p's."""

AUTONAT_PEER_PER_MINUTE = 12
"""For one peer: go-libp2p's. A client of ours asks about eight addresses."""

AUTONAT_RANGE_PER_MINUTE = 24
"""For all peers of one address range: peer ids are free."""

AUTONAT_DATA_PER_MINUTE = 12
"""Dials to other IP addresses than the client's: go-libp2p's."""

AUTONAT_TRACKED = 1024
"""Peers and ranges whose budget is remembered; when all of them are in use, others are refused."""

AUTONAT_MAX_RUNNING = 16
"""Requests served at once: each may hold a socket for 15 s."""

AUTONAT_V1_MAX_DIALS = 4
"""Addresses tried for one request of version 1."""

AUTONAT_MAX_ASKED_ADDRS = 8
"""Addresses of ours that we have others try: two families, two transports, two providers."""

# -- port mapping -------------------------------------------------------------------------------------------------
PORTMAP_MAX_DATAGRAM_BYTES = 1100
"""A PCP message: RFC 6887, section 7."""

PORTMAP_MAX_PORTS = 8
"""Ports of ours that are mapped: two in nearly every case. A router has room for some dozens, for all its machines."""

UPNP_MAX_DOCUMENT_BYTES = 128 << 10
"""A router's description; those of real ones have 3 to 20 KiB."""

UPNP_MAX_HEAD_BYTES = 8192
"""An HTTP head or SSDP answer; real ones are under 1 KiB."""

UPNP_MAX_HEADERS = 64
"""Lines of it."""

UPNP_MAX_ELEMENTS = 4096
"""XML elements; a description with all its services has a few hundred."""

UPNP_MAX_XML_DEPTH = 32
"""Three devices inside each other, each in a list, are 10 deep."""

UPNP_MAX_TEXT_CHARS = 4096
"""Text in one XML element."""

UPNP_MAX_URL_CHARS = 512
"""A location or control URL; real ones are under 100."""

UPNP_MAX_SERVICES = 4
"""WAN services of one router that are asked for an address."""

UPNP_MAX_LOCATIONS = 2
"""Descriptions of one router that are read: some run two UPnP servers."""

# -- mDNS ----------------------------------------------------------------------------------------------------------
MDNS_MAX_PACKET_BYTES = 9000
"""RFC 6762, section 17."""

MDNS_MAX_RECORDS = 64
"""In one packet: an answer about one peer has two, printers and televisions send some dozens."""

MDNS_MAX_TEXTS = 64
"""In one TXT record: an address each."""

MDNS_MAX_NAME_BYTES = 255
"""RFC 1035, section 2.3.4."""

MDNS_MAX_ADDRS = 16
"""Of one peer."""

MDNS_MAX_PEERS = 64
"""Peers in this network that are told of within a minute: who floods us with names has us dial no more than these."""

# -- local socket -------------------------------------------------------------------------------------------------
LOCAL_FD_OVER = 128 << 10
"""Longer tails go as memory, not through the socket. Below it the system calls cost as much as the copies."""

LOCAL_MAX_CLIENTS = 256
"""Workers and commands connected to one daemon at once."""

LOCAL_MAX_MAPPINGS = 256
"""Received tails that stay mapped in one process: each holds a file descriptor, of which 1,024 are usual. Further ones
are copied."""

LOCAL_POOL_BYTES = 256 << 20
"""Segments kept for use again, for some seconds: two tensors of 64 MiB in each direction."""

LOCAL_MAX_KEPT = 32
LOCAL_MAX_KEPT_BYTES = 256 << 20
"""Mappings of segments that stay for the next tail in them: each holds a file descriptor. Two tensors of 64 MiB in each
direction, or a dozen small ones of each of some workers."""

LOCAL_MAX_FDS = 128
"""File descriptors in one message. The kernel takes 253."""

LOCAL_MAX_OUTPUT = 512 << 20
"""Bytes queued for a client that does not read its socket, before it is disconnected: 512 results of 1 MiB that it
asked for and is too busy to take."""

LOCAL_MAX_LENT = 64
LOCAL_MAX_LENT_BYTES = 1 << 30
"""Segments that one receiver may hold before the sender forgets the oldest, which are then not used again. Each costs
the sender a file descriptor."""

LOCAL_MAX_SERVICES = 1024
LOCAL_MAX_METHODS = 1024
LOCAL_MAX_SERVICE_NAME = 128
"""What one worker registers. A method name with its service has 255 bytes."""

# -- relay (/libp2p/circuit/relay/0.2.0) --------------------------------------------------------------------------
RELAY_MAX_MESSAGE_BYTES = 4096
"""One hop or stop message: as go-libp2p and rust-libp2p. A reservation with ten addresses has under 1 KiB."""

RELAY_MAX_ADDRS = 32
"""Addresses read from one message; the relay's own, of which two or three are enough."""

RELAY_MAX_ADVERTISED_ADDRS = 4
"""Addresses of one relay that we pass on as ours: one per family and transport."""

RELAY_MAX_RESERVATIONS = 512
"""Reservations a relay holds in all. Each keeps a connection open, so half of `MAX_CONNECTIONS` stays for others."""

RELAY_MAX_RESERVATIONS_PER_RANGE = 64
"""Of these from one IPv4 /24 or IPv6 /48 (loopback aside): a lab behind one NAT fits, one operator cannot take all
places. go-libp2p allows 8 an address and 32 an autonomous system."""

RELAY_RESERVATION_SECONDS = 3600.0
"""Life of a reservation, as go-libp2p and rust-libp2p. It is renewed before, and ends with the connection."""

RELAY_MAX_CIRCUITS = 512
"""Circuits through a relay at once. An open one that rests costs about 10 kB, see `RELAY_MAX_HELD` for busy ones."""

RELAY_MAX_CIRCUITS_PER_SOURCE = 16
"""Circuits that one peer has opened: go-libp2p's bound. A peer needs one per partner that it cannot reach."""

RELAY_MAX_CIRCUITS_PER_TARGET = 128
"""Circuits to one peer: a worker with many clients. The inbound streams of its connection end at 512."""

RELAY_MAX_CIRCUITS_PER_RANGE = 96
"""Circuits opened from one IPv4 /24 or IPv6 /48 (loopback aside). Less than one target may have: a range must not be
able to keep all others from it."""

RELAY_REQUESTS_PER_SECOND = 5.0
RELAY_REQUEST_BURST = 64
"""Hop requests of one peer: each CONNECT makes the relay open a stream to somebody else."""

RELAY_WINDOW_BYTES = 256 * 1024
"""Window of a spliced stream while tens of circuits are open, which is yamux's first window."""

RELAY_MANY_CIRCUITS = 64
RELAY_CROWDED_WINDOW_BYTES = 128 * 1024
"""From so many circuits on. The first 256 KiB of a stream cannot be prevented, so this is for those that have carried
more. 64 circuits carry 200 MB/s with it over 40 ms, more than most relays have."""

RELAY_MAX_WINDOW_BYTES = 4 * 1024 * 1024
"""Window of a spliced stream while few are: 40 MB/s over 100 ms."""

RELAY_MAX_HELD = 64 * 1024 * 1024
"""Bytes that all circuits together have taken from one side and not yet given to the other. Windows are cut so that
they fit; over it (QUIC's windows cannot be cut) the circuit that holds the most is reset."""

RELAY_MAX_UNFINISHED_CIRCUITS = 64
"""Circuits to us whose handshake is not done; one more ends the oldest. Each costs a task and one Noise handshake."""

RELAY_SETUP_SECONDS = 15.0
"""For the target to answer the relay's CONNECT; within the dialler's own 15 s for a whole dial."""

RELAY_MAX_CANDIDATES = 64
"""Possible relays remembered; we need two."""

# -- hole punching (/libp2p/dcutr) --------------------------------------------------------------------------------
DCUTR_MAX_MESSAGE_BYTES = 4096
"""As go-libp2p and rust-libp2p."""

DCUTR_MAX_ADDRS = 64
"""Addresses read from one message; few of them are tried."""

PUNCH_MAX_TARGETS = 6
"""Addresses tried in one attempt, at IP addresses that the partner is known to have: two families, UDP and TCP, and a
mapped port."""

PUNCH_MAX_UNPROVEN = 2
"""Addresses tried at IP addresses that the partner merely names: it may have one more, but it must not make us send to
whomever it wants."""

PUNCH_PROBES = 24
"""Datagrams of 64 bytes to one address in one attempt: five seconds at the pace of go-libp2p."""

PUNCH_PROBES_UNPROVEN = 4
"""The same to an address that is not proven: 256 bytes, about as much as the messages that ask for it."""

PUNCH_TCP_TRIES = 12
PUNCH_TCP_TRIES_UNPROVEN = 1
"""Connection attempts to one address in one attempt; a box that answers with RST makes each end at once."""

PUNCH_PER_IP_BURST = 120
PUNCH_PER_IP_PER_SECOND = 8.0
"""Datagrams and connection attempts towards one IP address, whoever asked for them. Many partners together cannot make
us flood somebody; 8 a second are what a browser opens for one page."""

PUNCH_QUIC_DIAL = 20
"""What dialling QUIC at an address that is not proven counts in that account: an Initial has 1,200 bytes, twenty times
a probe, and is repeated while nobody answers."""

PUNCH_TRACKED_IPS = 1024
"""IP addresses in that account; with more than that at a time nothing is punched for the rest."""

PUNCH_ATTEMPTS = 3
"""As DCUtR says. 97 % of those that succeed do so at the first."""

PUNCH_ANSWERS_PER_MINUTE = 8
"""Attempts that one partner may start: two rounds of three, and two to spare."""

# -- guessing ports (/lattica/punch/1) ----------------------------------------------------------------------------
GUESS_MAX_MESSAGE_BYTES = 512
"""A key, a report and addresses: about 150 are used."""

GUESS_MAX_ADDRS = 4
"""Public addresses of one socket: one, or some while a NAT has moved it."""

GUESS_ANSWERS_PER_MINUTE = 6
"""Attempts that one partner may start: two predictions and a birthday, and again after it was gone for a moment."""

GUESS_PER_IP_BURST = 8192
GUESS_PER_IP_PER_SECOND = 10.0
"""Datagrams of guesses towards one IP address, over all partners: two attempts that find nothing and some that do, then
1 kB/s on average. A relay that lies about where a partner is can make us send that much to a third party, no more."""

GUESS_OPENER_MAX_TTL = 4
"""Hops of the datagrams that open our own NATs: two in a row, and what stands between. A step beyond the last one's
router they die in the provider's network."""

# -- replicated state (/lattica/replica/1) ------------------------------------------------------------------------
REPLICA_MAX_UPDATE_BYTES = 256 << 10
"""The CRDT update of one operation. Shared state is small; whatever is larger belongs into a blob."""

REPLICA_MAX_PARENTS = 256
"""Links of one operation: as many as there can be writers, so that one operation can merge what all of them wrote."""

REPLICA_MAX_WRITERS = 256
"""Keys that may write at a time. Frontiers and version vectors have an entry for each."""

REPLICA_MAX_INSTANCES = 64
"""Chains of one author: one for each time that it lost its memory. Each costs every replica a version vector. Whoever
has more is excluded."""

REPLICA_MAX_FIRST_BYTES = 12 << 10
"""The first operation of a chain. Those of 65 chains prove that somebody has too many, and have to fit a message."""

REPLICA_MAX_ADMIN_OPERATIONS = 1024
"""Grants, removals and hand-overs between two checkpoints. What a writer may do is worked out from all of them."""

REPLICA_MAX_OPERATION_BYTES = REPLICA_MAX_UPDATE_BYTES + REPLICA_MAX_PARENTS * 34 + 256
"""The update, the links, and the rest (two keys' worth of bytes and numbers)."""

REPLICA_MAX_STRUCTS = 4096
"""Items in one update, and ranges that it deletes: 20 to 45 ms in Python, 5 ms in yrs. A list of values is one item."""

REPLICA_MAX_PLACES = 8
"""Places of lists and texts where one update puts items. For each yrs walks over what stands there, 60 to 220 ns an
item: all of them over 100,000 items 50 to 170 ms. What is made here with more is cut into several operations."""

REPLICA_MAX_CUTS = 64
"""Ranges of values and text that one update deletes. Each may cut a run in two, which copies half of it: 2 ms where the
run has a million values. What is made here with more is cut into several operations."""

REPLICA_MAX_DEPTH = 32
"""Nesting of plain values inside an item: the decoders recurse."""

REPLICA_MAX_NESTING = 64
"""Shared types inside of each other. yrs deletes them by recursion: 20,000 fit the stack of a thread, 200,000 end the
process. Whoever nests deeper means another structure."""

REPLICA_MAX_NAME_BYTES = 128
"""Name of a space, and of a container in it."""

REPLICA_MAX_CLOCK_SKEW = 600
"""Seconds that an operation's time may be ahead of ours. Clocks without NTP drift by minutes."""

REPLICA_MAX_MESSAGE_BYTES = 1 << 20
"""One message: a batch of operations is cut at half of it, and one operation of the largest size fits."""

REPLICA_BATCH_BYTES = 256 << 10
REPLICA_BATCH_OPERATIONS = 1024
"""Operations in one message; a reader takes a batch in one transaction."""

REPLICA_BATCHES_IN_FLIGHT = 4
"""Batches sent before the first is acknowledged: 1 MiB covers 10 MB/s over a round trip of 100 ms."""

REPLICA_MAX_PENDING = 2048
REPLICA_MAX_PENDING_BYTES = 8 << 20
"""Operations whose parents have not come yet, all neighbours of a space together. Somebody who withholds parents can
fill no more than that; honest ones are asked for again by the next comparison."""

REPLICA_MAX_PENDING_PER_PEER = 256
"""Of these from one neighbour, so that one who withholds cannot push the others' out."""

REPLICA_MAX_LIMBO = 4096
"""Operations of excluded and removed authors that nobody's valid operation builds on, before they are forgotten."""

REPLICA_MAX_LIMBO_LINKS = 1 << 18
"""Branches in the pasts of these operations and beside them, each about 100 bytes and a step to look at. Twins that are
all linked to each other have the square of their number: these are forgotten when there are 500."""

REPLICA_MAX_TIPS = REPLICA_MAX_WRITERS * REPLICA_MAX_INSTANCES
"""Chain ends in one frontier."""

REPLICA_MAX_WANTED = 256
"""Operations asked for by id in one message."""

REPLICA_MAX_NEIGHBOURS = 16
"""Peers with whom a space exchanges new operations at once; inbound ones included."""

REPLICA_FANOUT = 6
"""Neighbours that we look for ourselves. 20 replicas are then two hops from each other, 1,000 about five."""

REPLICA_MAX_STATE_BYTES = 64 << 20
"""The document in a checkpoint, held in memory whole."""

REPLICA_MAX_COVERED = 4_000_000
"""Operations that a checkpoint can say it replaces: 8 bytes each."""

REPLICA_MAX_CHECKPOINT_BYTES = REPLICA_MAX_STATE_BYTES + 8 * REPLICA_MAX_COVERED + (4 << 20)
"""A checkpoint with its state."""

REPLICA_MAX_PROPOSAL_BYTES = 512 << 10
"""The header of a checkpoint that is passed on to be signed: a few thousand chains. It has to fit a message."""

REPLICA_MAX_PROPOSALS = 8
"""Checkpoints held that wait for signatures. One is the usual number; signers that propose at once make a few."""

REPLICA_MAX_PRESENCE_BYTES = 1024
"""What a member says about itself: a role, layers, a load."""

REPLICA_MAX_PRESENT = 1024
"""Members remembered as present. Writers, and readers that say hello."""

REPLICA_PRESENCE_SECONDS = 30.0
"""A member that was not heard of for so long is gone: three of its announcements were lost."""

REPLICA_PRESENCE_BURST = 8.0
"""Announcements of one member that are taken at once, and then one a second: it says something new for each of its
models that comes or goes. Every one reaches all members, over each of their links."""

REPLICA_MAX_PROOF_BYTES = 64 << 10
"""An inclusion proof: an operation of a few hundred bytes, grants, two Merkle paths."""
