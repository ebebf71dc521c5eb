"""Content: files and folders by the hash of what is in them.

    service.py    the public verbs                       store.py, catalog.py   what is there, and where
    download.py   one fetch                              sharing.py             hashing files into blobs
    search.py     who has it                             part.py                the file in the making
    source_stream.py  one peer that is asked             reader.py, serve.py    serving others

The wire format and the machines are in `lattica_protocols.blobs`.
"""

from __future__ import annotations

from lattica.blobs.download import FetchProgress, FetchResult
from lattica.blobs.service import BlobService
from lattica.blobs.sharing import Shared
from lattica.blobs.store import BlobInfo, BlobStore, VerifyReport

__all__ = [
    "BlobInfo",
    "BlobService",
    "BlobStore",
    "FetchProgress",
    "FetchResult",
    "Shared",
    "VerifyReport",
]
