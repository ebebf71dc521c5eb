"""Every bound on a size or count that a peer can choose, each with its reason.

Units: bytes unless the name says otherwise. One section per protocol.
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
"""As go-libp2p (signedIDSize). We keep what we send under 4 KiB, as Rust reads no more."""

MAX_IDENTIFY_MESSAGES = 10
"""As go-libp2p (maxMessages): a large identify is sent in parts that are merged."""

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
