"""What stands between the page and the net: headers, size limits, sessions, tokens against forged forms, throttling.

Whoever cannot show an account's session gets the sign-in form and nothing else. A form is taken only with the token of
the session that it was made for, so no other site can send one in an annotator's name.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection
from functools import partial
from typing import Annotated, Any

from fastapi import Form, HTTPException, Request
from itsdangerous import SignatureExpired, TimestampSigner
from starlette.middleware.sessions import SessionMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 64 * 1024  # bytes of a request
BUSY = "Many are at it just now. What was saved is safe: go back and try again in a few seconds."
SESSION_S = 14 * 24 * 3600
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "style-src 'self'",
        "script-src 'self'",
        "img-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_NOT_KEPT = (b"cache-control", b"no-store")
_CSRF_BYTES = 16
_CLOCK_S = 60.0  # that clocks may differ
_ADDRESS_CHARACTERS = 64  # a proxy may say anything


class Headers:
    """Puts the security headers on every answer, those to failures too; only what says so may be kept by browsers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                kept = [] if any(name.lower() == _NOT_KEPT[0] for name, _ in given) else [_NOT_KEPT]
                message["headers"] = [*given, *self._headers, *kept]
            await send(message)

        await self._app(scope, receive, with_headers)


class Hosts:
    """Refuses (421) requests under a name that is not ours: a site of somebody else's that a resolver sent here."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        """``names``: besides addresses and what this machine calls itself."""
        self._app = app
        own = (socket.gethostname(), os.environ.get("SLURMD_NODENAME", ""))
        short = (name.partition(".")[0] for name in own)
        self._names = {name.lower().rstrip(".") for name in (*names, *own, *short, "localhost") if name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [value for name, value in scope["headers"] if name == b"host"]
        if len(given) == 1 and self._is_ours(given[0].decode("latin-1")):
            await self._app(scope, receive, send)
            return
        sentence = "This page is not served under this name: start it with --allow-host NAME.\n"
        await PlainTextResponse(sentence, 421, {**_HEADERS, "Cache-Control": "no-store"})(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name = re.sub(r":[0-9]{1,5}\Z", "", host).lower()
        try:
            ipaddress.ip_address(name.strip("[]").partition("%")[0])
        except ValueError:
            return name.rstrip(".") in self._names
        return True  # no resolver has to do with it


class Crowd:
    """Dependency of every page: refuses (503) what comes while many requests wait for the store, so that nobody who
    comes later is kept waiting, too. A request of which only a part has come is not counted."""

    def __init__(self, most: int = 30) -> None:
        """``most``: fewer than there are threads (40), of which one is needed for a file."""
        self._most, self._num = most, 0

    async def __call__(self) -> AsyncIterator[None]:
        if self._num >= self._most:
            raise HTTPException(503, BUSY, {"Retry-After": "5"})
        self._num += 1
        try:
            yield
        finally:
            self._num -= 1


class BodyLimit:
    """Refuses a request (413) whose body is longer than ``MAX_BODY``, whatever length it announces."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        announced = dict(scope.get("headers", [])).get(b"content-length", b"0")
        num_bytes = int(announced) if announced.isdigit() and len(announced) < 12 else MAX_BODY + 1
        num_read = 0

        async def counted() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if max(num_bytes, num_read) > MAX_BODY:
                # The rest of the body is not read, so the connection cannot be used again.
                raise HTTPException(413, f"A request may have {MAX_BODY // 1024} kB.", {"Connection": "close"})
            return message

        await self._app(scope, counted, send)


class Sessions:
    """Signed cookies that scripts cannot read and other sites cannot cause to be sent; over https, never over http.

    Args:
        secret: signs them; who has it can be anybody.
        cookie: their name. Browsers do not keep the cookies of two ports apart.
    """

    def __init__(self, app: ASGIApp, secret: str, cookie: str) -> None:
        make = partial(
            SessionMiddleware,
            app,
            secret_key=secret,
            session_cookie=cookie,
            max_age=SESSION_S,
            same_site="strict",
        )
        self._over_http, self._over_https = make(), make(https_only=True)
        for sessions in (self._over_http, self._over_https):
            sessions.signer = _Signer(secret)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Whoever says so wrongly gets a cookie that is of no use to them.
        is_https = scope.get("scheme") == "https" or (b"x-forwarded-proto", b"https") in scope["headers"]
        await (self._over_https if is_https else self._over_http)(scope, receive, send)


class _Signer(TimestampSigner):
    """Takes what a clock signed that is ahead of this one: that of another server, or of this one before it was set."""

    def unsign(self, signed_value: Any, max_age: int | None = None, return_timestamp: bool = False) -> Any:
        value, signed_at = super().unsign(signed_value, return_timestamp=True)
        age = time.time() - signed_at.timestamp()
        if max_age is not None and not -_CLOCK_S <= age <= max_age:
            raise SignatureExpired(f"Signed {age:.0f} s ago.", payload=value, date_signed=signed_at)
        return (value, signed_at) if return_timestamp else value


class Attempts:
    """Counts failed sign-ins by address: ``limit`` of them in ``window_s``, then none is looked at any more."""

    def __init__(self, limit: int = 20, window_s: float = 300.0, max_addresses: int = 10_000) -> None:
        self._limit, self._window_s, self._max_addresses = limit, window_s, max_addresses
        self._failed: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, address: str) -> None:
        """Count an attempt, before it is looked at. Raises HTTPException (429) once there were too many."""
        address = address[:_ADDRESS_CHARACTERS]
        with self._lock:
            recent = self._recent(address)
            if len(recent) >= self._limit:
                wait_s = int(recent[0] + self._window_s - time.monotonic()) + 1
                raise HTTPException(
                    429, f"Too many attempts: try again in {wait_s} seconds.", {"Retry-After": str(wait_s)}
                )
            self._failed[address] = [*recent, time.monotonic()]
            self._failed.move_to_end(address)
            while len(self._failed) > self._max_addresses:
                self._failed.popitem(last=False)

    def succeeded(self, address: str) -> None:
        """The last attempt was none to be counted."""
        with self._lock:
            if recent := self._failed.get(address[:_ADDRESS_CHARACTERS]):
                recent.pop()

    def _recent(self, address: str) -> list[float]:
        begin = time.monotonic() - self._window_s
        return [at for at in self._failed.get(address, []) if at > begin]


def csrf_token(session: dict[str, Any]) -> str:
    """For a form of this session; another one each time, so that compressed pages do not give it away."""
    secret = bytes.fromhex(session.setdefault("csrf", secrets.token_hex(_CSRF_BYTES)))
    mask = secrets.token_bytes(_CSRF_BYTES)
    return (mask + _xor(mask, secret)).hex()


def check_form(request: Request, csrf: Annotated[str, Form()] = "") -> None:
    """Dependency of everything that changes something.

    Raises:
        HTTPException: 403, the form is not one of this session.
    """
    # Browsers say where a form came from; other clients do not, and have no session to abuse.
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "This form came from another site.")
    try:
        given = bytes.fromhex(csrf)
    except ValueError:
        given = b""
    expected = bytes.fromhex(request.session.get("csrf", ""))
    mask, masked = given[:_CSRF_BYTES], given[_CSRF_BYTES:]
    if len(expected) != _CSRF_BYTES or len(masked) != _CSRF_BYTES:
        raise HTTPException(403, "This form is out of date: go back, reload the page and try again.")
    if not hmac.compare_digest(_xor(mask, masked), expected):
        raise HTTPException(403, "This form is out of date: go back, reload the page and try again.")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
