"""The page that shows two answers, and what an annotator says of them. What it calls is committed when it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse

from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.records import MAX_NOTE, Account, Lease
from nemo_rlhf.feedback.web.security import check_form
from nemo_rlhf.feedback.web.site import Here, SignedIn, Site, guidelines_html, say, to
from nemo_rlhf.feedback.web.text import Shown, differences, one_line_ends, shown

router = APIRouter()

_LONG_S = 1e9  # the desk makes of it the time since the task was handed out

Token = Annotated[str, Form(max_length=100)]
Choice = Annotated[Literal["left", "right", "tie", "both_bad"], Form(alias="verdict")]


@dataclass(frozen=True)
class _TaskView:
    """A task as the page shows it."""

    token: str
    step: int
    prompt: Shown
    answers: tuple[Shown, Shown]  # left and right
    same: bool
    comparable: bool  # short enough to mark the differences


@router.get("/")
def compare(request: Request, here: Here, account: SignedIn) -> HTMLResponse:
    """The task that is this annotator's already, or the next one."""
    desk, run = _desk(here, account), here.run()
    lease = desk.next()
    progress = desk.progress()
    return here.page(
        request,
        "compare.html",
        view="compare",
        account=account,
        task=None if lease is None else _view(lease),
        progress=progress,
        agreement=progress.agreed / progress.compared if progress.compared else None,
        guidelines=guidelines_html(run.guidelines),
        can_undo=run.undo_s > 0,
        max_note=MAX_NOTE,
    )


@router.post("/answer", dependencies=[Depends(check_form)])
def answer(
    request: Request,
    here: Here,
    account: SignedIn,
    token: Token,
    choice: Choice,
    seconds: Annotated[str, Form(max_length=20)] = "",
    note: Annotated[str, Form(max_length=2 * MAX_NOTE)] = "",
) -> RedirectResponse:
    try:
        _desk(here, account).answer(token, choice, _seconds(seconds), one_line_ends(note).strip())
    except ValueError as error:
        say(request, str(error), "problem")
    else:
        say(request, "Saved.")
    return to(".")


@router.post("/skip", dependencies=[Depends(check_form)])
def skip(request: Request, here: Here, account: SignedIn, token: Token) -> RedirectResponse:
    try:
        _desk(here, account).skip(token)
    except ValueError as error:
        say(request, str(error), "problem")
    else:
        say(request, "Skipped.")
    return to(".")


@router.post("/undo", dependencies=[Depends(check_form)])
def undo(request: Request, here: Here, account: SignedIn) -> RedirectResponse:
    taken_back, _ = _desk(here, account).undo()
    if taken_back:
        say(request, "Your last answer is taken back.")
    else:
        say(request, f"There is no answer of the last {here.run().undo_s:g} seconds to take back.", "problem")
    return to(".")


def _desk(here: Site, account: Account) -> Desk:
    return Desk(here.store, here.run_id, account.id)


def _view(lease: Lease) -> _TaskView:
    left, right = map(one_line_ends, lease.answers)
    found = differences(left, right)
    spans = found or ([], [])
    return _TaskView(
        token=lease.token,
        step=lease.step,
        prompt=shown(one_line_ends(lease.prompt)),
        answers=(shown(left, spans[0]), shown(right, spans[1])),
        same=left == right,
        comparable=found is not None,
    )


def _seconds(given: str) -> float:
    """Those that the page counted, where it could and they make sense."""
    try:
        seconds = float(given)
    except ValueError:
        return _LONG_S
    return seconds if 0 <= seconds < math.inf else _LONG_S
