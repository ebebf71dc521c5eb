"""Calls between peers with tensors: unary and streaming, with deadlines, cancellation and back-pressure."""

from __future__ import annotations

from lattica.rpc.client import ItemStream, OpenCall
from lattica.rpc.items import ItemReader
from lattica.rpc.methods import client_streaming, nonblocking
from lattica.rpc.server import caller
from lattica.rpc.service import RpcService

__all__ = ["ItemReader", "ItemStream", "OpenCall", "RpcService", "caller", "client_streaming", "nonblocking"]
