"""Connections of ``nemo-rlhf serve-reward``, bounded in number and time, and requests that say one thing only.

Whoever reaches the port may open connections and send halves of requests. None of that may keep out those who have the
token; and no request may be read in two ways, one by a proxy and another by this server.
"""

from __future__ import annotations

import resource
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REQUEST_S = 10.0  # in which a stranger's request must have come
BODY_S = 60.0  # and a second a MiB, in which the body of a request must have come that shows the token
IDLE_S = 120.0  # that a connection may stay open between requests, once one was answered
_LINGER_S = 2.0  # for the rest of a request that was refused: who is still sending would not see the answer
_MOST, _FEWEST, _OTHER_FILES = 1024, 16, 128
_PIECE = 1 << 16  # bytes


@dataclass
class _Wait:
    """For a request, or for the rest of one."""

    is_known: bool  # one was answered on this connection before
    since: float
    until: float


class BoundedServer(ThreadingHTTPServer):
    """A thread a connection, and where there are too many, that connection ends whose request is awaited longest."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler, bind_and_activate=False)
        self.most = max(_FEWEST, min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FILES))
        self._open: set[Any] = set()
        self._waits: dict[Any, _Wait] = {}
        self._lock = threading.Lock()

    def expect(self, connection: Any, limit_s: float, *, is_known: bool = False) -> None:
        """A request, or the rest of one, must have come in this time, or the connection ends."""
        now = time.monotonic()
        with self._lock:
            if connection in self._open:
                self._waits[connection] = _Wait(is_known, now, now + limit_s)

    def expect_nothing(self, connection: Any) -> None:
        """The request is there; answering may take as long as it takes."""
        with self._lock:
            self._waits.pop(connection, None)

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError:  # no descriptor is left: it would be tried again at once, and again
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            is_full = len(self._open) >= self.most
            if is_full and self._waits:
                self._end(min(self._waits, key=lambda one: (self._waits[one].is_known, self._waits[one].since)))
                is_full = False
            if not is_full:
                self._open.add(request)
        if is_full:
            self.shutdown_request(request)
            return
        self.expect(request, REQUEST_S)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
            self._waits.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called several times a second."""
        now = time.monotonic()
        with self._lock:
            for connection in [one for one, wait in self._waits.items() if wait.until < now]:
                self._end(connection)

    def _end(self, connection: Any) -> None:
        """Its thread finds the end of the connection, and closes it."""
        self._open.discard(connection)
        self._waits.pop(connection, None)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class BoundedHandler(BaseHTTPRequestHandler):
    """Reads requests in bounded time, and knows which of them are ambiguous."""

    server: BoundedServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    is_known = False  # a request on this connection was answered well

    def setup(self) -> None:
        super().setup()
        self.rfile = _Lines(self.rfile)  # type: ignore[assignment]

    def handle_one_request(self) -> None:
        limit_s = IDLE_S if self.is_known else REQUEST_S
        self.server.expect(self.connection, limit_s, is_known=self.is_known)
        super().handle_one_request()

    def what_is_ambiguous(self) -> str | None:
        """Of the request: what another program might read in another way; None: nothing."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers:
            return "a Transfer-Encoding, which this server does not know"
        if len(lengths) > 1:
            return "several Content-Length"
        if self.headers.defects or self.rfile.are_odd:  # type: ignore[attr-defined]
            return "a line in its head that is no header"
        if self.command != "POST" and lengths not in ([], ["0"]):
            return f"a body, which {self.command} has not"
        return None

    def linger(self) -> None:
        """After the last answer: wait a moment for the rest of what the client sends, and drop it."""
        self.server.expect(self.connection, _LINGER_S)
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(_PIECE):
                pass

    def log_message(self, *args: Any) -> None:
        """A line a request would hide what matters."""


class _Lines:
    """A stream that notes lines with characters at which others may see the end of a line, or of the text."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.are_odd = False

    def readline(self, limit: int = -1) -> bytes:
        line: bytes = self._stream.readline(limit)
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        self.are_odd |= b"\r" in text or b"\0" in text
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
