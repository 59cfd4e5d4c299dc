"""The comparison page as one ASGI application: routes, what stands before them, and how mistakes are shown."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from sqlalchemy.exc import OperationalError, TimeoutError
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp

from nemo_rlhf.feedback.store import Store
from nemo_rlhf.feedback.web import pages_account, pages_admin, pages_compare
from nemo_rlhf.feedback.web.security import BUSY, BodyLimit, Crowd, Headers, Sessions
from nemo_rlhf.feedback.web.site import HERE, Site, site, to

_HEADINGS = {
    401: "Sign in",
    403: "Not allowed",
    404: "There is nothing here",
    405: "There is nothing here",
    413: "Too large",
    429: "Too many attempts",
    503: "Busy",
}


def make_app(store: Store, run_id: int, secret: str) -> ASGIApp:
    """The pages of one run. ``secret`` signs the sessions: with another one everybody has to sign in again."""
    # A redirect to the address with or without a slash would be an absolute one, under whatever name was asked for.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.site = Site(store, run_id)
    crowd = Depends(Crowd())
    for pages in (pages_account, pages_compare, pages_admin):
        app.include_router(pages.router, dependencies=[crowd])
    app.mount("/static", _Static(directory=HERE / "static"))
    app.add_middleware(Sessions, secret=secret, cookie=f"feedback_{_short(app.state.site.run_name)}")
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)
    app.add_middleware(BodyLimit)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _incomplete)
    app.add_exception_handler(OperationalError, _unavailable)
    app.add_exception_handler(TimeoutError, _unavailable)
    app.add_exception_handler(Exception, _failed)
    return Headers(app)


class _Static(StaticFiles):
    """Files whose address changes with what is in them."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        if isinstance(response, FileResponse):
            response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 401 and request.method == "GET":
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            # Whoever follows a link from elsewhere comes without the cookie, signed in or not.
            return site(request).message(request, 200, "One moment", "You come from another site.", go_on=True)
        return to("sign-in")
    heading = _HEADINGS.get(error.status_code, "Refused")
    sentence = error.detail if error.status_code not in (404, 405) else "This address leads nowhere."
    response = site(request).message(request, error.status_code, heading, sentence)
    response.headers.update(error.headers or {})
    return response


def _incomplete(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fields = ", ".join(sorted({str(found["loc"][-1]) for found in error.errors()}))
    return site(request).message(request, 422, "Not understood", f"This form cannot be read: look at {fields}.")


def _unavailable(request: Request, error: Exception) -> Response:
    """The store is locked for longer than one waits, or does not answer."""
    reason = " ".join(str(getattr(error, "orig", error)).split())
    print(f"nemo-rlhf: the store did not answer a request: {reason}", file=sys.stderr, flush=True)
    return _refused(request, HTTPException(503, BUSY, {"Retry-After": "5"}))


def _failed(request: Request, error: Exception) -> Response:
    return site(request).message(
        request, 500, "Something failed", "The server's log says what. What was saved is safe."
    )


def _short(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]
