"""Signing in with an invitation code, and out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from nemo_rlhf.feedback import accounts
from nemo_rlhf.feedback.web.security import check_form
from nemo_rlhf.feedback.web.site import Here, say, session_account, to

router = APIRouter()


@router.get("/sign-in")
def form(request: Request, here: Here) -> HTMLResponse:
    return here.page(request, "sign_in.html")


@router.post("/sign-in", dependencies=[Depends(check_form)])
def sign_in(request: Request, here: Here, code: Annotated[str, Form(max_length=200)]) -> Response:
    """The code is in the body, so that no log of addresses holds it."""
    address = request.client.host if request.client else ""
    here.attempts.begin(address)
    account = accounts.sign_in(here.store, here.run_id, code.strip())
    if account is None:
        say(request, "Nobody was invited with this code, or the invitation has ended.", "problem")
        return here.page(request, "sign_in.html", status=401)
    here.attempts.succeeded(address)
    request.session.clear()
    request.session.update(annotator=account.id, token_id=account.token_id)
    return to(".")


@router.post("/sign-out", dependencies=[Depends(check_form)])
def sign_out(request: Request, here: Here) -> RedirectResponse:
    if account := session_account(request, here):
        accounts.sign_out(here.store, account)
    request.session.clear()
    return to("sign-in")
