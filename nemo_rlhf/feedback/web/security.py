"""What stands between the page and the net: headers, size limits, sessions, tokens against forged forms, throttling.

Whoever cannot show an account's session gets the sign-in form and nothing else. A form is taken only with the token of
the session that it was made for, so no other site can send one in an annotator's name.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections import OrderedDict
from functools import partial
from typing import Annotated, Any

from fastapi import Form, HTTPException, Request
from starlette.middleware.sessions import SessionMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 64 * 1024  # bytes of a request
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_https = scope.get("scheme") in ("https", "wss")
        await (self._over_https if is_https else self._over_http)(scope, receive, send)


class Attempts:
    """Counts failed sign-ins by address: ``limit`` of them in ``window_s``, then none is looked at any more."""

    def __init__(self, limit: int = 20, window_s: float = 300.0, max_addresses: int = 10_000) -> None:
        self._limit, self._window_s, self._max_addresses = limit, window_s, max_addresses
        self._failed: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, address: str) -> None:
        """Raises HTTPException (429) once there were too many."""
        with self._lock:
            recent = self._recent(address)
            if len(recent) >= self._limit:
                wait_s = int(recent[0] + self._window_s - time.monotonic()) + 1
                raise HTTPException(
                    429, f"Too many attempts: try again in {wait_s} seconds.", {"Retry-After": str(wait_s)}
                )

    def failed(self, address: str) -> None:
        with self._lock:
            self._failed[address] = [*self._recent(address), time.monotonic()]
            self._failed.move_to_end(address)
            while len(self._failed) > self._max_addresses:
                self._failed.popitem(last=False)

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
