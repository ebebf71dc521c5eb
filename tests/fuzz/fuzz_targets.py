"""What is fuzzed, found by looking: every `*_untrusted` function, and every class that receives bytes.

A function is called with mutated bytes wherever its annotations say bytes, and with plausible values elsewhere; a new
one is picked up without a line here. What cannot be called that way has to be reached through something that can, which
`unreached` checks; a class that receives bytes needs a driver in `fuzz_machines`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import fuzz_autonat
import fuzz_corpus as corpus
import fuzz_machines as machines
import fuzz_mdns
import fuzz_nat as nat
import fuzz_portmap
import fuzz_relay
import fuzz_replica
from cryptography import x509
from fuzz_mutation import mutate

import lattica_protocols
from lattica_protocols.blobs import messages
from lattica_protocols.errors import RemoteProtocolError
from lattica_protocols.identify import Identify
from lattica_protocols.kad.messages import KadMessage, PeerEntry
from lattica_protocols.kad.records import Validators
from lattica_protocols.kad.store import ValueStore
from lattica_protocols.multiaddr import Multiaddr
from lattica_protocols.multihash import Multihash
from lattica_protocols.nat.probe import encode_probe
from lattica_protocols.noise_transport import NoiseOpener, NoiseSealer
from lattica_protocols.peer_id import PeerId
from lattica_protocols.peer_record import PEER_RECORD_DOMAIN, PEER_RECORD_TYPE
from lattica_protocols.protobuf import Message
from lattica_protocols.stun import Attribute, MessageType, StunMessage

FURTHER_MODULES = ["lattica.rpc.status"]
"""Outside of `lattica_protocols`, with parsers that need no I/O."""

INSTANCES: dict[type, Callable[[bytes], Any]] = {
    Identify: lambda data: Identify(signed_peer_record=data),
    NoiseOpener: lambda data: NoiseOpener(bytes(32)),
    ValueStore: lambda data: ValueStore(Validators()),
    StunMessage: lambda data: StunMessage(MessageType.SUCCESS, bytes(12), ((Attribute.OTHER_ADDRESS, data),)),
}
"""How to get an object whose methods parse; classes made from nothing or from bytes need no entry."""

DRIVERS = [
    *machines.DRIVERS,
    *nat.DRIVERS,
    *fuzz_relay.DRIVERS,
    *fuzz_autonat.DRIVERS,
    *fuzz_portmap.DRIVERS,
    *fuzz_mdns.DRIVERS,
    *fuzz_replica.DRIVERS,
]

LENGTHS = {"lattica_protocols.blobs.messages.decode_header_untrusted": messages.HEADER.size}
"""Functions that are documented to take exactly so many bytes."""

NAMED_VALUES: dict[str, Sequence[Any]] = {
    "attribute": [Attribute.OTHER_ADDRESS],
    "transaction_id": [None, bytes(12)],
    "domain": [PEER_RECORD_DOMAIN],
    "payload_type": [PEER_RECORD_TYPE],
    "accepted": [messages.TO_SERVER, messages.TO_CLIENT],
}
"""Parameters that the caller knows: they are never the peer's bytes."""


def _sealed() -> bytes:
    buffer = bytearray(2 + 5 + 16)
    buffer[2:7] = b"hello"
    NoiseSealer(bytes(32)).seal(memoryview(buffer), 0, 5)
    return bytes(buffer[2:])


SEEDS: dict[str, Callable[[], list[tuple[bytes, ...]]]] = {
    "lattica_protocols.stun.decode_message_untrusted": lambda: [(message,) for message in nat.stun_messages()],
    "lattica_protocols.autonat.messages.v1_addrs_untrusted": lambda: [(fuzz_autonat.v1_request(None),)],
    "lattica_protocols.nat.probe.decode_probe_untrusted": lambda: [
        (encode_probe(key, bytes(12)), key) for key in (bytes(32),)
    ],
    "lattica_protocols.stun.decode_address_untrusted": lambda: [(address,) for address in nat.addresses()],
    "lattica_protocols.stun.StunMessage.address_untrusted": lambda: [(address,) for address in nat.addresses()],
    "lattica_protocols.noise_transport.NoiseOpener.open_untrusted": lambda: [(b"", _sealed())],
    "lattica_protocols.blobs.messages.decode_ranges_untrusted": lambda: [
        (messages.encode_ranges([(0, 2), (3, 1)]),),
        (messages.encode_ranges([(i, 1) for i in range(50)]),),
    ],
    "lattica_protocols.blobs.manifest.check_object_untrusted": lambda: [(b"x",)],
    "lattica_protocols.blobs.canonical.CanonicalReader.read_bin_untrusted": lambda: [(b"\xc4\x03abc",)],
    "lattica_protocols.blobs.canonical.CanonicalReader.read_str_untrusted": lambda: [
        (b"\xa3abc",),
        (b"\xd9\x20" + b"a" * 32,),
    ],
    "lattica_protocols.kad.records.PublicKeyValidator.check_untrusted": lambda: [
        (b"/pk/" + corpus.PEER.to_bytes(), corpus.KEY.public_key.to_protobuf())
    ],
    "lattica_protocols.rpc.frames.decode_error_head_untrusted": lambda: [(head,) for head in corpus.rpc_heads()],
    "lattica_protocols.rpc.frames.decode_hello_head_untrusted": lambda: [(head,) for head in corpus.rpc_heads()],
    "lattica_protocols.rpc.resume.decode_ack_head_untrusted": lambda: [(corpus.rpc_account(),)],
    "lattica_protocols.rpc.resume.decode_resume_head_untrusted": lambda: [(bytes(20) + corpus.rpc_account(),)],
    "lattica_protocols.peer_record.PeerRecord.open_untrusted": lambda: [(corpus.RECORD.seal(corpus.KEY),)],
    "lattica_protocols.rpc.tensors.decode_value_untrusted": lambda: list(corpus.rpc_values()),
    "lattica_protocols.rpc.tensors.decode_args_untrusted": lambda: list(corpus.rpc_values()),
    "lattica_protocols.kad.records.open_value_untrusted": lambda: [(corpus.VALUE_KEY, corpus.VALUE)],
    "lattica_protocols.kad.records.SignedValueValidator.check_untrusted": lambda: [(corpus.VALUE_KEY, corpus.VALUE)],
    "lattica_protocols.kad.records.Validators.check_untrusted": lambda: [(corpus.VALUE_KEY, corpus.VALUE)],
    "lattica_protocols.kad.store.ValueStore.put_untrusted": lambda: [(b"", corpus.VALUE_KEY, corpus.VALUE)],
    "lattica_protocols.blobs.messages.decode_header_untrusted": lambda: [
        (messages.encode_frame(kind, 1),) for kind in messages.Kind
    ],
}
"""Valid arguments for functions that take several. Others start from everything that `fuzz_corpus` has."""


@dataclass
class Target:
    """Something to run cases against. `run(parts, rng)` may raise `RemoteProtocolError` and nothing else."""

    name: str
    run: Callable[[list[bytes], random.Random], object]
    seeds: list[tuple[bytes, ...]]
    generate: Callable[[random.Random], list[bytes]] | None = None
    """Makes well-formed cases; used for a quarter of them."""
    splice: list[bytes] = field(default_factory=list)

    def case(self, rng: random.Random) -> list[bytes]:
        seed: Sequence[bytes] = rng.choice(self.seeds)
        if self.generate is not None and rng.random() < 0.25:
            seed = self.generate(rng)
            if rng.random() < 0.5:
                return list(seed)
        return mutate(seed, self.splice or corpus.everything(), rng)


# -- looking ----------------------------------------------------------------------------------------------------------
def _modules() -> Iterator[types.ModuleType]:
    for info in pkgutil.walk_packages(lattica_protocols.__path__, "lattica_protocols."):
        yield importlib.import_module(info.name)
    for name in FURTHER_MODULES:
        yield importlib.import_module(name)


def _classes() -> list[type]:
    return [
        value
        for module in _modules()
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and not getattr(value, "_is_protocol", False)
    ]


def _plain_function(value: Any) -> types.FunctionType | None:
    """The function behind `value` when it is one, or a class method, or a cached one."""
    value = inspect.unwrap(getattr(value, "__func__", value))
    return value if isinstance(value, types.FunctionType) else None


def untrusted_functions() -> dict[str, tuple[types.FunctionType, type | None]]:
    """Every function and method that says it parses bytes from the network, by its full name."""
    found: dict[str, tuple[types.FunctionType, type | None]] = {}
    owners: list[tuple[object, type | None]] = [(module, None) for module in _modules()]
    owners += [(cls, cls) for cls in _classes()]
    for owner, cls in owners:
        module_name = owner.__module__ if cls else owner.__name__  # type: ignore[attr-defined]
        for name, value in vars(owner).items():
            function = _plain_function(value) if name.endswith("_untrusted") else None
            if function is not None and function.__module__ == module_name:
                found[f"{module_name}.{function.__qualname__}"] = (function, cls)
    return found


def receiving_classes() -> dict[str, type]:
    """Every class with a public `receive_*` method that takes bytes."""
    found = {}
    for cls in _classes():
        for name, value in vars(cls).items():
            if name.startswith("receive_") and isinstance(value, types.FunctionType):
                hints = _hints(value)
                if any(_takes_bytes(hint) for key, hint in hints.items() if key != "return"):
                    found[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return found


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function)


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _takes_bytes(hint: Any) -> bool:
    return any(member in (bytes, bytearray, memoryview) for member in _members(hint))


# -- calling ----------------------------------------------------------------------------------------------------------
class _CannotMake(Exception):
    """No value for a parameter can be made from its annotation."""


Maker = Callable[[bytes, random.Random], Any]


def _maker(name: str, hint: Any) -> tuple[Maker, bool]:
    """How to make an argument, and whether it uses up a part of the case."""
    members = _members(hint)
    if name in NAMED_VALUES:
        return lambda data, rng: rng.choice(NAMED_VALUES[name]), False
    if _takes_bytes(hint):
        if members == (memoryview,):
            return lambda data, rng: memoryview(bytearray(data)), True
        return lambda data, rng: data, True
    if hint is str:
        return lambda data, rng: data.decode("utf-8", "replace"), True
    if hint == Iterable[bytes]:
        return lambda data, rng: [data] * rng.choice((1, 2, 200)), True
    if hint == Iterable[PeerEntry]:
        return lambda data, rng: KadMessage.decode_untrusted(data).closer_peers, True
    if hint is KadMessage:
        return lambda data, rng: KadMessage.decode_untrusted(data), True
    if hint == x509.Certificate | bytes:
        return lambda data, rng: data, True
    if hint is int and name == "offset":
        return lambda data, rng: rng.choice((0, 0, 1, 5, 1000)), False
    if hint is int:
        return lambda data, rng: rng.choice((0, 1, 5, 8, 20, 64, 255, 65536, 1 << 20)), False
    if hint is float:
        return lambda data, rng: corpus.NOW, False
    if hint is Multihash:
        return lambda data, rng: corpus.HASH, False
    if hint is PeerId:
        return lambda data, rng: rng.choice((corpus.PEER, corpus.OTHER)), False
    if Multiaddr in members:
        return lambda data, rng: rng.choice(corpus.ADDRS), False
    raise _CannotMake(f"{name}: {hint}")


def _makers(function: Callable[..., Any], skip_first: bool) -> list[tuple[Maker, bool]]:
    hints = _hints(function)
    names = list(inspect.signature(function).parameters.values())[int(skip_first) :]
    return [_maker(p.name, hints[p.name]) for p in names if p.default is p.empty or _takes_bytes(hints[p.name])]


def _instance_maker(cls: type) -> tuple[Maker, bool]:
    if cls in INSTANCES:
        factory = INSTANCES[cls]
        return lambda data, rng: factory(data), True
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        return lambda data, rng: cls(), False
    makers = _makers(cls.__init__, skip_first=True)  # type: ignore[misc]
    if any(not uses for _, uses in makers) or len(makers) > 1:
        raise _CannotMake(cls.__name__)
    return lambda data, rng: cls(*(make(data, rng) for make, _ in makers)), bool(makers)


def _function_target(name: str, function: types.FunctionType, cls: type | None) -> Target | None:
    """A target that calls `function` directly; None when its arguments cannot be made."""
    bound = cls is not None and not isinstance(
        inspect.getattr_static(cls, function.__name__), (classmethod, staticmethod)
    )
    try:
        makers = _makers(function, skip_first=cls is not None)
        if bound:
            assert cls is not None
            makers.insert(0, _instance_maker(cls))
    except _CannotMake:
        return None
    if not any(uses for _, uses in makers):
        return None

    def run(parts: list[bytes], rng: random.Random) -> object:
        left = iter(parts)
        made = [make(next(left, b"") if uses else b"", rng) for make, uses in makers]
        if name in LENGTHS:
            made[0] = made[0][: LENGTHS[name]].ljust(LENGTHS[name], b"\x00")
        if bound:
            return getattr(made[0], function.__name__)(*made[1:])
        return getattr(cls, function.__name__)(*made) if cls is not None else function(*made)

    if name in SEEDS:
        seeds = SEEDS[name]()
    else:
        slots = sum(uses for _, uses in makers)
        seeds = [(value,) * slots for value in corpus.everything()]
    return Target(name, run, seeds, _generator(name))


def _generator(name: str) -> Callable[[random.Random], list[bytes]] | None:
    if ".rpc." in name:
        return lambda rng: [corpus.random_msgpack(rng), rng.randbytes(rng.choice((0, 64, 256, 4096)))]
    return None


def _message_target(cls: type[Message]) -> Target:
    return Target(
        f"{cls.__module__}.{cls.__qualname__}.decode_untrusted",
        lambda parts, rng: cls.decode_untrusted(parts[0] if parts else b""),
        [(value,) for value in corpus.everything()],
        lambda rng: [corpus.random_message(cls, rng).encode()],
    )


def all_targets() -> list[Target]:
    """Every public function that can be called, every protobuf message, every driver of a machine."""
    targets = []
    driven = {cls for driver in DRIVERS for cls in driver.covers}
    for name, (function, cls) in sorted(untrusted_functions().items()):
        private = any(part.startswith("_") for part in name.split("."))
        if private or cls is Message or (cls in driven and function.__name__.startswith("receive_")):
            continue
        target = _function_target(name, function, cls)
        if target is not None:
            targets.append(target)
    messages_of_ours = [cls for cls in _classes() if issubclass(cls, Message) and cls is not Message]
    targets += [_message_target(cls) for cls in [*messages_of_ours, corpus.AllKinds]]
    targets += [Target(d.name, d.run, d.seeds(), d.generate, d.parts()) for d in DRIVERS]
    return targets


# -- checking that nothing is left out ----------------------------------------------------------------------------
def unreached(targets: list[Target]) -> list[str]:
    """Functions that no target calls and no valid message reaches, and classes that nobody drives."""
    wanted = untrusted_functions()
    codes = {function.__code__: name for name, (function, _) in wanted.items()}
    seen: set[str] = set()

    def profile(frame: types.FrameType, event: str, _arg: object) -> None:
        if event == "call" and frame.f_code in codes:
            seen.add(codes[frame.f_code])

    sys.setprofile(profile)
    try:
        for target in targets:
            for seed in target.seeds:
                run_case(target, list(seed), random.Random(0))
    finally:
        sys.setprofile(None)
    driven = {cls for driver in DRIVERS for cls in driver.covers}
    missing = sorted(wanted.keys() - seen)
    return missing + sorted(name for name, cls in receiving_classes().items() if cls not in driven)


def run_case(target: Target, parts: list[bytes], rng: random.Random) -> bool:
    """Whether the case was accepted. Anything but success and `RemoteProtocolError` comes out of here."""
    refusal = None
    try:
        target.run(parts, rng)
    except RemoteProtocolError as error:
        refusal = str(error)
    if refusal is None:
        return True
    assert "\n" not in refusal, "an error is one line"
    assert len(refusal) < 5000, "an error repeats what the peer sent at length"
    return False
