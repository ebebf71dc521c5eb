"""Content exchange, `/lattica/blobs/1`: manifests, messages, and the machines of both sides.

    canonical.py    the subset of msgpack that manifests are written in, with exactly one encoding for a value
    manifest.py     what a blob or a folder consists of; its hash is the content id
    safetensors.py  the tensor table of a file, so that parts can be asked for by name
    chunk_set.py    which chunks somebody has
    messages.py     the frames on a stream
    server.py       answers requests            source.py   asks one peer
    fetch.py        decides which source is asked for which chunk

The wire format is in `specs/blobs.md`.
"""

from __future__ import annotations

PROTOCOL = "/lattica/blobs/1"
