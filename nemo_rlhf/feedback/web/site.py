"""What every page needs: the store and its run, templates, and who is asking."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from nemo_rlhf.feedback import accounts
from nemo_rlhf.feedback.records import Account, RunInfo
from nemo_rlhf.feedback.store import Store
from nemo_rlhf.feedback.web.security import Attempts, csrf_token

HERE = Path(__file__).parent
_DEPTH = 8  # of addresses that find their way back from nowhere


class Site:
    """One run of one store, as pages."""

    def __init__(self, store: Store, run_id: int) -> None:
        self.store, self.run_id = store, run_id
        self.run_name = self.run().name
        self.attempts = Attempts()
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        # browsers keep style and script until these change
        static = b"".join(path.read_bytes() for path in sorted((HERE / "static").iterdir()))
        self._templates.globals.update(
            run_name=self.run_name,
            run_title=PurePath(self.run_name).name or self.run_name,
            version=hashlib.sha256(static).hexdigest()[:12],
        )

    def run(self) -> RunInfo:
        return self.store.info(self.run_id)

    def page(self, request: Request, template: str, *, status: int = 200, **context: Any) -> HTMLResponse:
        """A page for whoever asks; it shows what ``say`` has left for it."""
        context = {"account": None, "view": "", "root": "", "flash": request.session.pop("flash", None), **context}
        html = self._templates.get_template(template).render(csrf=csrf_token(request.session), **context)
        return HTMLResponse(html, status)

    def message(
        self, request: Request, status: int, heading: str, sentence: str, *, go_on: bool = False
    ) -> HTMLResponse:
        """A page that touches neither session nor store: something was refused or failed; or ``go_on`` to the first."""
        html = self._templates.get_template("message.html").render(
            account=None,
            view="",
            root="../" * min(request.url.path.count("/") - 1, _DEPTH),
            flash=None,
            csrf="",
            heading=heading,
            sentence=sentence,
            go_on=go_on,
        )
        return HTMLResponse(html, status)


def site(request: Request) -> Site:
    found = request.app.state.site
    assert isinstance(found, Site)
    return found


def signed_in(request: Request, here: Annotated[Site, Depends(site)]) -> Account:
    """Dependency of everything but the sign-in form.

    Raises:
        HTTPException: 401, nobody is signed in, or no longer.
    """
    account = session_account(request, here)
    if account is None:
        raise HTTPException(401, "Sign in first.")
    return account


def session_account(request: Request, here: Site) -> Account | None:
    """Whose session this is; None: nobody's, or that of one whose access has ended or who has signed out."""
    annotator_id, token_id = request.session.get("annotator"), request.session.get("token_id")
    if annotator_id is None or token_id is None:
        return None
    return accounts.signed_in(here.store, here.run_id, annotator_id, token_id)


def signed_in_admin(account: Annotated[Account, Depends(signed_in)]) -> Account:
    """Dependency of what only admins may see. Raises HTTPException: 401 as above, 403 for everybody else."""
    if not account.is_admin:
        raise HTTPException(403, "This page is for those who were invited as admins.")
    return account


def say(request: Request, text: str, kind: str = "done") -> None:
    """Leave a sentence for the next page; ``kind``: "done" or "problem"."""
    request.session["flash"] = {"text": text, "kind": kind}


def to(page: str) -> RedirectResponse:
    """On to another page. Relative, as all addresses here, so that a proxy may put the site anywhere."""
    return RedirectResponse(page, status_code=303)


@lru_cache(maxsize=8)
def guidelines_html(text: str) -> Markup:
    """Markdown without raw HTML and without images, which would be fetched from elsewhere."""
    return Markup(MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(text))


Here = Annotated[Site, Depends(site)]
SignedIn = Annotated[Account, Depends(signed_in)]
Admin = Annotated[Account, Depends(signed_in_admin)]
