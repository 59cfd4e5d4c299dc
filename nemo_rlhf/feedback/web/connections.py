"""Connections of the page, bounded: whoever opens many, or sends half a request, keeps nobody else from it."""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

REQUEST_S = 10.0  # in which a whole request must have come, from the connection's beginning or the last answer on
ANSWER_S = 180.0  # in which the answer must have been taken; the store itself may wait for a minute
BACKLOG = 64  # connections that are accepted at once, before any of them can be refused
_MOST, _FEWEST = 256, 16
_OTHER_FILES = 96  # those of the store, above all
_QUIET_S = 60.0  # between two lines on the same trouble


def most_connections() -> int:
    """How many can be open at a time, so that descriptors are left for the store."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(_FEWEST, min(_MOST, files - BACKLOG - _OTHER_FILES))


class Connection(H11Protocol):
    """One of at most ``most_connections``: where there are more, that one ends which is without a request longest."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._most = most_connections()
        self._since = time.monotonic()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            waiting = [one for one in self.connections if isinstance(one, Connection) and one.is_without_request]
            min(waiting, key=lambda one: one._since).end()  # this one is among them

    def on_response_complete(self) -> None:
        self._since = time.monotonic()
        super().on_response_complete()

    @property
    def is_without_request(self) -> bool:
        """Whether no request has come, or only a part of one."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def end_if_late(self) -> None:
        limit = REQUEST_S if self.is_without_request else ANSWER_S
        if time.monotonic() - self._since > limit:
            self.end()

    def end(self) -> None:
        self.connections.discard(self)  # at once; it is told of its end in a later round of the loop
        self.transport.abort()


def quieten(loop: asyncio.AbstractEventLoop) -> None:
    """Of a flood of connections that this process has no descriptors for, the log gets a line a minute."""
    said = -_QUIET_S

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said
        if not isinstance(context.get("exception"), OSError) or "accept" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif time.monotonic() - said >= _QUIET_S:
            said = time.monotonic()
            print(f"nemo-rlhf: connections are refused ({context['exception'].strerror}).", file=sys.stderr, flush=True)

    loop.set_exception_handler(handle)
