"""How ranks find each other, and signs of life between them: whatever strangers send, rank 0 goes on listening."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_rlhf.parallel import meeting, watch
from tests.spawn import run_distributed


class Kept(dict[str, str]):
    set = dict.__setitem__
    get = dict.__getitem__  # type: ignore[assignment]


@pytest.fixture
def leader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Rank 0, listening, and the store in which it has put its port and token."""
    store = Kept()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(watch, "_store", lambda: store)
    leader = watch._Leader(30.0)
    leader.start()
    yield leader
    leader.stop()


def test_no_datagram_ends_the_thread_of_rank_0(leader: watch._Leader) -> None:
    follower = watch._Follower(30.0)
    token = follower._place["token"].encode()
    strangers = [b"", b"[" * 4000, b"\xff" * 60, os.urandom(4000), token[:-1], token[::-1] + b"{}", b"0" * 32 + b"{}"]
    bodies = [b"", b"[" * 4000, b"\xff", b"7", b"[1]", b"{}", b'{"rank": 1}', b'{"rank": [], "node": 1, "where": 2}',
              b'{"rank": ' + b"9" * 4000 + b"}", b'{"rank": NaN, "node": "", "where": ""}']  # fmt: skip
    bodies += [json.dumps({"rank": "x", "node": None, "where": {}}).encode(), b'{"rank": 1e999, "node": 1, "where": 1}']
    family, address = watch._address(follower._place["port"])
    with socket.socket(family, socket.SOCK_DGRAM) as peer:
        peer.settimeout(20)
        peer.connect(address)
        for data in (*strangers, *(token + body for body in bodies)):
            peer.send(data)
        assert follower._beat(peer)  # the first answer: none of those before got one
        assert list(leader._heard) == [0]
        peer.send(follower._sign(None))  # good-bye
        peer.send(token + json.dumps({"rank": 3, "node": "n3", "where": "rollout"}).encode())
        assert peer.recv(16) == b"heard" and list(leader._heard) == [3]


def test_rank_0_listens_where_the_others_look_for_it(leader: watch._Leader, monkeypatch: pytest.MonkeyPatch) -> None:
    assert leader._socket.getsockname()[0] == "127.0.0.1"

    def bound(name: str, address: str) -> str:
        monkeypatch.setenv("MASTER_ADDR", name)
        known = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (address, 0))]
        monkeypatch.setattr(watch.socket, "getaddrinfo", lambda *args, **keywords: known)
        with watch._listening() as listener:
            return str(listener.getsockname()[0])

    assert bound("localhost", "127.0.0.1") == "127.0.0.1"
    assert bound("node7", "127.0.0.1") == "0.0.0.0"  # others know it by another address
    assert bound("node7", "192.0.2.7") == "0.0.0.0"  # which is none of this machine's


def test_ranks_of_one_machine_meet_where_no_other_reaches_them() -> None:
    for world_size, store in ((1, "HashStore"), (2, "TCPStore")):
        for kind, *addresses in run_distributed("tests.workers.state_worker:addresses", world_size, {}, timeout_s=120):
            assert kind == store and {"::", "0.0.0.0"}.isdisjoint(addresses)


def test_what_loopback_is_to_every_machine() -> None:
    assert all(map(meeting.is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "localhost")))
    assert not any(
        map(meeting.is_loopback, ("node7", "10.0.0.1", "0.0.0.0", "::", "fe80::1%eth0", "", "127.0.0.1.org"))
    )
