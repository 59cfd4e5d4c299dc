"""Signs of life between ranks, and where each of them is.

A collective over a network that was cut, or with a node that lost its power, waits until its time-out, which must be
long: another rank may rightly take half an hour over its rewards. So every rank also tells rank 0 from a thread of its
own that it is there, and in which phase of which step. Whoever is silent for too long is named, and the job ends.
"""

from __future__ import annotations

import faulthandler
import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch.distributed as dist

from nemo_rlhf.parallel.meeting import is_loopback
from nemo_rlhf.untrusted import parse_json

_KEY = "nemo_rlhf/watch"
_MAX_BEAT_S = 10.0
_TOKEN_BYTES = 32  # in front of every datagram: hexadecimal digits
_LOOK_S = 0.5  # how long the thread of rank 0 sleeps at most
_EXIT_FAILED = 1

_rank = 0
_step = 0
_phase = "start"
_watch: _Watch | None = None


def enter(phase: str) -> None:
    """From here on this rank is in ``phase``: rollout, update, saving ..."""
    global _phase
    _phase = phase
    if _watch is not None:
        _watch.wake.set()


def enter_step(step: int) -> None:
    """From here on this rank does ``step``, which counts from 1."""
    global _step
    _step = step


def where() -> str:
    """Step and phase, for people."""
    return f"step {_step}, {_phase}" if _step else _phase


def start(silence_s: float) -> None:
    """Watch the ranks of torch.distributed, which is initialised, until ``stop``; all ranks call it.

    A rank of which rank 0 hears nothing for ``silence_s`` seconds, once it has been heard, is named on stderr, and rank
    0 ends with exit code 1, as does a rank to which rank 0 no longer answers. An exception that nobody catches names
    rank and phase below its traceback, and a crash in a library shows where Python was.
    """
    global _watch, _rank, _step
    stop()
    if dist.get_world_size() == 1:
        return
    _rank, _step = dist.get_rank(), 0
    enter("start")
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)  # sys.stderr may be no file, in a notebook, say
    sys.excepthook = _tell_where
    _watch = _Leader(silence_s) if _rank == 0 else _Follower(silence_s)
    _watch.start()


def stop() -> None:
    """No more watching: the ranks are about to part."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _tell_where(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    print(f"nemo-rlhf: rank {_rank} on {_node()} failed in {where()}.", file=sys.stderr, flush=True)


def _end_job(sentence: str) -> None:
    print(f"nemo-rlhf: {sentence} The job ends.", file=sys.stderr, flush=True)
    os._exit(_EXIT_FAILED)  # the main thread may hang in a collective for long


class _Watch:
    """A thread with a socket. Datagrams, so that nothing ever waits for a network that is gone."""

    def __init__(self, silence_s: float) -> None:
        self.silence_s = silence_s
        self.beat_s = min(_MAX_BEAT_S, silence_s / 6)
        self._stopped = False
        self.wake = threading.Event()  # there is something to tell

    def start(self) -> None:
        threading.Thread(target=self._run, name="nemo_rlhf.watch", daemon=True).start()

    def stop(self) -> None:
        self._stopped = True
        self.wake.set()

    def _run(self) -> None:
        raise NotImplementedError


class _Leader(_Watch):
    def __init__(self, silence_s: float) -> None:
        super().__init__(silence_s)
        self._socket = _listening()
        self._socket.settimeout(min(_LOOK_S, self.beat_s))
        token = secrets.token_hex(_TOKEN_BYTES // 2)
        self._token = token.encode()
        self._heard: dict[int, tuple[float, str, str]] = {}  # when, on which node, where it was
        _store().set(_KEY, json.dumps({"port": self._socket.getsockname()[1], "token": token}))

    def _run(self) -> None:
        with self._socket:
            last_look = time.monotonic()
            while not self._stopped:
                self._hear()
                now = time.monotonic()
                if now - last_look > self.silence_s / 2:
                    # This process itself stood still, and the signs of the others still wait to be read.
                    self._heard = {rank: (now, node, place) for rank, (_, node, place) in self._heard.items()}
                last_look = now
                silent = [rank for rank, (heard, *_) in self._heard.items() if now - heard > self.silence_s]
                if silent and not self._stopped:
                    self._name(silent)

    def _hear(self) -> None:
        """One sign of life. Anybody on the network may send datagrams: what does not begin with the token is not even
        read, and nothing that is in one ends the thread."""
        try:
            data, sender = self._socket.recvfrom(4096)
        except OSError:  # nothing came in time, or what was sent before could not go out
            return
        if not hmac.compare_digest(data[:_TOKEN_BYTES], self._token):
            return
        try:
            said = parse_json(data[_TOKEN_BYTES:], "a sign of life")
            rank, node, place = int(said["rank"]), str(said["node"]), said["where"]
        except Exception:  # whatever it holds is no sign of life
            return
        if place is None:
            self._heard.pop(rank, None)  # it has said good-bye
            return
        self._heard[rank] = (time.monotonic(), node, str(place))
        with suppress(OSError):  # the way back may be gone
            self._socket.sendto(b"heard", sender)

    def _name(self, silent: list[int]) -> None:
        nodes = dict.fromkeys(self._heard[rank][1] for rank in silent)
        ranks = ", ".join(map(str, sorted(silent)))
        last = self._heard[silent[0]][2]
        _end_job(
            f"no sign of life from rank {ranks} on {', '.join(nodes)} for {self.silence_s:g} s, last in {last}; "
            f"rank 0 on {_node()} is in {where()}."
        )


class _Follower(_Watch):
    def __init__(self, silence_s: float) -> None:
        super().__init__(silence_s)
        self._place: dict[str, Any] = json.loads(_store().get(_KEY))

    def _run(self) -> None:
        family, address = _address(self._place["port"])
        with socket.socket(family, socket.SOCK_DGRAM) as peer:
            peer.settimeout(self.beat_s)
            peer.connect(address)
            answered: float | None = None  # a network that carries no datagrams is no reason to end a job
            while not self._stopped:
                begun = time.monotonic()
                if self._beat(peer):
                    answered = time.monotonic()
                elif answered is not None and time.monotonic() - answered > self.silence_s + self.beat_s:
                    _end_job(
                        f"rank {_rank} on {_node()}, in {where()}, has no answer from rank 0 for {self.silence_s:g} s."
                    )
                self.wake.wait(max(0.0, begun + self.beat_s - time.monotonic()))
                self.wake.clear()
            with suppress(OSError):
                peer.send(self._sign(None))

    def _beat(self, peer: socket.socket) -> bool:
        try:
            peer.send(self._sign(where()))
            return peer.recv(16) == b"heard"
        except OSError:  # no answer in time, or no way
            return False

    def _sign(self, place: str | None) -> bytes:
        said = json.dumps({"rank": _rank, "node": _node(), "where": place})
        return f"{self._place['token']}{said}".encode()


def _address(port: int) -> tuple[socket.AddressFamily, Any]:
    """Of the node where rank 0 is."""
    found = socket.getaddrinfo(os.environ["MASTER_ADDR"], port, type=socket.SOCK_DGRAM)[0]
    return found[0], found[4]


def _listening() -> socket.socket:
    """A socket at the address by which the others know rank 0, and at no other where that can be."""
    family, address = _address(0)
    listener = socket.socket(family, socket.SOCK_DGRAM)
    # A node may know its own name as an address of loopback, by which the others do not find it.
    if is_loopback(os.environ["MASTER_ADDR"]) or not is_loopback(address[0]):
        with suppress(OSError):  # an address that the network translates is none of this node's
            listener.bind(address)
            return listener
    listener.bind(("", 0))
    return listener


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
