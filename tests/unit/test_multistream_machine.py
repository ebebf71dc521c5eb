"""multistream-select: both machines with each other, and with peers that break the rules."""

import pytest

from lattica_protocols.errors import LocalProtocolError, RemoteProtocolError
from lattica_protocols.multistream import Initiator, Responder, encode_message

HEADER = bytes.fromhex("13") + b"/multistream/1.0.0\n"


def exchange(initiator: Initiator, responder: Responder, size: int = 1000) -> None:
    """Carry bytes back and forth in pieces of `size` until nobody has any."""
    while True:
        there, back = initiator.poll_transmit(), responder.poll_transmit()
        if not there and not back:
            return
        for start in range(0, len(there), size):
            responder.receive_data(there[start : start + size])
        for start in range(0, len(back), size):
            initiator.receive_data(back[start : start + size])


def test_bytes_on_the_wire() -> None:
    assert encode_message("/multistream/1.0.0") == HEADER
    initiator, responder = Initiator(["/echo/1.0.0"]), Responder({"/echo/1.0.0"})
    proposal = initiator.poll_transmit()
    assert proposal == HEADER + b"\x0c/echo/1.0.0\n"
    assert initiator.poll_transmit() == b""
    responder.receive_data(proposal)
    assert responder.selected == "/echo/1.0.0"
    assert responder.poll_transmit() == proposal
    assert responder.poll_transmit() == b""


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("proposed", "supported", "selected"),
    [
        (["/a"], {"/a"}, "/a"),
        (["/a", "/b", "/c"], {"/c", "/b"}, "/b"),
        (["/a", "/b"], {"/c"}, None),
        (["/" + "x" * 200], {"/" + "x" * 200}, "/" + "x" * 200),
    ],
)
def test_selection(proposed: list[str], supported: set[str], selected: str | None, size: int) -> None:
    initiator, responder = Initiator(proposed), Responder(supported)
    exchange(initiator, responder, size)
    assert initiator.selected == responder.selected == selected
    assert initiator.confirmed == (selected is not None)
    assert initiator.failed == (selected is None)
    if selected is not None:
        assert initiator.take_leftover() == responder.take_leftover() == b""


def test_predicate() -> None:
    initiator, responder = Initiator(["/b/2", "/a/7"]), Responder(lambda name: name.startswith("/a/"))
    exchange(initiator, responder)
    assert initiator.selected == "/a/7"


def test_lazy_initiator_sends_data_along() -> None:
    initiator, responder = Initiator(["/a"], lazy=True), Responder({"/a"})
    assert initiator.selected == "/a"
    assert not initiator.confirmed
    responder.receive_data(initiator.poll_transmit() + b"request")
    assert responder.selected == "/a"
    assert not responder.peer_waits
    assert responder.take_leftover() == b"request"
    with pytest.raises(LocalProtocolError):
        initiator.take_leftover()
    initiator.receive_data(responder.poll_transmit() + b"answer")
    assert initiator.confirmed
    assert initiator.take_leftover() == b"answer"


def test_lazy_initiator_is_refused() -> None:
    initiator, responder = Initiator(["/a"], lazy=True), Responder({"/b"})
    responder.receive_data(initiator.poll_transmit())
    initiator.receive_data(responder.poll_transmit())
    assert initiator.failed
    assert initiator.selected is None


def test_patient_initiator_waits() -> None:
    responder = Responder({"/a"})
    responder.receive_data(Initiator(["/a"]).poll_transmit())
    assert responder.peer_waits


def test_list() -> None:
    responder = Responder({"/b", "/a"})
    responder.receive_data(HEADER + encode_message("ls") + encode_message("/a"))
    assert responder.poll_transmit() == HEADER + b"\x09\x03/a\n\x03/b\n\n" + b"\x03/a\n"
    silent = Responder(lambda name: True)
    silent.receive_data(HEADER + encode_message("ls"))
    assert silent.poll_transmit() == HEADER + b"\x01\n"
    told = Responder(lambda name: True, listed=["/x"])
    told.receive_data(HEADER + encode_message("ls"))
    assert told.poll_transmit() == HEADER + b"\x05\x03/x\n\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x05GET /", "newline"),
        (b"GET / HTTP/1.1\r\n" * 10, "newline"),
        (encode_message("/multistream/2.0.0"), "does not speak"),
        (b"\x00", "empty"),
        (b"\x81\x08", "over 1024"),
        (b"\xff\xff", "over 1024"),
        (b"\x81\x00", "not minimal"),
        (b"\x02\xff\n", "UTF-8"),
    ],
)
def test_both_sides_refuse_garbage(data: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        Responder({"/a"}).receive_data(data)
    with pytest.raises(RemoteProtocolError, match=reason):
        Initiator(["/a"]).receive_data(data)


def test_initiator_refuses_another_answer() -> None:
    with pytest.raises(RemoteProtocolError, match="answered '/b' when asked for '/a'"):
        Initiator(["/a"]).receive_data(HEADER + encode_message("/b"))


def test_too_many_proposals() -> None:
    responder = Responder({"/a"})
    responder.receive_data(HEADER + encode_message("/b") * 20)
    with pytest.raises(RemoteProtocolError, match="over 20"):
        responder.receive_data(encode_message("/a"))


def test_na_is_not_a_protocol() -> None:
    responder = Responder(lambda name: True)
    responder.receive_data(HEADER + encode_message("na"))
    assert responder.selected is None


def test_our_own_mistakes() -> None:
    for make in (
        lambda: Initiator([]),
        lambda: Initiator(["/a", "/b"], lazy=True),
        lambda: Initiator(["/a\n"]),
        lambda: Initiator(["/" + "a" * 1024]),
        lambda: Responder({"/a"}).take_leftover(),
    ):
        with pytest.raises(LocalProtocolError):
            make()
